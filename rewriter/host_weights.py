"""Frozen weights in host memory: what a step reads little of, or can read over the bus while it computes.

    embedding.weight, 1.05 GB on the device  ->  the same parameter in page-locked host memory

Two kinds can go there. Of the embedding of the tokens a batch reads as many rows as it has tokens
(``kernels/host_embedding.py``). The packed weights of 4-bit linears are read where they are dequantised, once
a forward and once a backward (``kernels/dequantize.py``): 109 MB a layer of an 8B Llama, 2 ms at 55 GB/s.
Under a memory plan they are copied while the layer before runs (``memory/weights_ahead.py``).

Such a weight is no longer among the parameters of its module, since whoever walks over those expects one
device: ``model.device`` of transformers is the first one's, DDP refuses two, ``model.to(device)`` would bring
it back. It is an attribute, and the module's class one made for it, that still saves it to state dicts, under
its old name, and loads it. The parameter is the same object all along.

Refused: weights that are trained, or shared with another module; the head, all of which the loss reads when
the most is on the device; 16-bit weights of layers, which no kernel reads over the bus.
"""

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.kernels.host_embedding import host_embedding
from rewriter.memory.pinned import HostSlab
from rewriter.size_text import size_text

EMBEDDING, LAYERS = KINDS = ("embedding", "layers")
_NAME = "weight"
_POSSIBLE = f"What can live in host memory is {' and '.join(KINDS)}."


@dataclass(frozen=True, eq=False)
class HostedWeight:
    """A module whose weight is in host memory, and what brings it back."""

    module: nn.Module
    device: torch.device
    unlocking: Any

    @property
    def nbytes(self) -> int:
        return vars(self.module)[_NAME].nbytes

    def bring_back(self) -> None:
        """The weight is a parameter of its module again, on the device that it was on."""
        module, weight = self.module, vars(self.module).pop(_NAME)
        module.__class__ = type(module)._own_class  # type: ignore[attr-defined]
        if not weight.is_meta:
            weight.data = weight.data.to(self.device)
        _register(module, weight)
        if self.unlocking is not None:
            self.unlocking.detach()


class _Hosted:
    """Mixed into the class of a module whose weight is an attribute, in host memory."""

    _own_class: type[nn.Module]

    def _save_to_state_dict(self: Any, *args: Any, **kwargs: Any) -> None:
        with _registered(self):
            super()._save_to_state_dict(*args, **kwargs)  # type: ignore[misc]

    def _load_from_state_dict(self: Any, *args: Any, **kwargs: Any) -> None:
        with _registered(self):
            super()._load_from_state_dict(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self: Any, protocol: Any) -> tuple:
        # The class was made in this process, and has no name that another could import.
        return _blank, (self._own_class,), dict(vars(self))


