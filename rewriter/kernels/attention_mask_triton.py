"""The mask of attention, evaluated from positions: which pairs are allowed, and which blocks to visit.

A block of rows visits the span [first, last) of blocks; within it, [full_first, full_last) needs no mask at
all. Structural terms (causal, window, chunk) give both by arithmetic. Packed documents give the span by one
scan of the segment ids: the first and last token whose segment lies between the least and the greatest of the
block's. That is exact for sorted ids and only ever too wide for unsorted ones, and since equality is
symmetric, one table serves queries that look for keys and keys that look for queries.
"""

# Triton types a kernel as the plain function below its decorator, and `tl.range` as a function: launch
# options, numbers for constexpr parameters and loops look like errors.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl


@triton.jit
def allowed(
    inside, q_pos, k_pos, q_segment, k_segment, key_ok, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    CHUNK: tl.constexpr, SEGMENTS: tl.constexpr, KEY_MASK: tl.constexpr,
):  # fmt: skip
    """``inside`` and every term given, for q_pos and k_pos broadcast against each other."""
    keep = inside
    if CAUSAL:
        keep = keep & (k_pos <= q_pos)
    if WINDOW > 0:
        keep = keep & (k_pos > q_pos - WINDOW)
    if CHUNK > 0:
        keep = keep & (k_pos // CHUNK == q_pos // CHUNK)
    if SEGMENTS:
        keep = keep & (k_segment == q_segment)
    if KEY_MASK:
        keep = keep & key_ok
    return keep


@triton.jit
def _in_blocks(first, last, full_first, full_last, BLOCK: tl.constexpr, MASKED_ALL: tl.constexpr):
    """Round a span outward and its full part inward to blocks; an empty full part lies at its start."""
    first = first // BLOCK * BLOCK
    full_first = tl.maximum(full_first + BLOCK - 1, 0) // BLOCK * BLOCK
    full_last = full_last // BLOCK * BLOCK
    full_first = tl.maximum(full_first, first)
    none_full = full_last <= full_first
    if MASKED_ALL:
        none_full = first == first
    full_first = tl.where(none_full, first, full_first)
    full_last = tl.where(none_full, first, full_last)
    return first, last, full_first, full_last


@triton.jit
def keys_of(
    start, q_len, kv_len, span_ptr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, SPAN_BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr, SEGMENTS: tl.constexpr,
    KEY_MASK: tl.constexpr,
):  # fmt: skip
    """Keys that queries [start, start + BLOCK_Q) visit: first, last, full_first, full_last."""
    end = tl.minimum(start + BLOCK_Q, q_len)
    first = start * 0  # a tensor, as the terms below make it
    last = first + kv_len
    full_first = first
    full_last = last
    if CAUSAL:
        last = tl.minimum(last, end)
        full_last = tl.minimum(full_last, start + 1)
    if WINDOW > 0:
        first = tl.maximum(first, start - WINDOW + 1)
        full_first = tl.maximum(full_first, end - WINDOW)
    if CHUNK > 0:
        first = tl.maximum(first, start // CHUNK * CHUNK)
        last = tl.minimum(last, (end - 1) // CHUNK * CHUNK + CHUNK)
        full_first = tl.maximum(full_first, (end - 1) // CHUNK * CHUNK)
        full_last = tl.minimum(full_last, start // CHUNK * CHUNK + CHUNK)
    if SEGMENTS:
        first = tl.maximum(first, tl.load(span_ptr + start // SPAN_BLOCK * 2))
        last = tl.minimum(last, tl.load(span_ptr + start // SPAN_BLOCK * 2 + 1))
    return _in_blocks(first, last, full_first, full_last, BLOCK_K, SEGMENTS or KEY_MASK)


@triton.jit
def queries_of(
    start, q_len, kv_len, span_ptr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, SPAN_BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr, SEGMENTS: tl.constexpr,
    KEY_MASK: tl.constexpr,
):  # fmt: skip
    """Queries that keys [start, start + BLOCK_K) are visited by: first, last, full_first, full_last."""
    end = tl.minimum(start + BLOCK_K, kv_len)
    first = start * 0  # a tensor, as the terms below make it
    last = first + q_len
    full_first = first
    full_last = last
    if CAUSAL:
        first = tl.maximum(first, start)
        full_first = tl.maximum(full_first, end - 1)
    if WINDOW > 0:
        last = tl.minimum(last, end - 1 + WINDOW)
        full_last = tl.minimum(full_last, start + WINDOW)
    if CHUNK > 0:
        first = tl.maximum(first, start // CHUNK * CHUNK)
        last = tl.minimum(last, (end - 1) // CHUNK * CHUNK + CHUNK)
        full_first = tl.maximum(full_first, (end - 1) // CHUNK * CHUNK)
        full_last = tl.minimum(full_last, start // CHUNK * CHUNK + CHUNK)
    if SEGMENTS:
        first = tl.maximum(first, tl.load(span_ptr + start // SPAN_BLOCK * 2))
        last = tl.minimum(last, tl.load(span_ptr + start // SPAN_BLOCK * 2 + 1))
    return _in_blocks(first, last, full_first, full_last, BLOCK_Q, SEGMENTS or KEY_MASK)


@triton.jit
def part_start(part: tl.constexpr, first, second, third):
    """Where a span's part begins: 0 is masked, before the full blocks; 1 is full; 2 is masked, after them."""
    if part == 0:
        return first
    elif part == 1:
        return second
    else:
        return third


@triton.jit(do_not_specialize=("tokens", "blocks"))
def _segment_spans_kernel(
    segments_ptr, spans_ptr, tokens, blocks, BLOCK: tl.constexpr, SCAN: tl.constexpr
):  # fmt: skip
    batch = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    row = segments_ptr + batch.to(tl.int64) * tokens
    own = block * BLOCK + tl.arange(0, BLOCK)
    # A block's first token always exists, so it can stand in for those past the end.
    ids = tl.load(row + tl.where(own < tokens, own, block * BLOCK))
    least = tl.min(ids, 0)
    greatest = tl.max(ids, 0)
    first = tl.full((SCAN,), 2147483647, tl.int32)
    last = tl.zeros((SCAN,), tl.int32)
    for start in tl.range(0, tokens, SCAN):
        position = start + tl.arange(0, SCAN)
        inside = position < tokens
        other = tl.load(row + position, mask=inside, other=0)
        inside = inside & (other >= least) & (other <= greatest)
        first = tl.minimum(first, tl.where(inside, position, 2147483647))
        last = tl.maximum(last, tl.where(inside, position + 1, 0))
    tl.store(spans_ptr + tl.program_id(0).to(tl.int64) * 2, tl.min(first, 0))
    tl.store(spans_ptr + tl.program_id(0).to(tl.int64) * 2 + 1, tl.max(last, 0))


def segment_spans(segments: torch.Tensor, block: int) -> torch.Tensor:
    """Contiguous (batch, tokens) ids to int32 (batch, blocks, 2): tokens [first, last) of a block's ids."""
    batch, tokens = segments.shape
    blocks = triton.cdiv(tokens, block)
    spans = torch.empty((batch, blocks, 2), dtype=torch.int32, device=segments.device)
    scan = min(4096, max(16, triton.next_power_of_2(tokens)))
    _segment_spans_kernel[(batch * blocks,)](segments, spans, tokens, blocks, BLOCK=block, SCAN=scan)
    return spans


@dataclass(frozen=True)
class Blocks:
    """Rows a program keeps, rows it streams past them, and how it is launched."""

    resident: int
    streamed: int
    warps: int
    stages: int


@cache
def blocks_for(device: torch.device, dtype: torch.dtype, dim: int, both_resident: bool) -> Blocks:
    """The largest tiles that fit a multiprocessor's shared memory.

    Args:
        dim: the wider of the padded head dimensions.
        both_resident: whether two tiles stay (the backward's kernels) or one (the forward's q).
    """
    if device.type == "cpu":
        return Blocks(16, 16, 4, 1)
    size = dtype.itemsize
    limit = torch.cuda.get_device_properties(device).shared_memory_per_block_optin - 4096
    if size == 4:
        # Full fp32 products unroll into FMAs: more warps and small tiles keep them in registers.
        candidates = ((32, 32, 8), (32, 16, 8), (16, 16, 4))
    elif dim <= 128:
        streamed = 64 if both_resident else 128
        candidates = ((128, streamed, 8), (128, 64, 8), (64, 64, 4), (64, 32, 4), (32, 32, 4))
    else:
        resident = 64 if both_resident else 128
        candidates = ((resident, 32, 8), (64, 32, 8), (64, 32, 4), (32, 32, 4), (16, 16, 4))
    # Fewer than three stages make Hopper's asynchronous products wait for each other (ptxas C7515).
    for stages in (3, 2, 1):
        for resident, streamed, warps in candidates:
            rows = resident * (2 if both_resident else 1) + streamed * 2 * stages
            if rows * dim * size <= limit:
                return Blocks(resident, streamed, warps, stages)
    raise ValueError(
        f"attention: head dimension {dim} does not fit {limit} bytes of shared memory; leave it unfused."
    )
