"""RMSNorm's op against fp64: every variant, every gradient, every layout."""

import pytest
import torch

from rewriter.kernels.rms_norm import (
    add_rms_norm_reference,
    rms_norm,
    rms_norm_reference,
)
from rewriter.kernels.rows import hidden_fits
from tests.accuracy import assert_as_accurate

device = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter truncates to bf16 where a GPU rounds: only a GPU can be held to eager's accuracy there.
dtypes = [torch.float32, torch.float16] + ([torch.bfloat16] if device == "cuda" else [])
EPS = 1e-5
LLAMA, GEMMA, OLMO, OFFSET_AFTER_ROUNDING = (0.0, True), (1.0, False), (0.0, False), (1.0, True)


def fused(x, weight, offset=0.0, round_before_weight=True, out_dtype=None):
    return torch.ops.rewriter.rms_norm(x, weight, EPS, offset, round_before_weight, out_dtype)[0]


def fused_add(x, residual, weight, offset=0.0, round_before_weight=True, out_dtype=None):
    return torch.ops.rewriter.add_rms_norm(x, residual, weight, EPS, offset, round_before_weight, out_dtype)[
        :2
    ]


def truth(x, weight, offset=0.0):
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
    return y if weight is None else y * (weight + offset)


def leaf(*shape, dtype):
    return torch.randn(shape, device=device).to(dtype).requires_grad_()


