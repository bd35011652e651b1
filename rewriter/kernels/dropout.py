"""Dropout by position: an element's fate is decided by a seed and by where it stands, and by nothing else.

    F.dropout(x, p)  ->  dropped(x, token_numbers, seed, p)

A generator gives numbers in the order in which they are drawn, so that a layer that runs in tiles, or in
stages that are graphs of their own, draws others than one that runs whole. Here the numbers are Philox's
(Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011) of the sequence, the token and the
channel: a tile that is given its tokens' numbers drops what the whole drops, and so do a recomputation and a
graph for more tokens. The generator is asked once, for the seeds (``dropout_seeds``).

Bytes moved per element of a bf16 result: 4, forward and backward. Nothing of ``x`` and no mask is saved: the
backward drops the same elements of the gradient, by the seed and the tokens' numbers.

Scaled by ``1 / (1 - p)`` and rounded once, as eager does on a GPU. The Triton kernel, on a GPU for bf16, fp16
and fp32, and plain PyTorch, for everything else, drop the same elements.

Refused: what is not (batch, tokens, channels), and a probability outside of 0 to 1, 1 included.
"""

import torch
from torch import Tensor

from .registration import define, differentiate
from .rows import DTYPES, dense_rows

_LOW = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def dropout_seeds(count: int, device: torch.device) -> Tensor:
    """Seeds for ``count`` dropouts, drawn from the default generator of ``device`` at once.

    Returns:
        (count, 2), int64: a row is a seed. Two numbers, so that each seed begins on 16 bytes.
    """
    return torch.ops.rewriter.dropout_seeds(count, device=device)


def dropped(x: Tensor, tokens: Tensor, seed: Tensor, p: float) -> Tensor:
    """``x`` with each element 0 with probability ``p``, and the others times ``1 / (1 - p)``.

    Args:
        x: (batch, tokens, channels), floating, any strides. Infinity times 0 is not a number, as in eager.
        tokens: (tokens,), int64: the number of each token in its sequence, below 2**32.
        seed: (2,), int64, a row of ``dropout_seeds``.
        p: from 0 to below 1, exact to 2**-32.

    Returns:
        As ``x``, in its memory order, dense. Saved for the backward: ``tokens`` and ``seed``.

    Raises:
        ValueError: operands of other shapes; ``p`` out of range.
    """
    check_dropout(x, tokens, seed, p)
    return torch.ops.rewriter.dropped(x, tokens, seed, p)


def check_dropout(x: Tensor, tokens: Tensor, seed: Tensor, p: float) -> None:
    """Raise unless these can be given to ``dropped``."""
    if x.dim() != 3 or not x.is_floating_point():
        raise ValueError(
            f"dropped: x is {x.dtype} of {tuple(x.shape)}; it takes floats of (batch, tokens, channels)."
        )
    if tokens.shape != x.shape[1:2] or seed.shape != (2,):
        raise ValueError(
            f"dropped: token numbers of {tuple(tokens.shape)} and a seed of {tuple(seed.shape)} for x of "
            f"{tuple(x.shape)}; give one number a token of its sequence, and a row of dropout_seeds."
        )
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropped: the probability is {p}; it is from 0 to below 1.")


def dropped_reference(x: Tensor, tokens: Tensor, seed: Tensor, p: float) -> Tensor:
    """The same in plain differentiable PyTorch."""
    kept = torch.stack(_random(x, tokens, seed), -1).flatten(-2)[..., : x.shape[-1]] >= threshold(p)
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * (kept.to(wide.dtype) * scale(p, wide.dtype))).to(x.dtype)


def threshold(p: float) -> int:
    """What 32 random bits, as a number, must reach to keep an element."""
    return min(round(p * 2**32), _LOW)


def scale(p: float, dtype: torch.dtype = torch.float32) -> float:
    """What a kept element is multiplied by, a number of ``dtype``."""
    return torch.tensor(1.0 / (1.0 - p), dtype=dtype).item()


def _random(x: Tensor, tokens: Tensor, seed: Tensor) -> tuple[Tensor, ...]:
    """Philox-4x32-10: four tensors of 32 random bits in int64, for channels 0 to 3 of every four.

    The seed's first number is the key; what is counted is every four channels, tokens, sequences, and the
    seed's second number.
    """
    batch, _, channels = x.shape
    fours = torch.arange((channels + 3) // 4, device=x.device)
    sequences = torch.arange(batch, device=x.device).view(-1, 1, 1)
    counters = torch.broadcast_tensors(fours, tokens.view(-1, 1) & _LOW, sequences, seed[1] & _LOW)
    key, key_high = seed[0] & _LOW, (seed[0] >> 32) & _LOW
    a, b, c, d = counters
    for _ in range(_ROUNDS):
        # The product of two numbers of 32 bits wraps around in int64, and its bits are right.
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b = ((second >> 32) & _LOW) ^ b ^ key, second & _LOW
        c, d = ((first >> 32) & _LOW) ^ d ^ key_high, first & _LOW
        key, key_high = (key + _KEY_STEPS[0]) & _LOW, (key_high + _KEY_STEPS[1]) & _LOW
    return a, b, c, d


def _seeds(count: int, *, device: torch.device) -> Tensor:
    return _seeds_fake(count, device=device).random_()


def _seeds_fake(count: int, *, device: torch.device) -> Tensor:
    return torch.empty((count, 2), dtype=torch.int64, device=device)


def _kernel(x: Tensor, tokens: Tensor, seed: Tensor, p: float) -> Tensor:
    if not x.is_cuda or x.dtype not in DTYPES:
        return _fake(x, tokens, seed, p).copy_(dropped_reference(x, tokens, seed, p))
    from .dropout_triton import launch

    out = _fake(x, tokens, seed, p)
    launch(x, tokens, seed, out, threshold(p), scale(p))
    return out


def _fake(x: Tensor, tokens: Tensor, seed: Tensor, p: float) -> Tensor:
    return dense_rows(x, x.dtype)


define(
    "dropout_seeds(int count, *, Device device) -> Tensor",
    kernel=_seeds,
    fake=_seeds_fake,
    # Never computed again; nor taken for another draw that looks alike, by ``draws_apart.py``.
    tags=(torch.Tag.needs_exact_strides, torch.Tag.nondeterministic_seeded),
    launches=False,
)
_dropped = define(
    "dropped(Tensor x, Tensor tokens, Tensor seed, float p) -> Tensor", kernel=_kernel, fake=_fake
)


def _setup_context(ctx, inputs, output):
    _, tokens, seed, ctx.p = inputs
    ctx.save_for_backward(tokens, seed)


def _gradient(ctx, grad):
    return _dropped(grad, *ctx.saved_tensors, ctx.p), None, None, None


differentiate(_dropped, _gradient, _setup_context)
