"""A gate's forward and backward in one graph become one launch, with the numbers of two."""

import operator

import pytest
import torch
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import rewriter.lower
import rewriter.memory.stage_graphs
from rewriter.gate_gradients import join_gate_gradients
from rewriter.kernels import gated_activation
from rewriter.memory.costs import graph_cost
from rewriter.memory.fakes import StageFakes
from tests.families import build
from tests.memory.budgeted import batches_of, compiled, steps
from tests.memory.test_costs import Machine

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels take tensors of a CPU in Triton's interpreter alone"
)
ops, aten = torch.ops.rewriter, torch.ops.aten
TOKENS, HIDDEN, WIDTH, RANK = 5, 8, 12, 2


def gradients_of(dh, gate, up, wanted=(True, True)):
    return ops.gated_activation_backward(dh, gate, up, "silu", *wanted)


def adapter_and_gate(dy, gate, up, weight, small):
    """Of a down projection with an adapter: the gradients of the adapter, of gate and of up."""
    h = ops.gated_activation(gate, up, "silu")
    d_adapter = small.t() @ h
    return d_adapter, *gradients_of(dy @ weight, gate, up)


def packed(dy, gate, up, weight, small):
    both = torch.cat((gate, up), -1)
    h = ops.gated_activation_packed(both, "silu", "gate_up")
    d_adapter = small.t() @ h
    return d_adapter, ops.gated_activation_packed_backward(dy @ weight, both, "silu", "gate_up")


def backward_first(dy, gate, up, weight, small):
    found = gradients_of((dy @ weight).view(1, *gate.shape)[0], gate, up)
    return small.t() @ ops.gated_activation(gate, up, "silu"), *found


def shape_alone(dy, gate, up, weight, small):
    """As LoRA's backward computes again: its scaled product is of the shape of what the activation makes."""
    down = ops.gated_activation(gate, up, "silu") @ weight.t()[:, :RANK]
    b = weight.t()[:HIDDEN, :RANK]
    d_down = torch.addmm(down, dy, b, beta=0, alpha=2.0)
    return dy.t() @ down, *gradients_of(dy @ weight + d_down @ b.t() @ weight, gate, up)


def a_product_without_rows(dy, gate, up, weight, small):
    """Nothing of it could stand for the sum whose shape it has."""
    down = ops.gated_activation(gate, up, "silu")[:, :RANK]
    nothing = torch.addmm(down, dy[:, :0], weight[:0, :RANK], beta=0, alpha=2.0)
    return dy.t() @ down, *gradients_of(dy @ weight + nothing @ small.t() @ up, gate, up)


def added_in_place(dy, gate, up, weight, small):
    h = ops.gated_activation(gate, up, "silu")
    dh = dy @ weight
    d_adapter = small.t() @ h
    ops.add_product_(dh, small, small.t() @ gate, 1.0)
    return d_adapter, *gradients_of(dh, gate, up)


def the_gradient_is_made_of_it(dy, gate, up, weight, small):
    h = ops.gated_activation(gate, up, "silu")
    return h.sum(0), *gradients_of(dy @ weight * h, gate, up)


def another_gate(dy, gate, up, weight, small):
    return small.t() @ ops.gated_activation(gate + 1, up, "silu"), *gradients_of(dy @ weight, gate, up)


def another_activation(dy, gate, up, weight, small):
    return small.t() @ ops.gated_activation(gate, up, "gelu"), *gradients_of(dy @ weight, gate, up)


def no_activation(dy, gate, up, weight, small):
    return gradients_of(dy @ weight, gate, up)


def no_gradients(dy, gate, up, weight, small):
    return small.t() @ ops.gated_activation(gate, up, "silu"), dy @ weight


def one_gradient(dy, gate, up, weight, small):
    d_gate, _ = gradients_of(dy @ weight, gate, up, (True, False))
    return small.t() @ ops.gated_activation(gate, up, "silu"), d_gate


def a_gradient_that_is_read_again(dy, gate, up, weight, small):
    dh = dy @ weight
    found = gradients_of(dh, gate, up)
    return small.t() @ ops.gated_activation(gate, up, "silu"), dh.view(-1).sum(), *found


def a_gradient_of_the_callers(dy, gate, up, weight, small):
    return small.t() @ ops.gated_activation(gate, up, "silu"), *gradients_of(up.view(up.shape), gate, gate)


def a_gradient_of_other_strides(dy, gate, up, weight, small):
    dh = (weight.t() @ dy.t()).t()
    return small.t() @ ops.gated_activation(gate, up, "silu"), *gradients_of(dh, gate, up)


