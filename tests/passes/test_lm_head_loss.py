"""The head and its loss: every form that is rewritten, every form that is kept, and the numbers of both."""

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint

import rewriter
from rewriter.fusion import apply
from rewriter.passes.lm_head_loss import lm_head_loss
from tests.capture import capture
from tests.families import batch, build

VOCABULARY, HIDDEN = 11, 8


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def operands(rows=(2, 5), dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    target = torch.randint(0, VOCABULARY, rows, generator=generator)
    target.view(-1)[1] = -100
    return random(*rows, HIDDEN), random(VOCABULARY, HIDDEN), random(VOCABULARY), target


def compiled(function, **options):
    return torch.compile(function, backend="rewriter", options={"lowering": "eager"}, **options)


def check(function, *, count=1, reason=None, dtype=torch.float32, inputs=None):
    """Compile; the number of rewrites, the reason of a miss, and results and gradients beside eager's."""
    inputs = inputs or operands(dtype=dtype)
    leaves = [t for t in inputs if t.requires_grad]
    with rewriter.inspect() as report:
        ours = compiled(function)(*inputs)
    record = next(p for g in report.graphs for p in g.passes if p.name == "lm_head_loss")
    assert record.error is None
    assert record.count == count, record.misses
    if reason is not None:
        assert reason in record.misses[0].reason
    eager = function(*inputs)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    ours, eager = (r if isinstance(r, tuple) else (r,) for r in (ours, eager))
    for got, wanted in zip(ours, eager, strict=True):
        assert (got.dtype, got.shape, got.requires_grad) == (wanted.dtype, wanted.shape, wanted.requires_grad)
        torch.testing.assert_close(got.detach() + 0, wanted.detach(), **tolerance)
    got = torch.autograd.grad(ours[0], leaves, retain_graph=True, allow_unused=True)
    wanted = torch.autograd.grad(eager[0], leaves, retain_graph=True, allow_unused=True)
    torch.testing.assert_close(got, wanted, **tolerance)
    return report


def rows(logits):
    return logits.float().view(-1, VOCABULARY)


def test_head_and_loss_are_one_op_without_logits():
    def f(x, weight, bias, target):
        return F.cross_entropy(rows(F.linear(x, weight)), target.view(-1))

    graphs = []
    torch.compile(f, backend=lambda g, _: graphs.append(g) or g.forward)(*operands())
    new, _ = apply(lm_head_loss, graphs[0])
    calls = [
        n.target if n.op == "call_method" else n.target.__name__ for n in new.graph.nodes if "call" in n.op
    ]
    assert calls == ["view", "linear_cross_entropy"]
    torch._dynamo.reset()
    check(f)


def test_head_with_a_bias():
    check(lambda x, w, b, t: F.cross_entropy(rows(F.linear(x, w, b)), t.view(-1)))


def test_sum_divided_by_the_number_of_items_takes_the_division_in():
    items = torch.tensor(7)

    def f(x, weight, bias, target):
        loss = F.cross_entropy(rows(F.linear(x, weight)), target.view(-1), reduction="sum")
        return loss / items

    graphs = []
    torch.compile(f, backend=lambda g, _: graphs.append(g) or g.forward)(*operands())
    new, _ = apply(lm_head_loss, graphs[0])
    assert not [n for n in new.graph.nodes if getattr(n.target, "__name__", "") == "truediv"]
    torch._dynamo.reset()
    check(f)


def test_sum_divided_by_a_plain_number_keeps_the_division():
    check(lambda x, w, b, t: F.cross_entropy(rows(F.linear(x, w)), t.view(-1), reduction="sum") / 7)


def test_sum_that_is_also_returned_undivided_keeps_the_division():
    def f(x, weight, bias, target):
        loss = F.cross_entropy(rows(F.linear(x, weight)), target.view(-1), reduction="sum")
        return loss / target.numel(), loss

    check(f)


@pytest.mark.parametrize("scaled", [lambda z: z * 0.25, lambda z: 0.25 * z, lambda z: z / 4.0])
def test_scaled_logits(scaled):
    check(lambda x, w, b, t: F.cross_entropy(rows(scaled(F.linear(x, w, b))), t.view(-1)))


def test_capped_logits():
    check(lambda x, w, b, t: F.cross_entropy(rows(torch.tanh(F.linear(x, w) / 5.0) * 5.0), t.view(-1)))


def test_logits_scaled_then_capped_and_returned():
    def f(x, weight, bias, target):
        logits = torch.tanh(F.linear(x, weight) * 0.5 / 5.0) * 5.0
        return F.cross_entropy(rows(logits), target.view(-1)), logits

    check(f)


def test_label_smoothing_and_another_ignored_index():
    def f(x, weight, bias, target):
        logits = rows(F.linear(x, weight))
        labels = target.view(-1).clamp(min=0)
        return F.cross_entropy(logits, labels, ignore_index=0, label_smoothing=0.1)

    check(f)


def test_shift_of_the_labels_by_padding():
    def f(x, weight, bias, target):
        logits = F.linear(x[:, 0:, :], weight)
        labels = F.pad(target, (0, 1), value=-100)[..., 1:].contiguous()
        return F.cross_entropy(rows(logits), labels.view(-1), ignore_index=-100), logits

    check(f)


@pytest.mark.parametrize(
    "shift", [lambda z: z[..., :-1, :].contiguous(), lambda z: z[:, :-1], lambda z: z[:, 1:][:, :-1, :]]
)
def test_shift_of_the_logits_becomes_a_shift_of_the_hidden_states(shift):
    def f(x, weight, bias, target):
        logits = F.linear(x, weight, bias).float()
        shifted = shift(logits)
        labels = target[:, target.shape[1] - shifted.shape[1] :].contiguous()
        return F.cross_entropy(shifted.reshape(-1, VOCABULARY), labels.view(-1)), logits

    check(f)


def test_rows_that_need_no_reshape():
    check(lambda x, w, b, t: F.cross_entropy(F.linear(x, w, b), t), inputs=operands(rows=(7,)))


def test_logits_that_the_loss_reads_in_16_bits():
    def f(x, weight, bias, target):
        return F.cross_entropy(F.linear(x, weight).flatten(0, 1), target.flatten())

    check(f, dtype=torch.bfloat16)


def test_logits_returned_raw_and_cast():
    def f(x, weight, bias, target):
        logits = F.linear(x, weight)
        return F.cross_entropy(rows(logits), target.view(-1)), logits, logits.float()

    check(f, dtype=torch.bfloat16)


def test_logits_returned_cast_to_the_type_of_another_tensor():
    def f(x, weight, bias, target):
        logits = F.linear(x, weight)
        return F.cross_entropy(rows(logits), target.view(-1)), logits.type_as(target.double())

    check(f)


def test_two_heads_of_one_model():
    def f(x, weight, bias, target):
        first, second = F.linear(x, weight), F.linear(x * 0.5, weight, bias)
        loss = F.cross_entropy(rows(first), target.view(-1)) + F.cross_entropy(rows(second), target.view(-1))
        return loss, first, second

    check(f, count=2)


def test_scale_in_place():
    def f(x, weight, bias, target):
        logits = F.linear(x, weight)
        logits /= 4.0
        return F.cross_entropy(rows(logits), target.view(-1)), logits

    check(f)


def test_loss_inside_a_checkpoint_is_kept():
    def f(x, weight, bias, target):
        def head(x):
            return F.cross_entropy(rows(F.linear(x, weight)), target.view(-1))

        return torch.utils.checkpoint.checkpoint(head, x, use_reentrant=False)

    check(f, count=0, reason="activation checkpoint")


def test_autocast_inside_with_the_cast_of_the_logits_after_it():
    def f(x, weight, bias, target):
        with torch.autocast("cpu", torch.bfloat16):
            logits = F.linear(x, weight, bias)
            loss = F.cross_entropy(rows(logits), target.view(-1))
        return loss, logits.float()

    inputs = operands()
    with rewriter.inspect() as report:
        loss, logits = compiled(f)(*inputs)
    assert report.counts()["lm_head_loss"] == 1
    eager_loss, eager_logits = f(*inputs)
    torch.testing.assert_close(loss, eager_loss, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(logits + 0, eager_logits, rtol=0, atol=0)


def test_rows_that_all_lack_a_label_give_what_eager_gives():
    def f(x, weight, bias, target):
        return F.cross_entropy(rows(F.linear(x, weight)), target.view(-1))

    x, weight, bias, target = operands()
    target.fill_(-100)
    assert compiled(f)(x, weight, bias, target).isnan() and f(x, weight, bias, target).isnan()


def test_a_second_length_and_symbolic_sizes():
    def f(x, weight, bias, target):
        logits = F.linear(x, weight)
        return F.cross_entropy(rows(logits), target.view(-1)), logits

    step = compiled(f, dynamic=True)
    with rewriter.inspect() as report:
        for length in (5, 9):
            inputs = operands(rows=(2, length))
            for ours, eager in zip(step(*inputs), f(*inputs), strict=True):
                assert ours.shape == eager.shape
                torch.testing.assert_close(ours, eager)
    assert report.counts()["lm_head_loss"] == 1 and len(report.graphs) == 1


class Head(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.cap = 0.5, 3.0

    def forward(self, x, weight, bias, target):
        logits = torch.tanh(F.linear(x, weight, bias) * self.scale / self.cap) * self.cap
        return F.cross_entropy(rows(logits), target.view(-1)), logits


def test_a_symbolic_scale_and_softcap_are_the_numbers_that_they_are_until_they_change():
    head = Head()
    step, inputs = compiled(head, dynamic=True), operands()
    with rewriter.inspect() as report:
        for head.scale in (0.5, 0.5, 0.25):
            for ours, eager in zip(step(*inputs), head(*inputs), strict=True):
                torch.testing.assert_close(ours + 0, eager)
    assert report.counts()["lm_head_loss"] == len(report.graphs) == 2


def loss_of(logits, target, **settings):
    return F.cross_entropy(rows(logits), target.view(-1), **settings)


KEPT = {
    "a second loss reads the logits": (
        lambda x, w, b, t: (lambda z: loss_of(z, t) + 1e-4 * z.logsumexp(-1).square().mean())(F.linear(x, w)),
        "is also used by",
    ),
    "the graph takes an argmax of them": (
        lambda x, w, b, t: (lambda z: (loss_of(z, t), z.argmax(-1)))(F.linear(x, w)),
        "is also used by",
    ),
    "the rows are returned": (
        lambda x, w, b, t: (lambda z: (F.cross_entropy(z, t.view(-1)), z))(rows(F.linear(x, w))),
        "is also returned",
    ),
    "the inside of a softcap is returned": (
        lambda x, w, b, t: (lambda z: (loss_of(z * 5.0, t), z))(torch.tanh(F.linear(x, w) / 5.0)),
        "is also returned",
    ),
    "the classes are weighted": (
        lambda x, w, b, t: loss_of(F.linear(x, w), t, weight=b.detach()),
        "weighted",
    ),
    "the losses are returned one by one": (
        lambda x, w, b, t: loss_of(F.linear(x, w), t, reduction="none").sum(),
        "reduction 'none'",
    ),
    "the targets are probabilities": (
        lambda x, w, b, t: F.cross_entropy(rows(F.linear(x, w)), F.one_hot(t.view(-1).clamp(0), 11).float()),
        "not int64 labels",
    ),
    "the vocabulary stands second": (
        lambda x, w, b, t: F.cross_entropy(F.linear(x, w).transpose(1, 2), t),
        "3 dimensions",
    ),
    "the loss is of a part of the vocabulary": (
        lambda x, w, b, t: F.cross_entropy(F.linear(x, w)[..., :10].reshape(-1, 10), t.view(-1).clamp(max=9)),
        "no slice of the rows",
    ),
    "rows are chosen by a mask": (
        lambda x, w, b, t: F.cross_entropy(F.linear(x, w)[torch.arange(2)].reshape(-1, 11), t.view(-1)),
        "no slice of the rows",
    ),
    "an adapter is added to the head": (
        lambda x, w, b, t: loss_of(F.linear(x, w) + F.linear(x, w * 2), t),
        "come from add",
    ),
    "the logits are a softmax": (
        lambda x, w, b, t: loss_of(F.linear(x, w).softmax(-1), t),
        "come from softmax",
    ),
    "the scale is a tensor": (lambda x, w, b, t: loss_of(F.linear(x, w) * b.mean(), t), "not a constant"),
    "a softcap has two bounds": (
        lambda x, w, b, t: loss_of(torch.tanh(F.linear(x, w) / 5.0) * 4.0, t),
        "divides by 5.0 and multiplies by 4.0",
    ),
    "a scale follows the softcap": (
        lambda x, w, b, t: loss_of(torch.tanh(F.linear(x, w) / 5.0) * 5.0 * 2.0, t),
        "after their softcap",
    ),
    "the logits are narrowed": (
        lambda x, w, b, t: loss_of(F.linear(x, w).bfloat16(), t),
        "narrowed to torch.bfloat16",
    ),
    "the logits are an input": (
        lambda x, w, b, t: F.cross_entropy(w, t.view(-1)[:1].expand(11).clamp(0, 7)),
        "not a linear's result",
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_loss_is_kept_when(name):
    function, reason = KEPT[name]
    check(function, count=0, reason=reason)


def test_loss_is_kept_when_the_hidden_states_are_written_in_place_after_the_head():
    def f(x, weight, bias, target):
        hidden = x.detach() * 1.0
        logits = F.linear(hidden, weight.detach(), bias)
        return loss_of(logits, target), logits, hidden.zero_()

    check(f, count=0, reason="written in place")


def test_loss_is_kept_when_the_head_runs_without_gradients():
    def f(x, weight, bias, target):
        with torch.no_grad():
            logits = F.linear(x, weight)
        return loss_of(logits * 1.0, target) + bias.sum()

    check(f, count=0, reason="grad mode")


@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16])
def test_a_head_of_another_dtype_than_its_hidden_states_fails_as_in_eager(narrow):
    def f(x, weight, target):
        return loss_of(F.linear(x, weight), target)

    x, weight, _, target = operands()
    inputs = x, weight.to(narrow), target
    for call in (f, compiled(f)):
        with rewriter.inspect() as report, pytest.raises(RuntimeError, match="same dtype"):
            call(*inputs)
    (record,) = [p for g in report.graphs for p in g.passes if p.name == "lm_head_loss"]
    assert not record.count and "eager refuses to multiply" in record.misses[0].reason
    with torch.autocast("cpu", torch.bfloat16), rewriter.inspect() as report:
        compiled(f)(*inputs)
    assert report.counts()["lm_head_loss"] == 1


def test_logits_without_labels_are_left_alone():
    def f(x, weight):
        return F.linear(x, weight)

    x, weight, _, _ = operands()
    with rewriter.inspect() as report:
        logits = compiled(f)(x, weight)
    assert report.counts()["lm_head_loss"] == 0 and type(logits) is torch.Tensor


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "cohere", "phi"])
def test_every_family_has_one_head_and_its_logits_are_deferred(name):
    inputs = batch(rows=1, length=8)
    (graph, example), *_ = capture(build(name, layers=1), **inputs)
    new, record = apply(lm_head_loss, graph)
    assert record.error is None and record.count == 1 and not record.misses
    for ours, eager in zip(new(*example), graph(*example), strict=True):
        torch.testing.assert_close(ours, eager)
