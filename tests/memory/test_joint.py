"""A stage's forward and backward graphs give autograd's own numbers, and save what they should."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch.fx import GraphModule

from rewriter.kernels.add_product import add_product
from rewriter.kernels.dequantize import Packed4bit
from rewriter.kernels.lora_linear import lora_linear, lora_linears
from rewriter.kernels.rms_norm import rms_norm
from rewriter.memory.fakes import StageFakes
from rewriter.memory.in_place import add_in_place_again
from rewriter.memory.joint import (
    Inseparable,
    Signature,
    backward_graph,
    forward_graph,
    partitioned_graphs,
    signature_of,
)


@dataclass
class Case:
    """A function to differentiate, and its inputs; those that require a gradient want one."""

    function: Callable
    inputs: list = field(default_factory=list)

    def signature(self) -> Signature:
        values, needs = self.fakes()
        return signature_of(self.function, values, needs)

    def fakes(self) -> tuple[list, list[bool]]:
        fakes = StageFakes(7)
        needs = [isinstance(x, Tensor) and x.requires_grad for x in self.inputs]
        return [fakes.like(x) for x in self.inputs], needs

    def mode(self, values):
        return next(v.fake_mode for v in values if isinstance(v, Tensor))

    def traced(self, make: Callable):
        """What ``make`` makes of the function and its signature, in the signature's fake mode."""
        values, needs = self.fakes()
        mode = self.mode(values)
        with tracing(TracingContext(mode)), torch.no_grad(), mode:
            signature = signature_of(self.function, values, needs)
            return signature, make(self.function, signature)

    def eager(self) -> tuple[list, list, list]:
        """Results, tangents and gradients, by autograd."""
        leaves = [x.detach().requires_grad_() if need else x
                  for x, need in zip(self.inputs, self.fakes()[1], strict=True)]  # fmt: skip
        results = self.function(*leaves)
        roots = [r for r in results if isinstance(r, Tensor) and r.requires_grad]
        generator = torch.Generator().manual_seed(1)
        tangents = [torch.randn(r.shape, generator=generator).to(r.dtype) for r in roots]
        wanted = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
        return list(results), tangents, list(torch.autograd.grad(roots, wanted, tangents, allow_unused=True))


def _randn(*shape, dtype=torch.float32, grad=True, scale=1.0):
    generator = torch.Generator().manual_seed(sum(shape) + len(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(dtype).requires_grad_(grad)


def _mlp(x, gate, up, down):
    return (F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down),)


def _mlp_case(dtype=torch.float32, trained=True):
    weights = [_randn(*s, dtype=dtype, grad=trained, scale=0.3) for s in ((12, 8), (12, 8), (8, 12))]
    return Case(_mlp, [_randn(2, 5, 8, dtype=dtype), *weights])


def _attention_case(dtype=torch.float32):
    def attention(q, k, v):
        return (F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),)

    return Case(attention, [_randn(1, 6, heads, 16, dtype=dtype).transpose(1, 2) for heads in (4, 2, 2)])


def _norm_case(dtype=torch.float32):
    return Case(lambda x, w: (rms_norm(x, w, 1e-5),), [_randn(2, 5, 8, dtype=dtype), _randn(8, dtype=dtype)])


def _lora_case(base=torch.float32, adapter=torch.float32, dropped=False):
    x, weight = _randn(2, 5, 8, dtype=base), _randn(12, 8, dtype=base, grad=False)
    a, b = _randn(2, 8, dtype=adapter), _randn(12, 2, dtype=adapter)

    def linear(x, weight, a, b):
        return (lora_linear(x, weight, None, a, b, 0.5, x * 0.9 if dropped else None),)

    return Case(linear, [x, weight, a, b])


def _lora_pair():
    def linears(x, w1, w2, a1, b1, a2, b2):
        return lora_linears(x, (w1, w2), (None, None), (a1, a2), (b1, b2), (0.5, 2.0))

    shapes = ((12, 8), (6, 8), (2, 8), (12, 2), (2, 8), (6, 2))
    return Case(linears, [_randn(2, 5, 8), *(_randn(*s, grad=i > 1) for i, s in enumerate(shapes))])


def _nf4_case():
    bnb = pytest.importorskip("bitsandbytes.functional")
    data, state = bnb.quantize_4bit(_randn(64, 64, grad=False), quant_type="nf4")

    def linear(x, data, absmax, a, b):
        packed = Packed4bit(data, (64, 64), absmax, state.blocksize, "nf4")
        return (lora_linear(x, packed, None, a, b, 0.5),)

    return Case(linear, [_randn(2, 5, 64), data, state.absmax, _randn(2, 64), _randn(64, 2)])


