"""LayerNorm, alone or with the residual add before it, in one pass over memory.

``y = (weight + offset) · (x - mean(x)) / sqrt(var(x) + eps) + bias`` over the last dimension, after Ba, Kiros
and Hinton, "Layer Normalization" (2016): ``torch.nn.functional.layer_norm``, its form with ``weight + 1``
(``offset``), and LayerNorms written by hand that cast to fp32, normalise, multiply and cast back.

Bytes moved per element of a bf16 ``x``: forward 4, with the add 8; backward 6, with the add's gradient 8.
Besides, 8 bytes a row (mean and reciprocal deviation, fp32) and the parameters, which stay in L2. The
variance is taken of the centred row, in registers. Saved for the backward: ``x`` (or the sum) and the two
statistics. The parameters' gradients are computed only where they are asked for: fp32 sums of each program,
then their sum in a fixed order, so that they are deterministic.

Refused: last dimensions beyond 65536 (``hidden_fits``), dtypes other than bf16, fp16 and fp32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rewriter.kernels.registration import define, differentiate
from rewriter.kernels.rows import DTYPES, check_norm, dense_rows, per_head, row_statistic


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float = 0.0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """LayerNorm of ``x`` over its last dimension; statistics, products and sums in fp32, rounded once.

    Args:
        x: (..., hidden). Any strides; copied only if the last dimension is not dense, or the leading ones do
            not collapse into two.
        weight, bias: (hidden,) or None, each of ``x``'s dtype or another. Without bias the weight may be
            (heads, hidden), for an ``x`` of (..., heads, hidden).
        offset: added to the weight.
        out_dtype: None for ``x.dtype``.

    Returns:
        (..., hidden), in the memory order of ``x``; contiguous with a weight of two dimensions.

    Raises:
        ValueError: hidden exceeds 65536, or a parameter is none of these.
        TypeError: a parameter is not bf16, fp16 or fp32. An ``x`` of another dtype takes the reference.
    """
    if x.is_cuda and x.dtype in DTYPES:
        return torch.ops.rewriter.layer_norm(x, weight, bias, eps, offset, out_dtype)[0]
    return layer_norm_reference(x, weight, bias, eps, offset, out_dtype)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float = 0.0,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """``h = x + residual`` and its LayerNorm, in one pass; arguments and errors as for ``layer_norm``.

    Returns:
        (y, h), both (..., hidden). ``h`` is rounded to the promoted dtype of ``x`` and ``residual`` before it
        is normalised, as in eager. The backward folds the gradient of ``h`` into the one gradient of both.
    """
    if x.is_cuda and x.dtype in DTYPES and residual.dtype in DTYPES:
        args = (x, residual, weight, bias, eps, offset, out_dtype)
        y, h, _, _ = torch.ops.rewriter.add_layer_norm(*args)
        return y, h
    return add_layer_norm_reference(x, residual, weight, bias, eps, offset, out_dtype)


def layer_norm_reference(x, weight, bias, eps, offset=0.0, out_dtype=None):
    """``F.layer_norm`` in fp32 (fp64 for fp64), rounded once, in plain differentiable PyTorch."""
    compute = torch.promote_types(x.dtype, torch.float32)
    weight = None if weight is None else weight.to(compute)
    if weight is not None and offset != 0:
        weight = weight + offset
    bias = None if bias is None else bias.to(compute)
    if weight is not None and per_head(weight):
        normal = F.layer_norm(x.to(compute), x.shape[-1:], None, None, eps)
        return (weight * normal).to(out_dtype or x.dtype)
    return F.layer_norm(x.to(compute), x.shape[-1:], weight, bias, eps).to(out_dtype or x.dtype)


def add_layer_norm_reference(x, residual, weight, bias, eps, offset=0.0, out_dtype=None):
    """The model's own sum, then its norm: (y, h), as ``add_layer_norm`` gives them."""
    h = x + residual
    return layer_norm_reference(h, weight, bias, eps, offset, out_dtype), h


def _empty_outputs(x, residual, weight, bias, out_dtype):
    """(y, h, mean, rstd), not yet computed; h is None where nothing is added."""
    op = "layer_norm" if residual is None else "add_layer_norm"
    heads = residual is None and bias is None and per_head(weight)
    check_norm(op, x, residual, weight[0] if heads else weight, bias)
    if heads and (x.dim() < 2 or x.shape[-2] != weight.shape[0]):
        raise ValueError(
            f"{op}: weight {tuple(weight.shape)} is not one row a head of input {tuple(x.shape)}."
        )
    h_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = _rows(x, weight, out_dtype or h_dtype)
    h = None if residual is None else torch.empty_like(y, dtype=h_dtype)
    return y, h, row_statistic(y), row_statistic(y)


def _rows(x, weight, dtype, device=None):
    """Empty rows in ``x``'s memory order; with a weight a head, in the order in which heads are innermost."""
    return dense_rows(x.contiguous() if per_head(weight) else x, dtype, device)


