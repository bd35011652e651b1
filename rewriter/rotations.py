"""The ways in which models write a rotation of features: which make a pair, and in what precision.

``FORMS`` are pairs of a turn, a function of ``x``, ``cos`` and ``sin``, and a precision, which applies it. A
turn's name is its layout in ``rewriter.kernels.rotary``, with a suffix where a layout is written in two ways.
"""

import itertools
from collections.abc import Callable

import torch


def _sliced_halves(x):
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


def _chunked_halves(x):
    halves = x.chunk(2, -1)
    return halves[0], halves[1]


def _pairs(x):
    return x[..., ::2], x[..., 1::2]


def _turned(first, second, cos, sin):
    return first * cos - second * sin, second * cos + first * sin


def halves(x, cos, sin):
    first, second = _sliced_halves(x)
    return x * cos + torch.cat((-second, first), -1) * sin


def halves_half_cos(x, cos, sin):
    return torch.cat(_turned(*_chunked_halves(x), cos, sin), -1)


def halves_half_cos_sliced(x, cos, sin):
    return torch.cat(_turned(*_sliced_halves(x), cos, sin), -1)


def interleaved(x, cos, sin):
    first, second = _pairs(x)
    return x * cos + torch.stack((-second, first), -1).flatten(-2) * sin


def interleaved_half_cos(x, cos, sin):
    return torch.stack(_turned(*_pairs(x), cos, sin), -1).flatten(-2)


def halves_cast_late(x, cos, sin):
    first, second = _sliced_halves(x)
    return x.to(torch.float32) * cos + torch.cat((-second, first), -1).to(torch.float32) * sin


def interleaved_cast_late(x, cos, sin):
    first, second = _pairs(x)
    rotated = torch.stack((-second, first), -1).flatten(-2)
    return x.to(torch.float32) * cos + rotated.to(torch.float32) * sin


def pairs_to_halves(x, cos, sin):
    batch, heads, tokens, head = x.shape[0], x.shape[1], x.shape[2], x.shape[3]
    pairs = x.view(batch, heads, tokens, head // 2, 2)
    return halves(pairs.transpose(4, 3).reshape(batch, heads, tokens, head), cos, sin)


def pairs_to_halves_half_cos(x, cos, sin):
    return torch.cat(_turned(*_pairs(x), cos, sin), -1)


def as_it_is(turn: Callable, x, cos, sin):
    return turn(x, cos, sin)


def rounded(turn: Callable, x, cos, sin):
    return turn(x, cos, sin).to(x.dtype)


def in_fp32(turn: Callable, x, cos, sin):
    return turn(x.to(torch.float32), cos, sin).to(x.dtype)


# Casts vanish where they change nothing, so the more particular form comes first; so does a turn that
# contains another.
_PRECISIONS = (in_fp32, rounded, as_it_is)
_TURNS = (
    pairs_to_halves, pairs_to_halves_half_cos, halves, halves_half_cos, halves_half_cos_sliced, interleaved,
    interleaved_half_cos,
)  # fmt: skip
FORMS = (
    *itertools.product(_TURNS, _PRECISIONS), (halves_cast_late, rounded), (interleaved_cast_late, rounded),
)  # fmt: skip
