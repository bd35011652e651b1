"""The forward kernel of attention, and the arguments of both directions.

One program holds a block of queries and streams the keys and values that its mask may allow: first the blocks
that need no mask, then those before and after them that do. Per query block and head it reads q once, K and V
of its span once (mostly from L2: the blocks of one head run side by side), and writes the output and one fp32
log-sum-exp a row.
"""

# Triton types a kernel as the plain function below its decorator, and `tl.range` as a function: launch
# options, numbers for constexpr parameters and loops look like errors.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false

import torch
import triton
import triton.language as tl

from .attention_mask_triton import (
    LOG2E,
    UNSPECIALIZED,
    Static,
    blocks_for,
    count,
    keys_allowed,
    load_ids,
    logits,
    padded_rows,
    place,
    store_tile,
    tile,
    visited,
)
from .attention_terms import Terms, lse_rows, span_sizes


@triton.jit
def _visit_keys(
    total, row_max, row_sum, q, q_pos, q_segment, k_base, v_base, segments_ptr, key_mask_ptr, stride_k,
    stride_v, kv_len, first, last, full_first, full_last, scale, softcap, MASKED: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    precision: tl.constexpr = "ieee" if C.exact else "tf32"
    for i in tl.range(0, count(first, last, full_first, full_last, C.block_k, MASKED)):
        start = place(i, first, full_first, full_last, C.block_k, MASKED)
        row = start.to(tl.int64)
        left = kv_len - start
        k = tile(k_base + row * stride_k, stride_k, left, C.block_k, C.dim, C.block_d, MASKED)
        qk = tl.dot(q, tl.trans(k), input_precision=precision)
        score, factor = logits(qk, scale, softcap, C)
        if MASKED:
            keep = keys_allowed(start, q_pos, q_segment, segments_ptr, key_mask_ptr, kv_len, C)
            score = tl.where(keep, score, float("-inf"))
        # The factor comes after the maximum, so that it joins the exponent's subtraction in one FMA.
        new_max = tl.maximum(row_max, tl.max(score, 1) * factor)
        # Where a row has seen no key yet its maximum is -inf; -inf - -inf must not become NaN.
        anchor = tl.where(new_max == float("-inf"), 0.0, new_max) if MASKED else new_max
        p = tl.exp2(score * factor - anchor[:, None])
        shrink = tl.exp2(row_max - anchor)
        row_sum = row_sum * shrink + tl.sum(p, 1)
        v = tile(v_base + row * stride_v, stride_v, left, C.block_k, C.value_dim, C.block_v, MASKED)
        total = tl.dot(p.to(v.dtype), v, total * shrink[:, None], input_precision=precision)
        row_max = new_max
    return total, row_max, row_sum


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, sinks_ptr, segments_ptr, spans_ptr, key_mask_ptr, valid_ptr,
    stride_segments, stride_spans, stride_mask, stride_valid, stride_qb, stride_qh, stride_qs, stride_kb,
    stride_kh, stride_ks, stride_vb, stride_vh, stride_vs, heads, q_len, kv_len, scale, softcap,
    C: tl.constexpr,
):  # fmt: skip
    BLOCK_Q: tl.constexpr = C.block_q
    BLOCK_V: tl.constexpr = C.block_v
    blocks = tl.cdiv(q_len, BLOCK_Q)
    row = tl.program_id(0) // blocks
    head = (row % heads).to(tl.int64)
    batch = (row // heads).to(tl.int64)
    # Under a causal mask the last queries see the most keys: they start first, so that none straggles.
    start = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_Q
    q_base = q_ptr + batch * stride_qb + head * stride_qh + start.to(tl.int64) * stride_qs
    k_base = k_ptr + batch * stride_kb + head // C.group * stride_kh
    v_base = v_ptr + batch * stride_vb + head // C.group * stride_vh
    segments_ptr += batch * stride_segments
    key_mask_ptr += batch * stride_mask

    q_pos = start + tl.arange(0, BLOCK_Q)
    inside = q_pos < q_len
    q_segment = load_ids(segments_ptr, q_pos, inside, C.segments)
    q = tile(q_base, stride_qs, q_len - start, BLOCK_Q, C.dim, C.block_d, True)
    row_max = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_Q,), tl.float32)
    if C.sinks:
        row_max = tl.zeros((BLOCK_Q,), tl.float32) + tl.load(sinks_ptr + head).to(tl.float32) * LOG2E
        row_sum += 1.0
    total = tl.zeros((BLOCK_Q, BLOCK_V), tl.float32)

    first, last, full_first, full_last = visited(
        start, q_len, kv_len, spans_ptr + batch * stride_spans, valid_ptr + batch * stride_valid, True, C
    )
    for masked in tl.static_range(2):
        total, row_max, row_sum = _visit_keys(
            total, row_max, row_sum, q, q_pos, q_segment, k_base, v_base, segments_ptr, key_mask_ptr,
            stride_ks, stride_vs, kv_len, first, last, full_first, full_last, scale, softcap, masked == 1, C,
        )  # fmt: skip

    # Rows that saw no key: zeros, and +inf so that the backward's exp2(score - lse) is 0.
    empty = row_sum == 0.0
    row_sum = tl.where(empty, 1.0, row_sum)
    lse = tl.where(empty, float("inf"), row_max + tl.log2(row_sum))
    out_row = out_ptr + ((batch * q_len + q_pos) * heads + head)[:, None] * C.value_dim
    store_tile(out_row, total / row_sum[:, None], inside, C.value_dim, BLOCK_V)
    lse_row = lse_ptr + row.to(tl.int64) * padded_rows(q_len)
    tl.store(lse_row + q_pos, tl.where(inside, lse, float("inf")))
    # The head's last program also fills what lies past its block.
    rest = tl.where(start + BLOCK_Q < q_len, padded_rows(q_len), start + BLOCK_Q)
    for past in tl.range(rest, padded_rows(q_len), BLOCK_Q):
        tl.store(lse_row + past + tl.arange(0, BLOCK_Q), tl.full((BLOCK_Q,), float("inf"), tl.float32))


