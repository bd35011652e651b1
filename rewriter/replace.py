"""Finds a pass's patterns in a graph and puts their replacements in.

A replacement is first run on fake tensors: one that gives another shape or dtype than the graph has is not
put in, and becomes a miss. So a rewrite is either whole, or the graph is as it was.
"""

import functools
import inspect
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from rewriter.canonical import canonical, value_of
from rewriter.effects import Effects, is_impure
from rewriter.fake import fake_call
from rewriter.match import Match, Miss
from rewriter.pattern import Rewrite
from rewriter.quantised import PackedWeight
from rewriter.search import beginnings, match


@dataclass
class Found:
    """What a search over one graph gave: disjoint matches in the graph's order, and misses, one an anchor."""

    matches: list[Match] = field(default_factory=list)
    misses: list[Miss] = field(default_factory=list)


def find(graph: Graph, rewrites: Sequence[Rewrite], anchors: Iterable[str], effects: Effects) -> Found:
    """Match each of ``rewrites``, the first in the list that holds, from the graph's end to its beginning.

    Args:
        anchors: canonical names of the operations that are worth a line in the report where no rewrite
            consumed them.
    """
    anchors = frozenset(anchors)
    view = functools.cache(canonical)
    names = {n: call.name for n in graph.nodes if (call := view(n)) is not None}
    is_anchor = {n for n, name in names.items() if name in anchors}
    claimed: set[Node] = set()
    near: dict[Node, Miss] = {}
    found = Found()
    begins = {rewrite: beginnings(rewrite) for rewrite in rewrites}
    for node, name in reversed(names.items()):
        if node in claimed:
            continue
        for rewrite in (r for r, beginning in begins.items() if beginning is None or name in beginning):
            result = match(rewrite, node, effects, view)
            if isinstance(result, Match) and not result.nodes & claimed:
                found.matches.append(result)
                claimed |= result.nodes
                break
            if isinstance(result, list):
                _keep_nearest(near, result, is_anchor)
    found.matches.reverse()
    for anchor in names:
        if anchor in is_anchor and anchor not in claimed:
            found.misses.append(near.get(anchor) or _unreached(anchor, rewrites))
    return found


def _keep_nearest(near: dict[Node, Miss], misses: list[Miss], anchors: set[Node]) -> None:
    for miss in misses:
        for anchor in anchors & (miss.matched | {miss.node}):
            best = near.get(anchor)
            if best is None or _nearness(miss) > _nearness(best):
                near[anchor] = miss


def _nearness(miss: Miss) -> tuple[float, int]:
    return miss.depth / max(miss.rewrite.size, 1), miss.depth


def _unreached(anchor: Node, rewrites: Sequence[Rewrite]) -> Miss:
    tried = ", ".join(dict.fromkeys(r.name for r in rewrites))
    return Miss(rewrites[0], f"none of {tried} reaches `{anchor.name}`", frozenset(), anchor, None)


def put(graph: Graph, found: Match, effects: Effects) -> Node | Miss:
    """Replace one match by a call of its rewrite's ``to``; a miss where that gives another shape or dtype."""
    args, kwargs = arguments(found)
    return put_call(graph, found, found.rewrite.to, args, kwargs, effects)


def put_call(
    graph: Graph, found: Match, to: Callable, args: tuple, kwargs: dict[str, Any], effects: Effects
) -> Node | Miss:
    """Replace ``found``'s outputs by those of ``to(*args, **kwargs)``; erase what nothing needs any more."""
    args, kwargs = effects.current((args, kwargs))
    place = insertion_point(found.outputs, found.nodes, args, kwargs, effects)
    if isinstance(place, str):
        return Miss(found.rewrite, place, found.nodes, found.root, None)
    result = fake_call(to, args, kwargs, found.root, effects)
    results = result if isinstance(result, (tuple, list)) else (result,)
    for output, new in zip(found.outputs, results, strict=False):
        if reason := _difference(value_of(output), new):
            return Miss(found.rewrite, f"the replacement {reason}", found.nodes, output, None)
    call = insert(graph, place, to, args, kwargs, result, found.root)
    effects.put(call, place)
    if not isinstance(result, (tuple, list)):
        swap(found.outputs[0], call, effects)
    else:
        for index, output in enumerate(found.outputs):
            with graph.inserting_after(call if index == 0 else call.next):
                item = graph.call_function(operator.getitem, (call, index))
            _describe(item, results[index], output)
            effects.put(item, place)
            swap(output, item, effects)
    erase(graph, found.nodes)
    return call