def _extended_case(*widths, k=64):
    """Adapters on 4-bit weights, added by the bases' own products."""
    bnb = pytest.importorskip("bitsandbytes.functional")
    inputs, weights = [_randn(2, 5, k, dtype=torch.bfloat16)], []
    for n in widths:
        data, state = bnb.quantize_4bit(_randn(n, k, grad=False), quant_type="nf4")
        weights.append((data, (n, k), state.absmax, state.blocksize, "nf4"))
        inputs += [data, state.absmax, _randn(4, k, dtype=torch.bfloat16), _randn(n, 4, dtype=torch.bfloat16)]

    def linears(x, *operands):
        parts = [operands[i : i + 4] for i in range(0, len(operands), 4)]
        packed = [Packed4bit(p[0], w[1], p[1], *w[3:]) for p, w in zip(parts, weights, strict=True)]
        none = [None] * len(parts)
        return lora_linears(x, packed, none, [p[2] for p in parts], [p[3] for p in parts], [0.5] * len(parts))

    return Case(linears, inputs)


def _autocast_case():
    def mixed(x, weight):
        with torch.autocast("cpu", torch.bfloat16):
            made = F.linear(x, weight)
        return (made.float() * x,)

    return Case(mixed, [_randn(5, 8), _randn(8, 8)])


def _with_indices():
    return Case(lambda x, y: (x * y, y.argmax(-1), (x + 1).detach()), [_randn(5, 8), _randn(5, 8)])


def _frozen_input():
    return Case(lambda x, mask, w: (torch.where(mask, x * w, x),),
                [_randn(5, 8), torch.rand(5, 8) > 0.5, _randn(8, grad=False)])  # fmt: skip


def _writing(x, weight):
    made = x @ weight
    made /= x.detach().abs().sum(-1, keepdim=True)
    total = torch.zeros_like(x).index_add_(0, torch.tensor([1, 0, 0, 3, 4]), made)
    total[0] += made[1]
    return (total * x,)


CASES = {
    "mlp": _mlp_case,
    "mlp, frozen": lambda: _mlp_case(trained=False),
    "mlp, bf16": lambda: _mlp_case(torch.bfloat16),
    "attention": _attention_case,
    "attention, bf16": lambda: _attention_case(torch.bfloat16),
    "norm": _norm_case,
    "norm, bf16": lambda: _norm_case(torch.bfloat16),
    "lora": _lora_case,
    "lora, bf16": lambda: _lora_case(torch.bfloat16, torch.bfloat16),
    "lora, bf16 with fp32 adapters": lambda: _lora_case(torch.bfloat16),
    "lora, dropped input": lambda: _lora_case(dropped=True),
    "lora, one input for two": _lora_pair,
    "lora on nf4": _nf4_case,
    "lora on nf4, two wide results": lambda: _extended_case(128, 192),
    "lora on nf4, a wide input": lambda: _extended_case(32, k=128),
    "autocast": _autocast_case,
    "results without a gradient": _with_indices,
    "inputs without a gradient": _frozen_input,
    "an input read twice": lambda: Case(lambda x: (x * x + x, x.sin()), [_randn(5, 8)]),
    "a sum, which hands its gradient through": lambda: Case(lambda x, y: (x + y,), [_randn(5), _randn(5)]),
    "writes in place": lambda: Case(_writing, [_randn(5, 8), _randn(8, 8)]),
    "views": lambda: Case(lambda x: x.view(5, 2, 4).transpose(0, 1).unbind(0), [_randn(5, 8)]),
    "an input that the result does not depend on": lambda: Case(
        lambda x, y: (x * torch.zeros_like(y),), [_randn(5), _randn(5)]
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_backward_that_computes_again_gives_autograds_gradients(name):
    case = CASES[name]()
    signature, (forward, backward) = case.traced(lambda f, s: (forward_graph(f, s), backward_graph(f, s)))
    results, tangents, gradients = case.eager()
    _assert_same(_run(forward, case.inputs), results)
    _assert_same(_run(backward, [*case.inputs, *tangents]), gradients)
    assert signature.differentiable == tuple(isinstance(r, Tensor) and r.requires_grad for r in results)


@pytest.mark.parametrize("name", CASES)
def test_a_backward_that_reads_what_was_saved_gives_autograds_gradients(name):
    case = CASES[name]()
    signature, (forward, backward, saved) = case.traced(partitioned_graphs)
    results, tangents, gradients = case.eager()
    made = _run(forward, case.inputs)
    given, extras = made[: len(results)], made[len(results) :]
    _assert_same(given, results)
    assert len(extras) == saved.extras
    read = [*(case.inputs[i] for i in saved.inputs), *(given[i] for i in saved.results), *extras]
    _assert_same(_run(backward, [*read, *tangents]), gradients)
    assert all(extra.untyped_storage().data_ptr() not in _places(given) for extra in extras)


@pytest.mark.parametrize(
    "name", ["lora", "lora, one input for two", "lora on nf4", "lora on nf4, two wide results"]
)
def test_gradients_are_autograds_where_products_add_in_place_as_on_a_gpu(name, monkeypatch):
    def in_place(total, left, right, alpha=1.0):
        torch.ops.rewriter.add_product_(total, left, right, alpha)
        return total

    monkeypatch.setattr("rewriter.kernels.lora_projection.add_product", in_place)
    test_a_backward_that_computes_again_gives_autograds_gradients(name)
    test_a_backward_that_reads_what_was_saved_gives_autograds_gradients(name)


@torch.no_grad()
def _run(graph: GraphModule, inputs: list) -> list:
    return list(graph(*inputs))


def _assert_same(ours, eager) -> None:
    assert len(ours) == len(eager)
    for mine, theirs in zip(ours, eager, strict=True):
        if theirs is None:
            assert mine is None
        else:
            assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)


def _places(tensors) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in tensors if isinstance(t, Tensor)}


