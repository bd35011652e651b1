"""The backward of unmasked attention, one group of query heads that share a key head after the other.

PyTorch's cuDNN and flash backwards need memory beside their results: the gradient of the queries in fp32 and,
where query heads share keys, gradients of keys and values for every query head, together 8 bytes for each
element of the queries in 16 bit. At 200,000 tokens of 32 heads of 128 that is 6.6 GB. Heads do not meet in
attention: group by group, the same kernels give the same gradients, and need that memory once a group.

Costs one more read and write of the gradients, and for each group a moment in which it no longer fills the
device: a tenth of attention's backward at 20,000 tokens, 2% at 32,768, and next to nothing at 50,000. For
long sequences, where memory is short; ``at_once`` has the op for the others. Takes PyTorch's own arguments;
refuses a bias.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .attention_key_blocks import cudnn_backward
from .registration import define


def _grouped(op: torch._ops.OpOverload, of_group: Callable) -> torch._ops.OpOverload:
    """An op of ``op``'s schema that calls ``of_group`` once a group; all (batch, heads, tokens, size)."""

    def kernel(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **settings: Any) -> Any:
        out, logsumexp, *others = rest
        results = _like_operands(grad, query, key, value)
        groups = key.shape[1]
        share = query.shape[1] // groups
        for group in range(groups):
            heads, shared = slice(group * share, (group + 1) * share), slice(group, group + 1)
            given = grad[:, heads], query[:, heads], key[:, shared], value[:, shared], out[:, heads]
            places = [
                result[:, place] for result, place in zip(results, (heads, shared, shared), strict=True)
            ]
            _fill(places, of_group(*given, logsumexp[:, heads], *others, **settings))
        return results

    return _defined(op, "by_groups", kernel)


def _like_operands(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _defined(op: torch._ops.OpOverload, manner: str, kernel: Callable) -> torch._ops.OpOverload:
    """An op of ``op``'s arguments that gives three tensors, in memory as its operands are."""
    name = op._schema.name.removeprefix("aten::").strip("_")
    schema = str(op._schema).partition("(")[2].rpartition("->")
    signature = f"{name}_{manner}({schema[0]}-> (Tensor, Tensor, Tensor)"
    return define(signature, kernel=kernel, fake=_like_operands, launches=False)


def _in_blocks(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **settings: Any) -> Any:
    """cuDNN's, with keys up to whole blocks; gradients that were cut to their keys are made dense."""
    found = cudnn_backward(grad, query, key, value, *rest, **settings)
    return tuple(map(_in_memory_as, found, (query, key, value)))


def _in_memory_as(x: Tensor, like: Tensor) -> Tensor:
    steps = zip(x.shape, x.stride(), torch.empty_like(like, device="meta").stride(), strict=True)
    same = all(size == 1 or own == wanted for size, own, wanted in steps)
    return x if same else torch.empty_like(like).copy_(x)


def _fill(places: Sequence[Tensor], parts: Sequence[Tensor]) -> None:
    """Holds a group's gradients until it returns: the next group's take their memory."""
    for place, part in zip(places, parts, strict=True):
        place.copy_(part)


_cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default
_flash = torch.ops.aten._scaled_dot_product_flash_attention_backward.default
_flash_on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
# PyTorch's op to the one that goes group by group. Their first six arguments are the same.
by_groups = {
    _cudnn: _grouped(_cudnn, cudnn_backward),
    _flash: _grouped(_flash, _flash),
    _flash_on_cpu: _grouped(_flash_on_cpu, _flash_on_cpu),
}
# An op that goes group by group to the one that does not.
at_once = {grouped: op for op, grouped in by_groups.items()}
at_once[by_groups[_cudnn]] = _defined(_cudnn, "in_blocks", _in_blocks)
