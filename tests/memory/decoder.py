"""A decoder layer of two projections, attention and a gated MLP, small enough to run by every schedule."""

import functools

import torch
import torch.nn.functional as F

from tests.memory.small_layers import Piece, SmallLayer

HIDDEN, HEADS, HEAD = 16, 4, 8


def randn(*shape, dtype=torch.float32, grad=False, scale=1.0, seed=0):
    """The same numbers for the same arguments."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(dtype).requires_grad_(grad)


def _norm(x, weight):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * weight


def _heads(x, weight):
    return F.linear(x, weight).unflatten(-1, (-1, HEAD)).transpose(1, 2)


def _projections(h, cos, norm, wq, wk, wv):
    x = _norm(h, norm)
    q, k = (_heads(x, w) * cos.unsqueeze(1) for w in (wq, wk))
    return q, k, _heads(x, wv)


def _attention(q, k, v):
    return (F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),)


def _mlp(h, out, wo, norm, gate, up, down):
    h = h + F.linear(out.transpose(1, 2).flatten(2), wo)
    x = _norm(h, norm)
    return (h + F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down),)


@functools.cache
def decoder(
    *,
    rows: int = 1,
    tokens: int = 13,
    dtype: torch.dtype = torch.float32,
    trained: bool = True,
    saving: bool = False,
) -> SmallLayer:
    """Inputs require gradients; weights where they are ``trained``. The norm's weight serves both norms."""
    shapes = {
        "wq": (HEADS * HEAD, HIDDEN),
        "wk": (2 * HEAD, HIDDEN),
        "wv": (2 * HEAD, HIDDEN),
        "wo": (HIDDEN, HEADS * HEAD),
        "norm": (HIDDEN,),
        "gate": (24, HIDDEN),
        "up": (24, HIDDEN),
        "down": (HIDDEN, 24),
    }
    weights = {
        name: randn(*shape, dtype=dtype, grad=trained, scale=0.3, seed=i)
        for i, (name, shape) in enumerate(shapes.items())
    }
    inputs = {
        "h": randn(rows, tokens, HIDDEN, dtype=dtype, grad=True),
        "cos": randn(1, tokens, HEAD, dtype=dtype).expand(rows, -1, -1),
        **weights,
    }
    pieces = (
        Piece(
            _projections,
            ("h", "cos", "norm", "wq", "wk", "wv"),
            ("q", "k", "v"),
            {"h": 1, "cos": 1, "q": 2, "k": 2, "v": 2},
        ),
        Piece(_attention, ("q", "k", "v"), ("out",), {}),
        Piece(
            _mlp,
            ("h", "out", "wo", "norm", "gate", "up", "down"),
            ("result",),
            {"h": 1, "out": 2, "result": 1},
        ),
    )
    return SmallLayer(pieces, inputs, ("result",), frozenset(inputs) - {"h"}, saving)