def dense_rows(x: torch.Tensor) -> torch.Tensor:
    """x where the kernels can read its rows by strides: dense, and 128 of them within 32-bit offsets."""
    return x if x.stride(-1) == 1 and x.stride(-2) < 2**24 else x.contiguous()


def mask_arguments(q: torch.Tensor, terms: Terms) -> tuple:
    """Pointers of segments, their spans, the key mask and its span, q for absent ones; batch strides."""
    ids = (terms.segments, terms.segment_spans, terms.key_mask, terms.key_spans)
    ids = [x if x is None else x.contiguous() for x in ids]
    ids = [x.view(torch.uint8) if x is not None and x.dtype == torch.bool else x for x in ids]
    strides = (0 if x is None or x.shape[0] == 1 else x.stride(0) for x in ids)
    return *(q if x is None else x for x in ids), *strides


def static(q, v, kv_heads: int, terms: Terms) -> Static:
    """What the shapes and terms fix; the blocks are the kernels' own."""
    dim, value_dim = q.shape[-1], v.shape[-1]
    block_d, block_v = (max(16, triton.next_power_of_2(x)) for x in (dim, value_dim))
    return Static(
        causal=terms.causal, window=terms.window, chunk=terms.chunk, segments=terms.segments is not None,
        key_mask=terms.key_mask is not None, sinks=terms.sinks is not None, softcap=terms.softcap != 0.0,
        exact=q.dtype == torch.float32, group=q.shape[1] // kv_heads, dim=dim, value_dim=value_dim,
        block_d=block_d, block_v=block_v, block_q=0, block_k=0, span_block=span_sizes(q.device)[0],
    )  # fmt: skip


def attention_forward(q, k, v, terms: Terms) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch. Returns out, (batch, heads, queries, value_dim), and the log2-sum-exp2 of ``lse_rows``."""
    q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
    batch, heads, q_len, _ = q.shape
    kv_heads, kv_len, value_dim = v.shape[1:]
    out = q.new_empty((batch, q_len, heads, value_dim)).transpose(1, 2)
    lse = q.new_empty((batch, heads, lse_rows(q_len)), dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    constants = static(q, v, kv_heads, terms)
    blocks = blocks_for(q.device, q.dtype, max(constants.block_d, constants.block_v), "forward")
    # A product of -inf, a logit not allowed, and a scale of 0 would be NaN.
    scale = max(float(terms.scale), 1e-30)
    _forward_kernel[(triton.cdiv(q_len, blocks.resident) * heads * batch,)](
        q, k, v, out, lse, q if terms.sinks is None else terms.sinks.contiguous(), *mask_arguments(q, terms),
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], heads, q_len, kv_len, scale, float(terms.softcap),
        C=constants._replace(block_q=blocks.resident, block_k=blocks.streamed), num_warps=blocks.warps,
        num_stages=blocks.stages,
    )  # fmt: skip
    return out, lse
