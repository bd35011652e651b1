"""The gated activation at sizes of real models, and past 2^31 elements."""

import pytest
import torch

from rewriter.kernels.gated_activation import (
    ACTIVATIONS,
    gated_activation,
    gated_activation_packed,
    gated_activation_packed_reference,
    gated_activation_reference,
)
from tests.accuracy import assert_as_accurate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def random(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, device="cuda", dtype=dtype).normal_()


def with_gradients(function, inputs, grad, dtype=None):
    inputs = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    out = function(*inputs)
    return out, *torch.autograd.grad(out, inputs, grad.to(out.dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("width", [14336, 8193])
def test_widths_of_real_models(width, activation, dtype):
    inputs, grad = (
        (random(2, 65, width, dtype=dtype), random(2, 65, width, dtype=dtype)),
        random(2, 65, width),
    )
    ours = with_gradients(lambda g, u: gated_activation(g, u, activation), inputs, grad)
    eager = with_gradients(lambda g, u: gated_activation_reference(g, u, activation), inputs, grad)
    truth = with_gradients(
        lambda g, u: gated_activation_reference(g, u, activation), inputs, grad, torch.float64
    )
    slack = 2.0 if dtype == torch.float32 else 1.0  # for the GPU's exponential, which is all that rounds here
    for name, *values in zip(("out", "d_gate", "d_up"), ours, eager, truth, strict=True):
        assert_as_accurate(*values, name=name, slack=slack)


@pytest.mark.parametrize("packed", [False, True])
def test_past_two_to_the_31_elements(packed):
    rows, width = (75_000 if packed else 150_000), 14336
    inputs = [random(rows, 2 * width)] if packed else [random(rows, width), random(rows, width)]
    assert inputs[0].numel() > 2**31
    function = gated_activation_packed if packed else gated_activation
    reference = gated_activation_packed_reference if packed else gated_activation_reference
    grad = random(rows, width)
    ours = with_gradients(lambda *xs: function(*xs, "silu"), inputs, grad)
    for at in (slice(0, 64), slice(rows - 64, rows)):
        exact = with_gradients(
            lambda *xs: reference(*xs, "silu"), [x[at] for x in inputs], grad[at], torch.float32
        )
        for a, b in zip(ours, exact, strict=True):
            torch.testing.assert_close(a[at].float(), b, rtol=8e-3, atol=1e-5)