def a_write_to_what_was_read(dy, gate, up, weight, small):
    h = ops.gated_activation(gate, up, "silu")
    total = small * 2
    d_adapter = total.t() @ h
    ops.add_product_(total, dy, weight[:, :RANK], 1.0)
    return d_adapter, total, *gradients_of(dy @ weight, gate, up)


def inputs(of=torch.randn):
    torch.manual_seed(0)
    shapes = (TOKENS, HIDDEN), (TOKENS, WIDTH), (TOKENS, WIDTH), (HIDDEN, WIDTH), (TOKENS, RANK)
    return [of(*shape) for shape in shapes]


def with_gates_joined(function, functional) -> tuple[GraphModule, bool]:
    """Its graph, and whether something was joined; the numbers are the same bits."""
    graph = make_fx(function, tracing_mode="symbolic")(*inputs())
    before = graph(*inputs())
    join_gate_gradients(graph.graph, functional=functional)
    graph.graph.lint()
    graph.recompile()
    for ours, apart in zip(graph(*inputs()), before, strict=True):
        assert torch.equal(ours, apart)
    return graph, "with_result_" in graph.code


def called(graph: GraphModule) -> list[str]:
    """Products and our ops, in their order."""
    targets = [n.args[0] if n.target is torch.ops.higher_order.auto_functionalized else n.target
               for n in graph.graph.nodes if n.op == "call_function"]  # fmt: skip
    names = [str(t).removesuffix(".default") for t in targets if t is not operator.getitem]
    return [n.rpartition(".")[2] for n in names if n.startswith("rewriter") or n == "aten.mm"]


@pytest.mark.parametrize("functional", [True, False])
def test_an_activation_and_its_gradients_become_one_launch_and_what_reads_it_follows(functional):
    graph, _ = with_gates_joined(adapter_and_gate, functional)
    assert called(graph) == ["mm", "gated_activation_backward_with_result_", "mm"]
    graph, _ = with_gates_joined(packed, functional)
    assert called(graph) == ["mm", "gated_activation_packed_backward_with_result_", "mm"]


@pytest.mark.parametrize("functional", [True, False])
@pytest.mark.parametrize("function", [backward_first, shape_alone, added_in_place])
def test_they_are_joined(function, functional):
    assert with_gates_joined(function, functional)[1]


@pytest.mark.parametrize(
    "function",
    [the_gradient_is_made_of_it, another_gate, another_activation, no_activation, no_gradients, one_gradient,
     a_gradient_that_is_read_again, a_gradient_of_the_callers, a_gradient_of_other_strides,
     a_write_to_what_was_read, a_product_without_rows],
)  # fmt: skip
def test_they_stay_apart(function):
    assert not with_gates_joined(function, False)[1]


def test_one_launch_costs_two_reads_less_and_no_more_memory():
    fakes = StageFakes(TOKENS)
    given = [fakes.like(x, None if i == 3 else 0) for i, x in enumerate(inputs())]
    with fakes.mode:
        graph = make_fx(adapter_and_gate)(*given)
    apart = graph_cost(graph, fakes, TOKENS, Machine())
    join_gate_gradients(graph.graph, functional=False)
    joined = graph_cost(graph, fakes, TOKENS, Machine())
    assert apart.seconds - joined.seconds == pytest.approx(2 * 4 * TOKENS * WIDTH / 1000)
    assert joined.peak_bytes <= apart.peak_bytes


@pytest.mark.parametrize(("layers", "budget"), [(1, None), (2, "1MB")])
def test_a_lora_models_gradients_are_the_same_bits(layers, budget, monkeypatch):
    # Its gates are the kernels' ops, as on a GPU.
    monkeypatch.setattr(gated_activation, "gated_activation_reference", ops.gated_activation)
    launches = []

    def counted(graph, functional):
        join_gate_gradients(graph, functional=functional)
        launches.append(sum("with_result_" in str((n.target, n.args)) for n in graph.nodes))

    def gradients(join):
        torch._dynamo.reset()
        for module in (rewriter.lower, rewriter.memory.stage_graphs):
            monkeypatch.setattr(module, "join_gate_gradients", join)
        return steps(compiled(build("llama", layers=layers, lora=True), budget), batches_of()[:1])[1]

    ours, apart = gradients(counted), gradients(lambda graph, functional: None)
    assert any(launches)
    assert ours.keys() == apart.keys() and all(torch.equal(ours[name], apart[name]) for name in apart)
