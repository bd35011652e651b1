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
    span_block: int  # rows to a line of segment_spans


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
def _narrow(first, last, full_first, full_last, span_ptr):
    first = tl.maximum(first, tl.load(span_ptr))
    last = tl.minimum(last, tl.load(span_ptr + 1))
    full_first = tl.maximum(full_first, tl.load(span_ptr + 2))
    full_last = tl.minimum(full_last, tl.load(span_ptr + 3))
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
        line = spans_ptr + start // C.span_block * 4
        first, last, full_first, full_last = _narrow(first, last, full_first, full_last, line)
    if C.key_mask and OF_KEYS:
        first, last, full_first, full_last = _narrow(first, last, full_first, full_last, valid_ptr)
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


@cache
def blocks_for(device: torch.device, dtype: torch.dtype, dim: int, kernel: str) -> Blocks:
    """The largest tiles that fit a multiprocessor's shared memory.

    Args:
        dim: the wider of the padded head dimensions.
        kernel: "forward", which keeps one tile (q), or "queries" or "keys" of the backward, which keep two.
    """
    if device.type == "cpu":
        return Blocks(16, 16, 4, 1)
    kept = 1 if kernel == "forward" else 2
    size = dtype.itemsize
    limit = torch.cuda.get_device_properties(device).shared_memory_per_block_optin - 4096
    if size == 4:
        # Full fp32 products unroll into FMAs: more warps and small tiles keep them in registers.
        candidates = ((32, 32, 8), (32, 16, 8), (16, 16, 4))
    elif dim <= 128:
        streamed = 64 if kept == 2 else 128
        candidates = ((128, streamed, 8), (128, 64, 8), (64, 64, 4), (64, 32, 4), (32, 32, 4))
    else:
        resident = 64 if kept == 2 else 128
        candidates = ((resident, 32, 8), (64, 32, 8), (64, 32, 4), (32, 32, 4), (16, 16, 4))
    # Fewer than three stages make Hopper's asynchronous products wait for each other (ptxas C7515).
    for stages in (3, 2, 1):
        for resident, streamed, warps in candidates:
            if (resident * kept + streamed * 2 * stages) * dim * size <= limit:
                return Blocks(resident, streamed, warps, stages)
    raise ValueError(
        f"attention: head dimension {dim} does not fit {limit} bytes of shared memory; leave it unfused."
    )
