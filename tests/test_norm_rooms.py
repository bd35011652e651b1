"""Norms that write rows with room for an adapter's columns: the bits of a copy, and no copy."""

import operator

import pytest
import torch
from torch._dynamo.backends import debugging
from torch._inductor.utils import fresh_inductor_cache, run_and_get_code
from torch.fx import Graph, GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import rewriter.lower
import rewriter.memory.stage_graphs
from rewriter.kernels import layer_norm as _defines_another_op  # noqa: F401
from rewriter.kernels import rms_norm
from rewriter.memory.costs import graph_cost
from rewriter.memory.fakes import StageFakes
from rewriter.norm_rooms import leave_rooms
from rewriter.options import Options
from tests.families import build
from tests.memory.test_costs import Machine

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels take tensors of a CPU in Triton's interpreter alone"
)
ops, aten = torch.ops.rewriter, torch.ops.aten
BATCH, TOKENS, HIDDEN, RANK, ROOM = 2, 5, 24, 3, 8


def normed(x, dy, weight):
    return ops.add_rms_norm(x, dy, weight, 1e-5, 0.0, True, None)


def beside(rows, a):
    """The rows with their columns, and the columns."""
    u = torch.addmm(rows[:, :1], rows, a.t(), beta=0, alpha=0.5)
    return ops.extended(rows, [u], ROOM), u


def forward(x, dy, weight, a, wide_weight):
    """As gate and up have it, and what is saved behind the result."""
    y, h, rstd = normed(x, dy, weight)
    rows = y.view(-1, HIDDEN)
    wide, u = beside(rows, a)
    return wide @ wide_weight, h, rstd, u, u.t() @ rows, rows


def backward(x, dy, weight, a, wide_weight):
    """As down has it: the gradient of its result is that of the residual, too."""
    rstd = x.square().mean(-1)
    dx, _ = ops.rms_norm_backward(dy, x, x, weight, rstd, 0.0, True, False)
    wide, v = beside(dx.view(-1, HIDDEN), a)
    more, _ = ops.rms_norm_backward(wide[:, :HIDDEN].view(x.shape), dx, x, weight, rstd, 0.0, True, False)
    return wide @ wide_weight, more, v


def without_views(x, dy, weight, a, wide_weight):
    y, _ = ops.rms_norm(x[0], weight, 1e-5, 0.0, True, None)
    wide, _ = beside(y, a)
    return wide * 1, y.sum(0), y.t() @ wide


def read_first_and_later(x, dy, weight, a, wide_weight):
    y, h, _ = normed(x, dy, weight)
    turned = y.view(-1, HIDDEN).t()
    wide, u = beside(y.view(-1, HIDDEN), a)
    return turned @ wide, y + h, u, y.view(-1, HIDDEN) @ a.t()


FUNCTIONS = [forward, backward, without_views, read_first_and_later]


def returned(x, dy, weight, a, wide_weight):
    y, _, _ = normed(x, dy, weight)
    wide, _ = beside(y.view(-1, HIDDEN), a)
    return wide @ wide_weight, y


def a_view_returned(x, dy, weight, a, wide_weight):
    y, _, _ = normed(x, dy, weight)
    rows = y.view(-1, HIDDEN)
    wide, _ = beside(rows, a)
    return wide @ wide_weight, rows[1:]


def the_copy_returned(x, dy, weight, a, wide_weight):
    y, _, _ = normed(x, dy, weight)
    return (beside(y.view(-1, HIDDEN), a)[0],)


def an_input(x, dy, weight, a, wide_weight):
    return (beside(x.view(-1, HIDDEN), a)[0] @ wide_weight,)


def another_result(x, dy, weight, a, wide_weight):
    _, h, _ = normed(x, dy, weight)
    return (beside(h.view(-1, HIDDEN), a)[0] @ wide_weight,)


def another_op(x, dy, weight, a, wide_weight):
    y, _, _ = ops.layer_norm(x, weight, None, 1e-5, 0.0, None)
    return (beside(y.view(-1, HIDDEN), a)[0] @ wide_weight,)


def cast_since(x, dy, weight, a, wide_weight):
    y, _, _ = normed(x, dy, weight)
    wide, _ = beside(y.view(-1, HIDDEN).half(), a.half())
    return (wide @ wide_weight.half(),)


