"""PEFT's LoRA linear as a straight line, for Dynamo to trace.

At every call PEFT's ``forward`` looks for adapters that are disabled, merged, mixed in one batch or of
another kind: a dozen Python functions, which Dynamo steps through in each of hundreds of layers. Under Dynamo
a prepared layer runs what is left of it where one plain adapter is on:

    base(x) + B(A(dropout(x in the adapter's dtype))) * scaling

These are PEFT's own operations in its own order; only casts to the dtype that a tensor has are left out. What
the line stands on (which adapter is on, its scale, that its parts are plain linears) is told at tracing and
guarded by the model's seal (``seal.py``), so that a model whose adapters are disabled, merged or switched is
traced anew. The line calls no module: the layer has its parts' parameters at hand, as the dictionaries that
they are, which Dynamo sees change. Parts that are hooked or of another kind are called as modules; where no
plain adapter is on, and outside of Dynamo, the layer runs its class's ``forward``. So does one whose class
reads other names than those known here, as a later PEFT's may.

PEFT is not imported here: where a layer of it is, it is loaded.
"""

import sys
from collections.abc import Iterator, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rewriter.opaque_linear import forget_product, give_product, is_opaque, known_product
from rewriter.seal import sealed, traced_as_a_whole

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
    free = torch.compiler.is_dynamo_compiling() and not (args or kwargs)
    line = _line(id(self)) if free and traced_as_a_whole() else None
    if line is not None:
        product, of_base = line[0], self._of_base
        if product is None:
            base = F.linear(x, of_base["weight"], of_base["bias"])
        else:
            bias = of_base["bias"] if product[1] else None
            base = known_product(x, of_base["weight"], bias, self._quant_state, self._quant_state2, product)
        result = base + _update(self, x, line, True)
        return result if result.dtype == base.dtype else result.to(base.dtype)
    adapter = _the_adapter(self) if free else None
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
    free = torch.compiler.is_dynamo_compiling() and not (args or kwargs)
    line = _line(id(self)) if free and traced_as_a_whole() else None
    if line is not None and line[0] is not None:
        product, of_base, casts = line[0], self._of_base, not torch.is_autocast_enabled()
        bias = of_base["bias"] if product[1] else None
        base = known_product(x, of_base["weight"], bias, self._quant_state, self._quant_state2, product)
        base = base.clone()
        update = _update(self, x, line, casts)
        return base + (update.to(base.dtype) if casts and update.dtype != base.dtype else update)
    adapter = _the_adapter(self) if free else None
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


def _update(self: Any, x: Tensor, line: tuple, casts: bool) -> Tensor:
    _, scale, dtype, dropout = line
    if casts and dtype is not None and x.dtype != dtype:
        x = x.to(dtype)
    if dropout is not None:
        x = self.lora_dropout._modules[dropout](x)
    of_a, of_b = self._of_a, self._of_b
    return F.linear(F.linear(x, of_a["weight"], of_a["bias"]), of_b["weight"], of_b["bias"]) * scale


# A copy by pickle asks its layer for the method of this name: it has its class's again.
forward_4bit.__name__ = "forward"


def _the_adapter(layer: Any) -> str | None:
    """The one adapter that is on; None where there are none or several, or it is not a plain one."""
    if layer._disable_adapters or layer.merged_adapters:
        return None
    names = layer._active_adapter
    if not isinstance(names, str):
        if len(names) != 1:
            return None
        names = names[0]
    return names if names in layer.lora_A._modules and names not in layer.lora_variant else None


def _line(layer: int) -> tuple | None:
    """Of the sealed layer of this ``id`` what its line needs beside tensors; None where it may not stand.

    The layer gets its parts' parameters, in place of five modules that would be read and three that would be
    called.
    """
    found: Any = sealed(layer)
    if found is None:
        return None
    adapter, casts, scale, base, first, second, dropout, *forwards = adapters([found])
    parts = base, first, second, dropout
    if adapter is None or any(map(_is_hooked, parts)) or type(scale) not in (int, float):
        return None
    plain = [type(part) is nn.Linear and own is None for part, own in zip(parts, forwards, strict=False)]
    product = None
    if is_opaque(base) and base._parameters.get("weight") is not None and sealed(id(base)) is not None:
        product = give_product(base, found)
    if not (plain[1] and plain[2] and (plain[0] or product)):
        return None
    for name, part in zip(_PARTS, parts, strict=False):
        vars(found)[name] = part._parameters
    dtype = first.weight.dtype if casts else None
    return product, scale, dtype, None if type(dropout) is nn.Identity else adapter


_PARTS = ("_of_base", "_of_a", "_of_b")
_NO_LINE = (None,) * 9


def adapters(layers: Sequence[Any]) -> list[Any]:
    """Of each layer what decides how its line is traced, other than its tensors' dtypes and sizes."""
    facts: list[Any] = []
    for own in map(vars, layers):
        names, modules = own["_active_adapter"], own["_modules"]
        adapter = names if isinstance(names, str) else names[0] if len(names) == 1 else None
        of_a = modules["lora_A"]._modules
        if own["_disable_adapters"] or own["merged_adapters"] or adapter in own["lora_variant"]:
            adapter = None
        if adapter not in of_a:
            facts += _NO_LINE
            continue
        base, first, second = modules["base_layer"], of_a[adapter], modules["lora_B"]._modules[adapter]
        facts += (
            adapter, own["cast_input_dtype_enabled"], own["scaling"][adapter],
            base, first, second, modules["lora_dropout"]._modules[adapter],
            base.__dict__.get("forward"), first.__dict__.get("forward"), second.__dict__.get("forward"),
        )  # fmt: skip
    return facts


def _is_hooked(part: Any) -> bool:
    return any((part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks))


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
    torch.compiler.assume_constant_result(_line)
    torch.compiler.assume_constant_result(traced_as_a_whole)
    for layer in model.modules():
        ours = _replacement(type(layer))
        if ours is not None and "forward" not in vars(layer):
            vars(layer)["forward"] = MethodType(ours, layer)
            yield layer


def make_as_written(layer: nn.Module) -> None:
    """Undo ``make_straight``; a ``forward`` that somebody put over it stays."""
    if getattr(vars(layer).get("forward"), "__func__", None) in (forward, forward_4bit):
        del vars(layer)["forward"]
    forget_product(layer)
    for name in _PARTS:
        vars(layer).pop(name, None)


def _replacement(kind: Any) -> Any:
    for module, name, ours, names in (
        ("peft.tuners.lora.layer", "Linear", forward, _NAMES),
        ("peft.tuners.lora.bnb", "Linear4bit", forward_4bit, _NAMES_4BIT),
    ):
        known = getattr(sys.modules.get(module), name, None)
        if known is not None and issubclass(kind, known) and kind.forward is known.forward:
            return ours if set(known.forward.__code__.co_names) == names else None
    return None