def results(function, tensors, gradients):
    """Outputs of ``function``, then the gradients of the tensors that want one."""
    outputs = function(*tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    used = [(y, g) for y, g in zip(outputs, gradients, strict=True) if g is not None]
    found = torch.autograd.grad([y for y, _ in used], wanted, [g.to(y.dtype) for y, g in used])
    return [*outputs, *found]


def compare(ours, eager, exact, tensors, *gradients):
    """Hold outputs and gradients of ``ours`` to the accuracy of ``eager``; ``exact`` is run in fp64."""
    doubles = [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
    found, plain = results(ours, tensors, gradients), results(eager, tensors, gradients)
    for i, values in enumerate(zip(found, plain, results(exact, doubles, gradients), strict=True)):
        # One reciprocal root serves a row, so that a few rows are a few draws: over 40 seeds the errors' mean
        # ratio in fp32 is at most 1.13, and one draw can have 2.2.
        slack = 1.5 if values[0].dtype == torch.float32 else 1.0
        assert_as_accurate(*values, name=f"result {i}", slack=slack)


def compare_norm(x, weight, variant=LLAMA, out_dtype=None, gradient=None):
    if gradient is None:
        gradient = torch.randn(x.shape, device=device).to(x.dtype)
    compare(
        lambda x, w: fused(x, w, *variant, out_dtype),
        lambda x, w: rms_norm_reference(x, w, EPS, *variant, out_dtype),
        lambda x, w: truth(x, w, variant[0]),
        (x, weight),
        gradient,
    )


def compare_add(x, residual, weight, variant=LLAMA, gradients=None):
    if gradients is None:
        gradients = [torch.randn(x.shape, device=device).to(x.dtype) for _ in range(2)]
    compare(
        lambda x, r, w: fused_add(x, r, w, *variant),
        lambda x, r, w: add_rms_norm_reference(x, r, w, EPS, *variant),
        lambda x, r, w: (truth(x + r, w, variant[0]), x + r),
        (x, residual, weight),
        *gradients,
    )


@pytest.mark.parametrize("dtype", dtypes)
@pytest.mark.parametrize("variant", [LLAMA, GEMMA, OLMO, OFFSET_AFTER_ROUNDING])
def test_every_variant_is_as_accurate_as_eager(variant, dtype):
    compare_norm(leaf(3, 20, 72, dtype=dtype), leaf(72, dtype=dtype), variant)


@pytest.mark.parametrize("hidden", [7, 64, 127, 128, 300, 2049, 5000])
@pytest.mark.parametrize("dtype", dtypes)
def test_odd_and_large_sizes(hidden, dtype):
    compare_norm(leaf(24, hidden, dtype=dtype), leaf(hidden, dtype=dtype))


@pytest.mark.parametrize("hidden", [1, 2])
def test_rows_of_one_or_two(hidden):
    # The terms of the gradient of x nearly cancel here, so its error is measured against their size.
    tensors = (leaf(6, hidden, dtype=torch.float32), leaf(hidden, dtype=torch.float32))
    gradient = [torch.randn(6, hidden, device=device)]
    eager = results(lambda x, w: rms_norm_reference(x, w, EPS), tensors, gradient)
    for a, b in zip(results(fused, tensors, gradient), eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 31, 33, 70])
def test_rows_that_do_not_fill_a_program(rows):
    compare_norm(leaf(rows, 64, dtype=torch.float32), leaf(64, dtype=torch.float32))


@pytest.mark.parametrize("variant", [LLAMA, OLMO])
def test_no_weight(variant):
    compare_norm(leaf(24, 40, dtype=torch.float16), None, variant)


@pytest.mark.parametrize("variant", [LLAMA, GEMMA, OLMO])
@pytest.mark.parametrize(
    "x_dtype, weight_dtype", [(torch.float16, torch.float32), (torch.float32, torch.float16)]
)
def test_weight_of_another_dtype(x_dtype, weight_dtype, variant):
    compare_norm(leaf(24, 48, dtype=x_dtype), leaf(48, dtype=weight_dtype), variant)


@pytest.mark.parametrize("variant", [LLAMA, GEMMA])
@pytest.mark.parametrize("out_dtype", [torch.float16, torch.float32])
def test_a_cast_after_the_norm_folds_into_it(out_dtype, variant):
    compare_norm(leaf(24, 48, dtype=torch.float16), leaf(48, dtype=torch.float32), variant, out_dtype)


@pytest.mark.parametrize("variant", [LLAMA, GEMMA, OLMO])
def test_bf16_on_any_device_within_two_units(variant):
    x, weight = leaf(24, 48, dtype=torch.bfloat16), leaf(48, dtype=torch.bfloat16)
    gradient = torch.randn(24, 48, device=device)
    ours = results(lambda x, w: fused(x, w, *variant), (x, weight), [gradient])
    eager = results(lambda x, w: rms_norm_reference(x, w, EPS, *variant), (x, weight), [gradient])
    for a, b in zip(ours, eager, strict=True):
        assert a.dtype == b.dtype == torch.bfloat16
        assert (a - b).abs().max() <= 2 * torch.finfo(torch.bfloat16).eps * b.abs().max()


def test_heads_transposed_keep_their_memory_order():
    x = torch.randn(2, 5, 3, 64, device=device).transpose(1, 2).requires_grad_()
    y = fused(x, None)
    assert y.stride() == x.stride()
    y.transpose(1, 2).view(2, 5, 192)
    compare_norm(x, leaf(64, dtype=torch.float32), gradient=torch.randn(2, 3, 5, 64, device=device))


def test_heads_cut_out_of_a_packed_projection():
    packed = torch.randn(2, 5, 7 * 32, device=device)
    x = packed[..., 32:128].view(2, 5, 3, 32).requires_grad_()
    assert not x.is_contiguous()
    compare_norm(x, leaf(32, dtype=torch.float32))


@pytest.mark.parametrize(
    "view",
    [
        lambda: torch.randn(40, 6, device=device).t(),
        lambda: torch.randn(6, 80, device=device)[:, ::2],
        lambda: torch.randn(4, 6, 8, 50, device=device)[:, :3, ::2, :40],
        lambda: torch.randn(6, 1, 40, device=device).expand(6, 3, 40),
        lambda: torch.randn(40, device=device),
        lambda: torch.randn(100, device=device).unfold(0, 40, 1),
    ],
    ids=[
        "last dimension not dense",
        "every other column",
        "three strides",
        "expanded",
        "one row",
        "overlapping",
    ],
)
def test_any_strides(view):
    compare_norm(view().requires_grad_(), leaf(40, dtype=torch.float32))


def test_strides_are_followed_without_a_copy_where_two_do():
    from rewriter.kernels.rows import dense_rows
    from rewriter.kernels.rows_triton import lay_out_rows

    q = torch.randn(2, 5, 7 * 32)[..., :96].view(2, 5, 3, 32).transpose(1, 2)
    inner, ((laid_out, strides),) = lay_out_rows(dense_rows(q, q.dtype), q)
    assert laid_out is q
    assert (inner, strides) == (3, (7 * 32, 32))


@pytest.mark.parametrize("turned", [False, True], ids=["dense", "transposed"])
def test_rows_with_room_are_the_same_bits(turned):
    x, residual, dy, dh = torch.randn(4, 6, 3, 40, device=device)
    x = x.transpose(0, 1).contiguous().transpose(0, 1) if turned else x
    weight, norms = torch.randn(40, device=device), torch.ops.rewriter
    settings = EPS, 0.0, True, None
    rstd = norms.rms_norm(x, weight, *settings)[1]
    cases = [
        (norms.rms_norm, (x, weight, *settings)),
        (norms.add_rms_norm, (x, residual, weight, *settings)),
        # The weight's gradient sums the rows in their order in memory.
        (norms.rms_norm_backward, (dy, dh, x, weight, rstd, 0.0, True, not turned)),
    ]
    for norm, given in cases:
        (dense, *rest), (wide, *others) = norm(*given), norm(*given, room=24)
        assert wide.shape == (6, 3, 64) and wide.is_contiguous() and torch.equal(wide[..., :40], dense)
        assert all(torch.equal(a, b) for a, b in zip(others, rest, strict=True))
        torch.library.opcheck(norm.default, given, {"room": 24}, test_utils="test_faketensor")


def test_a_room_is_not_written(monkeypatch):
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: empty(*a, **k).fill_(7.0))
    wide, _ = torch.ops.rewriter.rms_norm(torch.randn(5, 40, device=device), None, EPS, 0.0, True, None, 8)
    assert (wide[:, 40:] == 7).all() and not (wide[:, :40] == 7).any()


