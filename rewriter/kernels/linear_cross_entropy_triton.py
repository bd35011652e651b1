"""One Triton kernel for a chunk of logits: the loss of each row, and the logits' gradient in their place.

One program holds one row. It reads the row once for the log-sum-exp, then a second time, backwards, to
overwrite it with its gradient. What was read last is still in the L2 cache and is read first, and what comes
no more is marked to go first, so that memory mostly sees one read and one write: 4 bytes a bf16 logit.

At that rate arithmetic is the next limit, and each operation is counted. Exponentials are powers of two: one
fused multiply-add and the hardware's own instruction, where `exp` adds three for subnormal results (flushed
to zero here, where a probability is below 1e-38). The maximum that powers are taken relative to is kept for
all of a thread's logits together, so that the running sum is rescaled once per tile and no thread waits for
another before the row's end. Whole tiles are not masked, and the label's column is written by itself, last.

The reference of the powers stays in units of log2 to the end: multiplied by log2(e) in the same fused
operation as every logit, it cancels, where a product of its own would lose the digits of a large logit.
"""

# Triton types a kernel as the plain function below its decorator, and `tl.range` as a function: launch
# options, numbers for constexpr parameters and loops look like errors.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportAssignmentType=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl

# Far below any sum of logits, yet finite: the difference of two infinities would be NaN.
_LOWEST = tl.constexpr(-1.0e38)
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


class Tile(NamedTuple):
    """How a program takes its row: in each iteration, two vectors of `width` neighbouring logits a thread."""

    warps: int
    width: int


