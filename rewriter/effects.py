"""What forbids treating a graph as pure expressions: in-place writes, grad modes, autocast.

A rewrite moves and merges computations, which is only sound where nothing is overwritten in between, and
where all of them ran under the same grad mode and autocast state.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from rewriter.canonical import canonical, value_of

_IN_PLACE_OPERATORS = {"iadd", "isub", "imul", "itruediv", "iand", "ior", "setitem", "ipow", "ifloordiv"}
_MODES = {"_set_grad_enabled", "_enter_autocast", "_exit_autocast"}


def mutated_argument(node: Node) -> Node | None:
    """The tensor that ``node`` writes into, or None."""
    if node.op not in ("call_function", "call_method") or not node.args:
        return None
    out = node.kwargs.get("out")
    if isinstance(out, Node):
        return out
    first, *_ = node.args
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    in_place_method = bool(re.search(r"[^_]_$", name)) and name not in (
        "and_",
        "or_",
        "not_",
        "is_",
        "requires_grad_",
    )
    in_place = in_place_method or name in _IN_PLACE_OPERATORS or node.kwargs.get("inplace") is True
    if not in_place and name == "dropout" and len(node.args) > 3:
        in_place = node.args[3] is True
    if not in_place or not isinstance(first, Node):
        return None
    return first if isinstance(value_of(first), torch.Tensor) else None


def _storage(node: Node) -> int | None:
    value = value_of(node)
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        return None
    return value.untyped_storage()._cdata


@dataclass
class Effects:
    """The order of a graph's nodes, their modes, and the writes into storages.

    ``replaced`` maps values that rewrites took out of the graph to what stands for them: matches found before
    still speak of the old ones.
    """

    position: dict[Node, float] = field(default_factory=dict)
    mode: dict[Node, tuple] = field(default_factory=dict)
    writes: dict[int, list[Node]] = field(default_factory=lambda: defaultdict(list))
    sharing: dict[int, list[Node]] = field(default_factory=lambda: defaultdict(list))
    replaced: dict[Node, Node] = field(default_factory=dict)

    @classmethod
    def of(cls, graph: Graph, grad: bool = True) -> "Effects":
        """``grad``: the grad mode in which the graph is called."""
        effects = cls()
        autocasts = ()
        for position, node in enumerate(graph.nodes):
            effects.position[node] = position
            name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
            if name == "_set_grad_enabled":
                grad = node.args[0]
            elif name == "_enter_autocast":
                autocasts = (*autocasts, tuple(node.args))
            elif name == "_exit_autocast":
                autocasts = autocasts[:-1]
            effects.mode[node] = (grad, autocasts)
            storage = _storage(node)
            if storage is not None:
                effects.sharing[storage].append(node)
            written = mutated_argument(node)
            if written is not None and (storage := _storage(written)) is not None:
                effects.writes[storage].append(node)
        return effects

    def put(self, node: Node, before: Node) -> None:
        """Note a new node in front of ``before``."""
        self.position[node] = self.position[before] - 0.5
        self.mode[node] = self.mode[before]

    def current(self, values: Any) -> Any:
        """``values``, nested as a node's arguments are, with what stands for them now."""

        def latest(node: Node) -> Node:
            while node in self.replaced:
                node = self.replaced[node]
            return node

        return map_arg(values, latest)

    @contextmanager
    def entered(self, node: Node) -> Iterator[None]:
        """Run under the grad mode and the autocast state that ``node`` runs under."""
        grad, autocasts = self.mode[node]
        with ExitStack() as modes:
            for device, dtype, enabled, cache in autocasts:
                modes.enter_context(torch.autocast(device, dtype, enabled, cache))
            modes.enter_context(torch.set_grad_enabled(grad))
            yield

    def mixed_dtypes(self, product: Node) -> str | None:
        """Why a product fails in eager, where its operands must be of one dtype; None if it does not.

        Tracing does not tell, and a rewrite that casts would train what the model's own code refuses.
        """
        call = canonical(product)
        values = [value_of(x) for x in call.args if x is not None] if call is not None else []
        dtypes = {value.dtype: value.device.type for value in values if isinstance(value, torch.Tensor)}
        if len(dtypes) < 2 or not all(isinstance(value, torch.Tensor) for value in values):
            return None
        with self.entered(product):
            if torch.float64 not in dtypes and torch.is_autocast_enabled(next(iter(dtypes.values()))):
                return None
        return f"`{product.name}` is of {' and '.join(map(str, dtypes))}, which eager refuses to multiply"

    def is_written(self, node: Node) -> bool:
        """Whether anything in the graph writes into the memory of ``node``."""
        return bool(self.writes) and _storage(node) in self.writes

    def mode_border(self, nodes: set[Node]) -> str | None:
        """Why ``nodes`` may not be merged: they lie on two sides of a mode's border; None if they may."""
        modes = {self.mode[n] for n in nodes}
        if len(modes) <= 1:
            return None
        what = "grad mode" if len({grad for grad, _ in modes}) > 1 else "autocast"
        return f"a border of {what} runs through it"

    def overwritten(self, matched: set[Node], values: set[Node], until: Node) -> str | None:
        """Why the values of a match are not what they were: one is written in place before ``until``."""
        if not self.writes:
            return None
        first = min(self.position[n] for n in matched)
        last = self.position[until]
        for value in matched | values:
            storage = _storage(value)
            for write in self.writes.get(storage, ()) if storage is not None else ():
                if write in matched and self._is_private(write, matched):
                    continue
                if first <= self.position[write] <= last or write in matched:
                    return f"`{value.name}` is written in place by `{write.name}`"
        return None

    def _is_private(self, write: Node, matched: set[Node]) -> bool:
        """Whether an in-place write inside a match overwrites a value that nothing else reads."""
        target: Any = write.args[0]
        storage = _storage(target)
        fresh = target.op in ("call_function", "call_method") and target in matched
        if not fresh or storage is None:
            return False
        return all(
            node is write or user in matched or self.position[user] < self.position[write]
            for node in self.sharing[storage]
            for user in node.users
        )


def is_mode_switch(node: Node) -> bool:
    """Whether ``node`` changes the grad mode or autocast for those after it."""
    return node.op == "call_function" and getattr(node.target, "__name__", "") in _MODES


def is_impure(node: Node) -> bool:
    """Whether dead-code elimination must keep ``node``: it writes, changes a mode or draws random numbers."""
    if node.op in ("placeholder", "output"):
        return True
    return is_mode_switch(node) or mutated_argument(node) is not None or node.is_impure()
