"""PEFT's LoRA linear as a straight line, for Dynamo to trace.

At every call PEFT's ``forward`` looks for adapters that are disabled, merged, mixed in one batch or of
another kind: a dozen Python functions, which Dynamo steps through in each of hundreds of layers. Under Dynamo
a prepared layer runs what is left of it where one plain adapter is on:

    base(x) + B(A(dropout(x in the adapter's dtype))) * scaling

These are PEFT's own operations in its own order; only casts to the dtype that a tensor has are left out. What
is read to know that the line may stand is guarded, by the model's seal (``seal.py``) or like any attribute,
so that a model whose adapters are disabled, merged or switched is traced anew. There, and outside of Dynamo,
the layer runs its class's ``forward``; so does a layer whose class reads other names than those known here,
as a later PEFT's may.

PEFT is not imported here: where a layer of it is, it is loaded.
"""

import sys
from collections.abc import Iterator, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.seal import sealed

_NAMES = frozenset(
    (
        "_check_forward_args",
        "_mixed_batch_forward",
        "pop",
        "keys",
        "VARIANT_KWARG_KEYS",
        "lora_variant",
        "forward",
    )
    + ("disable_adapters", "active_adapters", "merged", "unmerge", "base_layer", "lora_A", "lora_B", "weight")
    + ("lora_dropout", "scaling", "_cast_input_dtype", "dtype", "to")
)
_NAMES_4BIT = _NAMES | {"clone", "torch", "is_autocast_enabled"}


def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """In place of the ``forward`` of ``peft.tuners.lora.Linear``; its arguments and result."""
    adapter = _the_adapter(self) if torch.compiler.is_dynamo_compiling() and not (args or kwargs) else None
    if adapter is None:
        return type(self).forward(self, x, *args, **kwargs)
    base = _base(self.base_layer, x)
    first = self.lora_A._modules[adapter]
    if self.cast_input_dtype_enabled and x.dtype != first.weight.dtype:
        x = x.to(first.weight.dtype)
    update = self.lora_B._modules[adapter](first(self.lora_dropout._modules[adapter](x)))
    result = base + update * self.scaling[adapter]
    return result if result.dtype == base.dtype else result.to(base.dtype)


def forward_4bit(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """In place of the ``forward`` of ``peft.tuners.lora.Linear4bit``, which casts where autocast does not."""
    adapter = _the_adapter(self) if torch.compiler.is_dynamo_compiling() and not (args or kwargs) else None
    if adapter is None:
        return type(self).forward(self, x, *args, **kwargs)
    base = _base(self.base_layer, x).clone()
    casts = not torch.is_autocast_enabled()
    first = self.lora_A._modules[adapter]
    if casts and self.cast_input_dtype_enabled and x.dtype != first.weight.dtype:
        x = x.to(first.weight.dtype)
    update = self.lora_B._modules[adapter](first(self.lora_dropout._modules[adapter](x)))
    update = update * self.scaling[adapter]
    return base + (update.to(base.dtype) if casts and update.dtype != base.dtype else update)


# A copy by pickle asks its layer for the method of this name: it has its class's again.
forward_4bit.__name__ = "forward"


def _the_adapter(layer: Any) -> str | None:
    """The one adapter that is on; None where there are none or several, or it is not a plain one."""
    known = _known_adapter(id(layer))
    if known is not None:
        return known if known in layer.lora_A._modules and known not in layer.lora_variant else None
    if layer._disable_adapters or layer.merged_adapters:
        return None
    names = layer._active_adapter
    if not isinstance(names, str):
        if len(names) != 1:
            return None
        names = names[0]
    return names if names in layer.lora_A._modules and names not in layer.lora_variant else None


def _known_adapter(layer: int) -> str | None:
    """What ``adapters`` says of the sealed layer of this ``id``."""
    found = sealed(layer)
    return None if found is None else adapters([found])[0]


def adapters(layers: Sequence[Any]) -> list[str | None]:
    """Of each layer the one adapter that is on; None where there are none or several."""
    return [
        None
        if own["_disable_adapters"] or own["merged_adapters"]
        else names
        if isinstance(names := own["_active_adapter"], str)
        else names[0]
        if len(names) == 1
        else None
        for own in map(vars, layers)
    ]


def _base(layer: Any, x: Tensor) -> Tensor:
    # Dynamo steps through the whole of ``Module.__call__`` where an instance has a ``forward`` of its own.
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return layer(x)
    return layer.forward(x)


def make_straight(model: nn.Module) -> Iterator[nn.Module]:
    """Give every LoRA linear of ``model`` its ``forward`` above, unless its own was replaced before.

    Returns:
        The layers that it changed.
    """
    torch.compiler.assume_constant_result(_known_adapter)
    for layer in model.modules():
        ours = _replacement(type(layer))
        if ours is not None and "forward" not in vars(layer):
            vars(layer)["forward"] = MethodType(ours, layer)
            yield layer


def make_as_written(layer: nn.Module) -> None:
    """Undo ``make_straight``; a ``forward`` that somebody put over it stays."""
    if getattr(vars(layer).get("forward"), "__func__", None) in (forward, forward_4bit):
        del vars(layer)["forward"]


def _replacement(kind: Any) -> Any:
    for module, name, ours, names in (
        ("peft.tuners.lora.layer", "Linear", forward, _NAMES),
        ("peft.tuners.lora.bnb", "Linear4bit", forward_4bit, _NAMES_4BIT),
    ):
        known = getattr(sys.modules.get(module), name, None)
        if known is not None and issubclass(kind, known) and kind.forward is known.forward:
            return ours if set(known.forward.__code__.co_names) == names else None
    return None
