"""Triton kernels of LayerNorm: as those of RMSNorm, with a second statistic a row and a bias."""

# Triton types a kernel as the plain function below its decorator, and `tl.range` as a function: launch
# options, numbers for constexpr parameters and loops look like errors.
# pyright: reportArgumentType=false, reportCallIssue=false

import torch
import triton
import triton.language as tl

from rewriter.kernels.rms_norm_triton import (
    in_row_order,
    lay_out_rows,
    resident_programs,
    row_starts,
    sum_columns,
    tile,
)


@triton.jit
def layer_norm_forward_kernel(
    x_ptr, x_outer, x_inner, residual_ptr, residual_outer, residual_inner, weight_ptr, bias_ptr,
    y_ptr, h_ptr, mean_ptr, rstd_ptr, rows, inner, eps, offset,
    HIDDEN: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    live = (row < rows)[:, None] & (column < HIDDEN)[None, :]
    out = row.to(tl.int64)[:, None] * HIDDEN + column[None, :]

    at = row_starts(row, inner, x_outer, x_inner)[:, None] + column[None, :]
    x = tl.load(x_ptr + at, mask=live, other=0.0)
    if residual_ptr is not None:
        at = row_starts(row, inner, residual_outer, residual_inner)[:, None] + column[None, :]
        residual = tl.load(residual_ptr + at, mask=live, other=0.0).to(tl.float32)
        x = (x.to(tl.float32) + residual).to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + out, x, mask=live)

    value = x.to(tl.float32)
    mean = tl.sum(value, 1) / HIDDEN
    centred = tl.where(live, value - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / HIDDEN + eps)
    tl.store(mean_ptr + row, mean, mask=row < rows)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)
    y = centred * rstd[:, None]
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + column, mask=column < HIDDEN, other=0.0).to(tl.float32) + offset
        y = y * weight[None, :]
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + column, mask=column < HIDDEN, other=0.0).to(tl.float32)
        y = y + bias[None, :]
    tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=live)


def launch_forward(x, residual, weight, bias, y, h, mean, rstd, eps, offset) -> None:
    """Fill ``y``, ``h`` (where there is a residual), ``mean`` and ``rstd``, all dense in one order."""
    if x.numel() == 0:
        return
    inner, ((x, x_strides), (residual, residual_strides)) = lay_out_rows(y, x, residual)
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    hidden = x.shape[-1]
    rows = x.numel() // hidden
    columns, tile_rows, warps = tile(hidden)
    with torch.cuda.device_of(x):
        layer_norm_forward_kernel[(triton.cdiv(rows, tile_rows),)](
            x, *x_strides, residual, *residual_strides, weight, bias, y, h, mean, rstd,
            rows, inner, eps, offset, hidden, columns, tile_rows, num_warps=warps,
        )  # fmt: skip


@triton.jit
def layer_norm_backward_kernel(
    dy_ptr, dy_outer, dy_inner, dh_ptr, dh_outer, dh_inner, x_ptr, x_outer, x_inner,
    weight_ptr, mean_ptr, rstd_ptr, dx_ptr, dweight_ptr, dbias_ptr, rows, inner, offset,
    HIDDEN: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, COLUMNS)
    if dweight_ptr is not None:
        dweight = tl.zeros([ROWS, COLUMNS], tl.float32)
    if dbias_ptr is not None:
        dbias = tl.zeros([ROWS, COLUMNS], tl.float32)

    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        live = (row < rows)[:, None] & (column < HIDDEN)[None, :]
        at = row_starts(row, inner, x_outer, x_inner)[:, None] + column[None, :]
        x = tl.load(x_ptr + at, mask=live, other=0.0)
        at = row_starts(row, inner, dy_outer, dy_inner)[:, None] + column[None, :]
        dy = tl.load(dy_ptr + at, mask=live, other=0.0)
        if dh_ptr is not None:
            at = row_starts(row, inner, dh_outer, dh_inner)[:, None] + column[None, :]
            dh = tl.load(dh_ptr + at, mask=live, other=0.0)
        mean = tl.load(mean_ptr + row, mask=row < rows, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)[:, None]

        # Dead columns have no gradient, so their normal (-mean) counts nowhere.
        gradient = dy.to(tl.float32)
        normal = (x.to(tl.float32) - mean) * rstd
        if dweight_ptr is not None:
            dweight += gradient * normal
        if dbias_ptr is not None:
            dbias += gradient
        if dx_ptr is not None:
            if weight_ptr is not None:
                # Read again each time, from L1: held over the loop, fewer programs would fit.
                weight = tl.load(weight_ptr + column, mask=column < HIDDEN, other=0.0).to(tl.float32) + offset
                gradient = gradient * weight[None, :]
            level = tl.sum(gradient, 1)[:, None] / HIDDEN
            along = tl.sum(gradient * normal, 1)[:, None] / HIDDEN
            dx = rstd * (gradient - level - normal * along)
            if dh_ptr is not None:
                dx += dh.to(tl.float32)
            out = row.to(tl.int64)[:, None] * HIDDEN + column[None, :]
            tl.store(dx_ptr + out, dx.to(dx_ptr.dtype.element_ty), mask=live)

    partial = tl.program_id(0).to(tl.int64) * HIDDEN + column
    if dweight_ptr is not None:
        tl.store(dweight_ptr + partial, tl.sum(dweight, 0), mask=column < HIDDEN)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + partial, tl.sum(dbias, 0), mask=column < HIDDEN)


def launch_backward(dy, dh, x, weight, mean, rstd, offset, dx, dweight, dbias) -> None:
    """Fill ``dx``, unless it is on meta and only gives the order of rows, ``dweight`` and ``dbias``."""
    wanted = [gradient for gradient in (dweight, dbias) if gradient is not None]
    if x.numel() == 0:
        for gradient in wanted:
            gradient.zero_()
        return
    mean, rstd = in_row_order(dx, mean), in_row_order(dx, rstd)
    inner, ((dy, dy_strides), (dh, dh_strides), (x, x_strides)) = lay_out_rows(dx, dy, dh, x)
    weight = None if weight is None else weight.contiguous()
    hidden = x.shape[-1]
    rows = x.numel() // hidden
    columns, tile_rows, warps = tile(hidden)
    programs = triton.cdiv(rows, tile_rows)
    if wanted:
        programs = min(programs, resident_programs(x.device, warps, len(wanted)))
    shape = (len(wanted), programs, hidden)
    partials = list(torch.empty(shape, dtype=torch.float32, device=x.device)) if wanted else []
    weight_partial = partials[0] if dweight is not None else None
    bias_partial = partials[-1] if dbias is not None else None
    with torch.cuda.device_of(x):
        layer_norm_backward_kernel[(programs,)](
            dy, *dy_strides, dh, *dh_strides, x, *x_strides, weight, mean, rstd, None if dx.is_meta else dx,
            weight_partial, bias_partial, rows, inner, offset, hidden, columns, tile_rows, num_warps=warps,
        )  # fmt: skip
        for partial, gradient in zip(partials, wanted, strict=True):
            sum_columns(partial, gradient)
