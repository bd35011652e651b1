"""The attention pass on small functions: every term of a mask, and every reason to leave a call as it is."""

import pytest
import torch
import torch.nn.functional as F

import rewriter
from rewriter.fusion import apply
from rewriter.kernels.attention_unmasked import causal_attention
from rewriter.passes.attention import attention_pass
from tests.passes import attention_cases as cases
from tests.passes.attention_cases import (
    HEADS,
    TOKENS,
    calls,
    capture,
    masked,
    positions,
    qkv,
    repeat,
    rewritten,
)

CAUSAL = "causal_attention()"
# Each mask, its inputs, and the call that stands for it; {0} and {1} are names of values in the graph.
MASKS = [
    (cases.causal, (), CAUSAL),
    (cases.causal_with_offsets, (), CAUSAL),
    (cases.causal_strict, (), CAUSAL),
    (cases.causal_in_two_dimensions, (), CAUSAL),
    (cases.causal_additive, (), CAUSAL),
    (cases.causal_infinite, (), CAUSAL),
    (cases.one_document, (), CAUSAL),
    (cases.wide_window, (), CAUSAL),
    (cases.window, (), "attention(causal=True, window=5)"),
    (cases.chunks, (), "attention(causal=True, chunk=4)"),
    (cases.chunks_without_padding, (), "attention(causal=True, chunk=4)"),
    (cases.chunks_after_padding, (torch.tensor([3, 0]),), "attention(causal=True, segments=getitem_{n})"),
    (cases.packed, (cases.position_ids(),), "attention(causal=True, segments=number)"),
    (cases.padded, (cases.kept(),), "attention(causal=True, key_mask=to)"),
    (cases.padded_by_view, (cases.kept(),), "attention(causal=True, key_mask=getitem_{n})"),
    (cases.only_padded, (cases.kept(),), "attention(causal=False, key_mask=getitem_{n})"),
    (
        cases.everything,
        (cases.kept(), cases.position_ids()),
        "attention(causal=True, window=5, segments=number, key_mask=to)",
    ),
]
IDS = [mask.__name__ for mask, _, _ in MASKS]


def kept_as_it_was(function, *inputs) -> str:
    """Assert that nothing is rewritten; the reason in the report."""
    new, record = rewritten(function, *inputs)
    assert record.count == 0 and calls(new)[0].startswith("scaled_dot_product_attention")
    (miss,) = record.misses
    return miss.reason


def same_shape_of_text(found: str, wanted: str) -> bool:
    head, _, tail = wanted.partition("{n}")
    return found.startswith(head) and found.endswith(tail)


@pytest.mark.parametrize(("mask", "inputs", "call"), MASKS, ids=IDS)
def test_each_mask_becomes_its_terms_and_no_square_tensor_is_left(mask, inputs, call):
    new, record = rewritten(masked(mask), *qkv(), *inputs)
    assert record.misses == () and record.count == 1
    (found,) = calls(new)
    assert same_shape_of_text(found, call)
    assert cases.square_tensors(new) == []


