"""Triton kernels of RMSNorm and LayerNorm: a row is read once, and its statistics are taken in registers.

They are one pair of kernels: LayerNorm is where there is a mean to keep. The backward with a parameter's
gradient runs as many programs as fit on the device together, each keeping one fp32 sum a column over all its
rows, and a second launch adds up the programs' sums.
"""

# Triton types a kernel as the plain function below its decorator, and `tl.range` as a function: launch
# options, numbers for constexpr parameters and loops look like errors.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from rewriter.kernels.rows_triton import Division, in_row_order, lay_out_rows, row_starts, sum_columns, tile


@triton.jit
def norm_forward_kernel(
    x_ptr, x_outer, x_inner, residual_ptr, residual_outer, residual_inner, weight_ptr, bias_ptr,
    y_ptr, h_ptr, mean_ptr, rstd_ptr, rows, inner, eps, offset,
    HIDDEN: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, ROUND: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, COLUMNS)
    for first in tl.range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        row = first + tl.arange(0, ROWS)
        live = (row < rows)[:, None] & (column < HIDDEN)[None, :]
        out = row.to(tl.int64)[:, None] * HIDDEN + column[None, :]

        at = row_starts(row, inner, x_outer, x_inner) + column[None, :]
        x = tl.load(x_ptr + at, mask=live, other=0.0)
        if residual_ptr is not None:
            at = row_starts(row, inner, residual_outer, residual_inner) + column[None, :]
            residual = tl.load(residual_ptr + at, mask=live, other=0.0).to(tl.float32)
            x = (x.to(tl.float32) + residual).to(h_ptr.dtype.element_ty)
            tl.store(h_ptr + out, x, mask=live)

        value = x.to(tl.float32)
        if mean_ptr is not None:
            mean = tl.sum(value, 1) / HIDDEN
            tl.store(mean_ptr + row, mean, mask=row < rows)
            value = tl.where(live, value - mean[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(value * value, 1) / HIDDEN + eps)
        tl.store(rstd_ptr + row, rstd, mask=row < rows)
        y = value * rstd[:, None]
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + column, mask=column < HIDDEN, other=0.0).to(tl.float32) + offset
            if ROUND:
                y = y.to(x.dtype).to(tl.float32)
            y = y * weight[None, :]
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + column, mask=column < HIDDEN, other=0.0).to(tl.float32)
            y = y + bias[None, :]
        tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=live)


@triton.jit
def norm_backward_kernel(
    dy_ptr, dy_outer, dy_inner, dh_ptr, dh_outer, dh_inner, x_ptr, x_outer, x_inner,
    weight_ptr, mean_ptr, rstd_ptr, dx_ptr, dweight_ptr, dbias_ptr, rows, inner, offset,
    HIDDEN: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, COLUMNS)
    if dweight_ptr is not None:
        dweight = tl.zeros([ROWS, COLUMNS], tl.float32)
    if dbias_ptr is not None:
        dbias = tl.zeros([ROWS, COLUMNS], tl.float32)

    for first in tl.range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        row = first + tl.arange(0, ROWS)
        live = (row < rows)[:, None] & (column < HIDDEN)[None, :]
        at = row_starts(row, inner, x_outer, x_inner) + column[None, :]
        x = tl.load(x_ptr + at, mask=live, other=0.0)
        at = row_starts(row, inner, dy_outer, dy_inner) + column[None, :]
        dy = tl.load(dy_ptr + at, mask=live, other=0.0)
        if dh_ptr is not None:
            at = row_starts(row, inner, dh_outer, dh_inner) + column[None, :]
            dh = tl.load(dh_ptr + at, mask=live, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)[:, None]

        gradient = dy.to(tl.float32)
        normal = x.to(tl.float32)
        if mean_ptr is not None:
            # Dead columns have no gradient, so what they hold then (-mean) counts nowhere.
            normal -= tl.load(mean_ptr + row, mask=row < rows, other=0.0)[:, None]
        normal *= rstd
        if dweight_ptr is not None:
            dweight += gradient * normal
        if dbias_ptr is not None:
            dbias += gradient
        if dx_ptr is not None:
            if weight_ptr is not None:
                # Read again each time, from L1: held over the loop, fewer programs would fit.
                weight = tl.load(weight_ptr + column, mask=column < HIDDEN, other=0.0).to(tl.float32) + offset
                gradient = gradient * weight[None, :]
            if mean_ptr is None:
                along = tl.sum(gradient * normal, 1)[:, None] / HIDDEN
            else:
                # Both sums in one reduction, for the threads meet at each.
                level, along = tl.split(tl.sum(tl.join(gradient, gradient * normal), 1) / HIDDEN)
                gradient -= level[:, None]
                along = along[:, None]
            dx = rstd * (gradient - normal * along)
            if dh_ptr is not None:
                dx += dh.to(tl.float32)
            out = row.to(tl.int64)[:, None] * HIDDEN + column[None, :]
            tl.store(dx_ptr + out, dx.to(dx_ptr.dtype.element_ty), mask=live)

    partial = tl.program_id(0).to(tl.int64) * HIDDEN + column
    if dweight_ptr is not None:
        tl.store(dweight_ptr + partial, tl.sum(dweight, 0), mask=column < HIDDEN)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + partial, tl.sum(dbias, 0), mask=column < HIDDEN)