def tile_of(vocab: int, itemsize: int, aligned: bool) -> Tile:
    """The tile of a row: 16 bytes a load where rows start on as many, four to eight iterations, or more.

    The rows in flight have to stay in the L2 cache: the longer a row, the more of a multiprocessor's threads
    its program takes. Programs that fill an H200 hold 68 MB, half of it on average between the two passes.
    """
    warps = min(32, max(4, triton.next_power_of_2(triton.cdiv(vocab, 2048))))
    return Tile(warps, 16 // itemsize if aligned else 1)


@triton.jit
def _capped(z, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """The logits that cross-entropy sees, and the slope of the cap there (0 without a cap, and unused)."""
    z = z.to(tl.float32) * SCALE
    slope = tl.zeros_like(z)
    if SOFTCAP != 0.0:
        # tanh by one power that cannot overflow; its slope without the cancellation of 1 - tanh².
        fading = tl.exp2(tl.abs(z) * (-2.0 * _LOG2_E / SOFTCAP))
        inverse = 1.0 / (1.0 + fading)
        slope = 4.0 * fading * inverse * inverse
        height = (1.0 - fading) * inverse * SOFTCAP
        # A NaN logit takes neither sign, and comes through `height`.
        z = tl.where(z < 0.0, -height, height)
    return z, slope


@triton.jit
def _power(z, reference):
    """``e^z / 2^reference``"""
    return tl.exp2(tl.fma(z, _LOG2_E, -reference))


@triton.jit
def _absorb(a, b, reference, power_sum):
    """Two vectors of logits a thread, added to its sum of powers relative to its running maximum."""
    higher = tl.maximum(tl.max(tl.maximum(a, b), 1) * _LOG2_E, reference)
    powers = _power(a, higher[:, None]) + _power(b, higher[:, None])
    return higher, power_sum * tl.exp2(reference - higher) + tl.sum(powers, 1)


@triton.jit
def _gradient(
    raw, reference, factor, even, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr
):
    """Gradient of logits that are not the label's, in their dtype."""
    z, slope = _capped(raw, SCALE, SOFTCAP)
    gradient = _power(z, reference) * factor
    if SMOOTHING != 0.0:
        gradient -= even
    if SOFTCAP != 0.0:
        gradient *= slope
    return gradient.to(raw.dtype)


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
    THREADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    label = tl.load(target + row)
    HALF: tl.constexpr = THREADS * WIDTH
    lanes = tl.arange(0, THREADS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    whole = vocab // (2 * HALF) * (2 * HALF)

    if label == ignore_index:
        tl.store(losses + row, 0.0)
        if GRADIENT:
            zero = tl.zeros((THREADS, WIDTH), logits.dtype.element_ty)
            for start in range(0, vocab, HALF):
                tl.store(logits + start + lanes, zero, mask=start + lanes < vocab)
        return

    KEPT: tl.constexpr = "" if GRADIENT else "evict_first"
    # A label that no column has: NaN, where eager asserts; nothing beside the row is read or written.
    known = (label >= 0) & (label < vocab)
    raw_label = tl.load(logits + label, mask=known, other=float("nan"))
    reference = tl.full((THREADS,), _LOWEST, tl.float32)
    power_sum = tl.zeros((THREADS,), tl.float32)
    plain_sum = tl.zeros((THREADS,), tl.float32)
    for start in range(whole, vocab, HALF):
        inside = start + lanes < vocab
        raw = tl.load(logits + start + lanes, mask=inside, other=0.0, eviction_policy=KEPT)
        z, slope = _capped(raw, SCALE, SOFTCAP)
        if SMOOTHING != 0.0:
            plain_sum += tl.sum(tl.where(inside, z, 0.0), 1)
        z = tl.where(inside, z, float("-inf"))
        reference, power_sum = _absorb(z, float("-inf"), reference, power_sum)
    for start in range(0, whole, 2 * HALF):
        raw_a = tl.load(logits + start + lanes, eviction_policy=KEPT)
        raw_b = tl.load(logits + start + HALF + lanes, eviction_policy=KEPT)
        a, slope = _capped(raw_a, SCALE, SOFTCAP)
        b, slope = _capped(raw_b, SCALE, SOFTCAP)
        if SMOOTHING != 0.0:
            plain_sum += tl.sum(a + b, 1)
        reference, power_sum = _absorb(a, b, reference, power_sum)
    row_reference = tl.max(reference, 0)
    row_sum = tl.sum(power_sum * tl.exp2(reference - row_reference), 0)

    label_z, label_slope = _capped(raw_label, SCALE, SOFTCAP)
    bits = tl.log2(row_sum) + (1.0 - SMOOTHING) * tl.fma(label_z, -_LOG2_E, row_reference)
    if SMOOTHING != 0.0:
        bits += SMOOTHING * tl.fma(tl.sum(plain_sum, 0) / vocab, -_LOG2_E, row_reference)
    tl.store(losses + row, bits * _LN_2)

    if GRADIENT:
        # Every thread has read the label's logit before any overwrites it.
        tl.debug_barrier()
        upstream = tl.where(known, tl.load(gradient_scale) * SCALE, float("nan"))
        # Not one power relative to the log-sum-exp: that sum, rounded, loses the digits that it needs.
        factor = upstream / row_sum
        even = upstream * (SMOOTHING / vocab)
        for back in range(0, whole, 2 * HALF):
            columns = whole - 2 * HALF - back + lanes
            # Both loads before a store, past which the compiler moves none.
            raw_a = tl.load(logits + columns, eviction_policy="evict_first")
            raw_b = tl.load(logits + columns + HALF, eviction_policy="evict_first")
            a = _gradient(raw_a, row_reference, factor, even, SCALE, SOFTCAP, SMOOTHING)
            b = _gradient(raw_b, row_reference, factor, even, SCALE, SOFTCAP, SMOOTHING)
            tl.store(logits + columns, a, eviction_policy="evict_first")
            tl.store(logits + columns + HALF, b, eviction_policy="evict_first")
        for start in range(whole, vocab, HALF):
            inside = start + lanes < vocab
            raw = tl.load(logits + start + lanes, mask=inside, other=0.0, eviction_policy="evict_first")
            gradient = _gradient(raw, row_reference, factor, even, SCALE, SOFTCAP, SMOOTHING)
            tl.store(logits + start + lanes, gradient, mask=inside, eviction_policy="evict_first")
        # The label's own is the last write to its place.
        tl.debug_barrier()
        gradient = (_power(label_z, row_reference) / row_sum - (1.0 - SMOOTHING)) * upstream - even
        if SOFTCAP != 0.0:
            gradient *= label_slope
        tl.store(logits + label, gradient.to(logits.dtype.element_ty), mask=known)


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
        target: ``(rows,)`` int64, contiguous. Of a label that is neither a column nor ``ignore_index`` the
            loss and the row's gradient are NaN.
        gradient_scale: fp32 scalar on the device, multiplied into the gradient before it is rounded.
        losses: ``(rows,)`` fp32, contiguous.
    """
    rows, vocab = logits.shape
    if rows == 0:
        return logits
    aligned = logits.stride(0) * logits.itemsize % 16 == 0 and logits.data_ptr() % 16 == 0
    tile = tile_of(vocab, logits.itemsize, aligned)
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
        THREADS=32 * tile.warps,
        WIDTH=tile.width,
        num_warps=tile.warps,
    )
    return logits