@pytest.mark.parametrize(("mask", "inputs", "call"), MASKS, ids=IDS)
def test_each_rewrite_gives_the_numbers_and_gradients_of_the_model(mask, inputs, call):
    graph, arguments = capture(masked(mask), *qkv(), *inputs)
    new, _ = apply(attention_pass, graph)
    leaves = [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]
    results = []
    for module in (graph, new):
        (out,) = module(*arguments)
        weights = torch.linspace(-1, 1, out.numel()).view_as(out)
        results.append((out, *torch.autograd.grad((out * weights).sum(), leaves)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("mask", [cases.causal, cases.window])
def test_symbolic_lengths_are_rewritten_too(mask):
    new, record = rewritten(masked(mask), *qkv(), dynamic=True)
    assert record.count == 1
    assert calls(new)[0] in (CAUSAL, "attention(causal=True, window=5)")


def test_lengths_up_to_a_window_share_one_causal_compilation_and_longer_ones_another():
    torch._dynamo.reset()
    eager = masked(cases.window)
    compiled = torch.compile(eager, backend="rewriter", options={"lowering": "eager"}, dynamic=True)
    with rewriter.inspect() as report:
        for tokens in (3, 4, 5, 8, 9, 4, 12):
            q, k, v = qkv(tokens=tokens)
            torch.testing.assert_close(compiled(q, k, v), eager(q, k, v))
    assert len(report.graphs) == 2 and report.counts()["attention"] == 2


def test_grouped_heads_are_read_unrepeated():
    new, _ = rewritten(masked(cases.causal), *qkv())
    (call,) = new.graph.find_nodes(op="call_function", target=causal_attention)
    assert [a.op for a in call.args[:3]] == ["placeholder"] * 3


def test_heads_that_are_tiled_instead_of_repeated_stay():
    def tiled(q, k, v):
        return F.scaled_dot_product_attention(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1), cases.causal(q))

    new, record = rewritten(tiled, *qkv())
    (call,) = new.graph.find_nodes(op="call_function", target=causal_attention)
    assert record.count == 1 and call.args[1].target == "repeat"


def test_keys_repeated_without_the_values_stay_repeated():
    def half(q, k, v):
        return F.scaled_dot_product_attention(q, repeat(k), v, attn_mask=cases.causal(q))

    q, k, _ = qkv()
    new, record = rewritten(half, q, k, torch.randn(q.shape))
    assert record.count == 1 and len(new.graph.find_nodes(op="call_method", target="expand")) == 1


def test_repeats_are_undone_where_there_is_no_mask():
    for is_causal, name in ((True, "causal_attention()"), (False, "full_attention()")):

        def unmasked(q, k, v, is_causal=is_causal):
            return F.scaled_dot_product_attention(q, repeat(k), repeat(v), is_causal=is_causal)

        new, record = rewritten(unmasked, *qkv())
        assert calls(new) == [name] and record.misses == ()


def test_a_call_that_is_as_good_as_ours_is_neither_rewritten_nor_missed():
    def plain(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    _, record = rewritten(plain, *qkv(HEADS))
    assert record.count == 0 and record.misses == ()


def test_dropout_is_kept_under_a_causal_mask():
    def dropped(q, k, v):
        return F.scaled_dot_product_attention(q, repeat(k), repeat(v), cases.causal(q), dropout_p=0.25)

    new, _ = rewritten(dropped, *qkv())
    assert calls(new) == ["causal_attention(dropout=0.25)"]


def test_dropout_under_any_other_mask_is_left():
    def dropped(q, k, v):
        return F.scaled_dot_product_attention(q, repeat(k), repeat(v), cases.window(q), dropout_p=0.25)

    assert "dropout 0.25" in kept_as_it_was(dropped, *qkv())


def _future(q):
    _, row, column = positions(q)
    return column <= row + 1


def _either(q):
    _, row, column = positions(q)
    return (column <= row) | (column < 3)


def _both_ways(q):
    _, row, column = positions(q)
    return column > row - 4


def _written(q):
    mask = torch.tril(torch.ones(q.shape[2], q.shape[2])).bool() & cases.causal(q)
    mask[..., 0] = True
    return mask


def _later_written(q):
    mask = cases.causal(q).clone()
    mask[0, :, :, 0] = False
    return mask


def _swapped(q):
    _, row, column = positions(q)
    return row <= column


def _heads(q):
    _, row, column = positions(q)
    return (column <= row) & (torch.arange(HEADS)[None, :, None, None] > 0)


def _other_documents(q):
    batch, row, column = positions(q)
    number = cases.documents(torch.arange(q.shape[2]).expand(q.shape[0], -1) * 2)
    return (column <= row) & (number[batch, row] == number[batch, column])


def _unequal_sides(q):
    _, row, column = positions(q)
    return (column <= row) & (column // 4 == row // 3)


def _mixed_positions(q):
    _, row, column = positions(q)
    shift = torch.arange(q.shape[2])[None, None, None, :]
    return (column <= row) & ((column * 3 + shift) // 5 == (row * 3 + shift) // 5)


def _additive_small(q):
    return torch.where(cases.causal(q), 0.0, -100.0)


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (_future, "up to +1 positions"),
        (_either, "is or_"),
        (_both_ways, "is a window without being causal"),
        (_written, "written in place"),
        (_later_written, "written in place"),
        (_swapped, "is a window without being causal"),
        (_heads, "is gt"),
        (_unequal_sides, "is eq"),
        (_mixed_positions, "is eq"),
        (_additive_small, "is where"),
    ],
)
def test_a_mask_with_an_unproven_term_stays_and_the_report_says_which(mask, reason):
    found = kept_as_it_was(masked(mask), *qkv())
    assert reason in found and ("test_attention.py:" in found or "attention_cases.py:" in found)


def test_positions_that_jump_are_never_taken_for_one_document():
    new, _ = rewritten(masked(_other_documents), *qkv())
    assert "segments=number" in calls(new)[0]


def test_a_mask_that_is_an_input_stays():
    given = torch.ones(TOKENS, TOKENS, dtype=torch.bool)
    assert "is an input" in kept_as_it_was(masked(lambda q, mask: mask), *qkv(), given)


def test_queries_and_keys_of_two_lengths_stay():
    def longer(q, k, v):
        mask = torch.arange(k.shape[2])[None, :] <= torch.arange(q.shape[2])[:, None]
        return F.scaled_dot_product_attention(q, repeat(k), repeat(v), attn_mask=mask)

    assert "no common positions" in kept_as_it_was(longer, *qkv(keys=TOKENS + 4))


def test_heads_too_large_for_the_kernel_stay():
    assert "exceeds 256" in kept_as_it_was(masked(cases.window), *qkv(dim=264))


def eager_attention(q, k, v, mask, p=0.0):
    weights = torch.matmul(q, repeat(k).transpose(2, 3)) * 0.3 + mask
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype)
    weights = F.dropout(weights, p=p, training=True)
    return torch.matmul(weights, repeat(v)), weights


def softcapped_attention(q, k, v, mask):
    weights = torch.matmul(q, repeat(k).transpose(2, 3)) * 0.3
    weights = torch.tanh(weights / 5.0) * 5.0 + mask
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(F.dropout(weights, p=0.0, training=True), repeat(v))


def sink_attention(q, k, v, mask, sinks):
    weights = torch.matmul(q, repeat(k).transpose(2, 3)) * 0.3 + mask
    sinks = sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)
    weights = torch.cat([weights, sinks], dim=-1)
    weights = weights - weights.max(dim=-1, keepdim=True).values
    weights = F.softmax(weights, dim=-1, dtype=weights.dtype)[..., :-1]
    return torch.matmul(F.dropout(weights, p=0.0, training=True).to(v.dtype), repeat(v))


