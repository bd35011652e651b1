"""Random chains of small blocks: what a decoder is made of, and what it is not."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

WIDTH = 8


@dataclass(frozen=True)
class Shared:
    """What all blocks may read: ``angles`` (length, WIDTH), ``mask`` boolean (length, length)."""

    angles: Tensor
    mask: Tensor


def _residual(h: Tensor, w: Tensor, shared: Shared) -> Tensor:
    return h + F.gelu(h @ w) @ w.mT


def _norm(h: Tensor, w: Tensor, shared: Shared) -> Tensor:
    x = h.float()
    return h + w[0] * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)).to(h.dtype)


def _parallel(h: Tensor, w: Tensor, shared: Shared) -> Tensor:
    return h + torch.tanh(h @ w) + torch.sigmoid(h) * w[1]


def _tuple(h: Tensor, w: Tensor, shared: Shared) -> Tensor:
    a, b = (h @ torch.cat((w, w.mT), -1)).chunk(2, dim=-1)
    return h + F.silu(a) * torch.sigmoid(b)


def _maximum(h: Tensor, w: Tensor, shared: Shared) -> Tensor:
    values, _ = (h @ w)[..., 1:].max(-1, keepdim=True)
    return h + values


def _rotated(h: Tensor, w: Tensor, shared: Shared) -> Tensor:
    angles = shared.angles.float()[None] * 0.5
    return h + (h @ w) * torch.cos(angles) + torch.sin(angles) * h


def _attention(h: Tensor, w: Tensor, shared: Shared) -> Tensor:
    rows, length, width = h.shape
    q = (h @ w).view(rows, length, 2, width // 2).transpose(1, 2)
    mask = shared.mask[None, None, :, :length]
    out = F.scaled_dot_product_attention(q, q, q, attn_mask=mask)
    return h + out.transpose(1, 2).reshape(rows, length, width)


def _dropout(h: Tensor, w: Tensor, shared: Shared) -> Tensor:
    return h + F.dropout(h @ w, 0.3, True)


def _written(h: Tensor, w: Tensor, shared: Shared) -> Tensor:
    x = h @ w
    x.mul_(0.5)
    return h + x


def _without_grad(h: Tensor, w: Tensor, shared: Shared) -> Tensor:
    with torch.no_grad():
        scale = h.abs().mean() + 1
    return h + (h @ w) / scale


def _narrow(h: Tensor, w: Tensor, shared: Shared) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = h @ w
    return h + x.to(h.dtype)


def _mixed(h: Tensor, w: Tensor, shared: Shared) -> Tensor:
    return F.layer_norm(h @ w, (WIDTH,))


def _numbers(h: Tensor, w: Tensor, shared: Shared) -> Tensor:
    return h * (1.0 / h.shape[1]) + w[2] / (h.shape[1] + 1)


BLOCKS: dict[str, Callable[[Tensor, Tensor, Shared], Tensor]] = {
    f.__name__.removeprefix("_"): f
    for f in (
        _residual,
        _norm,
        _parallel,
        _tuple,
        _maximum,
        _rotated,
        _attention,
        _dropout,
        _written,
        _without_grad,
        _narrow,
        _mixed,
        _numbers,
    )
}


@dataclass(frozen=True)
class Chain:
    """``before``, then ``repeats`` times ``layer``, then ``after``.

    Attributes:
        skip: every so many layers the stream from before them is added; 0 for never.
        middle: the stream after each layer is a result, too.
        tied: all blocks have one weight.
        frozen: the weights need no gradient.
    """

    before: tuple[str, ...]
    layer: tuple[str, ...]
    repeats: int
    after: tuple[str, ...]
    skip: int = 0
    middle: bool = False
    tied: bool = False
    frozen: bool = False

    def inputs(self, *, rows: int = 2, length: int = 4, seed: int = 0) -> tuple:
        """The stream, the angles, the mask, and the weights."""
        draw = torch.Generator().manual_seed(seed)
        count = len(self.before) + self.repeats * len(self.layer) + len(self.after)
        weights = [
            torch.nn.Parameter(
                torch.randn(WIDTH, WIDTH, generator=draw) / WIDTH**0.5, requires_grad=not self.frozen
            )
            for _ in range(1 if self.tied else count)
        ]
        stream = torch.randn(rows, length, WIDTH, generator=draw, requires_grad=True)
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        return stream, torch.rand(length, WIDTH, generator=draw), mask, weights * (count if self.tied else 1)

    def __call__(self, stream: Tensor, angles: Tensor, mask: Tensor, weights: list[Tensor]):
        shared, remaining = Shared(angles, mask), iter(weights)
        h, hidden = torch.tanh(stream), []
        for name in self.before:
            h = BLOCKS[name](h, next(remaining), shared)
        kept = h
        for index in range(self.repeats):
            for name in self.layer:
                h = BLOCKS[name](h, next(remaining), shared)
            if self.skip and index % self.skip == self.skip - 1:
                h = kept = h + kept
            if self.middle:
                hidden.append(h)
        for name in self.after:
            h = BLOCKS[name](h, next(remaining), shared)
        return (h.square().mean(), *hidden)


def each_layer_writes(h: Tensor, memory: Tensor, weights: list[Tensor]) -> Tensor:
    """Four layers, each of which writes in place into what the next one reads: no chain of regions."""
    memory = memory + 1
    h = torch.tanh(h)
    for w in weights:
        h = h + torch.sin(h @ w) * memory.exp()
        memory.mul_(0.5)
    return h.sum()


def inputs_of_writers() -> tuple:
    """The stream, what is written into, and the weights."""
    weights = [torch.randn(WIDTH, WIDTH, requires_grad=True) for _ in range(4)]
    return torch.randn(3, WIDTH, requires_grad=True), torch.rand(3, WIDTH), weights


_names = st.sampled_from(sorted(BLOCKS))


def chains(
    *, skips: tuple[int, ...] = (0, 0, 1, 2), repeats: tuple[int, int] = (2, 5)
) -> st.SearchStrategy[Chain]:
    """Any of the above."""
    return st.builds(
        Chain,
        before=st.lists(_names, max_size=1).map(tuple),
        layer=st.lists(_names, min_size=1, max_size=3).map(tuple),
        repeats=st.integers(*repeats),
        after=st.lists(_names, max_size=1).map(tuple),
        skip=st.sampled_from(skips),
        middle=st.booleans(),
        tied=st.booleans(),
        frozen=st.booleans(),
    )
