"""Triton kernels of the clamped gate: elementwise over dense pairs, a program a block of them."""

# Triton types a kernel as the plain function below its decorator, and `tl.range` as a function: launch
# options, numbers for constexpr parameters and loops look like errors.
# pyright: reportCallIssue=false

import torch
import triton
import triton.language as tl

from .sigmoid_triton import sigmoid

# Two 16-byte loads of the pairs a thread.
BLOCK = 1024
WARPS = 4


@triton.jit
def _pairs(gate_up, first, pairs, BLOCK: tl.constexpr):
    """Gate and up of ``BLOCK`` pairs in fp32; one dense load for both."""
    place = 2 * first + tl.arange(0, 2 * BLOCK)
    both = tl.load(gate_up + place, mask=place < 2 * pairs, other=0.0).to(tl.float32)
    return tl.split(tl.reshape(both, (BLOCK, 2)))


@triton.jit
def _clamped(gate, up, limit):
    # Comparisons, not minima: NaN must come through.
    gate = tl.where(gate > limit, limit, gate)
    up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    return gate, up


@triton.jit
def _forward_kernel(gate_up, out, pairs, alpha, limit, offset, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    gate, up = _pairs(gate_up, first, pairs, BLOCK)
    gate, up = _clamped(gate, up, limit)
    s, _ = sigmoid(alpha * gate)
    place = first + tl.arange(0, BLOCK)
    value = (up + offset) * (gate * s)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=place < pairs)


@triton.jit
def _backward_kernel(grad, gate_up, d_gate_up, pairs, alpha, limit, offset, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    place = first + tl.arange(0, BLOCK)
    dy = tl.load(grad + place, mask=place < pairs, other=0.0).to(tl.float32)
    free_gate, free_up = _pairs(gate_up, first, pairs, BLOCK)
    gate, up = _clamped(free_gate, free_up, limit)
    s, rest = sigmoid(alpha * gate)
    d_gate = dy * (up + offset) * (s + alpha * gate * s * rest)
    d_up = dy * (gate * s)
    # As the gradient of `clamp`: a value at the limit passes it, NaN does not.
    d_gate = tl.where(free_gate <= limit, d_gate, 0.0)
    d_up = tl.where((free_up <= limit) & (free_up >= -limit), d_up, 0.0)
    both = tl.reshape(tl.join(d_gate, d_up), (2 * BLOCK,)).to(d_gate_up.dtype.element_ty)
    wide = 2 * first + tl.arange(0, 2 * BLOCK)
    tl.store(d_gate_up + wide, both, mask=wide < 2 * pairs)


def launch_forward(
    gate_up: torch.Tensor, out: torch.Tensor, alpha: float, limit: float, offset: float
) -> None:
    """``out`` of (..., width) from ``gate_up`` of (..., 2 * width); both contiguous."""
    if pairs := out.numel():
        _forward_kernel[(triton.cdiv(pairs, BLOCK),)](
            gate_up, out, pairs, alpha, limit, offset, BLOCK=BLOCK, num_warps=WARPS
        )


def launch_backward(
    grad: torch.Tensor,
    gate_up: torch.Tensor,
    d_gate_up: torch.Tensor,
    alpha: float,
    limit: float,
    offset: float,
) -> None:
    """Write the gradient of ``gate_up``; all contiguous."""
    if pairs := grad.numel():
        _backward_kernel[(triton.cdiv(pairs, BLOCK),)](
            grad, gate_up, d_gate_up, pairs, alpha, limit, offset, BLOCK=BLOCK, num_warps=WARPS
        )
