"""Logits that are computed when read: what may be asked of them unread, and what reading them gives."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.fx import Graph, GraphModule
from torch.utils.checkpoint import checkpoint

import rewriter
from rewriter.deferred import DeferredTensor, deferred, split_deferred
from tests.doubled import Doubled
from tests.families import batch, build

VOCABULARY, HIDDEN = 7, 4


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model(x, weight, target):
    hidden = x * 2.0
    logits = F.linear(hidden, weight)
    return F.cross_entropy(logits.float().view(-1, VOCABULARY), target.view(-1)), logits


def operands(dtype=torch.float32, grad=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, HIDDEN, generator=generator).to(dtype).requires_grad_(grad)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator).to(dtype).requires_grad_(grad)
    return x, weight, torch.randint(0, VOCABULARY, (2, 3), generator=generator)


def compiled(function, **options):
    return torch.compile(function, backend="rewriter", options={"lowering": "eager"}, **options)


def is_unread(tensor):
    return type(tensor) is DeferredTensor and tensor._value.result is None


@pytest.fixture
def pair():
    """Deferred logits and eager's, and the operands of both."""
    inputs = operands()
    logits = compiled(model)(*inputs)[1]
    assert is_unread(logits)
    return logits, model(*inputs)[1], inputs


def test_questions_about_metadata_compute_nothing(pair):
    logits, eager, _ = pair
    assert logits.shape == eager.shape and logits.size(-1) == VOCABULARY and len(logits) == 2
    assert logits.dtype == eager.dtype and logits.device == eager.device and logits.ndim == logits.dim() == 3
    assert logits.numel() == eager.numel() and logits.stride() == eager.stride() and logits.is_contiguous()
    assert logits.requires_grad and logits.grad_fn is not None and not logits.is_leaf
    assert logits.is_floating_point() and not logits.is_cuda and logits.layout == torch.strided
    assert isinstance(logits, torch.Tensor) and torch.is_tensor(logits) and {logits: 1}[logits] == 1
    assert is_unread(logits)


READS = {
    "argmax": lambda z: z.argmax(-1),
    "indexing": lambda z: z[:, -1, 2:4],
    "indexing by a mask": lambda z: z[z > 0],
    "cat": lambda z: torch.cat([z, z]),
    "arithmetic": lambda z: 2 * z + z,
    "softmax": lambda z: F.softmax(z, -1),
    "numpy": lambda z: torch.from_numpy(z.detach().cpu().numpy()),
    "tolist": lambda z: torch.tensor(z.tolist()),
    "float64": lambda z: z.to(torch.float64),
    "float": lambda z: z.float(),
    "bfloat16": lambda z: z.bfloat16(),
    "clone": lambda z: z.clone(),
    "unbind": lambda z: torch.stack(list(z)),
    "out": lambda z: torch.add(z.detach(), 1, out=torch.empty(2, 3, VOCABULARY)),
    "in place": lambda z: z.detach().clone().add_(z.detach()),
    "data": lambda z: z.data,
}


@pytest.mark.parametrize("read", READS)
def test_reading_gives_what_eager_gives(pair, read):
    logits, eager, _ = pair
    ours, wanted = READS[read](logits), READS[read](eager)
    assert (ours.dtype, ours.requires_grad) == (wanted.dtype, wanted.requires_grad)
    torch.testing.assert_close(ours + 0, wanted)


def test_printing_shows_the_values(pair):
    logits, eager, _ = pair
    assert repr(logits.detach()) == repr(eager.detach()) and f"{logits.detach()}" == f"{eager.detach()}"


def test_the_value_is_computed_once(pair):
    logits, _, _ = pair
    assert logits.data_ptr() == logits.data_ptr() == logits.detach().data_ptr()


def test_detaching_and_casting_stay_deferred_and_share_the_value(pair):
    logits, eager, _ = pair
    detached, wide = logits.detach(), logits.float()
    half = detached.half()
    assert wide is logits and not detached.requires_grad and half.dtype == torch.float16
    assert is_unread(logits) and is_unread(detached) and is_unread(half)
    torch.testing.assert_close(half + 0, eager.detach().half())
    assert not is_unread(logits)