EAGER = [
    (lambda q, k, v: eager_attention(q, k, v, cases.causal_additive(q))[0], CAUSAL),
    (
        lambda q, k, v: softcapped_attention(q, k, v, cases.causal_additive(q)),
        "attention(causal=True, softcap=5.0)",
    ),
    (
        lambda q, k, v: sink_attention(q, k, v, cases.causal_additive(q), q[0, :, 0, 0]),
        "attention(causal=True, sinks=getitem_{n})",
    ),
]


@pytest.mark.parametrize(("function", "call"), EAGER, ids=["plain", "softcap", "sinks"])
def test_attention_written_out_by_hand_is_rewritten(function, call):
    graph, arguments = capture(function, *qkv())
    new, record = apply(attention_pass, graph)
    assert record.count == 1 and record.misses == ()
    assert same_shape_of_text(calls(new)[0].replace("sinks=sinks", "sinks=getitem_0"), call)
    assert cases.square_tensors(new) == []
    leaves = [a for a in arguments if a.requires_grad]
    results = [(o := m(*arguments)[0], *torch.autograd.grad(o.square().sum(), leaves)) for m in (graph, new)]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_weights_that_the_model_also_returns_keep_their_attention():
    def both(q, k, v):
        return eager_attention(q, k, v, cases.causal_additive(q))

    _, record = rewritten(both, *qkv())
    assert record.count == 0 and "is also returned" in record.misses[0].reason


def test_dropout_of_weights_written_out_by_hand_is_left_unless_causal():
    def dropped(q, k, v, mask):
        return eager_attention(q, k, v, mask(q), p=0.5)[0]

    new, _ = rewritten(lambda q, k, v: dropped(q, k, v, cases.causal_additive), *qkv())
    assert calls(new) == ["causal_attention(dropout=0.5)"]
    windowed = lambda q: torch.where(cases.window(q), 0.0, float("-inf"))  # noqa: E731
    _, record = rewritten(lambda q, k, v: dropped(q, k, v, windowed), *qkv())
    assert record.count == 0 and "dropout 0.5" in record.misses[0].reason


def test_the_softmax_of_a_router_is_no_miss():
    def route(x):
        return torch.softmax(x, dim=-1)

    _, record = rewritten(route, torch.randn(3, 5))
    assert record.misses == ()


def test_autocast_inside_the_graph_is_seen():
    def inside(q, k, v):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.scaled_dot_product_attention(q, repeat(k), repeat(v), attn_mask=cases.window(q))

    new, record = rewritten(inside, *qkv())
    assert record.count == 1
    assert new(*capture(inside, *qkv())[1])[0].dtype == torch.bfloat16
