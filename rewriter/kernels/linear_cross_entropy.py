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
bubble of some 50 µs, taken only when the head's products are far longer (`_SYNC_FROM`), and never while a
CUDA graph is captured; otherwise they are computed with the others and their gradient written as zeros.

Refused: class weights, targets that are probabilities, and reduction "none", for which the gradient's
upstream is not one number. fp64 runs the reference.

The idea of a gradient made in the forward, chunk by chunk, is Liger Kernel's (arXiv:2410.10989); the online
softmax is Milakov and Gimelshein's (arXiv:1805.02867).
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from .registration import define, differentiate

_CUDA_BUFFER = 2**28  # bytes of logits: a bf16 chunk of 1024 rows at 128K tokens fills the multiprocessors
_CPU_BUFFER = 2**27  # bytes of logits: with fewer rows the products read the weight too often
_SYNC_FROM = 2**25  # logits: from here on the products outlast the host's wait for the number of labels


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


def _chunk_loss(
    logits, target, gradient_scale, losses, *, scale, softcap, ignore_index, label_smoothing, gradient
) -> torch.Tensor:
    """What the Triton kernel's `chunk_loss` does, in PyTorch, for rows that all have a label."""
    z = logits.float()  # fp32 logits are worked on in place
    ratio = None
    if scale != 1.0:
        z.mul_(scale)
    if softcap != 0.0:
        z.div_(softcap).tanh_()
        ratio = z.clone() if gradient else None
        z.mul_(softcap)
    z.sub_(z.amax(1, keepdim=True))
    labels = target.unsqueeze(1)
    label_part = z.gather(1, labels).squeeze(1).mul_(1.0 - label_smoothing)
    if label_smoothing != 0.0:
        label_part.add_(z.sum(1), alpha=label_smoothing / z.shape[1])
    exp_sum = z.exp_().sum(1)
    torch.sub(exp_sum.log(), label_part, out=losses)
    if not gradient:
        return logits
    upstream = gradient_scale * scale
    z.mul_((upstream / exp_sum).unsqueeze(1))
    if label_smoothing != 0.0:
        z.sub_(upstream * (label_smoothing / z.shape[1]))
    z.scatter_add_(1, labels, (upstream * (label_smoothing - 1.0)).expand(labels.shape))
    if ratio is not None:
        z.mul_(ratio.square_().neg_().add_(1.0))
    return z if z is logits else logits.copy_(z)


def _labelled_rows(target: torch.Tensor, vocab: int, ignore_index: int) -> torch.Tensor | None:
    """Indices of the rows that have a label, or None to compute all rows."""
    tokens = target.shape[0]
    if target.is_cuda and (tokens * vocab < _SYNC_FROM or torch.cuda.is_current_stream_capturing()):
        return None
    rows = (target != ignore_index).nonzero().squeeze(1)
    return None if rows.shape[0] == tokens else rows


