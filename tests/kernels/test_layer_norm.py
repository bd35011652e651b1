"""LayerNorm's op against fp64: every variant, every gradient, every layout."""

import pytest
import torch
import torch.nn.functional as F

from rewriter.kernels.layer_norm import add_layer_norm_reference, layer_norm, layer_norm_reference
from tests.kernels.test_rms_norm import EPS, compare, device, dtypes, leaf, results


def fused(x, weight, bias, offset=0.0, out_dtype=None):
    return torch.ops.rewriter.layer_norm(x, weight, bias, EPS, offset, out_dtype)[0]


def fused_add(x, residual, weight, bias, offset=0.0, out_dtype=None):
    return torch.ops.rewriter.add_layer_norm(x, residual, weight, bias, EPS, offset, out_dtype)[:2]


def truth(x, weight, bias, offset=0.0):
    if weight is not None and weight.dim() == 2:
        return F.layer_norm(x, x.shape[-1:], None, None, EPS) * (weight + offset)
    return F.layer_norm(x, x.shape[-1:], None if weight is None else weight + offset, bias, EPS)


def compare_norm(x, weight, bias, offset=0.0, out_dtype=None, gradient=None, eager=None):
    if gradient is None:
        gradient = torch.randn(x.shape, device=device).to(x.dtype)
    compare(
        lambda x, w, b: fused(x, w, b, offset, out_dtype),
        eager or (lambda x, w, b: layer_norm_reference(x, w, b, EPS, offset, out_dtype)),
        lambda x, w, b: truth(x, w, b, offset),
        (x, weight, bias),
        gradient,
    )


def compare_add(x, residual, weight, bias, offset=0.0, gradients=None):
    if gradients is None:
        gradients = [torch.randn(x.shape, device=device).to(x.dtype) for _ in range(2)]
    compare(
        lambda x, r, w, b: fused_add(x, r, w, b, offset),
        lambda x, r, w, b: add_layer_norm_reference(x, r, w, b, EPS, offset),
        lambda x, r, w, b: (truth(x + r, w, b, offset), x + r),
        (x, residual, weight, bias),
        *gradients,
    )


@pytest.mark.parametrize("dtype", dtypes)
def test_as_accurate_as_pytorchs_layer_norm(dtype):
    parameters = leaf(72, dtype=dtype), leaf(72, dtype=dtype)
    compare_norm(
        leaf(3, 20, 72, dtype=dtype), *parameters, eager=lambda x, w, b: F.layer_norm(x, (72,), w, b, EPS)
    )


@pytest.mark.parametrize("dtype", dtypes)
def test_as_accurate_as_one_written_by_hand(dtype):
    def by_hand(x, weight, bias):
        h = x.to(torch.float32)
        mean = h.mean(-1, keepdim=True)
        variance = (h - mean).pow(2).mean(-1, keepdim=True)
        h = (h - mean) * torch.rsqrt(variance + EPS)
        return (weight.to(torch.float32) * h).to(x.dtype)

    compare_norm(leaf(3, 20, 72, dtype=dtype), leaf(72, dtype=dtype), None, eager=by_hand)


@pytest.mark.parametrize("dtype", dtypes)
@pytest.mark.parametrize("shape", [(2, 5, 3, 16), (7, 96, 24), (3, 1, 40), (2, 3, 5, 2100)])
def test_a_weight_for_each_head(shape, dtype):
    compare_norm(leaf(*shape, dtype=dtype), leaf(*shape[-2:], dtype=dtype), None)


@pytest.mark.parametrize("needed", [(True, False), (False, True)])
def test_a_weight_for_each_head_of_rows_in_another_order(needed):
    x = torch.randn(2, 3, 7, 16, device=device).transpose(1, 2).requires_grad_(needed[0])
    compare_norm(x, leaf(3, 16, dtype=torch.float32).requires_grad_(needed[1]), None, 1.0)


@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_weight_and_bias_are_optional(weight, bias):
    parameters = [leaf(40, dtype=torch.float16) if given else None for given in (weight, bias)]
    compare_norm(leaf(24, 40, dtype=torch.float16), *parameters)


@pytest.mark.parametrize("dtype", dtypes)
def test_one_added_to_the_weight(dtype):
    compare_norm(leaf(24, 40, dtype=dtype), leaf(40, dtype=dtype), leaf(40, dtype=dtype), 1.0)


