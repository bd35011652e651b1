"""LoRA whose update is added by the base's own product: the same results, and nothing more is kept."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import min_cut_rematerialization_partition
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.compile_fx import compile_fx

from rewriter.kernels import lora_gradients, lora_products, lora_projection
from rewriter.kernels.extended_product import extended, room
from rewriter.kernels.lora_linear import lora_linears
from tests.accuracy import assert_as_accurate
from tests.kernels.test_lora_linear import (
    SCALE,
    TOKENS,
    K,
    Projection,
    Recorder,
    compare,
    device,
    fused,
    randn,
    through,
)

BF16 = torch.bfloat16
# Extended, their products have inner dimensions of 192 and 64.
WIDE, NARROW = 2 * K, 40


@pytest.fixture
def taken(monkeypatch):
    """What was extended since: the inner dimension, and the columns that it got."""
    found = []

    def recording(x, columns, room):
        found.append((x.shape[1], sum(c.shape[1] for c in columns)))
        return extended(x, columns, room)

    for module in (lora_products, lora_gradients):
        monkeypatch.setattr(module, "extended", recording)
    return found


def half(n, **settings):
    return Projection(n, **{"kind": "nested", "adapter": BF16, "bias": False, **settings})


def x16(dtype=BF16, grad=True):
    return randn(*TOKENS, K, dtype=dtype, grad=grad)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("r", [8, 5])
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("kind", ["nf4", "nested"])
def test_a_result_wider_than_its_input_is_as_accurate_as_pefts(kind, dtype, r, bias, taken):
    compare([half(WIDE, kind=kind, dtype=dtype, adapter=dtype, r=r, bias=bias)], x16(dtype))
    assert taken == [(K, r)]


@pytest.mark.parametrize("r", [8, 5])
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_an_input_wider_than_its_result_gets_as_accurate_a_gradient(dtype, r, taken):
    compare([half(NARROW, dtype=dtype, adapter=dtype, r=r)], x16(dtype))
    assert taken == [(NARROW, r)]


def test_adapters_in_fp32_under_autocast_are_rounded_as_autocast_does(taken):
    projections = [half(n, adapter=torch.float32) for n in (WIDE, WIDE + 32)]
    compare(projections, x16(), autocast=BF16)
    compare([half(NARROW, adapter=torch.float32)], x16(), autocast=BF16)
    assert taken == [(K, 16), (NARROW, 8)]


@pytest.mark.parametrize(
    "sizes",
    [
        ((WIDE, 8), (WIDE, 8)),
        ((WIDE, 5), (3 * K, 8)),
        ((WIDE, 8), (WIDE, None)),
        ((96, 8), (WIDE, 4), (WIDE, 8)),
    ],
    ids=["two", "odd ranks", "one without an adapter", "one too narrow"],
)
def test_projections_of_one_input_share_its_copy(sizes, taken):
    compare([half(n, r=r) for n, r in sizes], x16())
    assert taken == [(K, sum(r for n, r in sizes if r and n >= WIDE))]


def test_projections_whose_scales_differ_are_added_one_by_one(taken):
    projections, x = [half(WIDE), half(WIDE)], x16()
    columns = zip(*((p.weight, p.bias, p.a, p.b) for p in projections), strict=True)
    ours = lora_linears(x, *columns, (SCALE, 2 * SCALE))
    assert not taken
    torch.testing.assert_close(ours[0], projections[0].eager(x), rtol=2e-2, atol=5e-2)
    assert (ours[1] - projections[1].eager(x)).abs().max() > 0.1


@pytest.mark.parametrize("shared", [False, True])
def test_an_input_after_dropout_has_its_columns_too(shared, taken):
    dropped = [randn(*TOKENS, K, dtype=BF16), None if shared else randn(*TOKENS, K, dtype=BF16)]
    compare([half(WIDE), half(WIDE, r=4)], x16(), dropped)
    compare([half(NARROW)], x16(), dropped[:1])
    assert taken == [(K, 12)]


def test_a_frozen_input_gets_no_gradient_and_its_adapters_do(taken):
    compare([half(WIDE), half(WIDE)], x16(grad=False))
    compare([half(NARROW)], x16(grad=False))
    assert taken == [(K, 16)]


def test_frozen_adapters_hand_the_gradient_through(taken):
    projection = half(NARROW)
    projection.a.requires_grad_(False)
    projection.b.requires_grad_(False)
    compare([projection], x16())
    assert taken == [(NARROW, 8)]


@pytest.mark.parametrize(
    "projections, x",
    [
        ([half(WIDE - 1)], x16()),
        ([half(WIDE, kind="dense")], x16()),
        ([half(WIDE, adapter=torch.float32)], x16()),
        ([half(WIDE, dtype=torch.float32, adapter=torch.float32)], x16(torch.float32)),
        ([half(WIDE, r=None)], x16()),
        ([half(NARROW), half(NARROW)], x16()),
        ([half(WIDE, r=r) for r in (200, 57)], x16()),
    ],
    ids=["narrow", "dense", "fp32 adapters", "fp32", "no adapter", "two narrow ones", "too many columns"],
)
def test_what_would_not_pay_is_left(projections, x, taken):
    compare(projections, x)
    assert not taken


@pytest.mark.parametrize("n", [WIDE, NARROW])
def test_a_token_that_is_nan_stays_alone(n, taken):
    projections = [half(n, r=r) for r in ((8, 5) if n == WIDE else (8,))]
    x, gradient = x16(), randn(*TOKENS, n, dtype=BF16, grad=False)
    clean = [*fused(x, projections), *torch.autograd.grad(fused(x, projections)[0], x, gradient)]
    with torch.no_grad():
        x[1, 3] = torch.nan
    gradient[1, 3] = torch.nan
    ours = fused(x, projections)
    seen = [*ours, *torch.autograd.grad(ours[0], x, gradient)]
    others = torch.ones(TOKENS, dtype=torch.bool, device=device)
    others[1, 3] = False
    for before, after in zip(clean, seen, strict=True):
        torch.testing.assert_close(after[others], before[others], rtol=0, atol=0)
        assert after[1, 3].isnan().all()
    assert taken


@pytest.mark.parametrize("scale", [16.0, 24.0, -24.0, 0.75, 0.0])
def test_a_scale_overflows_no_sooner_than_in_pefts_order(scale, taken):
    """In fp16, where ``x Aᵀ`` is within a factor of two of what overflows."""
    projection, x = half(WIDE, dtype=torch.float16, adapter=torch.float16), x16(torch.float16)
    with torch.no_grad():
        projection.a.mul_(3e4 / F.linear(x, projection.a).abs().max())
        projection.b.mul_(1e-4)
    sources = [x, projection.a, projection.b]
    upstream = randn(*TOKENS, WIDE, dtype=torch.float16, grad=False, scale=1e-3)

    def eager(x, a, b, weight):
        return F.linear(x, weight) + F.linear(F.linear(x, a), b) * scale

    exact = [t.detach().double().requires_grad_() for t in sources]
    columns = ((projection.weight,), (None,), (projection.a,), (projection.b,), (scale,))
    results = (
        (lora_linears(x, *columns)[0], sources),
        (eager(*sources, projection.dense), sources),
        (eager(*exact, projection.dense.double()), exact),
    )
    outcomes = [[y, *torch.autograd.grad(y, ts, upstream.to(y.dtype))] for y, ts in results]
    for i, values in enumerate(zip(*outcomes, strict=True)):
        assert_as_accurate(*values, name=f"result {i}")
    assert taken


@pytest.mark.parametrize("shape", [(0, K), (K,), (1, 1, K)])
def test_inputs_without_or_with_single_rows(shape):
    for n in (WIDE, NARROW):
        projection, x = half(n), randn(*shape, dtype=BF16)
        ours, eager = fused(x, [projection])[0], projection.eager(x)
        torch.testing.assert_close(ours, eager, rtol=2e-2, atol=2e-2)
        (gradient,) = torch.autograd.grad(ours.sum(), x)
        torch.testing.assert_close(gradient, torch.autograd.grad(eager.sum(), x)[0], rtol=5e-2, atol=5e-2)


def test_expanded_gradients_and_transposed_inputs_are_as_good():
    for n in (WIDE, NARROW):
        projection, x = half(n), randn(K, 19, 2, dtype=BF16, grad=False).permute(2, 1, 0).requires_grad_()
        ours, eager = fused(x, [projection])[0], projection.eager(x)
        torch.testing.assert_close(ours, eager, rtol=2e-2, atol=2e-2)
        (gradient,) = torch.autograd.grad(ours.sum(), x)
        torch.testing.assert_close(gradient, torch.autograd.grad(eager.sum(), x)[0], rtol=5e-2, atol=5e-2)


def with_kernels(monkeypatch):
    """The ops themselves in the graph, as on a GPU."""
    for name in ("dequantize_4bit", "dequantize_4bit_extended"):
        op = getattr(torch.ops.rewriter, name)
        monkeypatch.setattr(lora_projection, name, lambda packed, *rest, op=op: op(*packed, *rest))


def saved_by(graph):
    (output,) = graph.graph.find_nodes(op="output")
    return [n.meta["val"] for n in output.args[0] if isinstance(n, fx.Node)]


@pytest.mark.parametrize("kernels", [False, True], ids=["references", "kernels"])
@pytest.mark.parametrize("sizes", [(WIDE, WIDE), (NARROW,)], ids=["wide", "narrow"])
def test_neither_an_extended_weight_nor_an_extended_input_is_kept(sizes, kernels, monkeypatch):
    if kernels:
        with_kernels(monkeypatch)
    recorder = Recorder()
    compiler = aot_autograd(fw_compiler=recorder, partition_fn=min_cut_rematerialization_partition)
    with torch.autocast(device, BF16):
        torch.testing.assert_close(*through(compiler, [half(n, adapter=torch.float32) for n in sizes]))
    wide, rows = sizes[0] == WIDE, TOKENS[0] * TOKENS[1]
    saved = [tuple(v.shape) for v in saved_by(recorder.graphs[0])[len(sizes) :]]
    assert (rows, 192 if wide else 64) not in saved
    assert (TOKENS + (K,) in saved or (rows, K) in saved) and saved.count((rows, 8)) == len(sizes)
    ops = torch.ops.rewriter
    assert recorder.count(ops.extended.default) == ([1, 0] if wide else [0, 1])
    if not kernels:
        return
    assert not any((n, K) in saved for n in sizes) and not any((192 if wide else 64) in s for s in saved)
    assert recorder.count(ops.dequantize_4bit_extended.default) == ([2, 2] if wide else [0, 1])
    assert recorder.count(ops.dequantize_4bit.default) == ([0, 0] if wide else [1, 0])


def test_inductor_gives_the_same_and_keeps_no_part_of_a_larger_buffer(monkeypatch):
    with_kernels(monkeypatch)
    kept = []

    def compiler(gm, values):
        compiled = compile_fx(gm, values)

        def run(*inputs):
            with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
                return compiled(*inputs)

        return run

    torch.testing.assert_close(*through(compiler, [half(WIDE), half(WIDE)]))
    rows = TOKENS[0] * TOKENS[1]
    down = [t for t in kept if tuple(t.shape) == (rows, 8)]
    assert len(down) == 2
    sizes = [t.untyped_storage().nbytes() for t in down]
    assert all(size <= 2 * rows * 16 for size in sizes), (sizes, rows)


def test_columns_are_copied_behind_the_input_and_zeros_behind_them():
    x, parts = torch.randn(3, 5), [torch.randn(3, 2), torch.randn(2, 3).t()]
    ours = extended(x, parts, 8)
    torch.testing.assert_close(ours, torch.cat((x, *parts, torch.zeros(3, 4)), 1), rtol=0, atol=0)
    torch.testing.assert_close(extended(x, parts[:1], 2), torch.cat((x, parts[0]), 1), rtol=0, atol=0)
    with pytest.raises(ValueError, match="4 columns do not fit a room of 3"):
        extended(x, parts, 3)
    torch.library.opcheck(torch.ops.rewriter.extended.default, (x, parts, 8))


@pytest.mark.parametrize("room", [5, 8])
def test_columns_are_written_into_the_room_beside_rows_and_zeros_behind_them(room):
    fill, parts = torch.ops.rewriter.fill_columns_.default, [torch.randn(6, 2), torch.randn(3, 6).t()]
    wide = torch.full((2, 3, 5 + room), torch.nan)
    wide[..., :5] = torch.randn(2, 3, 5)
    true = extended(wide.view(6, -1)[:, :5], parts, room)
    fill(wide, parts, room)
    torch.testing.assert_close(wide.view(6, -1), true, rtol=0, atol=0)
    with pytest.raises(ValueError, match="5 columns do not fit a room of 4"):
        fill(wide, parts, 4)
    torch.library.opcheck(fill, (wide, parts, room))


def test_rooms_keep_rows_of_whole_128_bytes():
    for inner, rank in itertools.product((64, 100, 4096), (1, 5, 32, 64)):
        assert (inner + room(inner, [rank])) % 64 == 0 and 0 <= room(inner, [rank]) - rank < 64
    assert room(4096, [32, 32]) == 64