def _chunks(rows: int, vocab: int, dtype: torch.dtype, *, cuda: bool, weight_bytes: int) -> Iterator[slice]:
    """Slices of about equal length whose logits fit the buffer.

    ``weight_bytes`` is 0 for a frozen weight. The gradient of a trainable one is read and written once a
    chunk, in fp32: a buffer of half the weight's size makes that seldom, and is small beside it.
    """
    buffer = max(_CUDA_BUFFER, weight_bytes // 2) if cuda else _CPU_BUFFER
    most = max(1, buffer // (vocab * dtype.itemsize))
    if most >= 128:
        most -= most % 128  # whole tiles of the matrix products
    count = -(-rows // most)
    length = -(-rows // max(1, count))
    if length > 128:
        length = min(most, -(-length // 128) * 128)
    for start in range(0, rows, max(1, length)):
        yield slice(start, min(start + length, rows))


def _add_product(total: torch.Tensor, gradient: torch.Tensor, x: torch.Tensor, *, first: bool) -> None:
    """``total += gradient.T @ x``; the first product replaces what is in ``total``."""
    beta = 0 if first else 1
    if total.dtype == gradient.dtype:
        torch.addmm(total, gradient.t(), x, beta=beta, out=total)
    elif total.is_cuda:
        torch.addmm(total, gradient.t(), x, out_dtype=torch.float32, beta=beta, out=total)
    else:
        torch.addmm(total, gradient.t().float(), x.float(), beta=beta, out=total)


def _forward(
    x,
    weight,
    bias,
    target,
    divisor,
    scale,
    softcap,
    ignore_index,
    label_smoothing,
    mean,
    compute_dtype,
    loss_dtype,
    needs_x,
    needs_weight,
    needs_bias,
):
    if target.shape[0] != x.shape[0]:
        raise ValueError(
            f"linear_cross_entropy: {target.shape[0]} labels for {x.shape[0]} tokens; expected one for each."
        )
    if x.is_cuda:
        from .linear_cross_entropy_triton import chunk_loss
    else:
        chunk_loss = _chunk_loss
    vocab, hidden = weight.shape
    gradient = needs_x or needs_weight or needs_bias
    head, offset = weight.to(compute_dtype), None if bias is None else bias.to(compute_dtype)

    denominator = x.new_ones((), dtype=torch.float32)
    if mean:
        denominator = (target != ignore_index).sum().float()
    if divisor is not None:
        denominator = denominator * divisor.to(x.device).reshape(())
    # Without a label every gradient is zero, whatever the mean's factor.
    factor = 1.0 / denominator.masked_fill(denominator == 0, 1.0)
    # In [1, 2), eager's own size for a sum: a bit less, and small fp16 gradients lose one.
    mantissa = 2.0 * torch.frexp(factor).mantissa
    unit = factor / mantissa

    rows = _labelled_rows(target, vocab, ignore_index)
    labels = (target if rows is None else target.index_select(0, rows)).contiguous()
    count = labels.shape[0]
    weight_bytes = weight.nbytes if needs_weight else 0
    chunks = list(_chunks(count, vocab, compute_dtype, cuda=x.is_cuda, weight_bytes=weight_bytes))

    losses = x.new_empty(count, dtype=torch.float32)
    dx = _gradient_buffer(x, x.shape, compute_dtype, needs_x, zeros=rows is not None)
    # A single product rounds as eager's does; but sums over tokens, not yet divided, can pass fp16's range.
    direct = len(chunks) == 1 and compute_dtype != torch.float16
    total_dtype = compute_dtype if direct else torch.float32
    dw = _gradient_buffer(x, weight.shape, total_dtype, needs_weight, zeros=not chunks)
    db = _gradient_buffer(x, weight.shape[:1], torch.float32, needs_bias, zeros=True)

    longest = max((chunk.stop - chunk.start for chunk in chunks), default=0)
    # Rows that start on 128 bytes, for wide loads and for the matrix products, whatever the vocabulary.
    row_length = -(-vocab // 64) * 64 if x.is_cuda else vocab
    buffer = x.new_empty((longest if offset is None else 0, row_length), dtype=compute_dtype)[:, :vocab]
    for number, chunk in enumerate(chunks):
        part = (x[chunk] if rows is None else x.index_select(0, rows[chunk])).to(compute_dtype)
        if offset is None:
            logits = torch.mm(part, head.t(), out=buffer[: part.shape[0]])
        else:
            # A tensor of its own takes the path of the model's linear: the bias is added before rounding.
            logits = torch.addmm(offset, part, head.t())
        dlogits = chunk_loss(
            logits,
            labels[chunk],
            mantissa,
            losses[chunk],
            scale=scale,
            softcap=softcap,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            gradient=gradient,
        )
        if needs_x and rows is None:
            torch.mm(dlogits, head, out=dx[chunk])
        elif needs_x and rows is not None:
            dx.index_copy_(0, rows[chunk], torch.mm(dlogits, head))
        if needs_weight:
            _add_product(dw, dlogits, part, first=number == 0)
        if needs_bias:
            db += dlogits.sum(0, dtype=torch.float32)
        del logits, dlogits  # before the next chunk's are made

    loss = (losses.sum() / denominator).to(loss_dtype)
    return loss, dx, dw.to(_kept_dtype(weight)), db, unit


def _gradient_buffer(x, shape, dtype: torch.dtype, needed: bool, *, zeros: bool) -> torch.Tensor:
    make = x.new_zeros if zeros else x.new_empty
    return make(shape if needed else (0,), dtype=dtype)


def _kept_dtype(weight: torch.Tensor) -> torch.dtype:
    """Dtype of the weight's gradient before it is divided."""
    return torch.float32 if weight.dtype == torch.float16 else weight.dtype


def _fake(
    x,
    weight,
    bias,
    target,
    divisor,
    scale,
    softcap,
    ignore_index,
    label_smoothing,
    mean,
    compute_dtype,
    loss_dtype,
    needs_x,
    needs_weight,
    needs_bias,
):
    return (
        x.new_empty((), dtype=loss_dtype),
        x.new_empty(x.shape if needs_x else (0,), dtype=compute_dtype),
        x.new_empty(weight.shape if needs_weight else (0,), dtype=_kept_dtype(weight)),
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
    kernel=_forward,
    fake=_fake,
)
differentiate(_op, _backward, _setup_context)
