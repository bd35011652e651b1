"""Masked attention that never makes an S×S tensor.

Turns ``scaled_dot_product_attention(q, k, v, attn_mask=<bool S×S>)``, and the attention that models write out
by hand for sinks (GPT-OSS) or capped logits (Gemma 2), into one kernel forward and two backward. The mask
comes as the terms it was made of: causal, sliding window, chunks, packed documents, padding.

Why it pays: a mask of S×S booleans takes S² bytes, 90 GB at S = 300,000, and as many again where a kernel
wants it as an additive bias; it also turns PyTorch's flash kernels off. Here the mask is evaluated in
registers from positions and two vectors of length S, and blocks of keys that no query of a block may see are
not visited: a window of W costs S·W, not S², and packed documents cost the sum of their squares.
Grouped-query K and V are read by index, never repeated. Saved for backward: q, k, v, the output, and one fp32
number a row (log-sum-exp).

The method is FlashAttention-2 (Dao, 2023): online softmax in base 2, products in the inputs' dtype
accumulated in fp32 (fp32 inputs multiply in full fp32), probabilities recomputed in the backward, dq in one
kernel and dk, dv in another, so that there are no atomics and results repeat bit for bit.

A row that may see no key gives zeros, and zero gradients. So does eager: PyTorch's CPU flash kernel and its
math path (seen in 2.13), and by their source CUDA's memory-efficient kernel, which takes boolean masks.
Models' own additive masks give such a row, a padding token's, the mean of all values instead; no other row
reads it.

Refuses: float64, mixed dtypes, head dimensions above 256, dropout (``attention_refusal`` says why). Full
causal attention without other terms belongs to ``causal_attention``, PyTorch's own kernels.
"""

import math

import torch
import torch.nn.functional as F

from .registration import define, differentiate