@pytest.mark.parametrize("hidden", [7, 64, 127, 128, 300, 2049, 5000])
@pytest.mark.parametrize("dtype", dtypes)
def test_odd_and_large_sizes(hidden, dtype):
    compare_norm(leaf(24, hidden, dtype=dtype), leaf(hidden, dtype=dtype), leaf(hidden, dtype=dtype))


def test_a_row_of_one_is_its_bias():
    x, weight, bias = (leaf(*shape, dtype=torch.float32) for shape in ((6, 1), (1,), (1,)))
    y, dx, dw, db = results(fused, (x, weight, bias), [torch.ones(6, 1, device=device)])
    assert torch.equal(y, bias.expand(6, 1))
    assert dx.eq(0).all() and dw.eq(0).all() and db.eq(6).all()


@pytest.mark.parametrize("rows", [1, 31, 33, 70])
def test_rows_that_do_not_fill_a_program(rows):
    compare_norm(
        leaf(rows, 64, dtype=torch.float32), leaf(64, dtype=torch.float32), leaf(64, dtype=torch.float32)
    )


def test_a_large_mean_costs_no_accuracy():
    x = (torch.randn(9, 200, device=device) + 1000).requires_grad_()
    compare_norm(x, leaf(200, dtype=torch.float32), leaf(200, dtype=torch.float32))


@pytest.mark.parametrize("x_dtype, other", [(torch.float16, torch.float32), (torch.float32, torch.float16)])
def test_parameters_of_another_dtype(x_dtype, other):
    compare_norm(leaf(24, 48, dtype=x_dtype), leaf(48, dtype=other), leaf(48, dtype=x_dtype))


@pytest.mark.parametrize("out_dtype", [torch.float16, torch.float32])
def test_a_cast_after_the_norm_folds_into_it(out_dtype):
    tensors = [leaf(*shape, dtype=torch.float16) for shape in ((24, 48), (48,), (48,))]
    compare_norm(*tensors, out_dtype=out_dtype)


def test_bf16_on_any_device_within_two_units():
    tensors = [leaf(*shape, dtype=torch.bfloat16) for shape in ((24, 48), (48,), (48,))]
    gradient = [torch.randn(24, 48, device=device)]
    ours = results(fused, tensors, gradient)
    eager = results(lambda x, w, b: layer_norm_reference(x, w, b, EPS), tensors, gradient)
    for a, b in zip(ours, eager, strict=True):
        assert a.dtype == b.dtype == torch.bfloat16
        assert (a - b).abs().max() <= 2 * torch.finfo(torch.bfloat16).eps * b.abs().max()


@pytest.mark.parametrize(
    "view",
    [
        lambda: torch.randn(40, 6, device=device).t(),
        lambda: torch.randn(4, 6, 8, 50, device=device)[:, :3, ::2, :40],
        lambda: torch.randn(6, 1, 40, device=device).expand(6, 3, 40),
        lambda: torch.randn(2, 5, 3, 40, device=device).transpose(1, 2),
        lambda: torch.randn(40, device=device),
    ],
    ids=["last dimension not dense", "three strides", "expanded", "transposed", "one row"],
)
def test_any_strides(view):
    compare_norm(view().requires_grad_(), leaf(40, dtype=torch.float32), leaf(40, dtype=torch.float32))


@pytest.mark.parametrize("dtype", dtypes)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_add_and_norm_give_both_results_and_one_gradient(offset, dtype):
    tensors = [leaf(*shape, dtype=dtype) for shape in ((2, 20, 72), (2, 20, 72), (72,), (72,))]
    compare_add(*tensors, offset)


@pytest.mark.parametrize("used", [0, 1])
def test_add_with_one_result_unused(used):
    gradients = [None, None]
    gradients[used] = torch.randn(24, 40, device=device)
    parameters = [leaf(40, dtype=torch.float32).requires_grad_(used == 0) for _ in range(2)]
    compare_add(
        leaf(24, 40, dtype=torch.float32), leaf(24, 40, dtype=torch.float32), *parameters, gradients=gradients
    )


