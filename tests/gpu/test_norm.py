"""The norms where only a GPU goes: past 2^31 elements, wide rows, compiled graphs."""

import pytest
import torch

from rewriter.kernels.layer_norm import add_layer_norm, layer_norm, layer_norm_reference
from rewriter.kernels.rms_norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
EPS = 1e-5


def normal(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, device="cuda", dtype=dtype).requires_grad_()


def test_past_two_to_the_31_elements():
    rows, hidden = 2**31 // 4096 + 9, 4096
    x = torch.zeros(rows, hidden, device="cuda", dtype=torch.bfloat16)
    x[-8:].normal_()
    x.requires_grad_()
    weight = normal(hidden)
    y, h = add_rms_norm(x, x, weight, EPS)
    dy = torch.zeros_like(y)
    dy[-8:] = 1
    (dx,) = torch.autograd.grad(y, x, dy)
    tail = x[-8:].detach().requires_grad_()
    expected = rms_norm_reference(tail + tail, weight, EPS)
    expected_dx = torch.autograd.grad(expected.sum(), tail)[0]
    torch.testing.assert_close(y[-8:], expected)
    torch.testing.assert_close(dx[-8:], expected_dx, rtol=2e-2, atol=2e-2)
    assert torch.equal(h[-8:], x[-8:] + x[-8:])
    assert y[:-8].count_nonzero() == 0


@pytest.mark.parametrize("hidden", [5120, 16384, 28672, 65536])
def test_wide_rows(hidden):
    x, weight, bias = normal(40, hidden), normal(hidden), normal(hidden)
    gradient = torch.randn(40, hidden, device="cuda", dtype=torch.bfloat16)
    cases = [
        (rms_norm(x, weight, EPS), rms_norm_reference(x, weight, EPS), [x, weight]),
        (layer_norm(x, weight, bias, EPS), layer_norm_reference(x, weight, bias, EPS), [x, weight, bias]),
    ]
    for ours, eager, tensors in cases:
        torch.testing.assert_close(ours, eager)
        found, plain = (torch.autograd.grad(y, tensors, gradient) for y in (ours, eager))
        for a, b in zip(found, plain, strict=True):
            assert (a - b).abs().max() <= 2 * torch.finfo(torch.bfloat16).eps * b.abs().max()


@pytest.mark.parametrize("hidden", [4096, 8192, 16384])
def test_fp32_rows_too_long_to_load_ahead(hidden):
    x, residual, weight = (
        normal(*shape, dtype=torch.float32) for shape in ((300, hidden),) * 2 + ((hidden,),)
    )
    gradients = [torch.randn(300, hidden, device="cuda") for _ in range(2)]
    ours, eager = add_rms_norm(x, residual, weight, EPS), add_rms_norm_reference(x, residual, weight, EPS)
    found, plain = (torch.autograd.grad(y, (x, residual, weight), gradients) for y in (ours, eager))
    torch.testing.assert_close(ours, eager)
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("hidden", [100, 4096])
def test_rows_with_room_are_the_same_bits(hidden):
    x, residual, dy, dh = torch.randn(4, 3000, hidden, device="cuda", dtype=torch.bfloat16)
    weight, ops = torch.randn(hidden, device="cuda", dtype=torch.bfloat16), torch.ops.rewriter
    given = x, residual, weight, EPS, 0.0, True, None
    y, h, rstd = ops.add_rms_norm(*given)
    wide, *others = ops.add_rms_norm(*given, 64)
    columns = torch.randn(3000, 40, device="cuda", dtype=torch.bfloat16)
    ops.fill_columns_(wide, [columns], 64)
    assert torch.equal(wide, ops.extended(y, [columns], 64))
    assert torch.equal(others[0], h) and torch.equal(others[1], rstd)
    given = dy, dh, h, weight, rstd, 0.0, True, True
    (dx, dw), (wide, dw_again) = ops.rms_norm_backward(*given), ops.rms_norm_backward(*given, 64)
    assert torch.equal(wide[:, :hidden], dx) and torch.equal(dw_again, dw)


def test_weight_gradients_are_the_same_bits_every_time():
    x, weight, bias = normal(3000, 1000), normal(1000), normal(1000)
    gradient = torch.randn(3000, 1000, device="cuda", dtype=torch.bfloat16)
    runs = [
        torch.autograd.grad(layer_norm(x, weight, bias, EPS), (x, weight, bias), gradient) for _ in range(3)
    ]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor_keeps_results_and_gradients(dynamic):
    def model(q, x, residual, weight, scale):
        y, h = add_rms_norm(x, residual, weight, EPS)
        z, h = add_layer_norm(y * 2, h, weight, None, EPS)
        return (
            z,
            h,
            rms_norm(q.transpose(1, 2), scale, EPS, 1.0, False).transpose(1, 2).view(*x.shape[:2], -1),
        )

    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic)
    for length in (64, 96):
        tensors = [
            normal(2, length, 4, 64),
            normal(2, length, 512),
            normal(2, length, 512),
            normal(512),
            normal(64),
        ]
        found, plain = compiled(*tensors), model(*tensors)
        gradients = [torch.randn_like(y) for y in plain]
        pairs = zip(
            [*found, *torch.autograd.grad(found, tensors, gradients)],
            [*plain, *torch.autograd.grad(plain, tensors, gradients)],
            strict=True,
        )
        for a, b in pairs:
            assert (a - b).abs().max() <= 4 * torch.finfo(torch.bfloat16).eps * b.abs().max()
