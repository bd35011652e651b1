"""Ops of tensors on a GPU that is not the current one: the numbers of the first GPU, forward and backward."""

import pytest
import torch
from torch import Tensor

from rewriter.kernels.attention import attention
from rewriter.kernels.clamped_gate import clamped_gate
from rewriter.kernels.gated_activation import gated_activation, gated_activation_packed
from rewriter.kernels.layer_norm import layer_norm
from rewriter.kernels.linear_cross_entropy import linear_cross_entropy
from rewriter.kernels.rms_norm import add_rms_norm, rms_norm
from rewriter.kernels.rotary import rotary_one

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

HIDDEN = 512


def _heads(x: Tensor) -> Tensor:
    return x.view(1, -1, 4, 128).transpose(1, 2)


def _rotated(x: Tensor, weight: Tensor) -> Tensor:
    angle = torch.arange(x.shape[0], device=x.device)[:, None] * weight[None, :128].float()
    return rotary_one(_heads(x), angle.cos().to(x.dtype), angle.sin().to(x.dtype), "halves")


def _attended(x: Tensor, weight: Tensor) -> Tensor:
    ids = (torch.arange(x.shape[0], device=x.device) // 100)[None]
    return attention(_heads(x), _heads(x), _heads(x), scale=None, causal=True, segments=ids)


def _loss(x: Tensor, weight: Tensor) -> Tensor:
    head = weight.expand(64, HIDDEN) * torch.arange(64, device=x.device)[:, None].to(x.dtype) / 64
    return linear_cross_entropy(x, head, None, torch.arange(x.shape[0], device=x.device) % 64)


OPS = {
    "rms norm": lambda x, w: rms_norm(x, w, 1e-5),
    "sum and rms norm": lambda x, w: add_rms_norm(x, x, w, 1e-5)[0],
    "layer norm": lambda x, w: layer_norm(x, w, w, 1e-5),
    "gate": lambda x, w: gated_activation(x, x * w, "silu"),
    "packed gate": lambda x, w: gated_activation_packed(x, "silu"),
    "clamped gate": lambda x, w: clamped_gate(x, 1.702, 7.0, 1.0),
    "rotation": _rotated,
    "attention": _attended,
    "head and loss": _loss,
}


@pytest.mark.parametrize("name", OPS)
def test_an_op_on_the_second_gpu_gives_the_numbers_of_the_first(name):
    torch.manual_seed(0)
    given = (torch.randn(300, HIDDEN, dtype=torch.bfloat16), torch.rand(HIDDEN).bfloat16())
    found = []
    for device in ("cuda:0", "cuda:1"):
        x, weight = (value.to(device).requires_grad_() for value in given)
        with torch.cuda.device(0):
            out = OPS[name](x, weight)
            # Called here, where the first GPU is the current one; autograd's thread has its own.
            gradients = torch.autograd.grad(out.float().square().sum(), (x, weight), allow_unused=True)
        torch.cuda.synchronize(device)
        found.append([value.cpu() for value in (out, *gradients) if value is not None])
    for first, second in zip(*found, strict=True):
        assert second.isfinite().all() and torch.equal(first, second)