@pytest.mark.parametrize("layout", ["expanded", "transposed", "every other column"])
def test_gradients_of_any_strides(layout):
    gradient = {
        "expanded": torch.ones((), device=device).expand(2, 12, 40),
        "transposed": torch.randn(12, 2, 40, device=device).transpose(0, 1),
        "every other column": torch.randn(2, 12, 80, device=device)[..., ::2],
    }[layout]
    compare_norm(leaf(2, 12, 40, dtype=torch.float32), leaf(40, dtype=torch.float32), gradient=gradient)


@pytest.mark.parametrize("dtype", dtypes)
@pytest.mark.parametrize("variant", [LLAMA, GEMMA])
def test_add_and_norm_give_both_results_and_one_gradient(variant, dtype):
    compare_add(leaf(2, 20, 72, dtype=dtype), leaf(2, 20, 72, dtype=dtype), leaf(72, dtype=dtype), variant)


@pytest.mark.parametrize("used", [0, 1])
def test_add_with_one_result_unused(used):
    gradients = [None, None]
    gradients[used] = torch.randn(24, 40, device=device)
    weight = leaf(40, dtype=torch.float32).requires_grad_(used == 0)
    compare_add(
        leaf(24, 40, dtype=torch.float32), leaf(24, 40, dtype=torch.float32), weight, gradients=gradients
    )


def test_add_of_two_dtypes():
    x, residual = leaf(24, 40, dtype=torch.float16), leaf(24, 40, dtype=torch.float32)
    compare_add(
        x, residual, leaf(40, dtype=torch.float32), gradients=torch.randn(2, 24, 40, device=device).unbind()
    )


def test_add_of_two_layouts():
    x = torch.randn(6, 4, 40, device=device).transpose(0, 1).requires_grad_()
    residual = torch.randn(4, 1, 40, device=device).expand(4, 6, 40).requires_grad_()
    compare_add(x, residual, leaf(40, dtype=torch.float32))


