"""The head's loss in chunks of rows: how many rows make a chunk, and what is done with each.

A chunk's logits go to one buffer; one kernel turns them into losses and, in place, into their gradient; two
products give the gradients of the head's input and of its weight. ``linear_cross_entropy`` says why, and
where is rounded. Triton's kernel does the middle part on CUDA, ``_chunk_loss`` elsewhere, both in fp32.
"""

from collections.abc import Iterator

import torch

_CUDA_BUFFER = 2**28  # bytes of logits: a bf16 chunk of 1024 rows at 128K tokens fills the multiprocessors
_CPU_BUFFER = 2**27  # bytes of logits: with fewer rows the products read the weight too often
_SYNC_FROM = 2**25  # logits: from here on the products outlast the host's wait for the number of labels


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


def forward(
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
    """The kernel of ``linear_cross_entropy``'s forward; arguments as there, ``mean`` for its reduction.

    Returns:
        the loss; the gradients of ``x``, weight and bias, empty where not needed, each divided by the last:
        ``unit``, the power of two that a backward multiplies them by.

    Raises:
        ValueError: not one label a token.
    """
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
    return loss, dx, dw.to(kept_dtype(weight)), db, unit


def _gradient_buffer(x, shape, dtype: torch.dtype, needed: bool, *, zeros: bool) -> torch.Tensor:
    make = x.new_zeros if zeros else x.new_empty
    return make(shape if needed else (0,), dtype=dtype)


def kept_dtype(weight: torch.Tensor) -> torch.dtype:
    """Dtype of the weight's gradient before it is divided."""
    return torch.float32 if weight.dtype == torch.float16 else weight.dtype
