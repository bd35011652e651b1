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
# pyright: reportAttributeAccessIssue=false

import torch
import triton
import triton.language as tl

from .attention_mask_triton import (
    UNSPECIALIZED,
    allowed,
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
from .attention_terms import Terms
from .attention_triton import dense_rows, mask_arguments, static

DELTA_ROWS = 64  # divides what padded_rows rounds to


@triton.jit(do_not_specialize=("heads", "q_len"))
def _delta_kernel(
    out_ptr, grad_ptr, delta_ptr, stride_gb, stride_gh, stride_gs, heads, q_len, DIM: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    padded = padded_rows(q_len)
    blocks = padded // ROWS
    row = tl.program_id(0) // blocks
    head = (row % heads).to(tl.int64)
    batch = (row // heads).to(tl.int64)
    start = tl.program_id(0) % blocks * ROWS
    out_base = out_ptr + ((batch * q_len + start) * heads + head) * DIM
    grad_base = grad_ptr + batch * stride_gb + head * stride_gh + start.to(tl.int64) * stride_gs
    out = tile(out_base, heads * DIM, q_len - start, ROWS, DIM, BLOCK, True).to(tl.float32)
    grad = tile(grad_base, stride_gs, q_len - start, ROWS, DIM, BLOCK, True).to(tl.float32)
    tl.store(delta_ptr + row.to(tl.int64) * padded + start + tl.arange(0, ROWS), tl.sum(out * grad, 1))


@triton.jit
def _gradients(qk, dp, lse, delta, keep, scale, softcap, MASKED: tl.constexpr, C: tl.constexpr):
    """Probabilities and the gradient of the logits, less ``scale``; lse and delta broadcast to qk's shape."""
    x, factor = logits(qk, scale, softcap, C)
    p = tl.exp2(x * factor - lse)
    if MASKED:
        p = tl.where(keep, p, 0.0)
    ds = p * (dp - delta)
    if C.softcap:
        ds = ds * (1.0 - x * x)
    return p, ds


@triton.jit
def _visit_keys(
    dq, q, grad, lse, delta, q_pos, q_segment, k_base, v_base, segments_ptr, key_mask_ptr, stride_k, stride_v,
    kv_len, first, last, full_first, full_last, scale, softcap, MASKED: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    precision: tl.constexpr = "ieee" if C.exact else "tf32"
    for i in tl.range(0, count(first, last, full_first, full_last, C.block_k, MASKED)):
        start = place(i, first, full_first, full_last, C.block_k, MASKED)
        row = start.to(tl.int64)
        left = kv_len - start
        k = tile(k_base + row * stride_k, stride_k, left, C.block_k, C.dim, C.block_d, MASKED)
        v = tile(v_base + row * stride_v, stride_v, left, C.block_k, C.value_dim, C.block_v, MASKED)
        qk = tl.dot(q, tl.trans(k), input_precision=precision)
        dp = tl.dot(grad, tl.trans(v), input_precision=precision)
        keep = True
        if MASKED:
            keep = keys_allowed(start, q_pos, q_segment, segments_ptr, key_mask_ptr, kv_len, C)
        _, ds = _gradients(qk, dp, lse[:, None], delta[:, None], keep, scale, softcap, MASKED, C)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=precision)
    return dq


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _queries_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dq_ptr, segments_ptr, spans_ptr, key_mask_ptr,
    valid_ptr, stride_segments, stride_spans, stride_mask, stride_valid, stride_qb, stride_qh, stride_qs,
    stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs, stride_gb, stride_gh, stride_gs, heads,
    q_len, kv_len, scale, softcap, C: tl.constexpr,
):  # fmt: skip
    BLOCK_Q: tl.constexpr = C.block_q
    BLOCK_D: tl.constexpr = C.block_d
    blocks = tl.cdiv(q_len, BLOCK_Q)
    row = tl.program_id(0) // blocks
    head = (row % heads).to(tl.int64)
    batch = (row // heads).to(tl.int64)
    start = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_Q
    q_base = q_ptr + batch * stride_qb + head * stride_qh + start.to(tl.int64) * stride_qs
    grad_base = grad_ptr + batch * stride_gb + head * stride_gh + start.to(tl.int64) * stride_gs
    k_base = k_ptr + batch * stride_kb + head // C.group * stride_kh
    v_base = v_ptr + batch * stride_vb + head // C.group * stride_vh
    segments_ptr += batch * stride_segments
    key_mask_ptr += batch * stride_mask

    q_pos = start + tl.arange(0, BLOCK_Q)
    inside = q_pos < q_len
    q_segment = load_ids(segments_ptr, q_pos, inside, C.segments)
    q = tile(q_base, stride_qs, q_len - start, BLOCK_Q, C.dim, BLOCK_D, True)
    grad = tile(grad_base, stride_gs, q_len - start, BLOCK_Q, C.value_dim, C.block_v, True)
    lse = tl.load(lse_ptr + row.to(tl.int64) * padded_rows(q_len) + q_pos)
    delta = tl.load(delta_ptr + row.to(tl.int64) * padded_rows(q_len) + q_pos)
    dq = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)

    first, last, full_first, full_last = visited(
        start, q_len, kv_len, spans_ptr + batch * stride_spans, valid_ptr + batch * stride_valid, True, C
    )
    for masked in tl.static_range(2):
        dq = _visit_keys(
            dq, q, grad, lse, delta, q_pos, q_segment, k_base, v_base, segments_ptr, key_mask_ptr, stride_ks,
            stride_vs, kv_len, first, last, full_first, full_last, scale, softcap, masked == 1, C,
        )  # fmt: skip
    dq_row = dq_ptr + ((batch * q_len + q_pos) * heads + head)[:, None] * C.dim
    store_tile(dq_row, dq * scale, inside, C.dim, BLOCK_D)


@triton.jit
def _visit_queries(
    dk, dv, k, v, k_pos, k_segment, key_ok, q_base, grad_base, lse_base, delta_base, segments_ptr, stride_qh,
    stride_qs, stride_gh, stride_gs, q_len, first, last, full_first, full_last, scale, softcap,
    MASKED: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    precision: tl.constexpr = "ieee" if C.exact else "tf32"
    # One loop over blocks and the group's heads, so that its pipeline of loads fills and drains once.
    for i in tl.range(0, count(first, last, full_first, full_last, C.block_q, MASKED) * C.group):
        start = place(i // C.group, first, full_first, full_last, C.block_q, MASKED)
        head = i % C.group
        row = start.to(tl.int64)
        left = q_len - start
        q_pos = start + tl.arange(0, C.block_q)
        q_row = q_base + head * tl.cast(stride_qh, tl.int64) + row * stride_qs
        q = tile(q_row, stride_qs, left, C.block_q, C.dim, C.block_d, MASKED)
        grad_row = grad_base + head * tl.cast(stride_gh, tl.int64) + row * stride_gs
        grad = tile(grad_row, stride_gs, left, C.block_q, C.value_dim, C.block_v, MASKED)
        lse = tl.load(lse_base + head * padded_rows(q_len) + q_pos)
        delta = tl.load(delta_base + head * padded_rows(q_len) + q_pos)
        keep = True
        if MASKED:
            inside = q_pos < q_len
            q_segment = load_ids(segments_ptr, q_pos, inside, C.segments)
            keep = inside[None, :]
            if C.key_mask:
                keep = keep & key_ok[:, None]
            keep = allowed(keep, q_pos[None, :], k_pos[:, None], q_segment[None, :], k_segment[:, None], C)
        qk = tl.dot(k, tl.trans(q), input_precision=precision)
        dp = tl.dot(v, tl.trans(grad), input_precision=precision)
        p, ds = _gradients(qk, dp, lse[None, :], delta[None, :], keep, scale, softcap, MASKED, C)
        dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision=precision)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=precision)
    return dk, dv


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _keys_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, segments_ptr, spans_ptr, key_mask_ptr,
    valid_ptr, stride_segments, stride_spans, stride_mask, stride_valid, stride_qb, stride_qh, stride_qs,
    stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs, stride_gb, stride_gh, stride_gs, heads,
    q_len, kv_len, scale, softcap, C: tl.constexpr,
):  # fmt: skip
    BLOCK_K: tl.constexpr = C.block_k
    BLOCK_D: tl.constexpr = C.block_d
    BLOCK_V: tl.constexpr = C.block_v
    blocks = tl.cdiv(kv_len, BLOCK_K)
    kv_heads = heads // C.group
    row = tl.program_id(0) // blocks
    kv_head = (row % kv_heads).to(tl.int64)
    batch = (row // kv_heads).to(tl.int64)
    start = tl.program_id(0) % blocks * BLOCK_K
    k_base = k_ptr + batch * stride_kb + kv_head * stride_kh + start.to(tl.int64) * stride_ks
    v_base = v_ptr + batch * stride_vb + kv_head * stride_vh + start.to(tl.int64) * stride_vs
    segments_ptr += batch * stride_segments

    k_pos = start + tl.arange(0, BLOCK_K)
    inside = k_pos < kv_len
    k_segment = load_ids(segments_ptr, k_pos, inside, C.segments)
    k = tile(k_base, stride_ks, kv_len - start, BLOCK_K, C.dim, BLOCK_D, True)
    v = tile(v_base, stride_vs, kv_len - start, BLOCK_K, C.value_dim, BLOCK_V, True)
    dk = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)

    first, last, full_first, full_last = visited(
        start, kv_len, q_len, spans_ptr + batch * stride_spans, valid_ptr, False, C
    )
    key_ok = inside
    if C.key_mask:
        key_ok = tl.load(key_mask_ptr + batch * stride_mask + k_pos, mask=inside, other=0) != 0
        valid = tl.sum(key_ok.to(tl.int32), 0)
        last = tl.where(valid == 0, first, last)
        all_full = valid == tl.minimum(kv_len - start, BLOCK_K)
        full_first = tl.where(all_full, full_first, first)
        full_last = tl.where(all_full, full_last, first)
    head = kv_head * C.group
    q_base = q_ptr + batch * stride_qb + head * stride_qh
    grad_base = grad_ptr + batch * stride_gb + head * stride_gh
    lse_base = lse_ptr + (batch * heads + head) * padded_rows(q_len)
    delta_base = delta_ptr + (batch * heads + head) * padded_rows(q_len)
    # Masked blocks come first: the other way round ptxas serializes the products (its C7515, in CUDA 12.8).
    for unmasked in tl.static_range(2):
        dk, dv = _visit_queries(
            dk, dv, k, v, k_pos, k_segment, key_ok, q_base, grad_base, lse_base, delta_base, segments_ptr,
            stride_qh, stride_qs, stride_gh, stride_gs, q_len, first, last, full_first, full_last, scale,
            softcap, unmasked == 0, C,
        )  # fmt: skip
    token = ((batch * kv_len + k_pos) * kv_heads + kv_head)[:, None]
    store_tile(dk_ptr + token * C.dim, dk * scale, inside, C.dim, BLOCK_D)
    store_tile(dv_ptr + token * C.value_dim, dv, inside, C.value_dim, BLOCK_V)


def attention_backward(grad, q, k, v, out, lse, terms: Terms, need_q: bool, need_kv: bool):
    """Launch. Returns dq, dk, dv (empty where not needed) and delta, of lse's shape."""
    q, k, v, grad = dense_rows(q), dense_rows(k), dense_rows(v), dense_rows(grad.to(q.dtype))
    batch, heads, q_len, dim = q.shape
    kv_heads, kv_len, value_dim = v.shape[1:]
    delta = torch.zeros_like(lse) if out.numel() == 0 else torch.empty_like(lse)
    dq = q.new_empty((batch, q_len, heads, dim)).transpose(1, 2) if need_q else q.new_empty(0)
    dk = k.new_empty((batch, kv_len, kv_heads, dim)).transpose(1, 2) if need_kv else k.new_empty(0)
    dv = v.new_empty((batch, kv_len, kv_heads, value_dim)).transpose(1, 2) if need_kv else v.new_empty(0)
    if out.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_(), delta
    constants = static(q, v, kv_heads, terms)
    _delta_kernel[(lse.shape[2] // DELTA_ROWS * heads * batch,)](
        out, grad, delta, *grad.stride()[:3], heads, q_len, DIM=value_dim, BLOCK=constants.block_v,
        ROWS=DELTA_ROWS,
    )  # fmt: skip
    operands = (q, k, v, grad, lse, delta)
    arguments = (
        *mask_arguments(q, terms), *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad.stride()[:3],
        heads, q_len, kv_len, float(terms.scale), float(terms.softcap),
    )  # fmt: skip
    widest = max(constants.block_d, constants.block_v)
    if need_q:
        blocks = blocks_for(q.device, q.dtype, widest, "queries")
        _queries_kernel[(triton.cdiv(q_len, blocks.resident) * heads * batch,)](
            *operands, dq, *arguments, num_warps=blocks.warps, num_stages=blocks.stages,
            C=constants._replace(block_q=blocks.resident, block_k=blocks.streamed),
        )  # fmt: skip
    if need_kv and kv_len:
        blocks = blocks_for(q.device, q.dtype, widest, "keys")
        _keys_kernel[(triton.cdiv(kv_len, blocks.resident) * kv_heads * batch,)](
            *operands, dk, dv, *arguments, num_warps=blocks.warps, num_stages=blocks.stages,
            C=constants._replace(block_q=blocks.streamed, block_k=blocks.resident),
        )  # fmt: skip
    return dq, dk, dv, delta