class _HostedEmbedding(_Hosted, nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return host_embedding(input, self.weight)


@functools.cache
def _hosted_class(own: type[nn.Module]) -> type[nn.Module]:
    """A class of the name of ``own``; an embedding's own forward, as a scale, finds this as its super's."""
    if not issubclass(own, nn.Embedding):
        bases: tuple[type, ...] = (_Hosted, own)
    elif own is nn.Embedding:
        bases = (_HostedEmbedding,)
    else:
        bases = (own, _HostedEmbedding)
    return type(own.__name__, bases, {"_own_class": own, "__module__": own.__module__})


def _blank(own: type[nn.Module]) -> nn.Module:
    made = _hosted_class(own)
    return made.__new__(made)


def hosted_weights(
    model: nn.Module, kinds: Iterable[str], layers: Sequence[nn.Module]
) -> Iterator[HostedWeight]:
    """Move what ``kinds`` name to host memory.

    Args:
        kinds: of "embedding" and "layers".
        layers: the 4-bit linears whose forward can read such a weight.

    Raises:
        ValueError: a kind is not known or not there, or its weight cannot leave the device.
    """
    kinds = checked(kinds)
    modules = [embedding_of(model)] if EMBEDDING in kinds else []
    if LAYERS in kinds:
        modules += _quantised(model, layers)
    torch.compiler.allow_in_graph(host_embedding)
    return map(_host, modules)


def checked(kinds: Iterable[str]) -> tuple[str, ...]:
    """``kinds``, of which a single one may be given by itself.

    Raises:
        ValueError: for what is no name of one, with those that are.
    """
    if not isinstance(kinds, Iterable):
        raise ValueError(f"host is {kinds!r}; give a name, or several. {_POSSIBLE}")
    kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    for kind in kinds:
        if kind == "head":
            raise ValueError(
                "host is 'head'; the loss reads the head's weight for every chunk of tokens, at one of the "
                f"step's worst moments: it stays on the device. {_POSSIBLE}"
            )
        if kind not in KINDS:
            near = get_close_matches(str(kind), KINDS, 1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ValueError(f"host is {kind!r}{hint} {_POSSIBLE}")
    return kinds


def embedding_of(model: nn.Module) -> nn.Embedding:
    """The embedding of the tokens, if it can live in host memory.

    Raises:
        ValueError: there is not one and only one, or it is trained, or does more than to give rows.
    """
    found = [m for m in _input(model).modules() if isinstance(m, nn.Embedding)]
    if len(found) != 1:
        raise ValueError(
            f"host='embedding': {len(found)} embeddings in {type(model).__name__}; which one reads tokens "
            "is known of a model with get_input_embeddings(), or of one embedding."
        )
    (embedding,) = found
    if embedding.weight.requires_grad:
        raise ValueError(
            "host='embedding': the embedding is trained, its gradient and its update belong on the device; "
            "freeze it, or leave it there."
        )
    if embedding.max_norm is not None:
        raise ValueError(
            f"host='embedding': max_norm={embedding.max_norm} writes to the weight at each step; leave it on "
            "the device."
        )
    _refuse_shared(model, embedding)
    own = type(embedding).forward
    if own is not nn.Embedding.forward and "super" not in own.__code__.co_names:
        raise ValueError(
            f"host='embedding': {type(embedding).__name__}.forward does not call that of torch.nn.Embedding, "
            "and may read its weight in other ways; leave it on the device."
        )
    return embedding


def could_live_in_host_memory(sizes: Mapping[str, int], least: Callable[[int], int]) -> str:
    """What to add to an error for want of memory, of bytes by kind; "" for none.

    Args:
        least: the least memory_budget that would do with so many bytes less on the device.
    """
    names = {EMBEDDING: "the frozen embedding's", LAYERS: "the frozen layers'"}
    parts = [f"{names[kind]} {size_text(size)}" for kind, size in sizes.items()]
    if not parts:
        return ""
    kinds = repr(tuple(sizes)) if len(sizes) > 1 else repr(next(iter(sizes)))
    return (
        f" Of the weights, {' and '.join(parts)} can live in host memory: after "
        f"prepare(model, host={kinds}), memory_budget={least(sum(sizes.values()))} would do."
    )


def _input(model: nn.Module) -> nn.Module:
    given = getattr(model, "get_input_embeddings", None)
    return model if given is None else given()


def _quantised(model: nn.Module, layers: Sequence[nn.Module]) -> list[nn.Module]:
    found = [m for m in layers if getattr(m.weight, "quant_state", None) is not None]
    if not found:
        raise ValueError(
            "host='layers': no frozen 4-bit linear of bitsandbytes is there; 16-bit weights, which no kernel "
            "reads over the bus, stay on the device. Load the model in 4 bits, on its device."
        )
    for module in found:
        _refuse_shared(model, module)
    return found


def _refuse_shared(model: nn.Module, module: nn.Module) -> None:
    users = [m for m in model.modules() if any(p is module.weight for p in m._parameters.values())]
    other = next((name for name, m in model.named_modules() if m in users and m is not module), None)
    if other is not None:
        raise ValueError(
            f"host: the weight of {type(module).__name__} is that of {other} too, which needs it on the "
            "device: nothing would be freed; leave it there, or untie them."
        )


def _host(module: nn.Module) -> HostedWeight:
    weight, own = module._parameters.pop(_NAME), type(module)
    assert weight is not None
    device = weight.device
    unlocking = _move(weight)
    vars(module)[_NAME] = weight
    module.__class__ = _hosted_class(own)
    return HostedWeight(module, device, unlocking)


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
