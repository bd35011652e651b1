"""bitsandbytes' product as one call of the graph: the same numbers, the same rewrites, and a way back."""

import copy
import pickle
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import rewriter
from rewriter.huggingface import prepare, restore
from rewriter.opaque_linear import make_transparent
from tests.families import batch, build
from tests.golden import trace
from tests.regions.outlined import assert_equal, numbers, outlined, run_program

bitsandbytes = pytest.importorskip("bitsandbytes")


def layer(*, double: bool = False, bias: bool = False, **settings) -> nn.Module:
    """A 4-bit linear, 64 to 128."""
    torch.manual_seed(0)
    settings = {"compute_dtype": torch.bfloat16, "quant_type": "nf4", **settings}
    return bitsandbytes.nn.Linear4bit(64, 128, bias, compress_statistics=double, **settings).to("cpu")


def calls(model: nn.Module, x: torch.Tensor) -> set[str]:
    """Names of the functions in the graph that Dynamo makes of ``model``."""
    module, _ = trace(lambda x: model(x) * 1, x)
    return {getattr(n.target, "__name__", "") for n in module.graph.nodes if n.op == "call_function"}


def compiled(model: nn.Module):
    torch._dynamo.reset()
    return torch.compile(model, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(
    ("bias", "dtype", "needs_gradient"),
    [
        (False, torch.float32, False),
        (True, torch.float32, True),
        (False, torch.bfloat16, True),
        (True, torch.bfloat16, False),
    ],
)
def test_results_and_gradients_are_those_of_bitsandbytes(double, bias, dtype, needs_gradient):
    model = nn.Sequential(layer(double=double, bias=bias).to(dtype if bias else torch.float32))
    x = torch.randn(3, 5, 64, dtype=dtype, requires_grad=needs_gradient)
    expected, plain = numbers(model, (x,)), numbers(compiled(model), (x,))
    prepare(model)
    assert_equal(numbers(model, (x,)), expected)
    found = numbers(compiled(model), (x,))
    assert_equal(found, plain)
    assert_equal(found, expected)


def test_the_product_is_one_call_that_is_not_traced_into():
    model, x = nn.Sequential(layer()), torch.randn(3, 64, requires_grad=True)
    assert "autograd_function_apply" in calls(model, x)
    prepare(model)
    assert calls(model, x) == {"linear_4bit", "mul"}
    restore(model)
    assert "autograd_function_apply" in calls(model, x)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model, "support_avx512bf16_for_cpu", True),
        lambda model: setattr(model, "compute_type_is_set", False),
        lambda model: setattr(model.weight.quant_state, "shape", torch.Size((64, 128))),
    ],
    ids=["packing is on again", "no compute dtype yet", "quantised transposed"],
)
def test_where_the_layer_does_more_its_own_forward_is_traced(change):
    model, x = layer(), torch.randn(3, 64, requires_grad=True)
    prepare(model)
    change(model)
    assert "linear_4bit" not in calls(model, x)
    assert_equal(numbers(compiled(model), (x,)), numbers(model, (x,)))


def test_a_forward_that_somebody_put_over_it_stays():
    model = nn.Sequential(layer(), layer())
    model[0].forward = lambda x: x
    prepare(model)
    model[1].forward = over = lambda x: x
    restore(model)
    assert "forward" in vars(model[0]) and model[1].forward is over


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_computes_with_its_own_weight(duplicate):
    model = nn.Sequential(layer())
    prepare(model)
    twin = duplicate(model)
    with torch.no_grad():
        twin[0].weight.data.zero_()
    x = torch.randn(3, 64)
    assert not torch.equal(twin(x), model(x))
    assert not torch.equal(compiled(twin)(x), model(x))


@dataclass(frozen=True)
class Step:
    """One step of a compiled model."""

    loss: float
    rewrites: dict[str, int]
    notes: list[str]
    gradients: list[torch.Tensor]


def step(*, opaque: bool, checkpointing: bool = False, layers: int = 1, **options) -> Step:
    model = build("llama", lora=True, nf4=True, double_quant=True, layers=layers, dtype=torch.bfloat16)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    prepare(model)
    if not opaque:
        for module in model.modules():
            make_transparent(module)
    torch._dynamo.reset()
    with rewriter.inspect() as report:
        run = torch.compile(model, backend="rewriter", options={"lowering": "eager", **options})
        loss = run(**batch()).loss
        loss.backward()
    (graph,) = report.graphs
    rewrites = {m.rewrite: m.count for done in graph.passes for m in done.matches}
    gradients = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
    return Step(loss.item(), rewrites, graph.notes, gradients)


def test_a_model_of_opaque_layers_trains_as_one_of_plain_layers():
    ours, theirs = (step(opaque=opaque, checkpointing=True) for opaque in (True, False))
    assert (ours.loss, ours.rewrites) == (theirs.loss, theirs.rewrites)
    assert len(ours.gradients) == len(theirs.gradients) == 2 * 7
    assert all(torch.equal(a, b) for a, b in zip(ours.gradients, theirs.gradients, strict=True))


def test_a_prepared_model_passes_verification():
    (note,) = step(opaque=True, verify=True).notes
    assert note.startswith("verified: ")


def test_the_layers_of_a_prepared_model_are_outlined():
    model = build("llama", lora=True, nf4=True, layers=3)
    prepare(model)
    case = outlined(model, **batch())
    assert case.order == "beginning a b b end"
    assert_equal(numbers(run_program(case), case.values), numbers(case.body, case.values))
