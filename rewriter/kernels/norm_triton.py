"""Triton kernels of RMSNorm and LayerNorm: a row is read once, and its statistics are taken in registers.

They are one pair of kernels: LayerNorm is where there is a mean to keep. The backward runs as many programs
as fit on the device together, each going through many rows while the next ones load. For a parameter's
gradient each keeps one fp32 sum a column over all its rows, and a second launch adds up the programs' sums.
"""

# Triton types a kernel as the plain function below its decorator, and `tl.range` as a function: launch
# options, numbers for constexpr parameters and loops look like errors.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from rewriter.kernels.rows_triton import (
    WARPS,
    Tile,
    in_row_order,
    lay_out_rows,
    multiprocessors,
    row_starts,
    shared_memory,
    sum_columns,
    tile_rows,
)

# The backward's share of a multiprocessor's 65536 registers for a thread, where WARPS warps share them.
REGISTERS = 65536 // (32 * WARPS)
# Tiles of a backward program in flight, the one in registers among them.
STAGES = 3


@triton.jit
def _weight_of(weight_ptr, row, column, offset, HIDDEN: tl.constexpr, HEADS: tl.constexpr):
    """The weight of each row in fp32: one for all, or that of the row's head, heads being rows in turn."""
    if HEADS == 1:
        weight = tl.load(weight_ptr + column, mask=column < HIDDEN, other=0.0)[None, :]
    else:
        at = (row % HEADS)[:, None] * HIDDEN + column[None, :]
        weight = tl.load(weight_ptr + at, mask=(column < HIDDEN)[None, :], other=0.0)
    return weight.to(tl.float32) + offset


@triton.jit
def norm_forward_kernel(
    x_ptr, x_outer, x_inner, residual_ptr, residual_outer, residual_inner, weight_ptr, bias_ptr,
    y_ptr, h_ptr, mean_ptr, rstd_ptr, rows, inner, eps, offset,
    HIDDEN: tl.constexpr, WIDE: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, COLUMNS)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = (row < rows)[:, None] & (column < HIDDEN)[None, :]

    at = row_starts(row, inner, x_outer, x_inner) + column[None, :]
    x = tl.load(x_ptr + at, mask=live, other=0.0)
    if residual_ptr is not None:
        at = row_starts(row, inner, residual_outer, residual_inner) + column[None, :]
        residual = tl.load(residual_ptr + at, mask=live, other=0.0).to(tl.float32)
        x = (x.to(tl.float32) + residual).to(h_ptr.dtype.element_ty)
        out = row.to(tl.int64)[:, None] * HIDDEN + column[None, :]
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
        weight = _weight_of(weight_ptr, row, column, offset, HIDDEN, HEADS)
        if ROUND:
            y = y.to(x.dtype).to(tl.float32)
        y = y * weight
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + column, mask=column < HIDDEN, other=0.0).to(tl.float32)
        y = y + bias[None, :]
    out = row.to(tl.int64)[:, None] * WIDE + column[None, :]
    tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=live)