def other_rows(x, dy, weight, a, wide_weight):
    y, _, _ = normed(x, dy, weight)
    wide, _ = beside(y.view(-1, 2 * HIDDEN), a.repeat(1, 2))
    return (wide.sum(0),)


def heads(x, dy, weight, a, wide_weight):
    """Rows with gaps could be parted, but not every view of a part could be taken."""
    y, _, _ = normed(x, dy, weight)
    wide, _ = beside(y.view(-1, HIDDEN), a)
    return wide @ wide_weight, y.view(BATCH, TOKENS, 2, -1).sum(1)


def parted(x, dy, weight, a, wide_weight):
    y, _, _ = normed(x, dy, weight)
    wide, _ = beside(y.view(-1, HIDDEN), a)
    first, second = y.split([1, BATCH - 1])
    return wide @ wide_weight, first.view(-1).sum(), second.sum()


def written(x, dy, weight, a, wide_weight):
    y, _, _ = normed(x, dy, weight)
    rows = y.view(-1, HIDDEN)
    wide, u = beside(rows, a)
    ops.add_product_(rows, u, a, 1.0)
    return wide @ wide_weight, rows.sum(0)


def the_copy_written(x, dy, weight, a, wide_weight):
    y, _, _ = normed(x, dy, weight)
    wide, u = beside(y.view(-1, HIDDEN), a)
    ops.add_product_(wide, u, wide_weight.t()[:RANK], 1.0)
    return wide.sum(0), y.sum(0)


@torch.library.custom_op("test_norm_rooms::first_bytes", mutates_args=())
def first_bytes(x: torch.Tensor) -> torch.Tensor:
    """As a kernel of another library may, it takes the strides for granted."""
    return torch.as_strided(x, (x.numel(),), (1,)).sum().clone()


first_bytes.register_fake(lambda x: x.new_empty(()))


def given_to_others(x, dy, weight, a, wide_weight):
    y, _, _ = normed(x, dy, weight)
    wide, _ = beside(y.view(-1, HIDDEN), a)
    return wide @ wide_weight, first_bytes(y)


LEFT = [returned, a_view_returned, the_copy_returned, an_input, another_result, another_op, cast_since,
        other_rows, heads, parted, written, the_copy_written, given_to_others]  # fmt: skip


def inputs():
    torch.manual_seed(0)
    shapes = (BATCH, TOKENS, HIDDEN), (BATCH, TOKENS, HIDDEN), (HIDDEN,), (RANK, HIDDEN), (HIDDEN + ROOM, 7)
    return [torch.randn(shape) for shape in shapes]


def with_rooms(function, functional, returned=None) -> GraphModule:
    """Its graph; the numbers are the same bits."""
    graph = make_fx(function, tracing_mode="fake")(*inputs())
    before = graph(*inputs())
    leave_rooms(graph.graph, functional=functional, returned=returned)
    graph.graph.lint()
    graph.recompile()
    for ours, copied in zip(graph(*inputs()), before, strict=True):
        assert torch.equal(ours, copied)
    return graph


def copies(graph: GraphModule) -> int:
    return len(graph.graph.find_nodes(op="call_function", target=ops.extended.default))


@pytest.mark.parametrize("functional", [True, False])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_norm_leaves_the_room_that_a_copy_made(function, functional):
    # Of the forward, the last three are saved for a backward.
    graph = with_rooms(function, functional, 3 if function is forward else None)
    assert not copies(graph) and "fill_columns_" in graph.code


@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_is_made_before_the_room_is_filled_is_not_read_afterwards(function):
    graph = with_rooms(function, True, 3 if function is forward else None)
    (fill,) = graph.graph.find_nodes(op="call_function", target=torch.ops.higher_order.auto_functionalized)
    graph.graph.eliminate_dead_code()
    old = [fill.kwargs["wide"]]
    for node in old:
        views = [n for n in node.users if n.target in (aten.slice.Tensor, aten.view.default, aten.t.default)]
        assert all(reader <= fill for reader in node.users), node.users
        old += views
    assert fill.kwargs["wide"].target is operator.getitem and len(old) > 1


