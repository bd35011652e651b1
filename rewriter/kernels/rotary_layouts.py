"""The layouts of the rotary embedding, as models write them: which operands fit, and their own operations."""

import torch
from torch import Tensor

LAYOUTS = tuple(
    pairs + size for pairs in ("halves", "interleaved", "pairs_to_halves") for size in ("", "_half_cos")
)


def rotary_reference(q, k, cos, sin, layout, rotary_dim=None, compute_dtype=None):
    """The models' own operations, in plain differentiable PyTorch."""
    check_rotary(q, k, cos, sin, layout, rotary_dim)
    one = rotary_one_reference(q, cos, sin, layout, compute_dtype=compute_dtype)
    return one, None if k is None else rotary_one_reference(k, cos, sin, layout, compute_dtype=compute_dtype)


def rotary_one_reference(x, cos, sin, layout, rotary_dim=None, compute_dtype=None):
    """``rotary_reference`` of one tensor; rounds each product, as the models do."""
    check_rotary(x, None, cos, sin, layout, rotary_dim)
    rotary_dim = turned(cos, layout)
    dtype, rest = x.dtype, x[..., rotary_dim:]
    if rotary_dim != x.shape[-1]:
        x = x[..., :rotary_dim]
    if compute_dtype is not None:
        x = x.to(compute_dtype)
    y = _REFERENCES[layout](x, cos, sin)
    if compute_dtype is not None:
        y = y.to(dtype)
    return y if rest.shape[-1] == 0 else torch.cat([y, rest], dim=-1)


def _halves(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


def _halves_half_cos(x, cos, sin):
    first, second = torch.chunk(x, 2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _interleaved(x, cos, sin):
    first, second = x[..., ::2], x[..., 1::2]
    return x * cos + torch.stack((-second, first), dim=-1).flatten(-2) * sin


def _interleaved_half_cos(x, cos, sin):
    return _interleaved(x, cos.repeat_interleave(2, dim=-1), sin.repeat_interleave(2, dim=-1))


def _pairs_to_halves(x, cos, sin):
    pairs = x.unflatten(-1, (x.shape[-1] // 2, 2))
    return _halves(pairs.transpose(-1, -2).reshape(x.shape), cos, sin)


def _pairs_to_halves_half_cos(x, cos, sin):
    first, second = x[..., ::2], x[..., 1::2]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


_REFERENCES = {
    "halves": _halves,
    "halves_half_cos": _halves_half_cos,
    "interleaved": _interleaved,
    "interleaved_half_cos": _interleaved_half_cos,
    "pairs_to_halves": _pairs_to_halves,
    "pairs_to_halves_half_cos": _pairs_to_halves_half_cos,
}


def check_rotary(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, layout: str, rotary_dim: int | None = None
) -> None:
    """Raise unless the layout is known and the last dimensions agree."""
    if layout not in LAYOUTS:
        raise ValueError(f"rotary: unknown layout {layout!r}; known are {', '.join(LAYOUTS)}.")
    if cos.shape != sin.shape:
        raise ValueError(f"rotary: cos {tuple(cos.shape)} and sin {tuple(sin.shape)} differ in shape.")
    implied = turned(cos, layout)
    if rotary_dim is not None and rotary_dim != implied:
        raise ValueError(
            f"rotary: rotary_dim {rotary_dim}, but cos {tuple(cos.shape)} turns {implied} features by layout "
            f"{layout!r}; leave rotary_dim out, or use the layout of the other size."
        )
    if implied % 2:
        raise ValueError(f"rotary: {implied} features do not make pairs; the number must be even.")
    for name, x in (("q", q), ("k", k)):
        if x is not None and implied > x.shape[-1]:
            raise ValueError(
                f"rotary: cos turns {implied} features, but {name} {tuple(x.shape)} has {x.shape[-1]}; "
                "is it a layout of another size?"
            )


def turned(cos: Tensor, layout: str) -> int:
    """How many leading features turn."""
    return cos.shape[-1] * (2 if layout.endswith("_half_cos") else 1)
