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

Refuses: float64, mixed dtypes, head dimensions above 256, dropout (``attention_refusal`` says why). A mask
that is causal and nothing else belongs to ``causal_attention``, PyTorch's own kernels.
"""

import math

import torch
import torch.nn.functional as F

from .attention_terms import Terms, lse_rows, span_sizes
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
    fused = q.is_cuda and q.dtype != torch.float64
    return (fused_attention if fused else attention_reference)(
        q, k, v, scale=scale, causal=causal, window=window, chunk=chunk, segments=segments,
        key_mask=key_mask, sinks=sinks, softcap=softcap,
    )  # fmt: skip


def fused_attention(
    q, k, v, *, scale, causal, window=0, chunk=0, segments=None, key_mask=None, sinks=None, softcap=0.0
) -> torch.Tensor:  # fmt: skip
    """``attention`` by the kernels, which also run in Triton's interpreter."""
    # Ops of their own, that every layer calls with the same ids: the compiler keeps one call of each.
    spans = torch.ops.rewriter.attention_spans.default
    segment_spans = None if segments is None else spans(segments, False)
    key_spans = None if key_mask is None else spans(key_mask, True)
    terms = (segments, segment_spans, key_mask, key_spans, sinks, scale, causal, window, chunk, softcap)
    return torch.ops.rewriter.attention.default(q, k, v, *terms)[0]


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
    terms = Terms(segments, None, key_mask, None, sinks, scale or 0.0, causal, window, chunk, softcap)
    terms.check(q.shape[2], k.shape[2])
    allowed = terms.dense_mask(q.shape[2], k.shape[2], q.device)
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


def _attention_kernel(q, k, v, *terms):
    reason = attention_refusal(q, k, v)
    if reason is not None:
        raise ValueError(reason)
    terms = Terms(*terms)
    terms.check(q.shape[2], k.shape[2])
    if terms.scale < 0:
        raise ValueError(f"attention: scale {terms.scale} is negative; negate q instead.")
    from .attention_triton import attention_forward

    return attention_forward(q, k, v, terms)


def _attention_fake(q, k, v, *terms):
    batch, heads, queries, _ = q.shape
    out = q.new_empty((batch, queries, heads, v.shape[-1])).transpose(1, 2)
    return out, q.new_empty((batch, heads, lse_rows(queries)), dtype=torch.float32)


def _backward_kernel(grad, q, k, v, out, lse, *more):
    *terms, need_q, need_kv, need_sinks = more
    terms = Terms(*terms)
    from .attention_backward_triton import attention_backward

    dq, dk, dv, delta = attention_backward(grad, q, k, v, out, lse, terms, need_q, need_kv)
    sinks = terms.sinks
    if sinks is None or not need_sinks:
        return dq, dk, dv, q.new_empty(0)
    # The sink's probability draws mass from every row and adds no value: its part of softmax's gradient.
    probability = torch.exp2(sinks.float()[:, None] * math.log2(math.e) - lse)
    return dq, dk, dv, (probability * delta).sum((0, 2)).neg_().to(sinks.dtype)


def _backward_fake(grad, q, k, v, out, lse, *more):
    *terms, need_q, need_kv, need_sinks = more

    def in_token_order(x: torch.Tensor, needed: bool) -> torch.Tensor:
        if not needed:
            return x.new_empty(0)
        batch, heads, tokens, dim = x.shape
        return x.new_empty((batch, tokens, heads, dim)).transpose(1, 2)

    sinks = Terms(*terms).sinks
    dsinks = q.new_empty(0) if sinks is None or not need_sinks else torch.empty_like(sinks)
    return in_token_order(q, need_q), in_token_order(k, need_kv), in_token_order(v, need_kv), dsinks


def _spans_kernel(ids, is_mask):
    from .attention_spans_triton import attention_spans

    return attention_spans(ids, is_mask, *span_sizes(ids.device))


def _spans_fake(ids, is_mask):
    lines = 1 if is_mask else -(-ids.shape[1] // span_sizes(ids.device)[0])
    return ids.new_empty((ids.shape[0], lines, 4), dtype=torch.int32)


define(
    "attention_spans(Tensor ids, bool is_mask) -> Tensor",
    kernel=_spans_kernel,
    fake=_spans_fake,
)
TERMS = (
    "Tensor? segments, Tensor? segment_spans, Tensor? key_mask, Tensor? key_spans, Tensor? sinks, "
    "float scale, bool causal, int window, int chunk, float softcap"
)
_attention = define(
    f"attention(Tensor q, Tensor k, Tensor v, {TERMS}) -> (Tensor, Tensor)",
    kernel=_attention_kernel,
    fake=_attention_fake,
)
_attention_backward = define(
    f"attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {TERMS}, "
    "bool need_q, bool need_kv, bool need_sinks) -> (Tensor, Tensor, Tensor, Tensor)",
    kernel=_backward_kernel,
    fake=_backward_fake,
)


def _setup_context(ctx, inputs, output):
    q, k, v, *terms = inputs
    ids, ctx.numbers = terms[:5], terms[5:]
    ctx.save_for_backward(q, k, v, *output, *ids)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _grad_lse):
    nothing = [None] * (3 + len(Terms._fields))
    if grad is None:
        return tuple(nothing)
    sinks = 3 + Terms._fields.index("sinks")
    needs = ctx.needs_input_grad
    gradients = torch.ops.rewriter.attention_backward(
        grad, *ctx.saved_tensors, *ctx.numbers, needs[0], needs[1] or needs[2], needs[sinks]
    )
    for place, gradient in zip((0, 1, 2, sinks), gradients, strict=True):
        nothing[place] = gradient if needs[place] else None
    return tuple(nothing)


differentiate(_attention, _backward, _setup_context)
