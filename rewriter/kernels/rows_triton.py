"""What kernels over rows share: the rows' layout, how programs divide them, and the columns' sums.

Rows of any two strides are read in place. A program holds whole rows in registers; short rows (the q and k
norms of attention heads) share one.
"""

# Triton types a kernel as the plain function below its decorator: launch options look like errors.
# pyright: reportArgumentType=false, reportCallIssue=false

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

Strides = tuple[int, int]

# Most warps of a program: of larger ones too few fit on a multiprocessor to load while one waits at its sums.
WARPS = 16


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


class Tile(NamedTuple):
    """The columns and rows that a program holds in registers, powers of 2, and its warps."""

    columns: int
    rows: int
    warps: int


def tile_rows(hidden: int, elements: int) -> Tile:
    """Whole rows, ``elements`` a thread or what ``WARPS`` need for one row; short rows share a tile."""
    columns = triton.next_power_of_2(hidden)
    rows = max(1, 128 * elements // columns)
    return Tile(columns, rows, min(WARPS, columns * rows // (32 * elements)))


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; one where Triton's interpreter runs."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of a multiprocessor's shared memory that a program may keep tiles in."""
    if device.type != "cuda":
        return 0
    # What is left over is for the sums across a program's warps.
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin - 4096


@triton.jit
def row_starts(row, inner, outer_stride, inner_stride):
    """Where rows start, as ``lay_out_rows`` laid them out, ``(rows, 1)``."""
    start = (row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * inner_stride
    return start[:, None]


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
