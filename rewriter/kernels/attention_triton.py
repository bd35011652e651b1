"""The forward kernel of attention, and what both directions share: tiles, logits, arguments.

One program holds a block of queries and streams the keys and values that its mask may allow. Per query block
and head it reads q once, K and V of its span once (mostly from L2: the blocks of one head run side by side),
and writes the output and one fp32 log-sum-exp a row.
"""

# Triton types a kernel as the plain function below its decorator, and `tl.range` as a function: launch
# options, numbers for constexpr parameters and loops look like errors.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false, reportCallIssue=false

import torch
import triton
import triton.language as tl

from .attention_mask_triton import allowed, blocks_for, keys_of, part_start, segment_spans

LOG2E = tl.constexpr(1.4426950408889634)
# Numbers that vary from batch to batch, whose divisibility is no use: one compilation serves them all.
UNSPECIALIZED = ("heads", "q_len", "kv_len", "stride_segments", "stride_spans", "stride_mask")


@triton.jit
def tile(
    base, stride, rows_left, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """(ROWS, BLOCK) from ``base``, zeros past DIM columns and, if MASKED, past ``rows_left`` rows."""
    row = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    pointers = base + row[:, None] * stride + column[None, :]
    if MASKED and DIM != BLOCK:
        return tl.load(pointers, mask=(row < rows_left)[:, None] & (column < DIM)[None, :], other=0.0)
    elif MASKED:
        return tl.load(pointers, mask=(row < rows_left)[:, None], other=0.0)
    elif DIM != BLOCK:
        return tl.load(pointers, mask=(column < DIM)[None, :], other=0.0)
    else:
        return tl.load(pointers)


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
def logits(qk, scale, softcap, SOFTCAP: tl.constexpr, EXACT: tl.constexpr):
    """Products to logits in base 2, and their tanh where they are capped."""
    if SOFTCAP:
        squashed = tanh(qk * (scale / softcap), EXACT)
        return squashed * (softcap * LOG2E), squashed
    else:
        return qk * (scale * LOG2E), qk


@triton.jit
def _visit_keys(
    total, row_max, row_sum, q, q_pos, q_segment, k_base, v_base, segments_ptr, key_mask_ptr, stride_k,
    stride_v, kv_len, first, last, scale, softcap, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, CHUNK: tl.constexpr, SEGMENTS: tl.constexpr, KEY_MASK: tl.constexpr,
    SOFTCAP: tl.constexpr, EXACT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    precision: tl.constexpr = "ieee" if EXACT else "tf32"
    for start in tl.range(first, last, BLOCK_K):
        k = tile(k_base + start * stride_k, stride_k, kv_len - start, BLOCK_K, DIM, BLOCK_D, MASKED)
        qk = tl.dot(q, tl.trans(k), input_precision=precision)
        score, _ = logits(qk, scale, softcap, SOFTCAP, EXACT)
        if MASKED:
            k_pos = start + tl.arange(0, BLOCK_K)
            k_segment = k_pos
            key_ok = k_pos < kv_len
            if SEGMENTS:
                k_segment = tl.load(segments_ptr + k_pos, mask=key_ok, other=0)
            inside = key_ok
            if KEY_MASK:
                key_ok = tl.load(key_mask_ptr + k_pos, mask=key_ok, other=0) != 0
            keep = allowed(
                inside[None, :], q_pos[:, None], k_pos[None, :], q_segment[:, None], k_segment[None, :],
                key_ok[None, :], CAUSAL, WINDOW, CHUNK, SEGMENTS, KEY_MASK,
            )  # fmt: skip
            score = tl.where(keep, score, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(score, 1))
        # Where a row has seen no key yet its maximum is -inf; -inf - -inf must not become NaN.
        anchor = tl.where(new_max == float("-inf"), 0.0, new_max) if MASKED else new_max
        p = tl.exp2(score - anchor[:, None])
        shrink = tl.exp2(row_max - anchor)
        row_sum = row_sum * shrink + tl.sum(p, 1)
        v = tile(v_base + start * stride_v, stride_v, kv_len - start, BLOCK_K, VALUE_DIM, BLOCK_V, MASKED)
        total = tl.dot(p.to(v.dtype), v, total * shrink[:, None], input_precision=precision)
        row_max = new_max
    return total, row_max, row_sum


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, segments_ptr, spans_ptr, key_mask_ptr, sinks_ptr, stride_qb,
    stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs, stride_segments,
    stride_spans, stride_mask, heads, q_len, kv_len, scale, softcap, GROUP: tl.constexpr, DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, SPAN_BLOCK: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    CHUNK: tl.constexpr, SEGMENTS: tl.constexpr, KEY_MASK: tl.constexpr, SINKS: tl.constexpr,
    SOFTCAP: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(q_len, BLOCK_Q)
    row = tl.program_id(0) // blocks
    head = row % heads
    batch = (row // heads).to(tl.int64)
    # Under a causal mask the last queries see the most keys: they start first, so that none straggles.
    start = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_Q
    stride_k = tl.cast(stride_ks, tl.int64)
    stride_v = tl.cast(stride_vs, tl.int64)
    q_base = q_ptr + batch * stride_qb + head.to(tl.int64) * stride_qh + start * tl.cast(stride_qs, tl.int64)
    k_base = k_ptr + batch * stride_kb + (head // GROUP).to(tl.int64) * stride_kh
    v_base = v_ptr + batch * stride_vb + (head // GROUP).to(tl.int64) * stride_vh
    segments_ptr += batch * stride_segments
    spans_ptr += batch * stride_spans
    key_mask_ptr += batch * stride_mask

    q_pos = start + tl.arange(0, BLOCK_Q)
    q_segment = q_pos
    if SEGMENTS:
        q_segment = tl.load(segments_ptr + q_pos, mask=q_pos < q_len, other=0)
    q = tile(q_base, stride_qs, q_len - start, BLOCK_Q, DIM, BLOCK_D, True)
    row_max = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_Q,), tl.float32)
    if SINKS:
        row_max = tl.zeros((BLOCK_Q,), tl.float32) + tl.load(sinks_ptr + head).to(tl.float32) * LOG2E
        row_sum += 1.0
    total = tl.zeros((BLOCK_Q, BLOCK_V), tl.float32)

    first, last, full_first, full_last = keys_of(
        start, q_len, kv_len, spans_ptr, BLOCK_Q, BLOCK_K, SPAN_BLOCK, CAUSAL, WINDOW, CHUNK, SEGMENTS,
        KEY_MASK,
    )  # fmt: skip
    for part in tl.static_range(3):
        if part == 2 or (not (SEGMENTS or KEY_MASK) and (part == 1 or WINDOW > 0 or CHUNK > 0)):
            total, row_max, row_sum = _visit_keys(
                total, row_max, row_sum, q, q_pos, q_segment, k_base, v_base, segments_ptr, key_mask_ptr,
                stride_k, stride_v, kv_len, part_start(part, first, full_first, full_last),
                part_start(part, full_first, full_last, last), scale, softcap, DIM, VALUE_DIM, BLOCK_D,
                BLOCK_V, BLOCK_K, CAUSAL, WINDOW, CHUNK, SEGMENTS, KEY_MASK, SOFTCAP, EXACT, part != 1,
            )  # fmt: skip

    # Rows that saw no key: zeros, and +inf so that the backward's exp2(score - lse) is 0.
    empty = row_sum == 0.0
    row_sum = tl.where(empty, 1.0, row_sum)
    total = total / row_sum[:, None]
    lse = tl.where(empty, float("inf"), row_max + tl.log2(row_sum))
    inside = q_pos < q_len
    column = tl.arange(0, BLOCK_V)
    token = batch * q_len + q_pos
    out = out_ptr + (token * heads + head)[:, None] * VALUE_DIM + column[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=inside[:, None] & (column < VALUE_DIM)[None, :])
    tl.store(lse_ptr + row.to(tl.int64) * q_len + q_pos, lse, mask=inside)


def dense_rows(x: torch.Tensor) -> torch.Tensor:
    """x itself where its last dimension is dense, else a copy: the kernels read rows by strides."""
    return x if x.stride(-1) == 1 else x.contiguous()


def batch_stride(x: torch.Tensor) -> int:
    return 0 if x.shape[0] == 1 else x.stride(0)


def mask_arguments(q, segments, key_mask, block: int) -> tuple[tuple, tuple[int, int, int]]:
    """Pointers of (segments, spans, key_mask), q standing in for absent ones, and their batch strides."""
    spans, segment_stride, span_stride, key_stride = q, 0, 0, 0
    if segments is not None:
        segments = segments.contiguous()
        spans = segment_spans(segments, block)
        segment_stride, span_stride = batch_stride(segments), batch_stride(spans)
    if key_mask is not None:
        key_mask = key_mask.contiguous().view(torch.uint8)
        key_stride = batch_stride(key_mask)
    pointers = (q if segments is None else segments, spans, q if key_mask is None else key_mask)
    return pointers, (segment_stride, span_stride, key_stride)


def padded(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))


def attention_forward(q, k, v, segments, key_mask, sinks, scale, causal, window, chunk, softcap):
    """Launch; the arguments of ``rewriter::attention``. Returns out and the rows' log2-sum-exp2."""
    q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
    batch, heads, q_len, dim = q.shape
    kv_heads, kv_len, value_dim = v.shape[1:]
    out = q.new_empty((batch, q_len, heads, value_dim)).transpose(1, 2)
    lse = q.new_empty((batch, heads, q_len), dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    block_d, block_v = padded(dim), padded(value_dim)
    blocks = blocks_for(q.device, q.dtype, max(block_d, block_v), False)
    span_block = max(blocks.resident, blocks.streamed)
    masks, mask_strides = mask_arguments(q, segments, key_mask, span_block)
    _forward_kernel[(triton.cdiv(q_len, blocks.resident) * heads * batch,)](
        q, k, v, out, lse, *masks, q if sinks is None else sinks.contiguous(), *q.stride()[:3],
        *k.stride()[:3], *v.stride()[:3], *mask_strides, heads, q_len, kv_len, float(scale), float(softcap),
        GROUP=heads // kv_heads, DIM=dim, VALUE_DIM=value_dim, BLOCK_D=block_d, BLOCK_V=block_v,
        BLOCK_Q=blocks.resident, BLOCK_K=blocks.streamed, SPAN_BLOCK=span_block, CAUSAL=causal, WINDOW=window,
        CHUNK=chunk, SEGMENTS=segments is not None, KEY_MASK=key_mask is not None, SINKS=sinks is not None,
        SOFTCAP=softcap != 0.0, EXACT=q.dtype == torch.float32, num_warps=blocks.warps,
        num_stages=blocks.stages,
    )  # fmt: skip
    return out, lse
