"""One Triton kernel for a chunk of logits: the loss of each row, and the logits' gradient in their place.

One program holds one row. It reads the row once for the log-sum-exp, kept online in one running maximum and
sum per lane so that no iteration waits for a reduction across the program, then a second time to overwrite it
with its gradient: three passes over the chunk, 6 bytes a bf16 logit. Programs are wide and few (one or two a
multiprocessor), so that the rows in flight stay in the L2 cache and the second read mostly hits it.
"""

# Triton types a kernel as the plain function below its decorator, and `tl.range` as a function: launch
# options, numbers for constexpr parameters and loops look like errors.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl

# Below any logit, yet finite: the difference of two infinities would be NaN.
_LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def _capped(z, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """The logits that cross-entropy sees, and the slope of the cap there (0 without a cap, and unused)."""
    z = z.to(tl.float32) * SCALE
    slope = tl.zeros_like(z)
    if SOFTCAP != 0.0:
        # tanh by one exponential that cannot overflow; its slope without the cancellation of 1 - tanh².
        fading = tl.exp(tl.abs(z) * (-2.0 / SOFTCAP))
        slope = 4.0 * fading / ((1.0 + fading) * (1.0 + fading))
        height = (1.0 - fading) / (1.0 + fading) * SOFTCAP
        # A NaN logit takes neither sign, and comes through `height`.
        z = tl.where(z < 0.0, -height, height)
    return z, slope


@triton.jit
def _row_loss_and_gradient(
    logits,
    target,
    gradient_scale,
    losses,
    row_stride,
    vocab,
    ignore_index,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SMOOTHING: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    label = tl.load(target + row)
    lanes = tl.arange(0, BLOCK)

    if label == ignore_index:
        tl.store(losses + row, 0.0)
        if GRADIENT:
            zero = tl.zeros((BLOCK,), logits.dtype.element_ty)
            for start in range(0, vocab, BLOCK):
                tl.store(logits + start + lanes, zero, mask=start + lanes < vocab)
        return

    label_logit, label_slope = _capped(tl.load(logits + label), SCALE, SOFTCAP)
    largest = tl.full((BLOCK,), _LOWEST, tl.float32)
    exp_sum = tl.zeros((BLOCK,), tl.float32)
    plain_sum = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, vocab, BLOCK, num_stages=STAGES):
        inside = start + lanes < vocab
        z, slope = _capped(tl.load(logits + start + lanes, mask=inside, other=0.0), SCALE, SOFTCAP)
        if SMOOTHING != 0.0:
            plain_sum += z
        z = tl.where(inside, z, _LOWEST)
        # Of the two exponentials of an online softmax one is always exp(0): this computes the other only.
        fading = tl.exp(-tl.abs(z - largest))
        exp_sum = tl.where(z > largest, exp_sum * fading + 1.0, exp_sum + fading)
        largest = tl.maximum(z, largest)
    row_largest = tl.max(largest, 0)
    row_sum = tl.sum(exp_sum * tl.exp(largest - row_largest), 0)

    loss = row_largest - (1.0 - SMOOTHING) * label_logit
    if SMOOTHING != 0.0:
        loss -= SMOOTHING * (tl.sum(plain_sum, 0) / vocab)
    tl.store(losses + row, loss + tl.log(row_sum))

    if GRADIENT:
        # Every lane has read the label's logit before any lane overwrites it.
        tl.debug_barrier()
        upstream = tl.load(gradient_scale) * SCALE
        # Not exp(z - log_sum_exp): the sum's logarithm, added to the maximum, loses the digits that it needs.
        inverse_sum = 1.0 / row_sum
        even = 0.0
        if SMOOTHING != 0.0:
            even = SMOOTHING / vocab
        for start in tl.range(0, vocab, BLOCK, num_stages=STAGES):
            columns = start + lanes
            inside = columns < vocab
            z, slope = _capped(tl.load(logits + columns, mask=inside, other=0.0), SCALE, SOFTCAP)
            gradient = tl.exp(z - row_largest) * inverse_sum - even
            gradient = tl.where(columns == label, gradient - (1.0 - SMOOTHING), gradient)
            if SOFTCAP != 0.0:
                gradient *= slope
            gradient *= upstream
            tl.store(logits + columns, gradient.to(logits.dtype.element_ty), mask=inside)


def chunk_loss(
    logits: torch.Tensor,
    target: torch.Tensor,
    gradient_scale: torch.Tensor,
    losses: torch.Tensor,
    *,
    scale: float,
    softcap: float,
    ignore_index: int,
    label_smoothing: float,
    gradient: bool,
) -> torch.Tensor:
    """Write each row's loss to ``losses``; with ``gradient``, overwrite ``logits`` with theirs. Returns them.

    Args:
        logits: ``(rows, vocab)``, dense in the last dimension, fp32, bf16 or fp16; all arithmetic is fp32.
        target: ``(rows,)`` int64, contiguous.
        gradient_scale: fp32 scalar on the device, multiplied into the gradient before it is rounded.
        losses: ``(rows,)`` fp32, contiguous.
    """
    rows, vocab = logits.shape
    if rows == 0:
        return logits
    block = min(8192, max(128, triton.next_power_of_2(vocab)))
    _row_loss_and_gradient[(rows,)](
        logits,
        target,
        gradient_scale,
        losses,
        logits.stride(0),
        vocab,
        ignore_index,
        SCALE=scale,
        SOFTCAP=softcap,
        SMOOTHING=label_smoothing,
        GRADIENT=gradient,
        BLOCK=block,
        STAGES=3,
        num_warps=max(4, block // 512),
    )
    return logits