def _products(graph: GraphModule) -> int:
    names = ("mm", "addmm", "bmm")
    return sum(getattr(n.target, "overloadpacket", None) in [getattr(torch.ops.aten, m) for m in names]
               for n in graph.graph.nodes)  # fmt: skip


def test_an_mlps_backward_does_not_compute_the_down_projection_again():
    _, backward = _mlp_case(trained=False).traced(backward_graph)
    # Gate and up again; gradients of their product, and of the input by both.
    assert _products(backward) == 2 + 1 + 2
    _, backward = _mlp_case(trained=True).traced(backward_graph)
    assert _products(backward) == 5 + 3


def test_attention_saves_its_result_and_one_number_a_query():
    signature, (forward, _, saved) = _attention_case(torch.bfloat16).traced(partitioned_graphs)
    assert saved.inputs == (0, 1, 2) and saved.results == (0,) and saved.extras == 1
    (output,) = forward.graph.find_nodes(op="output")
    sums = output.args[0][-1].meta["val"]
    assert tuple(sums.shape) == (1, 4, 6) and sums.dtype == torch.float32


def test_the_graphs_have_no_autograd_left_in_them():
    case = _mlp_case()
    _, (forward, backward) = case.traced(lambda f, s: (forward_graph(f, s), backward_graph(f, s)))
    _, (first, second, _) = case.traced(partitioned_graphs)
    for graph in (forward, backward, first, second):
        targets = {str(n.target) for n in graph.graph.nodes}
        assert not {t for t in targets if "detach" in t or "grad" in t}
        assert not any(r.requires_grad for r in _example_results(graph))


def _example_results(graph: GraphModule) -> list[Tensor]:
    (output,) = graph.graph.find_nodes(op="output")
    return [n.meta["val"] for n in output.args[0] if n is not None]


def test_a_product_in_place_is_parted_out_of_place(monkeypatch):
    # On a GPU the product writes into its first operand; here its own op stands for that.
    def on_any_device(total, left, right, alpha=1.0):
        torch.ops.rewriter.add_product_(total, left, right, alpha)
        return total

    monkeypatch.setattr("rewriter.kernels.lora_projection.add_product", on_any_device)
    case = _lora_case()
    _, ahead = case.traced(forward_graph)
    assert _adds_in_place(ahead) == 1
    # The gradient of the input is added to in place; the result itself is not made again.
    _, again = case.traced(backward_graph)
    assert _adds_in_place(again) == 1 and _products(again) == 5
    _, (forward, backward, saved) = case.traced(partitioned_graphs)
    assert _adds_in_place(forward) == _adds_in_place(backward) == 0
    results, tangents, gradients = case.eager()

    def assert_right():
        made = _run(forward, case.inputs)
        _assert_same(made[:1], results)
        read = [*(case.inputs[i] for i in saved.inputs), *(made[i] for i in saved.results), *made[1:]]
        _assert_same(_run(backward, [*read, *tangents]), gradients)

    assert_right()
    # Parted, each adds in place again what nobody else reads.
    for graph in (forward, backward):
        add_in_place_again(graph)
        assert _adds_in_place(graph) == 1
    assert_right()
    assert add_product is not on_any_device


