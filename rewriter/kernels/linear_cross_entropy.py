"""``cross_entropy(softcap(scale * linear(x)).float(), target)`` without the ``(tokens, vocab)`` logits.

The model's head and its loss are computed in chunks of rows. A chunk's logits go to one buffer, rounded as
the model's own linear rounds them; one kernel turns them into the rows' losses and, in place, into their
gradient (fp32 arithmetic); two matrix products then give the gradients of ``x`` and of the weight, so that
the backward has only to scale them. At 8192 tokens, hidden 4096, vocabulary 128256 in bf16 the model's own
code holds 2.1 GB of logits, as much of their gradient and twice that in fp32 copies, and passes over them
some twelve times; here the buffer is 256 MiB, passed over five times (written, read, read, written, and
read by the product).

Where gradients are rounded. The loss's factor, 1/n of a mean or the divisor, is known in the forward. Its
mantissa goes into the fp32 gradient of the logits before that is rounded, its power of two is left to the
end (``unit``), where multiplying by it is exact: so fp16 gradients do not underflow, and a backward from
the loss itself rounds as eager does. An upstream gradient that is no power of two adds one rounding, in the
dtype of ``x``; keeping the gradient in fp32 instead would double the largest tensor that this op keeps.

Rows without a label cost no product. Their number is on the device, so the host has to wait for it once: a
bubble, taken only when the head's products are far longer (`_SYNC_FROM`), and never while a
CUDA graph is captured; otherwise they are computed with the others and their gradient written as zeros.

Refused: class weights, targets that are probabilities, and reduction "none", for which the gradient's
upstream is not one number. fp64 runs the reference.

The idea of a gradient made in the forward, chunk by chunk, is Liger Kernel's (arXiv:2410.10989); the online
softmax is Milakov and Gimelshein's (arXiv:1805.02867).
"""

import torch
import torch.nn.functional as F

from .linear_cross_entropy_chunks import forward, kept_dtype
from .registration import define, differentiate


def linear_cross_entropy_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    *,
    scale: float = 1.0,
    softcap: float = 0.0,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    divisor: torch.Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    loss_dtype: torch.dtype | None = torch.float32,
) -> torch.Tensor:
    """The model's own operations; arguments as `linear_cross_entropy`. Makes all logits."""
    dtype = compute_dtype or x.dtype
    logits = F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    if scale != 1.0:
        logits = logits * scale
    if softcap != 0.0:
        logits = torch.tanh(logits / softcap) * softcap
    logits = logits.reshape(-1, weight.shape[0]).to(loss_dtype or dtype)
    loss = F.cross_entropy(
        logits,
        target.reshape(-1),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )
    return loss if divisor is None else loss / divisor


def linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    *,
    scale: float = 1.0,
    softcap: float = 0.0,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    divisor: torch.Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    loss_dtype: torch.dtype | None = torch.float32,
) -> torch.Tensor:
    """Loss of the head ``weight`` on ``x``, a 0-d tensor of ``loss_dtype``. Runs on every device.

    Products accumulate in fp32 and are rounded to ``compute_dtype``; softmax, loss and the weight's gradient
    over the chunks are fp32. Saved for the backward: the gradients of those of ``x``, ``weight`` and ``bias``
    that require one (``x``'s in ``compute_dtype``), nothing else. With a trainable weight and more than one
    chunk, an fp32 buffer of the weight's shape is held while the op runs.

    Args:
        x: ``(tokens, hidden)`` or ``(..., hidden)``; fp32, bf16 or fp16 (fp64 runs the reference).
        weight: ``(vocab, hidden)``.
        bias: ``(vocab,)`` or None.
        target: ``(tokens,)`` or ``(...)``, int64, already shifted. A label that is neither in the vocabulary
            nor ``ignore_index`` is undefined.
        scale, softcap: the logits are ``softcap * tanh(scale * linear / softcap)``; no cap where it is 0.
        reduction: "mean" over the rows that have a label (NaN where there is none), or "sum".
        divisor: a number of items, one element, by which the loss is divided; gets no gradient.
        compute_dtype: dtype of the model's linear's output (autocast's, if it is on); ``x``'s by default.
        loss_dtype: dtype of the logits that the model hands to its loss; None if it does not cast them.

    Raises:
        ValueError: shapes that do not fit, another reduction, a smoothing outside [0, 1].
    """
    _check(x, weight, bias, target, label_smoothing, reduction)
    dtype = compute_dtype or x.dtype
    if dtype == torch.float64 or loss_dtype == torch.float64:
        return linear_cross_entropy_reference(
            x,
            weight,
            bias,
            target,
            scale=scale,
            softcap=softcap,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
            divisor=divisor,
            compute_dtype=compute_dtype,
            loss_dtype=loss_dtype,
        )
    training = torch.is_grad_enabled()
    return torch.ops.rewriter.linear_cross_entropy(
        x.reshape(-1, x.shape[-1]),
        weight,
        bias,
        target.reshape(-1),
        divisor,
        scale,
        softcap,
        ignore_index,
        label_smoothing,
        reduction == "mean",
        dtype,
        loss_dtype or dtype,
        training and x.requires_grad,
        training and weight.requires_grad,
        training and bias is not None and bias.requires_grad,
    )[0]


