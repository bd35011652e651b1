"""Runs a replacement on fake tensors, to learn the shapes and dtypes that it gives.

Fake tensors have no values: what a function gives for them depends on their metadata alone. Within
``remembering()`` a call that differs from an earlier one in nothing but the identity of its tensors is
therefore answered by copies of the earlier results: 32 equal layers cost one.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.fx.node import map_arg

from rewriter.canonical import value_of
from rewriter.effects import Effects

_Results = dict[Any, Any]
_remembered: ContextVar[_Results | None] = ContextVar("results of fake calls", default=None)

_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device, type(Ellipsis))


@contextmanager
def remembering() -> Iterator[None]:
    """Within it, equal fake calls run once."""
    token = _remembered.set({})
    try:
        yield
    finally:
        _remembered.reset(token)


def fake_call(to: Callable, args: tuple, kwargs: dict[str, Any], like: Node, effects: Effects) -> Any:
    """Run ``to`` on what tracing knows of its arguments, in the modes that ``like`` runs in."""
    values, keywords = map_arg((args, kwargs), value_of)
    signature = _Signature()
    given = signature.of((values, keywords))
    mode = next(t.fake_mode for t in signature.tensors if isinstance(t, FakeTensor))
    results = _remembered.get()
    with mode, effects.entered(like):
        if results is None or not signature.complete:
            return to(*values, **keywords)
        key = (to, given, effects.mode[like], mode)
        if key in results:
            return _copies(results[key])
        result = to(*values, **keywords)
        if _may_be_copied(result, signature):
            results[key] = result
        return result


@dataclass
class _Signature:
    """All that a function can learn of fake arguments, as a key: which tensors are one, or share memory, too.

    ``complete`` is False where an argument is of a kind that this does not know.
    """

    tensors: list[Tensor] = field(default_factory=list)
    memory: dict[int, int] = field(default_factory=dict)
    identity: dict[int, int] = field(default_factory=dict)
    complete: bool = True

    def of(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, (tuple, list)):
            return (type(value), *map(self.of, value))
        if isinstance(value, dict):
            return (dict, *((key, self.of(item)) for key, item in value.items()))
        if isinstance(value, slice):
            return (slice, self.of(value.start), self.of(value.stop), self.of(value.step))
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return (type(value), value.node.expr)
        self.complete &= isinstance(value, _PLAIN)
        # 1, 1.0 and True are equal, and so are 0.0 and -0.0.
        return (type(value), str(value) if isinstance(value, float) else value)

    def _tensor(self, value: Tensor) -> Any:
        self.tensors.append(value)
        if value.layout != torch.strided:
            self.complete = False
            return None
        storage = value.untyped_storage()._cdata
        return (
            self.identity.setdefault(id(value), len(self.identity)),
            self.memory.setdefault(storage, len(self.memory)),
            *_metadata(value),
        )


def _metadata(value: Tensor) -> tuple:
    sizes = (*value.shape, None, *value.stride(), value.storage_offset())
    exact = tuple(s.node.expr if isinstance(s, torch.SymInt) else s for s in sizes)
    flags = value.requires_grad, value.is_leaf, value.is_inference(), value.is_conj(), value.is_neg()
    return (type(value), exact, value.dtype, value.device, flags)


def _may_be_copied(result: Any, signature: _Signature) -> bool:
    """Whether ``result`` is of new tensors alone, whose clones are like them."""
    if isinstance(result, (tuple, list)):
        return all(_may_be_copied(item, signature) for item in result)
    if not isinstance(result, Tensor) or result.layout != torch.strided or free_unbacked_symbols(result):
        return False
    storage = result.untyped_storage()._cdata
    if storage in signature.memory:
        return False  # a view of an argument, or of a result before it
    signature.memory[storage] = len(signature.memory)
    return _metadata(result.clone()) == _metadata(result)


def _copies(result: Any) -> Any:
    return type(result)(map(_copies, result)) if isinstance(result, (tuple, list)) else result.clone()