@triton.jit
def norm_backward_kernel(
    dy_ptr, dy_outer, dy_inner, dh_ptr, dh_outer, dh_inner, x_ptr, x_outer, x_inner,
    weight_ptr, mean_ptr, rstd_ptr, dx_ptr, dweight_ptr, dbias_ptr, rows, inner, offset,
    HIDDEN: tl.constexpr, WIDE: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, STAGES: tl.constexpr,
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
                gradient = gradient * _weight_of(weight_ptr, row, column, offset, HIDDEN, HEADS)
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
            out = row.to(tl.int64)[:, None] * WIDE + column[None, :]
            tl.store(dx_ptr + out, dx.to(dx_ptr.dtype.element_ty), mask=live)

    partial = tl.program_id(0).to(tl.int64) * HIDDEN + column
    if dweight_ptr is not None and HEADS == 1:
        tl.store(dweight_ptr + partial, tl.sum(dweight, 0), mask=column < HIDDEN)
    elif dweight_ptr is not None:
        # Each row of the tile has met one head alone.
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        at = row[:, None] * HIDDEN + column[None, :]
        tl.store(dweight_ptr + at, dweight, mask=(column < HIDDEN)[None, :])
    if dbias_ptr is not None:
        tl.store(dbias_ptr + partial, tl.sum(dbias, 0), mask=column < HIDDEN)


def divide_forward(hidden: int, added: bool) -> Tile:
    """A thread has 64 bytes of 2-byte loads in flight: 32 elements of x, or 16 of x and 16 of the residual.

    The threads of a program all wait at its sums, and only other programs' loads fill that time. Half the
    bytes take twice the threads a row, and so half the programs: LayerNorm of 8192 columns then has 0.85 of a
    copy's bandwidth on an H200, not 0.92.
    """
    return tile_rows(hidden, 16 if added else 32)


def divide_backward(hidden: int, element_bytes: int, device: torch.device) -> tuple[Tile, int]:
    """The tile of a program, of which ``WARPS`` warps run on a multiprocessor, and how many it has in flight.

    A thread takes 16 elements and holds in fp32 the gradient, the normalised value and up to two sums of
    each: 64 registers of 128, so nothing spills. The loads of so few threads do not cover the latency (0.67
    of a copy's bandwidth on an H200, norms of 8192 columns with the weight's gradient); two tiles ahead in
    shared memory do (0.88). Twice the threads spill for LayerNorm (0.65), and one tile ahead is worse than
    none (0.55). Rows too long for two tiles ahead go without.

    Args:
        element_bytes: of the operands' elements in one column, together.
    """
    tile = tile_rows(hidden, 16)
    ahead = (STAGES - 1) * tile.columns * tile.rows * element_bytes
    return tile, STAGES if ahead <= shared_memory(device) else 1


def _heads(weight: Tensor | None) -> int:
    """How many weights there are, of which rows take one each in turn."""
    return 1 if weight is None or weight.dim() == 1 else weight.size(0)


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
    """Fill ``y``, ``h`` (with a residual), ``mean`` (LayerNorm) and ``rstd``, all dense in one order.

    Rows of ``y`` may be longer than those of ``x``; what is over is not written.
    """
    if x.numel() == 0:
        return
    hidden, wide = x.shape[-1], y.shape[-1]
    inner, ((x, x_strides), (residual, residual_strides)) = lay_out_rows(y.narrow(-1, 0, hidden), x, residual)
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    rows = x.numel() // hidden
    tile = divide_forward(hidden, residual is not None)
    norm_forward_kernel[(triton.cdiv(rows, tile.rows),)](
        x, *x_strides, residual, *residual_strides, weight, bias, y, h, mean, rstd,
        rows, inner, eps, offset, hidden, wide, _heads(weight), tile.columns, tile.rows,
        round_before_weight, num_warps=tile.warps,
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
    """Fill ``dx``, unless it is on meta and only gives the order of rows, ``dweight`` and ``dbias``.

    Rows of ``dx`` may be longer than those of ``x``; what is over is not written.
    """
    wanted = [gradient for gradient in (dweight, dbias) if gradient is not None]
    if x.numel() == 0:
        for gradient in wanted:
            gradient.zero_()
        return
    hidden = x.shape[-1]
    out = dx.narrow(-1, 0, hidden)
    rstd = in_row_order(out, rstd)
    mean = None if mean is None else in_row_order(out, mean)
    inner, ((dy, dy_strides), (dh, dh_strides), (x, x_strides)) = lay_out_rows(out, dy, dh, x)
    weight = None if weight is None else weight.contiguous()
    rows = x.numel() // hidden
    element_bytes = sum(operand.itemsize for operand in (dy, dh, x, weight) if operand is not None)
    tile, stages = divide_backward(hidden, element_bytes, x.device)
    resident = WARPS // tile.warps * multiprocessors(x.device)
    programs, heads = min(triton.cdiv(rows, tile.rows), resident), _heads(weight)
    if heads > 1 and dweight is not None:
        # Then a program's steps are whole turns of the heads, and each row of its tile keeps to one head.
        programs = triton.cdiv(programs, heads) * heads
    shape = (len(wanted), programs if heads == 1 else programs * tile.rows, hidden)
    partials = list(torch.empty(shape, dtype=torch.float32, device=x.device)) if wanted else []
    weight_partial = partials[0] if dweight is not None else None
    bias_partial = partials[-1] if dbias is not None else None
    norm_backward_kernel[(programs,)](
        dy, *dy_strides, dh, *dh_strides, x, *x_strides, weight, mean, rstd, None if dx.is_meta else dx,
        weight_partial, bias_partial, rows, inner, offset, hidden, dx.shape[-1], heads, tile.columns,
        tile.rows, stages, num_warps=tile.warps, maxnreg=REGISTERS,
    )  # fmt: skip
    for partial, gradient in zip(partials, wanted, strict=True):
        sum_columns(partial.view(-1, gradient.numel()), gradient)
