"""Leaves layers out of a model that only repeat others, and says which stand for them.

    80 layers   ->   3 layers, the second of which runs 78 times

Layers are equal where their modules, plain attributes and parameters are: no model is known by name. Layers
that take turns, as a full attention after five windows, are left out by whole periods. What has to be right
of the model as a whole, as the bytes of its weights, is to be counted before.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rewriter.regions.program import Program, RegionCall

# The first, whose input may need no gradient; one that stands for others; the last.
_KEPT_PERIODS = 3


class Uneven(Exception):
    """The layers that were to stand for others did not become the same regions."""


@dataclass(frozen=True)
class Repetition:
    """Layers left out of the list of modules at ``path``: those in ``window`` run ``times`` more times."""

    path: str
    window: range
    times: int


def longest_list(model: nn.Module) -> str | None:
    """Path of the list of modules that holds the most parameters; None where there is no list."""
    lists = {path: m for path, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    return max(lists, key=lambda p: sum(x.numel() for x in lists[p].parameters()), default=None)


def shorten(model: nn.Module, path: str) -> Repetition | None:
    """Leave out of the list at ``path`` what repeats; None where nothing does, or too seldom."""
    parent, _, name = path.rpartition(".")
    layers = layers_of(model, path)
    kinds, count = _kinds(layers), len(layers)
    for period in range(1, count // (_KEPT_PERIODS + 1) + 1):
        different = [i for i in range(count - period) if kinds[i] != kinds[i + period]]
        start = different[-1] + 1 if different else 0
        kept = start + _KEPT_PERIODS * period + (count - start) % period
        if kept < count:
            setattr(model.get_submodule(parent), name, nn.ModuleList(layers[:kept]))
            window = range(start + period, start + 2 * period)
            return Repetition(path, window, (count - kept) // period)
    return None


def layers_of(model: nn.Module, path: str) -> list[nn.Module]:
    """The modules of the list that ends in ``path``, wherever the model has been put since."""
    full = next(p for p, m in model.named_modules() if isinstance(m, nn.ModuleList) and p.endswith(path))
    return list(model.get_submodule(full).children())


def _kinds(layers: Sequence[nn.Module]) -> list[tuple]:
    """Of each layer all that may tell it from others, but the values of its tensors and its own place."""
    plain = [
        {(path, name): v for path, m in layer.named_modules() for name, v in vars(m).items() if _is_plain(v)}
        for layer in layers
    ]
    places = {key for key in plain[0] if all(kept.get(key) == i for i, kept in enumerate(plain))}
    return [
        (
            [(path, type(m)) for path, m in layer.named_modules()],
            [(path, x.shape, x.dtype, x.requires_grad) for path, x in layer.named_parameters()],
            [(path, x.shape, x.dtype) for path, x in layer.named_buffers()],
            {key: (type(v), v) for key, v in kept.items() if key not in places},
        )
        for layer, kept in zip(layers, plain, strict=True)
    ]


def _is_plain(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str, torch.dtype, type(None)))


def calls_of_all(program: Program, left_out: Repetition | None) -> list[RegionCall]:
    """The calls of the whole model, of a program of a shortened one.

    Raises:
        Uneven: what stands for others is not called as its neighbours are.
    """
    calls = list(program.calls)
    if left_out is None:
        return calls
    place = _layers_of(calls, left_out.path)
    window = left_out.window
    chosen = [call for call, layer in zip(calls, place, strict=True) if layer in window]
    end = max((i + 1 for i, layer in enumerate(place) if layer in window), default=0)
    following = calls[end : end + len(chosen)]
    if not chosen or [call.region for call in chosen] != [call.region for call in following]:
        raise Uneven
    return calls[:end] + chosen * left_out.times + calls[end:]


def _layers_of(calls: Sequence[RegionCall], path: str) -> list[int]:
    """Of each call the first layer whose weights it reads; of one that reads none, the layer before."""
    # As Dynamo names what it reads of a model.
    step = "(?:_dict)?_modules_"
    pattern = re.compile(step.join(map(re.escape, path.split("."))) + step + r"(\d+)_")
    places, last = [], -1
    for call in calls:
        names = [n.name for n in call.inputs if n.op == "placeholder"]
        own = [int(found[1]) for name in names if (found := pattern.search(name))]
        last = max(last, min(own, default=-1))
        places.append(last)
    return places