def test_what_somebody_else_reads_is_not_added_to_in_place():
    def read_twice(total, left, right):
        made = total @ total
        return (torch.addmm(made, left, right), made)

    def given(total, left, right):
        return (torch.addmm(total, left, right),)

    def scaled(total, left, right):
        return (torch.addmm(total @ total, left, right, beta=2),)

    def broadcast(total, left, right):
        return (torch.addmm((total @ total).sum(0), left, right),)

    def itself(total, left, right):
        made = total @ total
        return (torch.addmm(made, made, total),)

    def viewed(total, left, right):
        # In its memory order the view would be none.
        return (torch.addmm(total.t() * 2, left, right).view(-1),)

    for function in (read_twice, given, scaled, broadcast, itself, viewed):
        _, graph = Case(function, [_randn(5, 5), _randn(5, 3), _randn(3, 5)]).traced(forward_graph)
        add_in_place_again(graph)
        assert _adds_in_place(graph) == 0


def _adds_in_place(graph: GraphModule) -> int:
    return sum(n.target is torch.ops.rewriter.add_product_.default for n in graph.graph.nodes)


def test_a_write_to_an_input_cannot_be_parted_and_is_named():
    def writes(x, total):
        torch.ops.aten.add_.Tensor(total, 1.0)
        return (x * total,)

    with pytest.raises(Inseparable, match="writes to an input in place"):
        Case(writes, [_randn(5), _randn(5, grad=False)]).traced(partitioned_graphs)


def test_a_product_whose_size_alone_is_read_is_not_computed_again():
    def part(x, w):
        y = x @ w
        return (y.view(y.shape[0], 2, -1).mul(2.0),)

    fakes = StageFakes(7)
    inputs = [fakes.like(torch.empty(7, 8), 0), fakes.like(torch.empty(8, 4))]
    with tracing(TracingContext(fakes.mode)), fakes.mode:
        graph = backward_graph(part, signature_of(part, inputs, [True, False]))
    products = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)
    assert len(products) == 1


def test_a_view_of_an_input_is_taken_again_and_not_saved():
    def part(x, w):
        y = x.transpose(0, 1).view(-1, 8)
        return (torch.tanh(y @ w),)

    fakes = StageFakes(7)
    inputs = [fakes.like(torch.empty(7, 8).t(), 1), fakes.like(torch.empty(8, 4))]
    with tracing(TracingContext(fakes.mode)), fakes.mode:
        _, _, saved = partitioned_graphs(part, signature_of(part, inputs, [False, True]))
    assert saved.inputs == (0,) and saved.extras == 0


@pytest.mark.parametrize("needs", [[True, False], [False, False]])
def test_a_product_with_a_frozen_weight_is_traced_at_varying_lengths(needs):
    fakes = StageFakes(7)
    inputs = [fakes.like(torch.empty(2, 7, 8), 1), fakes.like(torch.empty(4, 8))]
    with tracing(TracingContext(fakes.mode)), fakes.mode:
        graph = forward_graph(_projected, signature_of(_projected, inputs, needs))
    assert len(graph.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)) == 1


def _projected(x: Tensor, w: Tensor) -> tuple[Tensor]:
    return (F.linear(x, w),)


@pytest.mark.parametrize("name", ["lora on nf4, two wide results", "lora on nf4, a wide input"])
def test_what_was_extended_is_not_saved_and_is_made_where_it_is_read(name, monkeypatch):
    for op in ("dequantize_4bit", "dequantize_4bit_extended"):
        kernel = getattr(torch.ops.rewriter, op)
        monkeypatch.setattr(
            f"rewriter.kernels.lora_projection.{op}", lambda p, *rest, op=kernel: op(*p, *rest)
        )
    wide = "results" in name
    signature, (forward, backward, saved) = CASES[name]().traced(partitioned_graphs)
    (output,) = forward.graph.find_nodes(op="output")
    extras = [n.meta["val"].shape for n in output.args[0][len(signature.results) :]]
    # Both A in one, and x Aᵀ of each.
    shapes = [tuple(map(int, shape)) for shape in extras]
    assert shapes == ([(8, 64), (10, 4), (10, 4)] if wide else [(10, 4)])
    assert _counts(forward) == ([0, 2, 1] if wide else [1, 0, 0])
    assert _counts(backward) == ([0, 2, 0] if wide else [0, 1, 1])
    _, again = CASES[name]().traced(backward_graph)
    assert _counts(again) == _counts(backward)


def _counts(graph: GraphModule) -> list[int]:
    names = ("dequantize_4bit", "dequantize_4bit_extended", "extended")
    ops = [getattr(torch.ops.rewriter, name).default for name in names]
    return [sum(n.target is op for n in graph.graph.nodes) for op in ops]
