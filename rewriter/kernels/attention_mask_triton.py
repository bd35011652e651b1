"""What the attention kernels share: what they are compiled for, tiles, logits, and the mask.

A block of rows visits the blocks of the other side in [first, last); in [full_first, full_last) no mask is
needed. Causal, window and chunk give both by arithmetic, ids by the tables of ``attention_spans``.
"""

# Triton types a kernel as the plain function below its decorator: numbers for constexpr parameters, and the
# fields of a tuple that is one, look like errors.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .attention_terms import lse_rows

LOG2E = tl.constexpr(1.4426950408889634)
LSE_ROWS = tl.constexpr(lse_rows(1))
# Numbers that vary from batch to batch, whose divisibility is no use: one compilation serves them all.
UNSPECIALIZED = ("heads", "q_len", "kv_len", "stride_segments", "stride_spans", "stride_mask", "stride_valid")


class Static(NamedTuple):
    """What a kernel is compiled for; a constexpr."""

    causal: bool
    window: int
    chunk: int
    segments: bool
    key_mask: bool
    sinks: bool
    softcap: bool
    exact: bool  # fp32: full products, and a tanh to the last bits
    group: int  # query heads to a key head
    dim: int
    value_dim: int
    block_d: int  # dim and value_dim, padded to powers of 2
    block_v: int
    block_q: int
    block_k: int
    span_block: int  # rows to a line of segment_spans; divides block_q and block_k, or they divide it


