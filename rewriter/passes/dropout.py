"""Dropout of activations to dropout by position, whose numbers do not depend on how a layer is run.

    F.dropout(x, p)  ->  dropped(x, token_numbers, seed, p)

A graph's seeds are drawn together, where it begins: Inductor may order draws within a graph as it likes, and
a layer's graph with none in it is a function of what it is given, whether it is run whole, in tiles, again
or by another order of its stages. The body of a checkpoint is a graph of its own, and draws its own. Pays in
memory, too: no mask is saved.

PyTorch's own dropout drops other elements under the same seed, as it does in any other graph of Inductor's.
The LoRA pass, which comes later, takes the result for what an adapter reads, as that of any dropout.

Refuses: what is not (batch, tokens, channels), as attention's weights by head are not; dropout in place; fp8.
Dropout that drops nothing is left, without a word.
"""

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import SymInt, Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from rewriter.canonical import canonical, fixed, value_of
from rewriter.effects import Effects
from rewriter.fusion import Applied, Pass
from rewriter.kernels.dropout import dropout_seeds, dropped
from rewriter.match import Match, Miss
from rewriter.pattern import require, rewrite, source_line
from rewriter.replace import find, insert, put_call
from rewriter.rowwise.sizes import same

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def is_activation(match: Match) -> None:
    """Floats of (batch, tokens, channels), and a probability that drops some of them."""
    x, p = match.value("x"), match["p"]
    require(isinstance(p, (int, float)), f"the probability {p} is no constant")
    require(0.0 < p < 1.0, f"a probability of {p} draws nothing")
    require(isinstance(x, Tensor) and x.dim() == 3, "what it drops is not (batch, tokens, channels)")
    require(x.dtype in _DTYPES, f"an input of {x.dtype}; the kernel takes floats of 16, 32 and 64 bits")


# Tokens and seed are put in by the pass, which has them drawn where the graph begins.
@rewrite(to=dropped, where=is_activation, tokens=None, seed=None)
def dropout(x, p):
    return F.dropout(x, p, True, False)


def _run(graph: Graph) -> Applied:
    effects = Effects.of(graph)
    found = find(graph, (dropout,), ("dropout",), effects)
    applied = Applied(misses=[miss for miss in found.misses if _draws(miss)])
    beginning = next(n for n in graph.nodes if n.op not in ("placeholder", "get_attr"))
    seeds = _seeds(graph, found.matches, beginning, effects)
    numbers: dict[tuple[torch.device, str], Node] = {}
    tokens = [_token_numbers(graph, match, beginning, numbers, effects) for match in found.matches]
    for match, *drawn in zip(found.matches, tokens, seeds, strict=True):
        place = source_line(match.root)
        args = match["x"], *drawn, float(match["p"])
        outcome = put_call(graph, match, dropped, args, {}, effects)
        if isinstance(outcome, Miss):
            applied.misses.append(outcome)
        else:
            applied.add(match, place)
    return applied


def _draws(miss: Miss) -> bool:
    """Whether it is about a dropout that drops something: models call many that do not."""
    calls = [canonical(node) for node in miss.matched]
    return any(call.args[2] is not False and call.args[1] not in (0.0, 1.0) for call in calls if call)


def _seeds(graph: Graph, matches: Sequence[Match], beginning: Node, effects: Effects) -> list[Node]:
    """A seed for each of ``matches``: those of one device are drawn at once, and parted at once.

    Parted in one operation, so that all leave the graph's beginning, and no layer knows its own number.
    """
    devices = [match.value("x").device for match in matches]
    parted = {}
    for device in dict.fromkeys(devices):
        like = matches[devices.index(device)].root
        drawn = _call(graph, beginning, dropout_seeds, (devices.count(device), device), like, effects)
        rows = _call(graph, beginning, torch.unbind, (drawn,), like, effects)
        parted[device] = iter([
            _call(graph, beginning, operator.getitem, (rows, i), like, effects)
            for i in range(devices.count(device))
        ])  # fmt: skip
    return [next(parted[device]) for device in devices]


def _token_numbers(
    graph: Graph,
    match: Match,
    beginning: Node,
    numbers: dict[tuple[torch.device, str], Node],
    effects: Effects,
) -> Node:
    """0, 1, 2, … of a sequence: one of ``numbers`` by device and length, or a new one."""
    x, root = match.value("x"), match.root
    length = _length(graph, x.shape[1])
    if length is None:
        # Made where it is read, so that layers that compute their length are still alike.
        length = _call(graph, root, torch.Tensor.size, (match["x"], 1), root, effects)
        return _arange(graph, root, length, x.device, root, effects)
    key = x.device, str(x.shape[1])
    if key not in numbers:
        numbers[key] = _arange(graph, beginning, length, x.device, root, effects)
    return numbers[key]


def _length(graph: Graph, size: int | SymInt) -> Node | int | None:
    """``size`` as a number or as an input of ``graph``; None where it is neither."""
    known = fixed(size)
    if known is not None:
        return known
    inputs = graph.find_nodes(op="placeholder")
    return next((n for n in inputs if isinstance(value_of(n), SymInt) and same(value_of(n), size)), None)


def _arange(
    graph: Graph, place: Node, length: Node | int, device: torch.device, like: Node, effects: Effects
) -> Node:
    return _call(graph, place, torch.arange, (length,), like, effects, device=device)


def _call(
    graph: Graph, place: Node, to: Any, args: tuple, like: Node, effects: Effects, **kwargs: Any
) -> Node:
    """``to(*args)`` before ``place``, with what it gives in the mode of ``like``'s value."""
    with value_of(like).fake_mode, torch.no_grad():
        value = to(*map_arg(args, value_of), **kwargs)
    made = insert(graph, place, to, args, kwargs, value, like)
    effects.put(made, place)
    return made


dropout_pass = Pass("dropout", _run)