def test_gradients_through_logits_are_those_of_eager(pair):
    _, _, inputs = pair
    step = compiled(model)

    def gradients(function):
        loss, logits = function(*inputs)
        return torch.autograd.grad(loss + logits.square().mean() + logits.double().sum(), inputs[:2])

    torch.testing.assert_close(gradients(step), gradients(model))


def test_gradients_through_a_deferred_cast_are_those_of_eager():
    inputs = operands(torch.bfloat16)

    def gradients(function):
        loss, logits = function(*inputs)
        wide = logits.float()
        return torch.autograd.grad(loss + wide.square().mean(), inputs[:2])

    torch.testing.assert_close(gradients(compiled(model)), gradients(model), rtol=2e-2, atol=2e-2)


def test_a_first_read_without_gradients_does_not_take_them_from_a_later_one(pair):
    logits, eager, inputs = pair
    with torch.no_grad():
        logits.argmax(-1)
    ours, wanted = (torch.autograd.grad(z.square().sum(), inputs[:2]) for z in (logits, eager))
    torch.testing.assert_close(ours, wanted)


def test_a_first_read_under_autocast_keeps_the_graphs_dtypes(pair):
    logits, eager, _ = pair
    with torch.autocast("cpu", torch.bfloat16):
        assert logits.clone().dtype == torch.float32
    torch.testing.assert_close(logits + 0, eager)


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):
        return tensor.detach() * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


@pytest.mark.parametrize("wide", [False, True])
def test_an_autograd_function_that_takes_the_logits_passes_gradients_on(wide):
    inputs = operands(torch.bfloat16 if wide else torch.float32)

    def gradients(function):
        logits = function(*inputs)[1]
        return torch.autograd.grad(Twice.apply(logits.float() if wide else logits).square().sum(), inputs[:2])

    torch.testing.assert_close(gradients(compiled(model)), gradients(model), rtol=2e-2, atol=1e-4)


def test_retained_and_hooked_gradients_are_seen(pair):
    logits, eager, _ = pair
    for z in (logits, eager):
        z.retain_grad()
        z.square().sum().backward()
    torch.testing.assert_close(logits.grad, eager.grad)


def test_each_call_has_its_own_logits():
    step = compiled(model)
    calls = [operands(seed=s) for s in (0, 1)]
    logits = [step(*inputs)[1] for inputs in calls]
    for ours, inputs in reversed(list(zip(logits, calls, strict=True))):
        torch.testing.assert_close(ours + 0, model(*inputs)[1])


def test_reading_after_a_step_of_the_optimizer_is_an_error_and_reading_before_is_not():
    x, weight, target = operands()
    step, optimizer = compiled(model), torch.optim.SGD([weight], lr=0.1)
    early, late = step(x, weight, target)[1], step(x, weight, target)[1]
    wanted = early.detach().clone()
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    torch.testing.assert_close(early + 0, wanted)
    with pytest.raises(RuntimeError, match="changed in place.*Read them before"):
        late.argmax(-1)


def test_inputs_are_let_go_when_the_value_is_there():
    x, weight, target = operands(grad=False)
    logits = compiled(model)(x, weight, target)[1]
    hidden = weakref.ref(logits._value.inputs[0])
    logits.argmax(-1)
    gc.collect()
    assert hidden() is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_logits_without_gradients(mode):
    inputs = operands()
    with mode():
        loss, logits = compiled(model)(*inputs)
        assert is_unread(logits) and not logits.requires_grad and logits.grad_fn is None
        torch.testing.assert_close(logits + 0, model(*inputs)[1])
        assert not (logits + 0).requires_grad


def test_saving_pickling_and_copying_give_plain_tensors():
    inputs = operands(grad=False)
    step, (_, eager) = compiled(model), model(*inputs)
    saved = io.BytesIO()
    torch.save({"logits": step(*inputs)[1]}, saved)
    saved.seek(0)
    copies = [
        torch.load(saved, weights_only=True)["logits"],
        pickle.loads(pickle.dumps(step(*inputs)[1])),
        copy.deepcopy(step(*inputs)[1]),
        copy.copy(step(*inputs)[1]),
    ]
    for made in copies:
        assert type(made) is torch.Tensor
        torch.testing.assert_close(made, eager)


