"""Which blocks a vector of ids leaves to visit: one table for the forward and both backward kernels.

Pairs of tokens matter where their ids are equal: packed documents' numbers, or a key mask's ones. A block of
rows then visits the tokens from the first to the last whose cell of ids may hold one of the block's, and
needs no mask where all ids are the block's one id. Two launches: the least and greatest id of every cell
(S ids read once), then a scan of the cells for every block. Two cells share no id where one's least exceeds
the other's greatest, whatever the order of ids: the span is exact to a cell for sorted ids and only ever too
wide for others, the unmasked part only ever too narrow. Equality is symmetric, so the same line of the table
serves queries that look for keys and keys that look for queries.
"""

# Triton types a kernel as the plain function below its decorator, and `tl.range` as a function: launch
# options, numbers for constexpr parameters and loops look like errors.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl

BEYOND = tl.constexpr(2147483647)


@triton.jit(do_not_specialize=("tokens", "cells"))
def _cells_kernel(ids_ptr, bounds_ptr, tokens, cells, CELL: tl.constexpr, CELLS: tl.constexpr):
    """bounds[cell] = (least, greatest) of ids[cell * CELL : (cell + 1) * CELL]."""
    programs = tl.cdiv(cells, CELLS)
    batch = (tl.program_id(0) // programs).to(tl.int64)
    cell = tl.program_id(0) % programs * CELLS + tl.arange(0, CELLS)
    # A cell's first token always exists, so it can stand in for those past the end.
    first = tl.minimum(cell, cells - 1)[:, None] * CELL
    token = first + tl.arange(0, CELL)[None, :]
    ids = tl.load(ids_ptr + batch * tokens + tl.where(token < tokens, token, first)).to(tl.int64)
    place = bounds_ptr + (batch * cells + cell) * 2
    tl.store(place, tl.min(ids, 1), mask=cell < cells)
    tl.store(place + 1, tl.max(ids, 1), mask=cell < cells)


@triton.jit(do_not_specialize=("tokens", "cells", "blocks"))
def _spans_kernel(
    bounds_ptr, spans_ptr, tokens, cells, blocks, IS_MASK: tl.constexpr, CELL: tl.constexpr,
    BLOCK_CELLS: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    bounds_ptr += batch * cells * 2
    least = tl.full((), 1, tl.int64)
    greatest = least
    if not IS_MASK:
        own = tl.minimum(tl.program_id(0) % blocks * BLOCK_CELLS + tl.arange(0, BLOCK_CELLS), cells - 1)
        least = tl.min(tl.load(bounds_ptr + own * 2), 0)
        greatest = tl.max(tl.load(bounds_ptr + own * 2 + 1), 0)
    first = tl.full((SCAN,), BEYOND, tl.int32)
    last = tl.zeros((SCAN,), tl.int32)
    for start in tl.range(0, cells, SCAN):
        cell = start + tl.arange(0, SCAN)
        inside = cell < cells
        low = tl.load(bounds_ptr + cell * 2, mask=inside, other=0)
        high = tl.load(bounds_ptr + cell * 2 + 1, mask=inside, other=0)
        shared = inside & (low <= greatest) & (high >= least)
        first = tl.minimum(first, tl.where(shared, cell, BEYOND))
        last = tl.maximum(last, tl.where(shared, cell + 1, 0))
    last = tl.max(last, 0)
    first = tl.where(last > 0, tl.min(first, 0), 0)
    # The run of cells of the one id around the middle of the span; padding and other documents lie outside.
    middle = (first + last) // 2
    full_first = tl.zeros((SCAN,), tl.int32)
    full_last = tl.full((SCAN,), BEYOND, tl.int32)
    for start in tl.range(0, cells, SCAN):
        cell = start + tl.arange(0, SCAN)
        inside = cell < cells
        low = tl.load(bounds_ptr + cell * 2, mask=inside, other=0)
        high = tl.load(bounds_ptr + cell * 2 + 1, mask=inside, other=0)
        other = inside & ((low != least) | (high != greatest) | (low != high))
        full_first = tl.maximum(full_first, tl.where(other & (cell < middle), cell + 1, 0))
        full_last = tl.minimum(full_last, tl.where(other & (cell >= middle), cell, BEYOND))
    place = spans_ptr + tl.program_id(0).to(tl.int64) * 4
    full_last = tl.minimum(tl.min(full_last, 0), last)
    tl.store(place, first * CELL)
    tl.store(place + 1, tl.minimum(last * CELL, tokens))
    tl.store(place + 2, tl.maximum(tl.max(full_first, 0), first) * CELL)
    tl.store(place + 3, tl.minimum(full_last * CELL, tokens))


def attention_spans(ids: torch.Tensor, is_mask: bool, block: int, cell: int) -> torch.Tensor:
    """(batch, tokens) ids to int32 (batch, blocks, 4): the first and last token visited, and unmasked.

    Args:
        ids: integers, or booleans of a key mask.
        is_mask: one line for all rows, that of id 1, instead of one for every ``block`` of tokens.
    """
    ids = (ids.view(torch.uint8) if ids.dtype == torch.bool else ids).contiguous()
    batch, tokens = ids.shape
    cells = triton.cdiv(tokens, cell)
    blocks = 1 if is_mask else triton.cdiv(tokens, block)
    spans = torch.empty((batch, blocks, 4), dtype=torch.int32, device=ids.device)
    if ids.numel() == 0:
        return spans.zero_()
    bounds = torch.empty((batch, cells, 2), dtype=torch.int64, device=ids.device)
    _cells_kernel[(batch * triton.cdiv(cells, 64),)](ids, bounds, tokens, cells, CELL=cell, CELLS=64)
    scan = min(1024, max(16, triton.next_power_of_2(cells)))
    _spans_kernel[(batch * blocks,)](
        bounds, spans, tokens, cells, blocks, IS_MASK=is_mask, CELL=cell, BLOCK_CELLS=block // cell, SCAN=scan
    )
    return spans
