"""Gated activation, ``activation(gate) * up``, of two tensors or of the halves of one packed tensor.

The elementwise middle of a gated MLP, after Shazeer, "GLU Variants Improve Transformer" (2020). The packed
form (Phi 3, GLM 4: ``gate, up = x.chunk(2, dim=-1)``) reads the halves in place and writes one packed
gradient, where eager would concatenate two.

Bytes moved per element of a bf16 result: forward 6; backward 10. Eager moves 10 and 18: it stores the
activation, and in the backward its gradient. Saved for the backward: gate and up only; the activation is
recomputed, in the launch that writes both gradients. Computed in fp32 and rounded once, where eager rounds
the activation, too.

Where a backward reads the result, too, ``*_backward_with_result_`` write it in the launch that writes the
gradients: 12 bytes an element for 10 and 6, and no memory beside the gradients', since the result takes the
place of the gradient that was read. A graph with both ops gets them by ``rewriter.gate_gradients``.

Refused, in favour of the reference: gate and up of different shapes, dtypes other than bf16, fp16 and fp32.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from rewriter.kernels.registration import define, differentiate

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_REFERENCES = {
    "silu": F.silu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "relu_squared": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
}
ACTIVATIONS = tuple(_REFERENCES)
ORDERS = ("gate_up", "up_gate")


def gated_activation(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """``activation(gate) * up``, computed in fp32.

    Args:
        gate, up: (..., width), of one shape, any strides; copied only if the last dimension is not dense or
            the leading ones do not collapse into one.
        activation: one of ``ACTIVATIONS``.

    Returns:
        (..., width), contiguous, of the promoted dtype of the two. Saved for the backward: gate and up.

    Raises:
        ValueError: unknown activation.
    """
    check_activation(activation)
    served = gate.is_cuda and gate.dtype in DTYPES and up.dtype in DTYPES
    if served and gate.dim() > 0 and gate.shape == up.shape:
        return torch.ops.rewriter.gated_activation(gate, up, activation)
    return gated_activation_reference(gate, up, activation)


def gated_activation_packed(gate_up: Tensor, activation: str, order: str = "gate_up") -> Tensor:
    """``activation(gate) * up`` of the two halves of ``gate_up``, computed in fp32.

    Args:
        gate_up: (..., 2 * width), any strides.
        activation: one of ``ACTIVATIONS``.
        order: ``"gate_up"`` or ``"up_gate"``, which half stands first.

    Returns:
        (..., width), contiguous. Saved for the backward: ``gate_up``.

    Raises:
        ValueError: unknown activation or order; an odd last dimension.
    """
    check_packed(gate_up, activation, order)
    if gate_up.is_cuda and gate_up.dtype in DTYPES:
        return torch.ops.rewriter.gated_activation_packed(gate_up, activation, order)
    return gated_activation_packed_reference(gate_up, activation, order)


def gated_activation_reference(gate, up, activation):
    """The models' own operations, in plain differentiable PyTorch."""
    return _REFERENCES[activation](gate) * up


def gated_activation_packed_reference(gate_up, activation, order="gate_up"):
    """The same of one packed tensor, (..., 2 * width)."""
    first, second = gate_up.chunk(2, dim=-1)
    gate, up = (first, second) if order == "gate_up" else (second, first)
    return up * _REFERENCES[activation](gate)


def check_activation(activation: str) -> None:
    """Raise unless the kernels know the activation."""
    if activation not in _REFERENCES:
        raise ValueError(
            f"gated_activation: unknown activation {activation!r}; known are {', '.join(ACTIVATIONS)}."
        )


def check_packed(gate_up: Tensor, activation: str, order: str) -> None:
    """Raise unless ``gate_up`` has two equal halves in a known order, and the activation is known."""
    check_activation(activation)
    if order not in ORDERS:
        raise ValueError(
            f"gated_activation_packed: unknown order {order!r}; known are {' and '.join(ORDERS)}."
        )
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2:
        raise ValueError(
            f"gated_activation_packed: the last dimension of {tuple(gate_up.shape)} has no two equal halves."
        )


def _halves(packed: Tensor, order: str) -> tuple[Tensor, Tensor]:
    """Views of the gate's and of the up's half."""
    width = packed.shape[-1] // 2
    first, second = packed[..., :width], packed[..., width:]
    return (first, second) if order == "gate_up" else (second, first)


def _fake(gate, up, activation):
    return gate.new_empty(gate.shape, dtype=torch.promote_types(gate.dtype, up.dtype))


def _kernel(gate, up, activation):
    from rewriter.kernels.gated_activation_triton import launch_forward

    if gate.shape != up.shape:
        raise ValueError(
            f"gated_activation: gate {tuple(gate.shape)} and up {tuple(up.shape)} differ in shape; "
            "use gated_activation_reference."
        )
    out = _fake(gate, up, activation)
    launch_forward(gate, up, out, activation)
    return out


