"""The rotary kernel at sizes of real models, and past 2^31 elements."""

import pytest
import torch

from rewriter.kernels.rotary import rotary
from rewriter.kernels.rotary_layouts import LAYOUTS, rotary_reference
from tests.accuracy import assert_as_accurate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def heads_first(batch, heads, tokens, head, dtype=torch.bfloat16):
    return torch.randn(batch, tokens, heads, head, device="cuda", dtype=dtype).transpose(1, 2)


def angles(tokens, factors, dtype=torch.bfloat16):
    angle = torch.rand(1, 1, tokens, factors, device="cuda") * 6.3
    return angle.cos().to(dtype), angle.sin().to(dtype)


def with_gradients(function, q, k, grads, dtype=None):
    q, k = (x.detach().to(dtype or x.dtype).requires_grad_() for x in (q, k))
    outs = function(q, k)
    return *outs, *torch.autograd.grad(
        outs, (q, k), [g.to(o.dtype) for g, o in zip(grads, outs, strict=True)]
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head", "rotary_dim"),
    [
        (32, 8, 128, 128),
        (28, 4, 128, 128),
        (14, 2, 64, 64),
        (8, 1, 256, 256),
        (32, 32, 80, 32),
        (128, 1, 64, 64),
    ],
)
def test_heads_of_real_models(heads, kv_heads, head, rotary_dim, layout):
    q, k = heads_first(2, heads, 515, head), heads_first(2, kv_heads, 515, head)
    cos, sin = angles(515, rotary_dim // 2 if layout.endswith("_half_cos") else rotary_dim)
    grads = torch.randn_like(q), torch.randn_like(k)
    ours = with_gradients(lambda q, k: rotary(q, k, cos, sin, layout), q, k, grads)
    eager = with_gradients(lambda q, k: rotary_reference(q, k, cos, sin, layout), q, k, grads)
    exact = cos.double(), sin.double()
    truth = with_gradients(lambda q, k: rotary_reference(q, k, *exact, layout), q, k, grads, torch.float64)
    for name, *values in zip(("q", "k", "dq", "dk"), ours, eager, truth, strict=True):
        assert_as_accurate(*values, name=name)


@pytest.mark.parametrize("heads_outside", [False, True])
def test_past_two_to_the_31_elements(heads_outside):
    tokens, heads, head = 530_000, 32, 128
    shape = (1, heads, tokens, head) if heads_outside else (1, tokens, heads, head)
    q = torch.empty(shape, device="cuda", dtype=torch.bfloat16).normal_()
    q = q if heads_outside else q.transpose(1, 2)
    assert q.numel() > 2**31
    k = q[:, -1:]
    cos, sin = angles(tokens, head)
    ours = rotary(q, k, cos, sin, "halves")
    gradient = torch.ops.rewriter.rotary_backward(
        *ours, cos, sin, "halves", q.dtype, q.dtype, [0, 1, 2, 3], [0, 1, 2, 3]
    )
    for at in (slice(0, 1000), slice(tokens - 1000, tokens)):
        part = cos[:, :, at], sin[:, :, at]
        expected = rotary_reference(q[:, :, at].float(), k[:, :, at].float(), *part, "halves")
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a[:, :, at].float(), b, rtol=8e-3, atol=1e-5)
        first, second = ours[0][:, :, at].float().chunk(2, dim=-1)
        (c1, c2), (s1, s2) = (x.float().chunk(2, dim=-1) for x in part)
        expected = torch.cat((first * c1 + second * s2, second * c2 - first * s1), dim=-1)
        torch.testing.assert_close(gradient[0][:, :, at].float(), expected, rtol=8e-3, atol=1e-5)