@pytest.mark.parametrize("functional", [True, False])
@pytest.mark.parametrize("function", LEFT)
def test_rows_that_may_have_no_gaps_are_copied(function, functional):
    assert copies(with_rooms(function, functional)) == 1


def test_rows_that_are_saved_for_a_backward_may_have_gaps_and_results_may_not():
    assert [copies(with_rooms(forward, True, count)) for count in (5, 6, None)] == [0, 1, 1]


def test_a_step_costs_a_copy_less():
    fakes = StageFakes(TOKENS)
    given = [fakes.like(x, 1 if i < 2 else None) for i, x in enumerate(inputs())]
    with fakes.mode:
        graph = make_fx(lambda *tensors: forward(*tensors)[:-1])(*given)
    copied = graph_cost(graph, fakes, TOKENS, Machine())
    leave_rooms(graph.graph, functional=False)
    assert not copies(graph)
    ours = graph_cost(graph, fakes, TOKENS, Machine())
    rows = 4 * BATCH * TOKENS
    # The norm writes the room, the copy read and wrote all; both read and write the columns.
    spared = rows * (HIDDEN + RANK + HIDDEN + ROOM) - rows * ROOM - 2 * rows * RANK
    assert copied.seconds - ours.seconds == pytest.approx(spared / 1000)
    assert ours.peak_bytes < copied.peak_bytes


@pytest.mark.parametrize("staged", [False, True])
def test_inductor_fills_the_room_where_the_norm_left_it(staged):
    def product(*tensors):
        return forward(*tensors)[:2]

    def run(*tensors):
        module = make_fx(product, tracing_mode="fake")(*tensors)
        if staged:
            leave_rooms(module.graph, functional=False)
            module.recompile()
        return rewriter.lower.lower(module, tensors, Options())(*tensors)

    with fresh_inductor_cache(), torch.no_grad():
        found, code = run_and_get_code(run, *inputs())
    for ours, true in zip(found, product(*inputs()), strict=True):
        assert torch.equal(ours, true)
    assert "rewriter.fill_columns_.default(buf" in code[0] and "rewriter.extended" not in code[0]
    # Nothing is copied: it has no kernel of its own.
    assert "async_compile.cpp" not in code[0]


def test_half_a_llamas_layer_gives_the_same_bits_forward_and_backward(monkeypatch):
    # Its norms are the kernels' ops, as on a GPU.
    monkeypatch.setattr(rms_norm, "rms_norm_reference", lambda *given: ops.rms_norm(*given)[0])
    monkeypatch.setattr(rms_norm, "add_rms_norm_reference", lambda *given: ops.add_rms_norm(*given)[:2])
    left, compared = [], []

    def counted(half, **case):
        copied = Graph()
        copied.output(copied.graph_copy(half.graph, {}))
        leave(half, **case)
        left.append((half, GraphModule(half, copied)))

    def both(half, given):
        ours, copied = (nop(graph, given) for graph in (half, left[-1][1]))
        assert half is left[-1][0]

        def run(tensors):
            true = copied(list(tensors))
            compared.append(len(true))
            torch.testing.assert_close(ours(tensors), true, rtol=0, atol=0)
            return true

        run._boxed_call = True
        return run

    leave, nop = rewriter.lower._leave_rooms, debugging.boxed_nop
    monkeypatch.setattr(rewriter.lower, "_leave_rooms", counted)
    monkeypatch.setattr(debugging, "boxed_nop", both)
    torch._dynamo.reset()
    model = build("llama", layers=1, lora=True, nf4=True, dtype=torch.bfloat16, lora_dtype=torch.bfloat16)
    decoder = model.get_base_model().model

    @torch.compile(backend="rewriter", options={"lowering": "eager"}, dynamic=True)
    def second_half(x, residual):
        h = x + residual
        return decoder.norm(h + decoder.layers[0].mlp(decoder.layers[0].post_attention_layernorm(h)))

    for length in (9, 12):
        x, residual = torch.randn(2, 2, length, 64, dtype=torch.bfloat16).requires_grad_()
        second_half(x, residual).sum().backward()
    # Before gate and up, and before down in the backward, whatever the length.
    assert [(copies(half), copies(copied)) for half, copied in left] == [(0, 1), (0, 1)]
    assert len(compared) == 4