def _packed_fake(gate_up, activation, order):
    return gate_up.new_empty([*gate_up.shape[:-1], gate_up.shape[-1] // 2])


def _packed_kernel(gate_up, activation, order):
    from rewriter.kernels.gated_activation_triton import launch_forward

    out = _packed_fake(gate_up, activation, order)
    launch_forward(*_halves(gate_up, order), out, activation)
    return out


def _backward_fake(grad, gate, up, activation, grad_gate, grad_up):
    d_gate = gate.new_empty(gate.shape if grad_gate else 0)
    return d_gate, up.new_empty(up.shape if grad_up else 0)


def _backward_kernel(grad, gate, up, activation, grad_gate, grad_up):
    from rewriter.kernels.gated_activation_triton import launch_backward

    d_gate, d_up = _backward_fake(grad, gate, up, activation, grad_gate, grad_up)
    wanted = d_gate if grad_gate else None, d_up if grad_up else None
    launch_backward(grad, gate, up, *wanted, activation)
    return d_gate, d_up


def _packed_backward_fake(grad, gate_up, activation, order):
    return gate_up.new_empty(gate_up.shape)


def _packed_backward_kernel(grad, gate_up, activation, order):
    from rewriter.kernels.gated_activation_triton import launch_backward

    packed = _packed_backward_fake(grad, gate_up, activation, order)
    launch_backward(grad, *_halves(gate_up, order), *_halves(packed, order), activation)
    return packed


def _with_result_fake(grad, gate, up, activation):
    return _backward_fake(grad, gate, up, activation, True, True)


def _with_result_kernel(grad, gate, up, activation):
    d_gate, d_up = _with_result_fake(grad, gate, up, activation)
    _replace_by_result(grad, (gate, up), (d_gate, d_up), activation)
    return d_gate, d_up


def _packed_with_result_kernel(grad, gate_up, activation, order):
    packed = _packed_backward_fake(grad, gate_up, activation, order)
    _replace_by_result(grad, _halves(gate_up, order), _halves(packed, order), activation)
    return packed


def _replace_by_result(grad, inputs, gradients, activation):
    """Write ``gradients`` of ``inputs``, and over ``grad`` the result, through a copy where it has gaps."""
    from rewriter.kernels.gated_activation_triton import launch_backward

    place = grad.contiguous()
    (gate, up), (d_gate, d_up) = inputs, gradients
    launch_backward(place, gate, up, d_gate, d_up, activation, result=True)
    if place is not grad:
        grad.copy_(place)


_forward = define(
    "gated_activation(Tensor gate, Tensor up, str activation) -> Tensor",
    kernel=_kernel,
    fake=_fake,
)
_packed_forward = define(
    "gated_activation_packed(Tensor gate_up, str activation, str order) -> Tensor",
    kernel=_packed_kernel,
    fake=_packed_fake,
)
_backward = define(
    "gated_activation_backward(Tensor grad, Tensor gate, Tensor up, str activation, bool grad_gate,"
    " bool grad_up) -> (Tensor, Tensor)",
    kernel=_backward_kernel,
    fake=_backward_fake,
)
_packed_backward = define(
    "gated_activation_packed_backward(Tensor grad, Tensor gate_up, str activation, str order) -> Tensor",
    kernel=_packed_backward_kernel,
    fake=_packed_backward_fake,
)
define(
    "gated_activation_backward_with_result_(Tensor(a!) grad, Tensor gate, Tensor up, str activation)"
    " -> (Tensor, Tensor)",
    kernel=_with_result_kernel,
    fake=_with_result_fake,
)
define(
    "gated_activation_packed_backward_with_result_(Tensor(a!) grad, Tensor gate_up, str activation,"
    " str order) -> Tensor",
    kernel=_packed_with_result_kernel,
    fake=_packed_backward_fake,
)


def _setup_context(ctx, inputs, output):
    gate, up, ctx.activation = inputs
    ctx.save_for_backward(gate, up)


def _gradients(ctx, grad):
    wanted = ctx.needs_input_grad[:2]
    grads = _backward(grad, *ctx.saved_tensors, ctx.activation, *wanted)
    return *(dx if want else None for dx, want in zip(grads, wanted, strict=True)), None


def _packed_setup_context(ctx, inputs, output):
    gate_up, ctx.activation, ctx.order = inputs
    ctx.save_for_backward(gate_up)


def _packed_gradients(ctx, grad):
    (gate_up,) = ctx.saved_tensors
    return _packed_backward(grad, gate_up, ctx.activation, ctx.order), None, None


differentiate(_forward, _gradients, _setup_context)
differentiate(_packed_forward, _packed_gradients, _packed_setup_context)