def _forward_fake(x, weight, bias, eps, offset, out_dtype):
    y, _, mean, rstd = _empty_outputs(x, None, weight, bias, out_dtype)
    return y, mean, rstd


def _forward_kernel(x, weight, bias, eps, offset, out_dtype):
    from rewriter.kernels.norm_triton import launch_forward

    y, _, mean, rstd = _empty_outputs(x, None, weight, bias, out_dtype)
    launch_forward(x, None, weight, bias, y, None, mean, rstd, eps, offset)
    return y, mean, rstd


def _add_forward_fake(x, residual, weight, bias, eps, offset, out_dtype):
    return _empty_outputs(x, residual, weight, bias, out_dtype)


def _add_forward_kernel(x, residual, weight, bias, eps, offset, out_dtype):
    from rewriter.kernels.norm_triton import launch_forward

    y, h, mean, rstd = _empty_outputs(x, residual, weight, bias, out_dtype)
    launch_forward(x, residual, weight, bias, y, h, mean, rstd, eps, offset)
    return y, h, mean, rstd


def _empty_gradients(x, weight, bias_dtype, grad_weight):
    dw = weight.new_empty(weight.shape) if grad_weight else x.new_empty(0)
    db = x.new_empty(0) if bias_dtype is None else x.new_empty(x.shape[-1:], dtype=bias_dtype)
    return dw, db


def _backward_fake(dy, dh, x, weight, mean, rstd, offset, bias_dtype, grad_x, grad_weight):
    dx = _rows(x, weight, x.dtype) if grad_x else x.new_empty(0)
    return dx, *_empty_gradients(x, weight, bias_dtype, grad_weight)


def _backward_kernel(dy, dh, x, weight, mean, rstd, offset, bias_dtype, grad_x, grad_weight):
    from rewriter.kernels.norm_triton import launch_backward

    # Without a gradient for x there is still the order of its rows to go by.
    rows = _rows(x, weight, x.dtype, None if grad_x else "meta")
    dw, db = _empty_gradients(x, weight, bias_dtype, grad_weight)
    wanted = (dw if grad_weight else None, None if bias_dtype is None else db)
    launch_backward(dy, dh, x, weight, mean, rstd, offset, rows, *wanted)
    return rows if grad_x else x.new_empty(0), dw, db


_forward = define(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, float offset, ScalarType? out_dtype)"
    " -> (Tensor, Tensor, Tensor)",
    kernel=_forward_kernel,
    fake=_forward_fake,
)
_add_forward = define(
    "add_layer_norm(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps, float offset,"
    " ScalarType? out_dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    kernel=_add_forward_kernel,
    fake=_add_forward_fake,
)
_backward = define(
    # bias_dtype is None where the bias's gradient is not asked for; its values play no part in it.
    "layer_norm_backward(Tensor dy, Tensor? dh, Tensor x, Tensor? weight, Tensor mean, Tensor rstd,"
    " float offset, ScalarType? bias_dtype, bool grad_x, bool grad_weight) -> (Tensor, Tensor, Tensor)",
    kernel=_backward_kernel,
    fake=_backward_fake,
)


def _save(ctx, x, weight, bias, offset, mean, rstd):
    ctx.offset = offset
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, weight, mean, rstd)


def _run_backward(ctx, dy, dh, grad_x, grad_weight, grad_bias):
    x, weight, mean, rstd = ctx.saved_tensors
    bias_dtype = ctx.bias_dtype if grad_bias else None
    dx, dw, db = _backward(dy, dh, x, weight, mean, rstd, ctx.offset, bias_dtype, grad_x, grad_weight)
    return dx if grad_x else None, dw if grad_weight else None, db if grad_bias else None


def _setup_context(ctx, inputs, output):
    x, weight, bias, _, offset, _ = inputs
    _save(ctx, x, weight, bias, offset, *output[1:])


def _gradients(ctx, dy, *_):
    if dy is None:
        return (None,) * 6
    return *_run_backward(ctx, dy, None, *ctx.needs_input_grad[:3]), None, None, None


def _add_setup_context(ctx, inputs, output):
    x, residual, weight, bias, _, offset, _ = inputs
    ctx.dtypes = x.dtype, residual.dtype
    _save(ctx, output[1], weight, bias, offset, *output[2:])


def _add_gradients(ctx, dy, dh, *_):
    grad_x, grad_residual, grad_weight, grad_bias = ctx.needs_input_grad[:4]
    dw = db = None
    if dy is not None:
        dh, dw, db = _run_backward(ctx, dy, dh, grad_x or grad_residual, grad_weight, grad_bias)
    dx = dh.to(ctx.dtypes[0]) if dh is not None and grad_x else None
    dresidual = dh.to(ctx.dtypes[1]) if dh is not None and grad_residual else None
    return dx, dresidual, dw, db, None, None, None


differentiate(_forward, _gradients, _setup_context)
differentiate(_add_forward, _add_gradients, _add_setup_context)