def test_add_of_two_dtypes_and_layouts():
    x = torch.randn(6, 4, 40, device=device).half().transpose(0, 1).requires_grad_()
    gradients = torch.randn(2, 4, 6, 40, device=device).unbind()
    compare_add(x, leaf(4, 6, 40, dtype=torch.float32), None, None, gradients=gradients)


@pytest.mark.parametrize(
    "needed", [(True, False, False), (False, True, False), (False, False, True), (True, False, True)]
)
def test_only_the_gradients_that_are_needed(needed):
    x = torch.randn(6, 2, 40, device=device).transpose(0, 1)
    tensors = [x, torch.randn(40, device=device), torch.randn(40, device=device)]
    compare_norm(*(t.requires_grad_(n) for t, n in zip(tensors, needed, strict=True)))


@pytest.mark.parametrize("shape", [(0, 40), (3, 0, 40), (3, 0)])
def test_empty(shape):
    x, weight, bias = (leaf(*s, dtype=torch.float32) for s in (shape, shape[-1:], shape[-1:]))
    y, dx, dw, db = results(fused, (x, weight, bias), [torch.ones(shape, device=device)])
    assert y.shape == dx.shape == shape
    assert dw.eq(0).all() and db.eq(0).all()


def test_refusals_name_the_limit():
    with pytest.raises(ValueError, match="last dimension 65537 exceeds 65536"):
        fused(torch.zeros(1, 65537, device=device), None, None)
    with pytest.raises(TypeError, match="float64"):
        fused(torch.zeros(1, 8, device=device, dtype=torch.float64), None, None)
    with pytest.raises(ValueError, match=r"weight \(2, 8\) is not one row a head of input \(1, 8\)"):
        fused(torch.zeros(1, 8, device=device), torch.zeros(2, 8, device=device), None)
    with pytest.raises(ValueError, match=r"parameter of shape \(2, 8\)"):
        fused(torch.zeros(2, 8, device=device), *torch.zeros(2, 2, 8, device=device))
    with pytest.raises(ValueError, match=r"parameter of shape \(7,\)"):
        fused(torch.zeros(1, 8, device=device), None, torch.zeros(7, device=device))


def test_the_public_function_takes_the_reference_on_cpu():
    x, weight = torch.randn(3, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    torch.testing.assert_close(layer_norm(x, weight, None, EPS), F.layer_norm(x, (8,), weight, None, EPS))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_without_a_break_gives_the_same(dynamic):
    def model(x, residual, weight, bias):
        y, h = fused_add(x, residual, weight, bias)
        return fused(y.transpose(0, 1), weight, None, 1.0) * h.transpose(0, 1)

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for length in (3, 5):
        tensors = [
            leaf(*shape, dtype=torch.float32) for shape in ((2, length, 16), (2, length, 16), (16,), (16,))
        ]
        gradient = [torch.randn(length, 2, 16, device=device)]
        for a, b in zip(results(compiled, tensors, gradient), results(model, tensors, gradient), strict=True):
            torch.testing.assert_close(a, b)
            assert a.stride() == b.stride()


@pytest.mark.parametrize("given", [True, False])
def test_the_ops_keep_pytorchs_contract(given):
    x = torch.randn(5, 3, 16, device=device).transpose(0, 1).requires_grad_()
    residual = leaf(3, 5, 16, dtype=torch.float16)
    weight, bias = (leaf(16, dtype=torch.float32), leaf(16, dtype=torch.float16)) if given else (None, None)
    torch.library.opcheck(torch.ops.rewriter.layer_norm, (x, weight, bias, EPS, 1.0, torch.float16))
    heads = leaf(3, 16, dtype=torch.float32), leaf(5, 16, dtype=torch.float32)
    torch.library.opcheck(torch.ops.rewriter.layer_norm, (x, heads[x.shape[1] == 5], None, EPS, 0.0, None))
    torch.library.opcheck(torch.ops.rewriter.add_layer_norm, (x, residual, weight, bias, EPS, 0.0, None))
    mean, rstd = torch.rand(2, 5, 3, device=device).transpose(1, 2).unbind()
    args = (residual.detach(), None, x.detach(), None if weight is None else weight.detach(), mean, rstd, 0.0)
    for wanted in ((None, True, given), (torch.float16, False, given), (torch.float32, True, False)):
        torch.library.opcheck(torch.ops.rewriter.layer_norm_backward, (*args, *wanted))