@triton.jit
def tile(
    base, stride, rows_left, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """(ROWS, BLOCK) from ``base``, zeros past DIM columns and, if MASKED, past ``rows_left`` rows."""
    row = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    pointers = base + (row[:, None] * stride + column[None, :])
    if MASKED and DIM != BLOCK:
        return tl.load(pointers, mask=(row < rows_left)[:, None] & (column < DIM)[None, :], other=0.0)
    elif MASKED:
        return tl.load(pointers, mask=(row < rows_left)[:, None], other=0.0)
    elif DIM != BLOCK:
        return tl.load(pointers, mask=(column < DIM)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def store_tile(pointers, x, inside, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """The first DIM columns of the rows ``inside``; pointers: (rows, 1), where each row begins."""
    column = tl.arange(0, BLOCK)[None, :]
    tl.store(pointers + column, x.to(pointers.dtype.element_ty), mask=inside[:, None] & (column < DIM))


@triton.jit
def tanh(x, EXACT: tl.constexpr):
    """By the logistic function; EXACT keeps the relative error of an fp32 unit near zero by tanh's series."""
    if EXACT:
        magnitude = tl.abs(x)
        e = tl.exp(-2.0 * magnitude)
        far = (1.0 - e) / (1.0 + e)
        s = x * x
        series = 1.0 + s * (-1.0 / 3 + s * (2.0 / 15 + s * (-17.0 / 315 + s * (62.0 / 2835))))
        return tl.where(magnitude < 0.25, x * series, tl.where(x < 0, -far, far))
    else:
        return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def logits(qk, scale, softcap, C: tl.constexpr):
    """x and a factor >= 0 whose product is the logit in base 2; x is the tanh where logits are capped."""
    if C.softcap:
        return tanh(qk * (scale / softcap), C.exact), softcap * LOG2E
    else:
        return qk, scale * LOG2E


@triton.jit
def padded_rows(q_len):
    """Numbers a head has in lse and delta: blocks lie aligned and whole, so that they load as vectors."""
    return tl.cdiv(q_len, LSE_ROWS) * LSE_ROWS


@triton.jit
def load_ids(ids_ptr, position, inside, PRESENT: tl.constexpr):
    """ids at ``position``, or anything at all where there are none."""
    if PRESENT:
        return tl.load(ids_ptr + position, mask=inside, other=0)
    else:
        return position


@triton.jit
def allowed(inside, q_pos, k_pos, q_segment, k_segment, C: tl.constexpr):
    """``inside`` and every term of the mask but the keys' own, for arguments broadcast against each other."""
    keep = inside
    if C.causal:
        keep = keep & (k_pos <= q_pos)
    if C.window > 0:
        keep = keep & (k_pos > q_pos - C.window)
    if C.chunk > 0:
        keep = keep & (k_pos // C.chunk == q_pos // C.chunk)
    if C.segments:
        keep = keep & (k_segment == q_segment)
    return keep


@triton.jit
def keys_allowed(start, q_pos, q_segment, segments_ptr, key_mask_ptr, kv_len, C: tl.constexpr):
    """The mask of queries (rows) and the block of keys at ``start`` (columns)."""
    k_pos = start + tl.arange(0, C.block_k)
    inside = k_pos < kv_len
    k_segment = load_ids(segments_ptr, k_pos, inside, C.segments)
    if C.key_mask:
        inside = inside & (tl.load(key_mask_ptr + k_pos, mask=inside, other=0) != 0)
    return allowed(inside[None, :], q_pos[:, None], k_pos[None, :], q_segment[:, None], k_segment[None, :], C)


@triton.jit
def _narrow(first, last, full_first, full_last, spans_ptr, line, final, LINES: tl.constexpr):
    """By what LINES lines of a table visit together; those past the ``final`` one count as that one.

    Lines of different documents share no full span: what is left of it is empty, as it must be.
    """
    place = spans_ptr + line * 4
    least, greatest, full_least, full_greatest = (
        tl.load(place), tl.load(place + 1), tl.load(place + 2), tl.load(place + 3),
    )  # fmt: skip
    for n in tl.static_range(1, LINES):
        place = spans_ptr + tl.minimum(line + n, final) * 4
        least = tl.minimum(least, tl.load(place))
        greatest = tl.maximum(greatest, tl.load(place + 1))
        full_least = tl.maximum(full_least, tl.load(place + 2))
        full_greatest = tl.minimum(full_greatest, tl.load(place + 3))
    first = tl.maximum(first, least)
    last = tl.minimum(last, greatest)
    full_first = tl.maximum(full_first, full_least)
    full_last = tl.minimum(full_last, full_greatest)
    return first, last, full_first, full_last


@triton.jit
def visited(start, own_len, other_len, spans_ptr, valid_ptr, OF_KEYS: tl.constexpr, C: tl.constexpr):
    """What the block of rows at ``start`` visits: first, last, full_first, full_last, the first three at
    multiples of the other side's block.

    OF_KEYS: the rows are queries that visit keys; else keys that queries visit.
    """
    OWN: tl.constexpr = C.block_q if OF_KEYS else C.block_k
    OTHER: tl.constexpr = C.block_k if OF_KEYS else C.block_q
    end = tl.minimum(start + OWN, own_len)
    first = start * 0  # a tensor, as the terms below make it
    last = first + other_len
    full_first = first
    full_last = last
    if C.causal and OF_KEYS:
        last = tl.minimum(last, end)
        full_last = tl.minimum(full_last, start + 1)
    elif C.causal:
        first = tl.maximum(first, start)
        full_first = tl.maximum(full_first, end - 1)
    if C.window > 0 and OF_KEYS:
        first = tl.maximum(first, start - C.window + 1)
        full_first = tl.maximum(full_first, end - C.window)
    elif C.window > 0:
        last = tl.minimum(last, end - 1 + C.window)
        full_last = tl.minimum(full_last, start + C.window)
    if C.chunk > 0:
        first = tl.maximum(first, start // C.chunk * C.chunk)
        last = tl.minimum(last, (end - 1) // C.chunk * C.chunk + C.chunk)
        full_first = tl.maximum(full_first, (end - 1) // C.chunk * C.chunk)
        full_last = tl.minimum(full_last, start // C.chunk * C.chunk + C.chunk)
    if C.segments:
        LINES: tl.constexpr = (OWN + C.span_block - 1) // C.span_block
        line, final = start // C.span_block, (own_len - 1) // C.span_block
        first, last, full_first, full_last = _narrow(
            first, last, full_first, full_last, spans_ptr, line, final, LINES
        )
    if C.key_mask and OF_KEYS:
        first, last, full_first, full_last = _narrow(first, last, full_first, full_last, valid_ptr, 0, 0, 1)
    first = first // OTHER * OTHER
    full_first = tl.maximum(tl.cdiv(tl.maximum(full_first, 0), OTHER) * OTHER, first)
    full_last = full_last // OTHER * OTHER
    is_any_full = full_last > full_first
    full_first = tl.where(is_any_full, full_first, first)
    full_last = tl.where(is_any_full, full_last, first)
    return first, last, full_first, full_last


@triton.jit
def count(first, last, full_first, full_last, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """How many blocks need the mask, or how many do not."""
    if MASKED:
        return (full_first - first) // BLOCK + tl.cdiv(last - full_last, BLOCK)
    else:
        return (full_last - full_first) // BLOCK


@triton.jit
def place(i, first, full_first, full_last, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Where the i-th block of those begins: masked ones lie before and after the others."""
    if MASKED:
        start = first + i * BLOCK
        return tl.where(start < full_first, start, start + (full_last - full_first))
    else:
        return full_first + i * BLOCK


@dataclass(frozen=True)
class Blocks:
    """Rows a program keeps, rows it streams past them, and how it is launched."""

    resident: int
    streamed: int
    warps: int
    stages: int


# By the kernel and the wider head dimension, at most 64, 128 or 256: what was fastest on an H200 in bf16.
FASTEST = {
    ("forward", 64): Blocks(64, 64, 4, 3),
    ("forward", 128): Blocks(64, 64, 4, 3),
    ("forward", 256): Blocks(128, 64, 8, 2),
    ("queries", 64): Blocks(64, 64, 4, 3),
    ("queries", 128): Blocks(64, 64, 4, 2),
    ("queries", 256): Blocks(128, 32, 8, 2),
    ("keys", 64): Blocks(64, 64, 4, 3),
    ("keys", 128): Blocks(64, 32, 4, 3),
    ("keys", 256): Blocks(64, 64, 8, 2),
}
# Where a multiprocessor has less shared memory.
SMALLER = (
    Blocks(64, 64, 4, 2),
    Blocks(64, 32, 4, 2),
    Blocks(32, 32, 4, 2),
    Blocks(32, 32, 4, 1),
    Blocks(16, 16, 4, 1),
)
# Full fp32 products unroll into FMAs: more warps and small tiles keep them in registers.
EXACT = tuple(Blocks(*rows, s) for s in (3, 2, 1) for rows in ((32, 32, 8), (32, 16, 8), (16, 16, 4)))


@cache
def blocks_for(device: torch.device, dtype: torch.dtype, dim: int, kernel: str) -> Blocks:
    """The fastest tiles that fit a multiprocessor's shared memory, one rule for every mask.

    Tried over 8,192 tokens, 32 query heads to 8 (at 256: 16 to 8), with a window of 4,096, and at 128 also
    with 8 documents of 300 to 2,200 tokens, whose spans were known to 128 tokens. Up to 128, tiles of 64 rows
    and 4 warps leave room for two programs or more on a multiprocessor: one multiplies while another fills
    its pipeline, which short spans never keep full. So 128 rows are slower there, and so is a third stage of
    queries at 128. Where it was no clear matter:

    - queries, 64: 128 keys at a time are faster, until ids leave no room for a second program.
    - keys, 128: 128 rows by 64 queries are as fast with a window, and spill registers for ids; two stages are
      a little faster with documents, and slower by more with a window.
    - 256: fewer rows and fewer of what is streamed were slower.

    Args:
        dim: the wider of the padded head dimensions, a power of 2.
        kernel: "forward", which keeps one tile (q), or "queries" or "keys" of the backward, which keep two.

    Raises:
        ValueError: where not even the smallest tiles fit.
    """
    if device.type == "cpu":
        return Blocks(16, 16, 4, 1)
    kept = 1 if kernel == "forward" else 2
    limit = torch.cuda.get_device_properties(device).shared_memory_per_block_optin - 4096
    fastest = FASTEST[kernel, max(dim, 64)]
    for blocks in EXACT if dtype.itemsize == 4 else (fastest, *SMALLER):
        rows = blocks.resident * kept + blocks.streamed * 2 * blocks.stages
        if rows * dim * dtype.itemsize <= limit:
            return blocks
    raise ValueError(
        f"attention: head dimension {dim} does not fit {limit} bytes of shared memory; leave it unfused."
    )
