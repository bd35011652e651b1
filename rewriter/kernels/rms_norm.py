"""RMSNorm, alone or with the residual add before it, in one pass over memory.

``y = weight · x / sqrt(mean(x²) + eps)`` over the last dimension, after Zhang and Sennrich, "Root Mean Square
Layer Normalization" (2019), in the variants that models write: Llama rounds to the input's dtype before the
weight (``round_before_weight``), OLMo 2 and GPT-OSS after it, Gemma adds 1 to the weight (``offset``) and
rounds last, some have no weight.

Bytes moved per element of a bf16 ``x``: forward 4, with the add 8; backward 6, with the add's gradient 8.
Besides, 4 bytes a row (the fp32 reciprocal root) and the weight, which stays in L2. Eager makes several fp32
copies of ``x``. Saved for the backward: ``x`` (or the sum) and the reciprocal root. The weight's gradient is
computed only where it is asked for: fp32 sums of each program, then their sum in a fixed order, so that it is
deterministic.

Refused: last dimensions beyond 65536 (``hidden_fits``), dtypes other than bf16, fp16 and fp32.
"""

import torch
from torch import Tensor

from rewriter.kernels.registration import define, differentiate
from rewriter.kernels.rows import DTYPES, check_norm, dense_rows, row_statistic


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    offset: float = 0.0,
    round_before_weight: bool = True,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """RMSNorm of ``x`` over its last dimension; statistics and products in fp32.

    Args:
        x: (..., hidden). Any strides; copied only if the last dimension is not dense, or the leading ones do
            not collapse into two.
        weight: (hidden,) or None, of ``x``'s dtype or another.
        offset: added to the weight (Gemma: 1).
        round_before_weight: round to ``x.dtype`` before the product with the weight.
        out_dtype: None for the variant's own: ``x.dtype``, or with ``round_before_weight`` the promotion of
            ``x.dtype`` and ``weight.dtype``.

    Returns:
        (..., hidden), in the memory order of ``x``.

    Raises:
        ValueError: hidden exceeds 65536, or the weight is not (hidden,).
        TypeError: the weight is not bf16, fp16 or fp32. An ``x`` of another dtype takes the reference.
    """
    if x.is_cuda and x.dtype in DTYPES:
        return torch.ops.rewriter.rms_norm(x, weight, eps, offset, round_before_weight, out_dtype)[0]
    return rms_norm_reference(x, weight, eps, offset, round_before_weight, out_dtype)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    offset: float = 0.0,
    round_before_weight: bool = True,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """``h = x + residual`` and its RMSNorm, in one pass; arguments and errors as for ``rms_norm``.

    Returns:
        (y, h), both (..., hidden). ``h`` is rounded to the promoted dtype of ``x`` and ``residual`` before it
        is normalised, as in eager. The backward folds the gradient of ``h`` into the one gradient of both.
    """
    if x.is_cuda and x.dtype in DTYPES and residual.dtype in DTYPES:
        args = (x, residual, weight, eps, offset, round_before_weight, out_dtype)
        y, h, _ = torch.ops.rewriter.add_rms_norm(*args)
        return y, h
    return add_rms_norm_reference(x, residual, weight, eps, offset, round_before_weight, out_dtype)


def rms_norm_reference(x, weight, eps, offset=0.0, round_before_weight=True, out_dtype=None):
    """The models' own operations, in plain differentiable PyTorch."""
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    if not round_before_weight:
        h = h if weight is None else h * (weight.float() + offset)
        return h.to(out_dtype or x.dtype)
    y = h.to(x.dtype)
    if weight is not None:
        y = (weight + offset if offset != 0 else weight) * y
    return y.to(out_dtype or y.dtype)


def add_rms_norm_reference(x, residual, weight, eps, offset=0.0, round_before_weight=True, out_dtype=None):
    """The model's own sum, then its norm: (y, h), as ``add_rms_norm`` gives them."""
    h = x + residual
    return rms_norm_reference(h, weight, eps, offset, round_before_weight, out_dtype), h


def _out_dtype(x_dtype, weight, round_before_weight, out_dtype):
    if out_dtype is not None:
        return out_dtype
    if weight is None or not round_before_weight:
        return x_dtype
    return torch.promote_types(x_dtype, weight.dtype)


def _empty_outputs(x, residual, weight, round_before_weight, out_dtype, room):
    """(y, h, rstd), not yet computed; h is None where nothing is added."""
    check_norm("rms_norm" if residual is None else "add_rms_norm", x, residual, weight)
    h_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = dense_rows(x, _out_dtype(h_dtype, weight, round_before_weight, out_dtype), room=room)
    h = None if residual is None else dense_rows(y.narrow(-1, 0, x.shape[-1]), h_dtype)
    return y, h, row_statistic(y)