MAX_HEAD_DIM = 256
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None,
    causal: bool,
    window: int = 0,
    chunk: int = 0,
    segments: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    softcap: float = 0.0,
) -> torch.Tensor:
    """Softmax attention over the keys that every given term of the mask allows.

    Args:
        q: (batch, heads, queries, dim), any strides.
        k: (batch, kv_heads, keys, dim); ``heads`` is a multiple of ``kv_heads``.
        v: (batch, kv_heads, keys, value_dim).
        scale: factor of the logits, not negative; ``None`` is ``dim ** -0.5``.
        causal: query i sees key j only if j <= i.
        window: with ``causal``, only if j > i - window; 0 is no window.
        chunk: only if i // chunk == j // chunk; 0 is no chunks.
        segments: integers (batch or 1, tokens); only if segments[i] == segments[j]. Sorted ids skip most
            blocks; unsorted ones are right too.
        key_mask: bool (batch or 1, keys); only if key_mask[j].
        sinks: (heads,), one more logit for every row of a head, without a value.
        softcap: logits become ``softcap * tanh(logits / softcap)`` before the mask; 0 is none.

    Returns:
        (batch, heads, queries, value_dim) in q's dtype, in memory (batch, queries, heads, value_dim).
        Differentiable in q, k, v and sinks.

    Raises:
        ValueError: where ``attention_refusal`` has a reason, or the terms contradict the shapes.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if not q.is_cuda or q.dtype == torch.float64:
        return attention_reference(
            q, k, v, scale=scale, causal=causal, window=window, chunk=chunk, segments=segments,
            key_mask=key_mask, sinks=sinks, softcap=softcap,
        )  # fmt: skip
    op = torch.ops.rewriter.attention.default
    return op(q, k, v, segments, key_mask, sinks, scale, causal, window, chunk, softcap)[0]


def attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None,
    causal: bool,
    window: int = 0,
    chunk: int = 0,
    segments: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    softcap: float = 0.0,
) -> torch.Tensor:
    """``attention`` in plain PyTorch, with the S×S mask: what a model does, and what other devices run."""
    _check_terms(q, k, causal, window, chunk, segments)
    allowed = dense_mask(q, k, causal, window, chunk, segments, key_mask)
    grouped = bool(q.shape[1] != k.shape[1])
    if sinks is None and not softcap:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scale, enable_gqa=grouped)
    if grouped:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    logits = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        logits = torch.tanh(logits / softcap) * softcap
    if allowed is not None:
        logits = logits.masked_fill(~allowed, torch.finfo(logits.dtype).min)
    if sinks is not None:
        sink = sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], 1)
        logits = torch.cat([logits, sink.to(logits.dtype)], dim=-1)
    # In fp32 even where a model takes 16 bits: the kernel, too, rounds probabilities only for the product.
    weights = torch.softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    weights = weights[..., : k.shape[2]]
    if allowed is not None:
        weights = weights.masked_fill(~allowed, 0.0)
    return weights.to(v.dtype) @ v


def dense_mask(
    q: torch.Tensor,
    k: torch.Tensor,
    causal: bool,
    window: int,
    chunk: int,
    segments: torch.Tensor | None,
    key_mask: torch.Tensor | None,
) -> torch.Tensor | None:
    """The terms as one boolean (batch or 1, 1, queries, keys), True where allowed; None without terms."""
    rows = torch.arange(q.shape[2], device=q.device)[:, None]
    columns = torch.arange(k.shape[2], device=q.device)[None, :]
    terms = []
    if causal:
        terms.append((columns <= rows)[None, None])
    if window:
        terms.append((columns > rows - window)[None, None])
    if chunk:
        terms.append((columns // chunk == rows // chunk)[None, None])
    if segments is not None:
        terms.append((segments[:, :, None] == segments[:, None, :])[:, None])
    if key_mask is not None:
        terms.append(key_mask[:, None, None, :].expand(-1, 1, q.shape[2], -1))
    allowed = None
    for term in terms:
        allowed = term if allowed is None else allowed & term
    return allowed


def attention_refusal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str | None:
    """Why the kernel cannot take these tensors (fake ones too), in words for a report; None if it can."""
    if q.dtype not in DTYPES:
        return f"attention: dtype {q.dtype} is not one of bfloat16, float16, float32; left unfused."
    if not q.dtype == k.dtype == v.dtype:
        return f"attention: q, k and v are {q.dtype}, {k.dtype} and {v.dtype}, not one dtype; left unfused."
    if max(q.shape[-1], v.shape[-1]) > MAX_HEAD_DIM:
        return (
            f"attention: head dimension {max(q.shape[-1], v.shape[-1])} exceeds {MAX_HEAD_DIM}, "
            "the most one program can hold; left unfused."
        )
    if q.shape[1] % k.shape[1] or k.shape[1] != v.shape[1]:
        return (
            f"attention: {q.shape[1]} query heads over {k.shape[1]} key and {v.shape[1]} value heads "
            "do not form equal groups; left unfused."
        )
    return None


def causal_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None, dropout: float = 0.0
) -> torch.Tensor:
    """PyTorch's own causal attention, with K and V repeated only where its kernels need that.

    By PyTorch's dispatch rules, cuDNN's and flash kernels on CUDA read grouped K and V by index; both want 16
    bits, flash also one head dimension of at most 256. The memory-efficient kernel, which takes the rest,
    wants repeated heads in these releases, and without it the math path makes S×S tensors: there, repeating
    is the cheaper. The CPU's flash kernel takes groups in every dtype (seen in 2.13).

    Args:
        q: (batch, heads, tokens, dim); k, v: (batch, kv_heads, tokens, dim), of as many tokens.
        scale: factor of the logits; ``None`` is ``dim ** -0.5``.
        dropout: probability of dropping an attention weight.
    """
    return _unmasked(q, k, v, scale, dropout, causal=True)


def full_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None, dropout: float = 0.0
) -> torch.Tensor:
    """As ``causal_attention``, every query seeing every key; the keys may be of another number."""
    return _unmasked(q, k, v, scale, dropout, causal=False)


def _unmasked(q, k, v, scale: float | None, dropout: float, *, causal: bool) -> torch.Tensor:
    grouped = bool(q.shape[1] != k.shape[1])
    if grouped and q.is_cuda and not _flash_takes(q, v):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        grouped = False
    return F.scaled_dot_product_attention(
        q, k, v, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=grouped
    )


def _flash_takes(q: torch.Tensor, v: torch.Tensor) -> bool:
    device = q.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else q.dtype
    return dtype in (torch.bfloat16, torch.float16) and q.shape[-1] == v.shape[-1] <= MAX_HEAD_DIM


def _check_terms(q, k, causal: bool, window: int, chunk: int, segments) -> None:
    if window and not causal:
        raise ValueError(f"attention: window {window} without causal=True has no meaning here; set causal.")
    if window < 0 or chunk < 0:
        raise ValueError(f"attention: window {window} and chunk {chunk} must be 0 (none) or positive.")
    square = causal or chunk or segments is not None
    if square and q.shape[2] != k.shape[2]:
        raise ValueError(
            f"attention: {q.shape[2]} queries and {k.shape[2]} keys have no common positions; "
            "only key_mask works there."
        )


def _attention_kernel(q, k, v, segments, key_mask, sinks, scale, causal, window, chunk, softcap):
    reason = attention_refusal(q, k, v)
    if reason is not None:
        raise ValueError(reason)
    _check_terms(q, k, causal, window, chunk, segments)
    if scale < 0:
        raise ValueError(f"attention: scale {scale} is negative; negate q instead.")
    from .attention_triton import attention_forward

    return attention_forward(q, k, v, segments, key_mask, sinks, scale, causal, window, chunk, softcap)


def _attention_fake(q, k, v, segments, key_mask, sinks, scale, causal, window, chunk, softcap):
    batch, heads, queries, _ = q.shape
    out = q.new_empty((batch, queries, heads, v.shape[-1])).transpose(1, 2)
    return out, q.new_empty((batch, heads, queries), dtype=torch.float32)


def _backward_kernel(
    grad, q, k, v, out, lse, segments, key_mask, sinks, scale, causal, window, chunk, softcap, need_q,
    need_kv, need_sinks,
):  # fmt: skip
    from .attention_backward_triton import attention_backward

    dq, dk, dv, delta = attention_backward(
        grad, q, k, v, out, lse, segments, key_mask, scale, causal, window, chunk, softcap, need_q, need_kv
    )
    if not need_sinks:
        return dq, dk, dv, q.new_empty(0)
    # The sink's probability draws mass from every row and adds no value: its part of softmax's gradient.
    probability = torch.exp2(sinks.float()[:, None] * math.log2(math.e) - lse)
    return dq, dk, dv, (probability * delta).sum((0, 2)).neg_().to(sinks.dtype)


def _backward_fake(
    grad, q, k, v, out, lse, segments, key_mask, sinks, scale, causal, window, chunk, softcap, need_q,
    need_kv, need_sinks,
):  # fmt: skip
    def in_token_order(x: torch.Tensor, needed: bool) -> torch.Tensor:
        if not needed:
            return x.new_empty(0)
        batch, heads, tokens, dim = x.shape
        return x.new_empty((batch, tokens, heads, dim)).transpose(1, 2)

    dsinks = torch.empty_like(sinks) if need_sinks else q.new_empty(0)
    return in_token_order(q, need_q), in_token_order(k, need_kv), in_token_order(v, need_kv), dsinks


_attention = define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? segments, Tensor? key_mask, Tensor? sinks, float scale, "
    "bool causal, int window, int chunk, float softcap) -> (Tensor, Tensor)",
    kernel=_attention_kernel,
    fake=_attention_fake,
)
_attention_backward = define(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? segments, "
    "Tensor? key_mask, Tensor? sinks, float scale, bool causal, int window, int chunk, float softcap, "
    "bool need_q, bool need_kv, bool need_sinks) -> (Tensor, Tensor, Tensor, Tensor)",
    kernel=_backward_kernel,
    fake=_backward_fake,
)


def _setup_context(ctx, inputs, output):
    q, k, v, segments, key_mask, sinks, *ctx.numbers = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, segments, key_mask, sinks)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _grad_lse):
    nothing = (None,) * 11
    if grad is None:
        return nothing
    need_q, need_k, need_v, _, _, need_sinks, *_ = ctx.needs_input_grad
    dq, dk, dv, dsinks = torch.ops.rewriter.attention_backward(
        grad, *ctx.saved_tensors, *ctx.numbers, need_q, need_k or need_v, need_sinks
    )
    return (
        dq if need_q else None,
        dk if need_k else None,
        dv if need_v else None,
        None,
        None,
        dsinks if need_sinks else None,
        *nothing[6:],
    )


differentiate(_attention, _backward, _setup_context)