def divide_forward(hidden: int, centred: bool, added: bool) -> Division:
    return tile(hidden)


def divide_backward(hidden: int, centred: bool, added: bool, sums: int) -> Division:
    """``sums``: how many sums a column a program keeps in registers."""
    division = tile(hidden)
    if not sums:
        return division
    return division._replace(resident=max(1, (24 if sums == 1 else 16) // division.warps))


def launch_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    h: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    eps: float,
    offset: float,
    round_before_weight: bool = False,
) -> None:
    """Fill ``y``, ``h`` (with a residual), ``mean`` (LayerNorm) and ``rstd``, all dense in one order."""
    if x.numel() == 0:
        return
    inner, ((x, x_strides), (residual, residual_strides)) = lay_out_rows(y, x, residual)
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    hidden = x.shape[-1]
    rows = x.numel() // hidden
    division = divide_forward(hidden, mean is not None, residual is not None)
    with torch.cuda.device_of(x):
        norm_forward_kernel[(division.programs(rows, x.device),)](
            x, *x_strides, residual, *residual_strides, weight, bias, y, h, mean, rstd,
            rows, inner, eps, offset, hidden, division.columns, division.rows, round_before_weight,
            division.stages, num_warps=division.warps, maxnreg=division.registers,
        )  # fmt: skip


def launch_backward(
    dy: Tensor,
    dh: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    offset: float,
    dx: Tensor,
    dweight: Tensor | None,
    dbias: Tensor | None = None,
) -> None:
    """Fill ``dx``, unless it is on meta and only gives the order of rows, ``dweight`` and ``dbias``."""
    wanted = [gradient for gradient in (dweight, dbias) if gradient is not None]
    if x.numel() == 0:
        for gradient in wanted:
            gradient.zero_()
        return
    rstd = in_row_order(dx, rstd)
    mean = None if mean is None else in_row_order(dx, mean)
    inner, ((dy, dy_strides), (dh, dh_strides), (x, x_strides)) = lay_out_rows(dx, dy, dh, x)
    weight = None if weight is None else weight.contiguous()
    hidden = x.shape[-1]
    rows = x.numel() // hidden
    division = divide_backward(hidden, mean is not None, dh is not None, len(wanted))
    programs = division.programs(rows, x.device)
    shape = (len(wanted), programs, hidden)
    partials = list(torch.empty(shape, dtype=torch.float32, device=x.device)) if wanted else []
    weight_partial = partials[0] if dweight is not None else None
    bias_partial = partials[-1] if dbias is not None else None
    with torch.cuda.device_of(x):
        norm_backward_kernel[(programs,)](
            dy, *dy_strides, dh, *dh_strides, x, *x_strides, weight, mean, rstd, None if dx.is_meta else dx,
            weight_partial, bias_partial, rows, inner, offset, hidden, division.columns, division.rows,
            division.stages, num_warps=division.warps, maxnreg=division.registers,
        )  # fmt: skip
        for partial, gradient in zip(partials, wanted, strict=True):
            sum_columns(partial, gradient)