@pytest.mark.parametrize("needs_x, needs_weight", [(True, False), (False, True)])
def test_only_the_gradients_that_are_needed(needs_x, needs_weight):
    x = torch.randn(6, 2, 40, device=device).transpose(0, 1).requires_grad_(needs_x)
    compare_norm(x, leaf(40, dtype=torch.float32).requires_grad_(needs_weight))
    dx, dw = torch.ops.rewriter.rms_norm_backward(
        x, None, x, x[0, 0], torch.ones(2, 6, device=device), 0.0, needs_x, needs_weight
    )
    assert (dx.numel() > 0) == needs_x
    assert (dw.numel() > 0) == needs_weight


def test_only_the_residual_needs_a_gradient():
    x, residual = leaf(24, 40, dtype=torch.float32).detach(), leaf(24, 40, dtype=torch.float32)
    compare_add(x, residual, None)


@pytest.mark.parametrize("shape", [(0, 40), (3, 0, 40), (3, 0)])
def test_empty(shape):
    x, weight = leaf(*shape, dtype=torch.float32), leaf(shape[-1], dtype=torch.float32)
    y, dx, dw = results(fused, (x, weight), [torch.ones(shape, device=device)])
    assert y.shape == dx.shape == shape
    assert dw.eq(0).all()


def test_nan_and_infinity_propagate_as_in_eager():
    x = torch.randn(24, 40, device=device)
    x[0, 3], x[1, 5] = float("nan"), float("inf")
    y, expected = fused(x, None), rms_norm_reference(x, None, EPS)
    assert torch.equal(y.isnan(), expected.isnan())


def test_refusals_name_the_limit():
    assert hidden_fits(65536) and not hidden_fits(65537)
    with pytest.raises(ValueError, match="last dimension 65537 exceeds 65536"):
        fused(torch.zeros(1, 65537, device=device), None)
    with pytest.raises(TypeError, match="float64"):
        fused(torch.zeros(1, 8, device=device, dtype=torch.float64), None)
    with pytest.raises(ValueError, match=r"parameter of shape \(7,\)"):
        fused(torch.zeros(1, 8, device=device), torch.zeros(7, device=device))
    with pytest.raises(ValueError, match="residual"):
        fused_add(torch.zeros(2, 8, device=device), torch.zeros(8, device=device), None)
    with pytest.raises(ValueError, match="scalar"):
        fused(torch.zeros((), device=device), None)


def test_the_public_function_takes_the_reference_on_cpu():
    x, weight = torch.randn(3, 8, dtype=torch.float64), torch.randn(8)
    assert torch.equal(rms_norm(x, weight, EPS), rms_norm_reference(x, weight, EPS))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_without_a_break_gives_the_same(dynamic):
    def model(x, residual, weight):
        y, h = fused_add(x, residual, weight)
        return fused(y.transpose(0, 1), weight, *GEMMA) * h.transpose(0, 1)

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for length in (3, 5):
        tensors = (
            leaf(2, length, 16, dtype=torch.float32),
            leaf(2, length, 16, dtype=torch.float32),
            leaf(16, dtype=torch.float32),
        )
        gradient = [torch.randn(length, 2, 16, device=device)]
        for a, b in zip(results(compiled, tensors, gradient), results(model, tensors, gradient), strict=True):
            torch.testing.assert_close(a, b)
            assert a.stride() == b.stride()


@pytest.mark.parametrize("weight_dtype", [None, torch.float32])
def test_the_ops_keep_pytorchs_contract(weight_dtype):
    x = torch.randn(5, 3, 16, device=device).transpose(0, 1).requires_grad_()
    residual = leaf(3, 5, 16, dtype=torch.float16)
    weight = None if weight_dtype is None else leaf(16, dtype=weight_dtype)
    torch.library.opcheck(torch.ops.rewriter.rms_norm, (x, weight, EPS, 1.0, False, torch.float16))
    torch.library.opcheck(torch.ops.rewriter.add_rms_norm, (x, residual, weight, EPS, 0.0, True, None))
    rstd = torch.rand(5, 3, device=device).t()
    for wanted in ((True, weight is not None), (False, weight is not None), (True, False)):
        args = (
            residual.detach(),
            None,
            x.detach(),
            None if weight is None else weight.detach(),
            rstd,
            0.0,
            *wanted,
        )
        torch.library.opcheck(torch.ops.rewriter.rms_norm_backward, args)
