"""Triton kernels of the gated activation: elementwise, over rows of any stride.

A program owns a block of one row. Dense tensors are one long row, so that no block but the last is cut.
"""

# Triton types a kernel as the plain function below its decorator, and `tl.range` as a function: launch
# options, numbers for constexpr parameters and loops look like errors.
# pyright: reportCallIssue=false

import torch
import triton
import triton.language as tl

from .sigmoid_triton import sigmoid

# Two 16-byte loads of gate and of up a thread forward; one of each, and of the gradient, backward. Both keep
# more loads in flight than the latency of memory asks for.
BLOCK = 2048
FORWARD_WARPS = 4
BACKWARD_WARPS = 8

SQRT_HALF = tl.constexpr(0.7071067811865476)
INVERSE_SQRT_TWO_PI = tl.constexpr(0.3989422804014327)
TWICE_SQRT_TWO_OVER_PI = tl.constexpr(1.5957691216057308)
CUBIC = tl.constexpr(0.044715)


@triton.jit
def _activate(g, ACTIVATION: tl.constexpr):
    """The activation of fp32 ``g``, and its derivative."""
    if ACTIVATION == "silu":
        s, rest = sigmoid(g)
        value = g * s
        slope = s + value * rest
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 is sigmoid(2u), without the cancellation near tanh = -1.
        s, rest = sigmoid(g * TWICE_SQRT_TWO_OVER_PI * (1.0 + g * g * CUBIC))
        value = g * s
        slope = s + value * rest * ((1.0 + g * g * (3.0 * CUBIC)) * TWICE_SQRT_TWO_OVER_PI)
    elif ACTIVATION == "gelu":
        normal = 0.5 * (1.0 + tl.erf(g * SQRT_HALF))
        value = g * normal
        slope = normal + g * (tl.exp(-0.5 * g * g) * INVERSE_SQRT_TWO_PI)
    elif ACTIVATION == "relu":
        # A comparison, not a maximum: NaN must come through.
        value = tl.where(g <= 0.0, 0.0, g)
        slope = tl.where(g <= 0.0, 0.0, 1.0)
    elif ACTIVATION == "relu_squared":
        positive = tl.where(g <= 0.0, 0.0, g)
        value = positive * positive
        slope = 2.0 * positive
    else:
        tl.static_assert(ACTIVATION == "sigmoid")
        value, rest = sigmoid(g)
        slope = value * rest
    return value, slope


@triton.jit(do_not_specialize=["blocks"])
def _forward_kernel(
    gate, up, out, gate_stride, up_stride, width, blocks, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    column = (program % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    g = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    value, _ = _activate(g, ACTIVATION)
    tl.store(out + row * width + column, (value * u).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["blocks"])
def _backward_kernel(
    grad, gate, up, d_gate, d_up,
    grad_stride, gate_stride, up_stride, d_gate_stride, d_up_stride, width, blocks,
    ACTIVATION: tl.constexpr, GATE: tl.constexpr, UP: tl.constexpr, RESULT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients; with ``RESULT`` the activation, too, in the place of ``grad``."""
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    column = (program % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    dy = tl.load(grad + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    value, slope = _activate(g, ACTIVATION)
    if GATE or RESULT:
        u = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    if RESULT:
        tl.store(grad + row * grad_stride + column, (value * u).to(grad.dtype.element_ty), mask=inside)
    if GATE:
        dg = (dy * u * slope).to(d_gate.dtype.element_ty)
        tl.store(d_gate + row * d_gate_stride + column, dg, mask=inside)
    if UP:
        du = (dy * value).to(d_up.dtype.element_ty)
        tl.store(d_up + row * d_up_stride + column, du, mask=inside)


def _rows(x: torch.Tensor, width: int) -> torch.Tensor:
    """``x`` as (rows, width): a view where its strides allow one, else a copy."""
    if x.stride(-1) != 1 and width != 1:
        x = x.contiguous()
    return x.reshape(-1, width)


def _as_rows(
    inputs: list[torch.Tensor], outputs: list[torch.Tensor]
) -> tuple[int, list[torch.Tensor], list[torch.Tensor]]:
    """The width, and all tensors as (rows, width): one row where all are dense."""
    width = outputs[0].size(-1)
    if all(x.is_contiguous() for x in (*inputs, *outputs)):
        width = outputs[0].numel()
    return width, [_rows(x, width) for x in inputs], [x.view(-1, width) for x in outputs]


def _blocks(width: int) -> tuple[int, int]:
    """The size of a block, a power of 2, and how many cover a row."""
    block = min(BLOCK, 1 << (width - 1).bit_length())
    return block, -(-width // block)


def launch_forward(gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor, activation: str) -> None:
    """``out = activation(gate) * up``; all (..., width), ``out`` contiguous."""
    if out.numel() == 0:
        return
    width, (gate, up), (out,) = _as_rows([gate, up], [out])
    block, blocks = _blocks(width)
    _forward_kernel[(gate.size(0) * blocks,)](
        gate, up, out, gate.stride(0), up.stride(0), width, blocks,
        ACTIVATION=activation, BLOCK=block, num_warps=FORWARD_WARPS,
    )  # fmt: skip


def launch_backward(
    grad: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    d_gate: torch.Tensor | None,
    d_up: torch.Tensor | None,
    activation: str,
    *,
    result: bool = False,
) -> None:
    """Write the gradients that are not None; all (..., width), the outputs of strides that view as rows.

    Where all have one dtype, each element is read by the thread that writes it before it is written: the
    outputs may then be ``gate``, ``up`` or ``grad`` themselves, if those die here. With ``result`` what the
    forward wrote takes the place of ``grad``, which has to be contiguous.
    """
    outputs = [x for x in (d_gate, d_up) if x is not None]
    if not outputs or grad.numel() == 0:
        return
    width, (grad, gate, up), outputs = _as_rows([grad, gate, up], outputs)
    first, last = outputs[0], outputs[-1]
    block, blocks = _blocks(width)
    _backward_kernel[(gate.size(0) * blocks,)](
        grad, gate, up, first, last,
        grad.stride(0), gate.stride(0), up.stride(0), first.stride(0), last.stride(0), width, blocks,
        ACTIVATION=activation, GATE=d_gate is not None, UP=d_up is not None, RESULT=result, BLOCK=block,
        num_warps=BACKWARD_WARPS,
    )  # fmt: skip
