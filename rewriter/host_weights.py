"""Frozen weights in host memory: what a step reads little of, or can read over the bus while it computes.

    embedding.weight, 1.05 GB on the device  ->  the same parameter in page-locked host memory

Three kinds can go there. Of the embedding of the tokens a batch reads as many rows as it has tokens
(``kernels/host_embedding.py``). The head is copied to the device for its loss, and let go behind it
(``kernels/host_weight.py``): no backward reads it. Where it is tied to the embedding, one weight serves both.
The packed weights of 4-bit linears are read where they are dequantised, once a forward and once a backward
(``kernels/dequantize.py``): 109 MB a layer of an 8B Llama, 2 ms at 55 GB/s. Under a memory plan they are
copied while the layer before runs (``memory/weights_ahead.py``), and so is the head where there is room
(``memory/head_ahead.py``).

Such a weight is no longer among the parameters of its module, since whoever walks over those expects one
device: ``model.device`` of transformers is the first one's, DDP refuses two, ``model.to(device)`` would bring
it back. It is an attribute, and the module's class one made for it, that still saves it to state dicts, under
its old name, and loads it. The parameter is the same object all along.

Refused: weights that are trained, or shared with a module that stays; a head under an adapter, or in 4 bits;
16-bit weights of layers, which no kernel reads over the bus.
"""

import functools
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewriter.hostable import (
    EMBEDDING,
    HEAD,
    LAYERS,
    checked,
    embedding_of,
    head_of,
    quantised_of,
    refuse_shared,
)
from rewriter.kernels.host_embedding import host_embedding
from rewriter.kernels.host_weight import host_weight
from rewriter.memory.pinned import HostSlab

_NAME = "weight"


@dataclass(frozen=True, eq=False)
class HostedWeight:
    """A weight in host memory, the modules whose it is, two where it is tied, and what brings it back."""

    modules: tuple[nn.Module, ...]
    device: torch.device
    unlocking: Any

    @property
    def nbytes(self) -> int:
        return vars(self.modules[0])[_NAME].nbytes

    def bring_back(self) -> None:
        """The weight is a parameter of its modules again, on the device that it was on."""
        for module in self.modules:
            weight = vars(module).pop(_NAME)
            if not weight.is_meta:
                weight.data = weight.data.to(self.device)
            _register(module, weight)
            module.__class__ = type(module)._own_class  # type: ignore[attr-defined]
        if self.unlocking is not None:
            self.unlocking.detach()


class _Hosted:
    """Mixed into the class of a module whose weight is an attribute, in host memory."""

    _own_class: type[nn.Module]
    _reading: "type[_Hosted]"

    def __setattr__(self: Any, name: str, value: Any) -> None:
        # As where weights are tied again.
        if name == _NAME and _NAME not in self._parameters:
            vars(self)[_NAME] = value
        else:
            super().__setattr__(name, value)

    def _save_to_state_dict(self: Any, *args: Any, **kwargs: Any) -> None:
        with _registered(self):
            super()._save_to_state_dict(*args, **kwargs)  # type: ignore[misc]

    def _load_from_state_dict(self: Any, *args: Any, **kwargs: Any) -> None:
        with _registered(self):
            super()._load_from_state_dict(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self: Any, protocol: Any) -> tuple:
        # The class was made in this process, and has no name that another could import.
        return _blank, (self._own_class, self._reading), dict(vars(self))


class _HostedEmbedding(_Hosted, nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return host_embedding(input, self.weight)


class _HostedHead(_Hosted, nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, host_weight(input, self.weight), self.bias)


@functools.cache
def _hosted_class(own: type[nn.Module], reading: type[_Hosted]) -> type[nn.Module]:
    """A class of the name of ``own``; to a forward of its own, that of ``reading`` is its super's."""
    if not issubclass(reading, nn.Module):
        bases: tuple[type, ...] = (reading, own)
    elif own in reading.__bases__:
        bases = (reading,)
    else:
        bases = (own, reading)
    return type(own.__name__, bases, {"_own_class": own, "_reading": reading, "__module__": own.__module__})


def _blank(own: type[nn.Module], reading: type[_Hosted]) -> nn.Module:
    made = _hosted_class(own, reading)
    return made.__new__(made)


def hosted_weights(
    model: nn.Module, kinds: Iterable[str], layers: Sequence[nn.Module]
) -> Iterator[HostedWeight]:
    """Move what ``kinds`` name to host memory.

    Args:
        kinds: of "embedding", "head" and "layers".
        layers: the 4-bit linears whose forward can read such a weight.

    Raises:
        ValueError: a kind is not known or not there, or its weight cannot leave the device.
    """
    kinds = checked(kinds)
    found: dict[nn.Module, type[_Hosted]] = {}
    if EMBEDDING in kinds:
        found[embedding_of(model)] = _HostedEmbedding
    if HEAD in kinds:
        found[head_of(model)] = _HostedHead
    if LAYERS in kinds:
        found |= dict.fromkeys(quantised_of(layers), _Hosted)
    refuse_shared(model, found)
    torch.compiler.allow_in_graph(host_embedding)
    torch.compiler.allow_in_graph(host_weight)
    weights = dict.fromkeys(module.weight for module in found)
    users = [{m: how for m, how in found.items() if m.weight is weight} for weight in weights]
    return map(_host, users)


def read_head_from_host(model: nn.Module) -> None:
    """Let the head copy its weight to where its input is, wherever the weight is: for tracing alone."""
    torch.compiler.allow_in_graph(host_weight)
    _let_read(head_of(model), _HostedHead)


def _host(users: Mapping[nn.Module, type[_Hosted]]) -> HostedWeight:
    """Move the one weight of modules to host memory, and let each read it as is said."""
    (weight,) = {_let_read(module, reading) for module, reading in users.items()}
    device = weight.device
    return HostedWeight(tuple(users), device, _move(weight))


def _let_read(module: nn.Module, reading: type[_Hosted]) -> nn.Parameter:
    """Make the weight of ``module`` an attribute; gives it."""
    weight = module._parameters.pop(_NAME)
    assert weight is not None
    vars(module)[_NAME] = weight
    module.__class__ = _hosted_class(type(module), reading)
    return weight


def _move(weight: nn.Parameter) -> weakref.finalize | None:
    """To page-locked memory where there is a GPU; what keeps it locked while the weight lives."""
    if not torch.cuda.is_available():
        weight.data = weight.data.cpu()
        return None
    slab = HostSlab(max(weight.nbytes, 1), pin=True, device=weight.device)
    made = slab.bytes[: weight.nbytes].view(weight.dtype).view(weight.shape)
    weight.data = made.copy_(weight.data)
    unlocking = weakref.finalize(weight, _outlived, slab)
    unlocking.atexit = False
    return unlocking


def _outlived(_slab: HostSlab) -> None:
    """The last that knows a slab is gone."""


def _register(module: nn.Module, weight: nn.Parameter) -> None:
    """Make ``weight`` the first parameter, as the modules that can be hosted have it."""
    others = dict(module._parameters)
    module._parameters.clear()
    module._parameters.update({_NAME: weight, **others})


@contextmanager
def _registered(module: nn.Module) -> Iterator[None]:
    """Within it, the weight is a parameter as others are."""
    _register(module, vars(module).pop(_NAME))
    try:
        yield
    finally:
        vars(module)[_NAME] = module._parameters.pop(_NAME)