def _check(x, weight, bias, target, label_smoothing: float, reduction: str) -> None:
    if weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"linear_cross_entropy: x {tuple(x.shape)} does not fit weight {tuple(weight.shape)}; "
            "expected (..., hidden) and (vocab, hidden)."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"linear_cross_entropy: bias {tuple(bias.shape)} does not fit weight {tuple(weight.shape)}; "
            "expected (vocab,)."
        )
    if target.is_floating_point():
        raise ValueError(
            f"linear_cross_entropy: target is {target.dtype}; probabilities, not labels, are left unfused."
        )
    if reduction not in ("mean", "sum"):
        raise ValueError(
            f"linear_cross_entropy: reduction {reduction!r} is neither 'mean' nor 'sum'; left unfused."
        )
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"linear_cross_entropy: label_smoothing {label_smoothing} is outside [0, 1].")


def _fake(x, weight, *others):
    *_, compute_dtype, loss_dtype, needs_x, needs_weight, needs_bias = others
    return (
        x.new_empty((), dtype=loss_dtype),
        x.new_empty(x.shape if needs_x else (0,), dtype=compute_dtype),
        x.new_empty(weight.shape if needs_weight else (0,), dtype=kept_dtype(weight)),
        x.new_empty(weight.shape[:1] if needs_bias else (0,), dtype=torch.float32),
        x.new_empty((), dtype=torch.float32),
    )


def _setup_context(ctx, inputs, output):
    _, *gradients, unit = output
    ctx.mark_non_differentiable(*gradients, unit)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*gradients, unit)
    ctx.dtypes = [None if t is None else t.dtype for t in inputs[:3]]
    ctx.needs = inputs[-3:]


def _backward(ctx, grad_loss, *_):
    given = len(ctx.needs_input_grad)
    if grad_loss is None:
        return (None,) * given
    *gradients, unit = ctx.saved_tensors
    # In fp32, rounded once: a 0-d factor would otherwise be rounded to the gradient's dtype first.
    factor = grad_loss.float() * unit
    scaled = [
        (gradient.float() * factor).to(dtype) if needed else None
        for gradient, dtype, needed in zip(gradients, ctx.dtypes, ctx.needs, strict=True)
    ]
    return (*scaled, *(None,) * (given - 3))


_op = define(
    "linear_cross_entropy(Tensor x, Tensor weight, Tensor? bias, Tensor target, Tensor? divisor, "
    "float scale, float softcap, int ignore_index, float label_smoothing, bool mean, "
    "ScalarType compute_dtype, ScalarType loss_dtype, bool needs_x, bool needs_weight, bool needs_bias) "
    "-> (Tensor loss, Tensor dx, Tensor dweight, Tensor dbias, Tensor unit)",
    kernel=forward,
    fake=_fake,
)
differentiate(_op, _backward, _setup_context)
