"""Triton kernels of RMSNorm, and what every kernel over rows needs: their layout, tile and column sums.

One program holds whole rows in registers: a row is read once, and each of its statistics is one reduction.
Short rows (the q and k norms of attention heads) share a program. The backward with a weight gradient runs as
many programs as fit on the device together, each keeping one fp32 sum a column over all its rows.
"""

# Triton types a kernel as the plain function below its decorator, and `tl.range` as a function: launch
# options, numbers for constexpr parameters and loops look like errors.
# pyright: reportArgumentType=false, reportCallIssue=false

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

Strides = tuple[int, int]


def lay_out_rows(out: Tensor, *operands: Tensor | None) -> tuple[int, list[tuple[Any, Strides]]]:
    """View operands as rows in the memory order of the dense ``out``, without copying where two strides do.

    Returns:
        ``inner``, and each operand or None with its strides (outer, inner): row ``r`` of an operand starts at
        ``r // inner * outer_stride + r % inner * inner_stride``, and at ``r * hidden`` of ``out``. An operand
        whose last dimension is not dense, or that needs a third stride, is copied into the order of ``out``.
    """
    hidden = out.shape[-1]
    rows = out.numel() // hidden
    dense = (0, hidden)
    if out.is_contiguous() and all(t is None or t.is_contiguous() for t in operands):
        return rows, [(t, dense) for t in operands]

    order = [d for d in range(out.dim() - 1) if out.size(d) > 1]
    order.sort(key=out.stride, reverse=True)
    breaks = [None if t is None else _breaks(t, order) for t in operands]
    split = next((b[0] for b in breaks if b is not None and len(b) == 1), 0)
    inner = rows
    for d in order[:split]:
        inner //= out.size(d)

    laid_out: list[tuple[Any, Strides]] = []
    for tensor, at in zip(operands, breaks, strict=True):
        if tensor is None:
            laid_out.append((None, dense))
        elif at is None or any(b != split for b in at):
            copy = torch.empty_like(out, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
            laid_out.append((copy, (inner * hidden, hidden)))
        else:
            outer_stride = tensor.stride(order[split - 1]) if split else 0
            laid_out.append((tensor, (outer_stride, tensor.stride(order[-1]) if order else hidden)))
    return inner, laid_out


def _breaks(tensor: Tensor, order: list[int]) -> list[int] | None:
    """Positions in ``order`` where a new stride starts; None where the rows themselves are not dense."""
    if tensor.size(-1) > 1 and tensor.stride(-1) != 1:
        return None
    pairs = zip(order, order[1:], strict=False)
    return [i for i, (a, b) in enumerate(pairs, 1) if tensor.stride(a) != tensor.stride(b) * tensor.size(b)]


def in_row_order(out: Tensor, statistic: Tensor) -> Tensor:
    """``statistic``, one value a row, dense in the memory order of ``out``; normally it is already."""
    if out.is_contiguous():
        return statistic.contiguous()
    expected = torch.empty_like(out.select(-1, 0), dtype=statistic.dtype, device="meta")
    if statistic.stride() == expected.stride():
        return statistic
    return torch.empty_like(expected, device=statistic.device).copy_(statistic)


def tile(hidden: int) -> tuple[int, int, int]:
    """(columns, rows, warps) of one program: 16 elements a thread up to the 1024 threads that there are."""
    columns = triton.next_power_of_2(hidden)
    rows = max(1, 2048 // columns)
    return columns, rows, min(32, max(4, columns * rows // 512))


@functools.cache
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def resident_programs(device: torch.device, warps: int, sums: int) -> int:
    """How many programs of ``warps`` warps run together, each with ``sums`` sums a column in registers.

    Compiled for sm_90, a thread takes up to 80 registers with one sum and 128 with two, of 65536 together.
    """
    return multiprocessors(device) * max(1, (24 if sums == 1 else 16) // warps)


@triton.jit
def row_starts(row, inner, outer_stride, inner_stride):
    return (row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * inner_stride


@triton.jit
def column_sum_kernel(
    partial_ptr, out_ptr, count, HIDDEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, count, ROWS):
        row = first + tl.arange(0, ROWS)
        live = (row < count)[:, None] & (column < HIDDEN)[None, :]
        at = row.to(tl.int64)[:, None] * HIDDEN + column[None, :]
        total += tl.load(partial_ptr + at, mask=live, other=0.0)
    tl.store(out_ptr + column, tl.sum(total, 0), mask=column < HIDDEN)


def sum_columns(partial: Tensor, out: Tensor) -> None:
    """``out`` (hidden,) becomes the sum of the rows of ``partial`` (count, hidden) fp32, in a fixed order."""
    count, hidden = partial.shape
    column_sum_kernel[(triton.cdiv(hidden, 32),)](partial, out, count, hidden, 64, 32, num_warps=4)


@triton.jit
def rms_norm_forward_kernel(
    x_ptr, x_outer, x_inner, residual_ptr, residual_outer, residual_inner, weight_ptr, y_ptr, h_ptr, rstd_ptr,
    rows, inner, eps, offset,
    HIDDEN: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, ROUND: tl.constexpr,
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
    rstd = tl.rsqrt(tl.sum(value * value, 1) / HIDDEN + eps)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)
    y = value * rstd[:, None]
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + column, mask=column < HIDDEN, other=0.0).to(tl.float32) + offset
        if ROUND:
            y = y.to(x.dtype).to(tl.float32)
        y = y * weight[None, :]
    tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=live)


def launch_forward(x, residual, weight, y, h, rstd, eps, offset, round_before_weight) -> None:
    """Fill ``y``, ``h`` (where there is a residual) and ``rstd``; the latter three are dense in one order."""
    if x.numel() == 0:
        return
    inner, ((x, x_strides), (residual, residual_strides)) = lay_out_rows(y, x, residual)
    weight = None if weight is None else weight.contiguous()
    hidden = x.shape[-1]
    rows = x.numel() // hidden
    columns, tile_rows, warps = tile(hidden)
    with torch.cuda.device_of(x):
        rms_norm_forward_kernel[(triton.cdiv(rows, tile_rows),)](
            x, *x_strides, residual, *residual_strides, weight, y, h, rstd, rows, inner, eps, offset,
            hidden, columns, tile_rows, round_before_weight, num_warps=warps,
        )  # fmt: skip


@triton.jit
def rms_norm_backward_kernel(
    dy_ptr, dy_outer, dy_inner, dh_ptr, dh_outer, dh_inner, x_ptr, x_outer, x_inner,
    weight_ptr, rstd_ptr, dx_ptr, dweight_ptr, rows, inner, offset,
    HIDDEN: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, COLUMNS)
    if dweight_ptr is not None:
        dweight = tl.zeros([ROWS, COLUMNS], tl.float32)

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
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)[:, None]

        gradient = dy.to(tl.float32)
        normal = x.to(tl.float32) * rstd
        if dweight_ptr is not None:
            dweight += gradient * normal
        if dx_ptr is not None:
            if weight_ptr is not None:
                # Read again each time, from L1: held over the loop, fewer programs would fit.
                weight = tl.load(weight_ptr + column, mask=column < HIDDEN, other=0.0).to(tl.float32) + offset
                gradient = gradient * weight[None, :]
            along = tl.sum(gradient * normal, 1)[:, None] / HIDDEN
            dx = rstd * (gradient - normal * along)
            if dh_ptr is not None:
                dx += dh.to(tl.float32)
            out = row.to(tl.int64)[:, None] * HIDDEN + column[None, :]
            tl.store(dx_ptr + out, dx.to(dx_ptr.dtype.element_ty), mask=live)

    if dweight_ptr is not None:
        partial = dweight_ptr + tl.program_id(0).to(tl.int64) * HIDDEN + column
        tl.store(partial, tl.sum(dweight, 0), mask=column < HIDDEN)


def launch_backward(dy, dh, x, weight, rstd, offset, dx, dweight) -> None:
    """Fill ``dx``, unless it is on meta and only gives the order of rows, and ``dweight`` unless None."""
    if x.numel() == 0:
        if dweight is not None:
            dweight.zero_()
        return
    rstd = in_row_order(dx, rstd)
    inner, ((dy, dy_strides), (dh, dh_strides), (x, x_strides)) = lay_out_rows(dx, dy, dh, x)
    weight = None if weight is None else weight.contiguous()
    hidden = x.shape[-1]
    rows = x.numel() // hidden
    columns, tile_rows, warps = tile(hidden)
    programs = triton.cdiv(rows, tile_rows)
    partial = None
    if dweight is not None:
        programs = min(programs, resident_programs(x.device, warps, 1))
        partial = torch.empty((programs, hidden), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        rms_norm_backward_kernel[(programs,)](
            dy, *dy_strides, dh, *dh_strides, x, *x_strides,
            weight, rstd, None if dx.is_meta else dx, partial,
            rows, inner, offset, hidden, columns, tile_rows, num_warps=warps,
        )  # fmt: skip
        if partial is not None:
            sum_columns(partial, dweight)
