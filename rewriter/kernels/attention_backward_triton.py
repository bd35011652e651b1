"""The backward kernels of attention: delta, then dq by blocks of queries, then dk and dv by blocks of keys.

Probabilities are recomputed from the saved log-sum-exp. delta = sum(out · grad) of a row stands for the
softmax's normalisation in the gradient. dq streams keys as the forward does; dk and dv stream the queries of
every head of the group, so that a K/V head's gradient is summed in fp32 by one program, without atomics.
Between them q, k, v, grad are read twice (mostly from L2), out once, and 3 gradients written, in memory
(batch, tokens, heads, dim).
"""

# Triton types a kernel as the plain function below its decorator, and `tl.range` as a function: launch
# options, numbers for constexpr parameters and loops look like errors.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false, reportCallIssue=false

import torch
import triton
import triton.language as tl

from .attention_mask_triton import allowed, blocks_for, keys_of, part_start, queries_of
from .attention_triton import UNSPECIALIZED, dense_rows, logits, mask_arguments, padded, tile


@triton.jit(do_not_specialize=("heads", "q_len"))
def _delta_kernel(
    out_ptr, grad_ptr, delta_ptr, stride_gb, stride_gh, stride_gs, heads, q_len, VALUE_DIM: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(q_len, BLOCK_Q)
    row = tl.program_id(0) // blocks
    head = (row % heads).to(tl.int64)
    batch = (row // heads).to(tl.int64)
    start = tl.program_id(0) % blocks * BLOCK_Q
    stride_out = tl.cast(heads * VALUE_DIM, tl.int64)
    out_base = out_ptr + ((batch * q_len + start) * heads + head) * VALUE_DIM
    grad_base = grad_ptr + batch * stride_gb + head * stride_gh + start * tl.cast(stride_gs, tl.int64)
    out = tile(out_base, stride_out, q_len - start, BLOCK_Q, VALUE_DIM, BLOCK_V, True).to(tl.float32)
    grad = tile(grad_base, stride_gs, q_len - start, BLOCK_Q, VALUE_DIM, BLOCK_V, True).to(tl.float32)
    q_pos = start + tl.arange(0, BLOCK_Q)
    tl.store(delta_ptr + row.to(tl.int64) * q_len + q_pos, tl.sum(out * grad, 1), mask=q_pos < q_len)


@triton.jit
def _visit_keys(
    dq, q, grad, lse, delta, q_pos, q_segment, k_base, v_base, segments_ptr, key_mask_ptr, stride_k, stride_v,
    kv_len, first, last, scale, softcap, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    CHUNK: tl.constexpr, SEGMENTS: tl.constexpr, KEY_MASK: tl.constexpr, SOFTCAP: tl.constexpr,
    EXACT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    precision: tl.constexpr = "ieee" if EXACT else "tf32"
    for start in tl.range(first, last, BLOCK_K):
        k = tile(k_base + start * stride_k, stride_k, kv_len - start, BLOCK_K, DIM, BLOCK_D, MASKED)
        v = tile(v_base + start * stride_v, stride_v, kv_len - start, BLOCK_K, VALUE_DIM, BLOCK_V, MASKED)
        qk = tl.dot(q, tl.trans(k), input_precision=precision)
        score, squashed = logits(qk, scale, softcap, SOFTCAP, EXACT)
        p = tl.exp2(score - lse[:, None])
        if MASKED:
            k_pos = start + tl.arange(0, BLOCK_K)
            k_segment = k_pos
            inside = k_pos < kv_len
            key_ok = inside
            if SEGMENTS:
                k_segment = tl.load(segments_ptr + k_pos, mask=inside, other=0)
            if KEY_MASK:
                key_ok = tl.load(key_mask_ptr + k_pos, mask=inside, other=0) != 0
            keep = allowed(
                inside[None, :], q_pos[:, None], k_pos[None, :], q_segment[:, None], k_segment[None, :],
                key_ok[None, :], CAUSAL, WINDOW, CHUNK, SEGMENTS, KEY_MASK,
            )  # fmt: skip
            p = tl.where(keep, p, 0.0)
        dp = tl.dot(grad, tl.trans(v), input_precision=precision)
        ds = p * (dp - delta[:, None])
        if SOFTCAP:
            ds = ds * (1.0 - squashed * squashed)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=precision)
    return dq


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _queries_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dq_ptr, segments_ptr, spans_ptr, key_mask_ptr,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_gb, stride_gh, stride_gs, stride_segments, stride_spans, stride_mask, heads, q_len, kv_len, scale,
    softcap, GROUP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, SPAN_BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr, SEGMENTS: tl.constexpr,
    KEY_MASK: tl.constexpr, SOFTCAP: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(q_len, BLOCK_Q)
    row = tl.program_id(0) // blocks
    head = (row % heads).to(tl.int64)
    batch = (row // heads).to(tl.int64)
    start = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_Q
    stride_k = tl.cast(stride_ks, tl.int64)
    stride_v = tl.cast(stride_vs, tl.int64)
    q_base = q_ptr + batch * stride_qb + head * stride_qh + start * tl.cast(stride_qs, tl.int64)
    grad_base = grad_ptr + batch * stride_gb + head * stride_gh + start * tl.cast(stride_gs, tl.int64)
    k_base = k_ptr + batch * stride_kb + head // GROUP * stride_kh
    v_base = v_ptr + batch * stride_vb + head // GROUP * stride_vh
    segments_ptr += batch * stride_segments
    spans_ptr += batch * stride_spans
    key_mask_ptr += batch * stride_mask

    q_pos = start + tl.arange(0, BLOCK_Q)
    inside = q_pos < q_len
    q_segment = q_pos
    if SEGMENTS:
        q_segment = tl.load(segments_ptr + q_pos, mask=inside, other=0)
    q = tile(q_base, stride_qs, q_len - start, BLOCK_Q, DIM, BLOCK_D, True)
    grad = tile(grad_base, stride_gs, q_len - start, BLOCK_Q, VALUE_DIM, BLOCK_V, True)
    lse = tl.load(lse_ptr + row.to(tl.int64) * q_len + q_pos, mask=inside, other=float("inf"))
    delta = tl.load(delta_ptr + row.to(tl.int64) * q_len + q_pos, mask=inside, other=0.0)
    dq = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)

    first, last, full_first, full_last = keys_of(
        start, q_len, kv_len, spans_ptr, BLOCK_Q, BLOCK_K, SPAN_BLOCK, CAUSAL, WINDOW, CHUNK, SEGMENTS,
        KEY_MASK,
    )  # fmt: skip
    for part in tl.static_range(3):
        if part == 2 or (not (SEGMENTS or KEY_MASK) and (part == 1 or WINDOW > 0 or CHUNK > 0)):
            dq = _visit_keys(
                dq, q, grad, lse, delta, q_pos, q_segment, k_base, v_base, segments_ptr, key_mask_ptr,
                stride_k, stride_v, kv_len, part_start(part, first, full_first, full_last),
                part_start(part, full_first, full_last, last), scale, softcap, DIM, VALUE_DIM, BLOCK_D,
                BLOCK_V, BLOCK_K, CAUSAL, WINDOW, CHUNK, SEGMENTS, KEY_MASK, SOFTCAP, EXACT, part != 1,
            )  # fmt: skip
    column = tl.arange(0, BLOCK_D)
    place = dq_ptr + ((batch * q_len + q_pos) * heads + head)[:, None] * DIM + column[None, :]
    dq = (dq * scale).to(dq_ptr.dtype.element_ty)
    tl.store(place, dq, mask=inside[:, None] & (column < DIM)[None, :])


@triton.jit
def _visit_queries(
    dk, dv, k, v, k_pos, k_segment, key_ok, q_base, grad_base, lse_ptr, delta_ptr, segments_ptr, stride_q,
    stride_g, q_len, first, last, scale, softcap, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_Q: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, CHUNK: tl.constexpr, SEGMENTS: tl.constexpr, KEY_MASK: tl.constexpr,
    SOFTCAP: tl.constexpr, EXACT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    precision: tl.constexpr = "ieee" if EXACT else "tf32"
    for start in tl.range(first, last, BLOCK_Q):
        q_pos = start + tl.arange(0, BLOCK_Q)
        inside = q_pos < q_len
        q = tile(q_base + start * stride_q, stride_q, q_len - start, BLOCK_Q, DIM, BLOCK_D, MASKED)
        g_base = grad_base + start * stride_g
        grad = tile(g_base, stride_g, q_len - start, BLOCK_Q, VALUE_DIM, BLOCK_V, MASKED)
        if MASKED:
            # +inf makes the probabilities of rows past the end exp2(-inf), which is 0.
            lse = tl.load(lse_ptr + q_pos, mask=inside, other=float("inf"))
            delta = tl.load(delta_ptr + q_pos, mask=inside, other=0.0)
        else:
            lse = tl.load(lse_ptr + q_pos)
            delta = tl.load(delta_ptr + q_pos)
        qk = tl.dot(k, tl.trans(q), input_precision=precision)
        score, squashed = logits(qk, scale, softcap, SOFTCAP, EXACT)
        p = tl.exp2(score - lse[None, :])
        if MASKED:
            q_segment = q_pos
            if SEGMENTS:
                q_segment = tl.load(segments_ptr + q_pos, mask=inside, other=0)
            keep = allowed(
                inside[None, :], q_pos[None, :], k_pos[:, None], q_segment[None, :], k_segment[:, None],
                key_ok[:, None], CAUSAL, WINDOW, CHUNK, SEGMENTS, KEY_MASK,
            )  # fmt: skip
            p = tl.where(keep, p, 0.0)
        dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision=precision)
        dp = tl.dot(v, tl.trans(grad), input_precision=precision)
        ds = p * (dp - delta[None, :])
        if SOFTCAP:
            ds = ds * (1.0 - squashed * squashed)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=precision)
    return dk, dv


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _keys_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, segments_ptr, spans_ptr, key_mask_ptr,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_gb, stride_gh, stride_gs, stride_segments, stride_spans, stride_mask, heads, q_len, kv_len, scale,
    softcap, GROUP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, SPAN_BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr, SEGMENTS: tl.constexpr,
    KEY_MASK: tl.constexpr, SOFTCAP: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(kv_len, BLOCK_K)
    kv_heads = heads // GROUP
    row = tl.program_id(0) // blocks
    kv_head = (row % kv_heads).to(tl.int64)
    batch = (row // kv_heads).to(tl.int64)
    start = tl.program_id(0) % blocks * BLOCK_K
    stride_q = tl.cast(stride_qs, tl.int64)
    stride_g = tl.cast(stride_gs, tl.int64)
    k_base = k_ptr + batch * stride_kb + kv_head * stride_kh + start * tl.cast(stride_ks, tl.int64)
    v_base = v_ptr + batch * stride_vb + kv_head * stride_vh + start * tl.cast(stride_vs, tl.int64)
    segments_ptr += batch * stride_segments
    spans_ptr += batch * stride_spans
    key_mask_ptr += batch * stride_mask

    k_pos = start + tl.arange(0, BLOCK_K)
    inside = k_pos < kv_len
    k_segment = k_pos
    key_ok = inside
    if SEGMENTS:
        k_segment = tl.load(segments_ptr + k_pos, mask=inside, other=0)
    if KEY_MASK:
        key_ok = tl.load(key_mask_ptr + k_pos, mask=inside, other=0) != 0
    k = tile(k_base, stride_ks, kv_len - start, BLOCK_K, DIM, BLOCK_D, True)
    v = tile(v_base, stride_vs, kv_len - start, BLOCK_K, VALUE_DIM, BLOCK_V, True)
    dk = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)

    first, last, full_first, full_last = queries_of(
        start, q_len, kv_len, spans_ptr, BLOCK_Q, BLOCK_K, SPAN_BLOCK, CAUSAL, WINDOW, CHUNK, SEGMENTS,
        KEY_MASK,
    )  # fmt: skip
    for member in tl.range(0, GROUP):
        head = kv_head * GROUP + member
        q_base = q_ptr + batch * stride_qb + head * stride_qh
        grad_base = grad_ptr + batch * stride_gb + head * stride_gh
        lse_row = lse_ptr + (batch * heads + head) * q_len
        delta_row = delta_ptr + (batch * heads + head) * q_len
        for part in tl.static_range(3):
            if part == 2 or (not (SEGMENTS or KEY_MASK) and (part == 1 or CAUSAL or CHUNK > 0)):
                dk, dv = _visit_queries(
                    dk, dv, k, v, k_pos, k_segment, key_ok, q_base, grad_base, lse_row, delta_row,
                    segments_ptr, stride_q, stride_g, q_len, part_start(part, first, full_first, full_last),
                    part_start(part, full_first, full_last, last), scale, softcap, DIM, VALUE_DIM, BLOCK_D,
                    BLOCK_V, BLOCK_Q, CAUSAL, WINDOW, CHUNK, SEGMENTS, KEY_MASK, SOFTCAP, EXACT, part != 1,
                )  # fmt: skip
    token = ((batch * kv_len + k_pos) * kv_heads + kv_head)[:, None]
    column = tl.arange(0, BLOCK_D)
    dk = (dk * scale).to(dk_ptr.dtype.element_ty)
    tl.store(dk_ptr + token * DIM + column[None, :], dk, mask=inside[:, None] & (column < DIM)[None, :])
    column = tl.arange(0, BLOCK_V)
    dv = dv.to(dv_ptr.dtype.element_ty)
    column_ok = (column < VALUE_DIM)[None, :]
    tl.store(dv_ptr + token * VALUE_DIM + column[None, :], dv, mask=inside[:, None] & column_ok)


def attention_backward(
    grad, q, k, v, out, lse, segments, key_mask, scale, causal, window, chunk, softcap, need_q, need_kv
):
    """Launch. Returns dq, dk, dv (empty where not needed) and delta, (batch, heads, queries) in fp32."""
    q, k, v, grad = dense_rows(q), dense_rows(k), dense_rows(v), dense_rows(grad.to(q.dtype))
    batch, heads, q_len, dim = q.shape
    kv_heads, kv_len, value_dim = v.shape[1:]
    delta = torch.zeros_like(lse) if out.numel() == 0 else torch.empty_like(lse)
    dq = q.new_empty((batch, q_len, heads, dim)).transpose(1, 2) if need_q else q.new_empty(0)
    dk = k.new_empty((batch, kv_len, kv_heads, dim)).transpose(1, 2) if need_kv else k.new_empty(0)
    dv = v.new_empty((batch, kv_len, kv_heads, value_dim)).transpose(1, 2) if need_kv else v.new_empty(0)
    if out.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_(), delta
    block_d, block_v = padded(dim), padded(value_dim)
    blocks = blocks_for(q.device, q.dtype, max(block_d, block_v), True)
    span_block = max(blocks.resident, blocks.streamed)
    masks, mask_strides = mask_arguments(q, segments, key_mask, span_block)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad.stride()[:3], *mask_strides)
    numbers = (heads, q_len, kv_len, float(scale), float(softcap))
    constants = dict(
        GROUP=heads // kv_heads, DIM=dim, VALUE_DIM=value_dim, BLOCK_D=block_d, BLOCK_V=block_v,
        SPAN_BLOCK=span_block, CAUSAL=causal, WINDOW=window, CHUNK=chunk, SEGMENTS=segments is not None,
        KEY_MASK=key_mask is not None, SOFTCAP=softcap != 0.0, EXACT=q.dtype == torch.float32,
        num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    block = blocks_for(q.device, q.dtype, max(block_d, block_v), False).streamed
    _delta_kernel[(triton.cdiv(q_len, block) * heads * batch,)](
        out, grad, delta, *grad.stride()[:3], heads, q_len, VALUE_DIM=value_dim, BLOCK_V=block_v,
        BLOCK_Q=block,
    )  # fmt: skip
    if need_q:
        _queries_kernel[(triton.cdiv(q_len, blocks.resident) * heads * batch,)](
            q, k, v, grad, lse, delta, dq, *masks, *strides, *numbers, BLOCK_Q=blocks.resident,
            BLOCK_K=blocks.streamed, **constants,
        )  # fmt: skip
    if need_kv and kv_len:
        _keys_kernel[(triton.cdiv(kv_len, blocks.resident) * kv_heads * batch,)](
            q, k, v, grad, lse, delta, dk, dv, *masks, *strides, *numbers, BLOCK_Q=blocks.streamed,
            BLOCK_K=blocks.resident, **constants,
        )  # fmt: skip
    return dq, dk, dv, delta
