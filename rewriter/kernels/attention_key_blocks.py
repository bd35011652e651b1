"""The backward of causal attention with keys up to whole blocks of cuDNN's kernels.

    backward(grad, q, k, v, ...)  ->  backward(grad, q, pad(k), pad(v), ...), cut to the keys that there are

cuDNN reads keys in blocks of 128. Where a sequence ends within one, its backward takes 2 to 5% longer (20,000
and 50,000 tokens, 32 heads of 128, 8 of keys); its forward does not. Zeros behind the last key are behind
every query too, so that the causal mask hides them: gradients of other keys stay as they are, and those of
the zeros are dropped.

Costs a copy of keys and values, whose bytes grow with the tokens, where attention grows with their square.
Refuses what is not causal, or has another number of keys than of queries: with fewer, a zero would be seen.
"""

import torch
from torch import Tensor

_BLOCK = 128
# From about here the copy takes less than it spares.
_LONG = 16384

_aten = torch.ops.aten


def missing_keys(q: Tensor, k: Tensor, causal: bool) -> int:
    """How many keys complete the last block; 0 where there are none to add, or that is not worth it.

    Args:
        q: (batch, heads, tokens, dim); k: (batch, kv_heads, keys, dim).
    """
    keys = k.shape[2]
    return -keys % _BLOCK if are_long(q.shape[2], keys, causal) else 0


def are_long(queries: int, keys: int, causal: bool) -> bool:
    """Whether attention of so many is worth whole blocks, and no query would see what completes them."""
    return causal and keys == queries and keys >= _LONG


def with_keys(x: Tensor, missing: int) -> Tensor:
    """(batch, kv_heads, keys, dim) with so many zeros behind the last key; itself for none.

    In memory by token, as models have their heads, and as the gradient will be.
    """
    if not missing:
        return x
    return _aten.constant_pad_nd(x.transpose(1, 2), [0, 0, 0, 0, 0, missing]).transpose(1, 2)


def cudnn_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    seed: Tensor,
    offset: Tensor,
    bias: Tensor | None,
    starts_q: Tensor | None,
    starts_k: Tensor | None,
    most_q: int,
    most_k: int,
    dropout: float,
    causal: bool,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As PyTorch's own, of its arguments; a forward without the zeros gave ``out`` and ``logsumexp``."""
    # Dropout would draw for other pairs, and a bias has no columns for more keys.
    missing = missing_keys(q, k, causal) if not dropout and bias is None else 0
    dq, dk, dv = _aten._scaled_dot_product_cudnn_attention_backward(
        grad, q, with_keys(k, missing), with_keys(v, missing), out, logsumexp, seed, offset, bias,
        starts_q, starts_k, most_q, most_k + missing, dropout, causal, scale=scale,
    )  # fmt: skip
    return dq, dk[:, :, : k.shape[2]], dv[:, :, : k.shape[2]]