def test_accelerate_casts_pads_and_gathers_them():
    operations = pytest.importorskip("accelerate.utils.operations")
    from accelerate import Accelerator

    inputs = operands(torch.bfloat16, grad=False)
    outputs = {"logits": compiled(model)(*inputs)[1]}
    outputs = operations.convert_to_fp32(outputs)
    assert is_unread(outputs["logits"]) and outputs["logits"].dtype == torch.float32
    accelerator = Accelerator(cpu=True)
    padded = accelerator.pad_across_processes(outputs, dim=1, pad_index=-100)
    gathered = accelerator.gather_for_metrics(padded)
    moved = operations.send_to_device(gathered, "cpu")
    torch.testing.assert_close(moved["logits"] + 0, model(*inputs)[1].float())


def test_a_graph_break_hands_them_to_the_rest_of_the_function():
    def broken(x, weight, target):
        loss, logits = model(x, weight, target)
        torch._dynamo.graph_break()
        return loss + logits.square().mean(), logits

    inputs = operands()
    ours, eager = compiled(broken)(*inputs), broken(*inputs)
    torch.testing.assert_close(ours[0], eager[0])
    wanted = torch.autograd.grad(eager[0], inputs[:2])
    torch.testing.assert_close(torch.autograd.grad(ours[0], inputs[:2]), wanted)


def nested():
    """A graph by hand: ``(hidden, (deferred, None))`` with the weight as an argument."""
    head = Graph()
    head.output(head.call_function(F.linear, (head.placeholder("x"), head.placeholder("weight"))))
    graph = Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    hidden = graph.call_function(torch.mul, (x, 2.0))
    call = graph.call_function(deferred, (graph.get_attr("head"), hidden, weight))
    call.meta["example_value"] = torch.empty(2, 3, VOCABULARY)
    graph.output((hidden, (call, None)))
    return GraphModule({"head": GraphModule(torch.nn.Module(), head)}, graph)


def test_nested_outputs_keep_their_structure_and_returned_inputs_are_not_returned_twice():
    module = nested()
    body, finish = split_deferred(module)
    assert len(body(*operands()[:2])) == 2
    assert not [n for n in body.graph.nodes if n.target is deferred or n.op == "get_attr"]
    assert [n for n in module.graph.nodes if n.target is deferred]
    x, weight, _ = operands(grad=False)
    hidden, (logits, nothing) = finish(body)(x, weight)
    assert nothing is None and is_unread(logits)
    torch.testing.assert_close(logits + 0, F.linear(hidden, weight))


def test_a_graph_without_deferred_outputs_is_left_as_it_is():
    module = GraphModule(torch.nn.Module(), Graph())
    module.graph.output(())
    body, finish = split_deferred(module)
    assert body is module and finish(body) is body


def test_trainer_evaluates_with_metrics(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = build("llama", layers=1)
    data = [{k: v[0] for k, v in batch(rows=1, length=8, seed=s).items()} for s in range(4)]
    seen = {}

    def metrics(prediction):
        seen["shape"] = prediction.predictions.shape
        hits = prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]
        return {"accuracy": hits.mean(), "total": float(prediction.predictions.sum())}

    arguments = transformers.TrainingArguments(
        str(tmp_path), per_device_eval_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True
    )

    def evaluate():
        return transformers.Trainer(model, arguments, eval_dataset=data, compute_metrics=metrics).evaluate()

    wanted = evaluate()
    model.compile(backend="rewriter", options={"lowering": "eager"})
    with rewriter.inspect() as report:
        got = evaluate()
    assert report.counts()["lm_head_loss"] == 1
    assert seen["shape"] == (4, 8, 128)
    for name in ("eval_loss", "eval_accuracy", "eval_total"):
        assert got[name] == pytest.approx(wanted[name], rel=1e-3, abs=1e-3)


def test_autograd_functions_inside_checkpoints_stay():
    def function(x, weight, target):
        return model(checkpoint(Doubled.apply, x, use_reentrant=False), weight, target)

    values = operands()
    loss, logits = compiled(function)(*values)
    torch.testing.assert_close(loss, function(*values)[0])
    assert is_unread(logits)
