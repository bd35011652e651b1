"""Walks a pattern over a graph, from its root towards its inputs.

Every order of the operands of a sum or product is tried. Four rules replace lists of variants: nodes are
compared through the canonical view; a cast matches a cast to the same dtype, or a value that has that dtype
already; expressions over shapes and dtypes are evaluated on what is bound; a hole binds a value, a constant
or None.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx import Node

from rewriter.canonical import Call, DtypeOf, canonical, dtype_of, value_of
from rewriter.effects import Effects
from rewriter.match import Match, Miss, accepted
from rewriter.pattern import Rewrite, evaluate, same
from rewriter.quantised import PackedWeight
from rewriter.signatures import COMMUTATIVE

View = Callable[[Node], Call | None]


def match(rewrite: Rewrite, root: Node, effects: Effects, view: View = canonical) -> Match | list[Miss]:
    """Match ``rewrite`` with its first result at ``root``; where it fails, the misses met on the way.

    Args:
        view: ``canonical``; one that remembers, where the graph stays as it is from call to call.
    """
    search = _Search(rewrite, view)
    for env, nodes in search.value(rewrite.root, root, {}, frozenset()):
        if not search.metadata_holds(env, nodes):
            continue
        found = accepted(rewrite, env, nodes, root, effects)
        if isinstance(found, Match):
            return found
        search.misses.append(found)
    return search.misses


def beginnings(rewrite: Rewrite) -> frozenset[str] | None:
    """The canonical operations that a match's root can be; None for any.

    A cast at a pattern's root also matches a value that has the dtype already: what it casts may begin too.
    """
    names: set[str] = set()
    node: Any = rewrite.root
    while isinstance(node, Node) and node in rewrite.calls:
        call = rewrite.calls[node]
        if call.name == "maybe":
            return None
        names.add(call.name)
        if call.name not in ("cast", "alias"):
            return frozenset(names)
        node = call.args[0]
    return None


_Step = tuple[dict[Node, Any], frozenset[Node]]


class _Search:
    """One attempt of one rewrite at one root; collects what failed."""

    def __init__(self, rewrite: Rewrite, view: View):
        self.rewrite = rewrite
        self.view = view
        self.misses: list[Miss] = []

    def miss(self, reason: str, nodes: frozenset[Node], node: Any = None, pattern_node: Any = None) -> None:
        node = node if isinstance(node, Node) else None
        self.misses.append(Miss(self.rewrite, reason, nodes, node, pattern_node))

    def metadata_holds(self, env: dict[Node, Any], nodes: frozenset[Node]) -> bool:
        """Compare what was still unbound when the search met it."""
        for expression, found in env.get(_DEFERRED, ()):
            wanted = dtype_of_expression(expression, env)
            if not same(wanted, _concrete(found)):
                self.miss(f"expected {wanted}, found {found}", nodes, found)
                return False
        return True

    # The generators below yield every way in which a pattern's value can equal a graph's value, as the
    # bindings and the matched nodes.

    def value(self, wanted: Any, found: Any, env: dict[Node, Any], nodes: frozenset[Node]) -> Iterator[_Step]:
        if isinstance(wanted, (tuple, list, slice)):
            yield from self._structure(wanted, found, env, nodes)
        elif not isinstance(wanted, Node):
            if same(wanted, _concrete(found)):
                yield env, nodes
            else:
                self.miss(f"expected the constant {wanted!r}, found {self._describe(found)}", nodes, found)
        elif wanted.op == "placeholder":
            yield from self._hole(wanted, found, env, nodes)
        elif wanted in self.rewrite.calls:
            yield from self._call(wanted, found, env, nodes)
        else:
            yield from self._metadata(wanted, found, env, nodes)

    def _hole(self, hole: Node, found: Any, env: dict[Node, Any], nodes: frozenset[Node]) -> Iterator[_Step]:
        found = self._resolve(found)
        if hole not in env:
            yield {**env, hole: found}, nodes
        elif same(env[hole], found) or env[hole] == found and isinstance(found, PackedWeight):
            yield env, nodes
        else:
            before, here = self._describe(env[hole]), self._describe(found)
            reason = f"`{hole.target}` is {before} in one place and {here} in another"
            self.miss(reason, nodes, found, hole)

    def _metadata(
        self, wanted: Any, found: Any, env: dict[Node, Any], nodes: frozenset[Node]
    ) -> Iterator[_Step]:
        try:
            value = evaluate(wanted, env)
        except KeyError:
            yield {**env, _DEFERRED: (*env.get(_DEFERRED, ()), (wanted, found))}, nodes
            return
        if same(value, _concrete(found)):
            yield env, nodes
        else:
            self.miss(f"expected {value}, found {self._describe(found)}", nodes, found, wanted)

    def _structure(
        self, wanted: Any, found: Any, env: dict[Node, Any], nodes: frozenset[Node]
    ) -> Iterator[_Step]:
        if isinstance(wanted, slice):
            if not isinstance(found, slice):
                self.miss(f"expected a slice, found {self._describe(found)}", nodes, found)
                return
            fields = ("start", "stop", "step")
            yield from self._each([(getattr(wanted, f), getattr(found, f)) for f in fields], env, nodes)
        elif isinstance(found, (tuple, list)) and len(found) == len(wanted):
            yield from self._each(list(zip(wanted, found, strict=True)), env, nodes)
        else:
            self.miss(f"expected {len(wanted)} values, found {self._describe(found)}", nodes, found)

    def _each(self, pairs: list[tuple], env: dict[Node, Any], nodes: frozenset[Node]) -> Iterator[_Step]:
        if not pairs:
            yield env, nodes
            return
        (wanted, found), *rest = pairs
        for env_, nodes_ in self.value(wanted, found, env, nodes):
            yield from self._each(rest, env_, nodes_)

    def _call(
        self, wanted: Node, found: Any, env: dict[Node, Any], nodes: frozenset[Node]
    ) -> Iterator[_Step]:
        call = self.rewrite.calls[wanted]
        if not isinstance(found, Node):
            self.miss(f"expected {call.name}, found {self._describe(found)}", nodes, found, wanted)
            return
        if wanted in env:
            if self._resolve(env[wanted]) is self._resolve(found):
                yield env, nodes
            else:
                reason = f"`{wanted.name}` is `{env[wanted]}` in one place and `{found}` in another"
                self.miss(reason, nodes, found, wanted)
            return
        env = {**env, wanted: found}
        if call.name == "maybe":
            yield from self._maybe(call, found, env, nodes)
            return
        if call.name == "alias":
            yield from self.value(call.args[0], found, env, nodes)
            return
        seen = self.view(found)
        if call.name == "cast":
            yield from self._cast(wanted, call, found, seen, env, nodes)
            return
        if seen is not None and seen.name == "alias":
            yield from self._aliased(wanted, found, seen, env, nodes)
            return
        if seen is None or seen.name != call.name:
            self.miss(f"expected {call.name}, found {seen.name if seen else found.op}", nodes, found, wanted)
            return
        yield from self._arguments(wanted, call, found, seen, env, nodes)

    def _aliased(
        self, wanted: Node, found: Node, seen: Call, env: dict[Node, Any], nodes: frozenset[Node]
    ) -> Iterator[_Step]:
        unbound = {k: v for k, v in env.items() if k is not wanted}
        yield from self._call(wanted, seen.args[0], unbound, nodes | {found})

    def _arguments(
        self, wanted: Node, call: Call, found: Node, seen: Call, env: dict[Node, Any], nodes: frozenset[Node]
    ) -> Iterator[_Step]:
        nodes = nodes | {found, *seen.through}
        for args in _orders(seen):
            if len(args) != len(call.args):
                reason = f"{call.name} has {len(args)} arguments where the pattern has {len(call.args)}"
                self.miss(reason, nodes, found, wanted)
                return
            if call.name == "getitem":
                args = (args[0], _index_like(call.args[1], args[1], args[0]))
            yield from self._each(list(zip(call.args, args, strict=True)), env, nodes)

    def _maybe(
        self, call: Call, found: Node, env: dict[Node, Any], nodes: frozenset[Node]
    ) -> Iterator[_Step]:
        function, x, *rest = call.args
        seen = self.view(found)
        if seen is not None and seen.name == function.__name__:
            for args in _orders(seen):
                pairs = [(x, args[0]), *zip(rest, args[1:], strict=False)]
                yield from self._each(pairs, env, nodes | {found})
        absent = {r: None for r in rest if isinstance(r, Node)}
        if all(env.get(r) is None for r in absent):
            yield from self.value(x, found, {**env, **absent}, nodes)

    def _cast(
        self,
        wanted: Node,
        call: Call,
        found: Node,
        seen: Call | None,
        env: dict[Node, Any],
        nodes: frozenset[Node],
    ) -> Iterator[_Step]:
        operand, dtype = call.args
        actual = dtype_of(found)
        try:
            target = dtype_of_expression(dtype, env)
        except KeyError:
            target = actual
            env = {**env, _DEFERRED: (*env.get(_DEFERRED, ()), (dtype, actual))}
        if target != actual:
            self.miss(f"expected a cast to {target}, found {self._describe(found)}", nodes, found, wanted)
            return
        if seen is not None and seen.name == "cast":
            yield from self.value(operand, seen.args[0], env, nodes | {found})
        yield from self.value(operand, found, env, nodes)

    def _resolve(self, found: Any) -> Any:
        """Look through casts to the same dtype: they are the value itself."""
        while isinstance(found, Node):
            call = self.view(found)
            if call is None or call.name != "alias" or found.target in ("contiguous", "clone"):
                return found
            found = call.args[0]
        return found

    def _describe(self, found: Any) -> str:
        if not isinstance(found, Node):
            return repr(found)
        call = self.view(found)
        dtype = dtype_of(found)
        kind = f"{call.name} " if call else ""
        return f"{kind}`{found.name}`" + (f" of {str(dtype).removeprefix('torch.')}" if dtype else "")


# The key under which an attempt's bindings keep comparisons that must wait for a binding.
_DEFERRED: Any = object()


def _orders(call: Call) -> list[tuple]:
    """The arguments of ``call``, in every order in which they mean the same."""
    commutes = call.name in COMMUTATIVE and len(call.args) == 2
    return [call.args, call.args[::-1]] if commutes else [call.args]


def dtype_of_expression(dtype: Any, env: dict[Node, Any]) -> torch.dtype | None:
    """The dtype that a pattern's cast asks for: a constant, ``x.dtype``, or that of another value."""
    if isinstance(dtype, DtypeOf):
        return dtype_of(env[dtype.value])
    return evaluate(dtype, env)


def _index_like(wanted: Any, index: Any, source: Any) -> Any:
    """``index`` with ``...`` for its leading full slices where the pattern has ``...``: ``x[:, :, 1:]``."""
    starts = isinstance(wanted, tuple) and isinstance(index, tuple) and wanted[:1] == (Ellipsis,)
    rank = getattr(value_of(source), "ndim", None)
    if not starts or Ellipsis in index or None in index or len(index) != rank:
        return index
    extra = len(index) - len(wanted) + 1
    full = extra >= 0 and all(isinstance(i, slice) and i == slice(None) for i in index[:extra])
    return (Ellipsis, *index[extra:]) if full else index


def _concrete(found: Any) -> Any:
    """A graph value as a number where tracing knows it: symbolic sizes are nodes in dynamic graphs."""
    if isinstance(found, Node):
        value = value_of(found)
        return found if value is None or isinstance(value, torch.Tensor) else value
    if isinstance(found, (tuple, list)):
        return type(found)(_concrete(a) for a in found)
    if isinstance(found, slice):
        return slice(_concrete(found.start), _concrete(found.stop), _concrete(found.step))
    return found