def arguments(found: Match) -> tuple[tuple, dict[str, Any]]:
    """The call's arguments: the holes by name, and the rewrite's constants."""
    rewrite = found.rewrite
    given = {hole: _plain(found.bindings[hole]) for hole in rewrite.holes}
    for name, constant in rewrite.constants.items():
        given[name] = constant(found) if callable(constant) else constant
    args: list[Any] = []
    for name, parameter in inspect.signature(rewrite.to).parameters.items():
        if name not in given or parameter.kind is not parameter.POSITIONAL_OR_KEYWORD:
            break
        args.append(given.pop(name))
    return tuple(args), given


def _plain(value: Any) -> Any:
    return value.flat() if isinstance(value, PackedWeight) else value


def insertion_point(
    outputs: Sequence[Node], nodes: Iterable[Node], args: Any, kwargs: Any, effects: Effects
) -> Node | str:
    """The node before which a replacement may stand: after all that it reads, before all that read it."""
    inside = set(nodes)
    users = [u for o in outputs for u in o.users if u not in inside]
    place = min([outputs[0], *users], key=effects.position.__getitem__)
    read: list[Node] = []
    map_arg((args, kwargs), read.append)
    for node in read:
        if effects.position[node] >= effects.position[place]:
            return f"`{place.name}` needs a result before `{node.name}` is known"
    return place


def _difference(old: Any, new: Any) -> str | None:
    if not isinstance(old, torch.Tensor) or not isinstance(new, torch.Tensor):
        return (
            None
            if type(old) is type(new)
            else f"gives {type(new).__name__}, the graph has {type(old).__name__}"
        )
    if old.dtype != new.dtype:
        return f"gives {new.dtype}, the graph has {old.dtype}"
    # As text: comparing symbolic sizes would install guards.
    if str(tuple(old.shape)) != str(tuple(new.shape)):
        return f"gives shape {tuple(new.shape)}, the graph has {tuple(old.shape)}"
    return None


def insert(
    graph: Graph, place: Node, to: Callable, args: tuple, kwargs: dict, value: Any, like: Node
) -> Node:
    """A new call before ``place``, with the value tracing would have given it and ``like``'s source line."""
    with graph.inserting_before(place):
        call = graph.call_function(to, args, kwargs)
    _describe(call, value, like)
    return call


def _describe(node: Node, value: Any, like: Node) -> None:
    node.meta["example_value"] = value
    for key in ("stack_trace", "nn_module_stack"):
        if key in like.meta:
            node.meta[key] = like.meta[key]


def swap(old: Node, new: Node, effects: Effects) -> None:
    """Let all that read ``old`` read ``new``, and matches found before know it."""
    old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    effects.replaced[old] = new


def erase(graph: Graph, nodes: Iterable[Node]) -> None:
    """Erase those of ``nodes`` that nothing uses any more, and then those that only they used."""
    left = {n for n in nodes if _stands_in_graph(n)}
    ready = [n for n in left if not n.users]
    while ready:
        node = ready.pop()
        operands = node.all_input_nodes
        graph.erase_node(node)
        left.discard(node)
        ready += [n for n in operands if n in left and not n.users]


def _stands_in_graph(node: Node) -> bool:
    return node.prev.next is node


def sweep(module: GraphModule) -> None:
    """Drop what nothing reads, keep what acts; then check and let the module's code follow its graph."""
    drop_dead(module.graph)
    module.graph.lint()
    module.recompile()


def drop_dead(graph: Graph) -> None:
    """Erase what nothing reads, but what acts.

    ``Graph.eliminate_dead_code`` also enters nested graphs, and there does not ask what must stay: it deletes
    in-place writes in the bodies of checkpoints.
    """
    for node in reversed(list(graph.nodes)):
        if not node.users and not is_impure(node):
            graph.erase_node(node)