def _forward_fake(x, weight, eps, offset, round_before_weight, out_dtype, room=0):
    y, _, rstd = _empty_outputs(x, None, weight, round_before_weight, out_dtype, room)
    return y, rstd


def _forward_kernel(x, weight, eps, offset, round_before_weight, out_dtype, room=0):
    from rewriter.kernels.norm_triton import launch_forward

    y, _, rstd = _empty_outputs(x, None, weight, round_before_weight, out_dtype, room)
    launch_forward(x, None, weight, None, y, None, None, rstd, eps, offset, round_before_weight)
    return y, rstd


def _add_forward_fake(x, residual, weight, eps, offset, round_before_weight, out_dtype, room=0):
    return _empty_outputs(x, residual, weight, round_before_weight, out_dtype, room)


def _add_forward_kernel(x, residual, weight, eps, offset, round_before_weight, out_dtype, room=0):
    from rewriter.kernels.norm_triton import launch_forward

    y, h, rstd = _empty_outputs(x, residual, weight, round_before_weight, out_dtype, room)
    launch_forward(x, residual, weight, None, y, h, None, rstd, eps, offset, round_before_weight)
    return y, h, rstd


def _backward_fake(dy, dh, x, weight, rstd, offset, grad_x, grad_weight, room=0):
    dx = dense_rows(x, x.dtype, room=room) if grad_x else x.new_empty(0)
    dw = weight.new_empty(weight.shape) if grad_weight else x.new_empty(0)
    return dx, dw


def _backward_kernel(dy, dh, x, weight, rstd, offset, grad_x, grad_weight, room=0):
    from rewriter.kernels.norm_triton import launch_backward

    # Without a gradient for x there is still the order of its rows to go by.
    rows = dense_rows(x, x.dtype, None if grad_x else "meta", room)
    dw = weight.new_empty(weight.shape) if grad_weight else None
    launch_backward(dy, dh, x, weight, None, rstd, offset, rows, dw)
    return rows if grad_x else x.new_empty(0), x.new_empty(0) if dw is None else dw


# With a room, rows of the first result have so many more columns, which are not written: for who fills them
# (``rewriter.norm_rooms``). It has no gradient then.
_forward = define(
    "rms_norm(Tensor x, Tensor? weight, float eps, float offset, bool round_before_weight,"
    " ScalarType? out_dtype, int room=0) -> (Tensor, Tensor)",
    kernel=_forward_kernel,
    fake=_forward_fake,
)
_add_forward = define(
    "add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps, float offset,"
    " bool round_before_weight, ScalarType? out_dtype, int room=0) -> (Tensor, Tensor, Tensor)",
    kernel=_add_forward_kernel,
    fake=_add_forward_fake,
)
_backward = define(
    "rms_norm_backward(Tensor dy, Tensor? dh, Tensor x, Tensor? weight, Tensor rstd, float offset,"
    " bool grad_x, bool grad_weight, int room=0) -> (Tensor, Tensor)",
    kernel=_backward_kernel,
    fake=_backward_fake,
)


def _setup_context(ctx, inputs, output):
    x, weight, _, ctx.offset, *_ = inputs
    _, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(rstd)
    ctx.save_for_backward(x, weight, rstd)


def _gradients(ctx, dy, _):
    if dy is None:
        return (None,) * 6
    x, weight, rstd = ctx.saved_tensors
    grad_x, grad_weight = ctx.needs_input_grad[:2]
    dx, dw = _backward(dy, None, x, weight, rstd, ctx.offset, grad_x, grad_weight)
    return dx if grad_x else None, dw if grad_weight else None, None, None, None, None


def _add_setup_context(ctx, inputs, output):
    x, residual, weight, _, ctx.offset, *_ = inputs
    _, h, rstd = output
    ctx.dtypes = x.dtype, residual.dtype
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(rstd)
    ctx.save_for_backward(h, weight, rstd)


def _add_gradients(ctx, dy, dh, _):
    grad_x, grad_residual, grad_weight = ctx.needs_input_grad[:3]
    dw = None
    if dy is not None:
        h, weight, rstd = ctx.saved_tensors
        dh, dw = _backward(dy, dh, h, weight, rstd, ctx.offset, grad_x or grad_residual, grad_weight)
    if dh is None:
        return (None,) * 7
    dx = dh.to(ctx.dtypes[0]) if grad_x else None
    dresidual = dh.to(ctx.dtypes[1]) if grad_residual else None
    return dx, dresidual, dw if grad_weight else None, None, None, None, None


differentiate(_forward, _gradients, _setup_context)
differentiate(_add_forward, _add_gradients, _add_setup_context)
