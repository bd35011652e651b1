"""What a search gives: a ``Match`` with its bindings, or a ``Miss`` with the reason.

Operations that equal a pattern's are a match only where they can be replaced: nothing inside is used outside,
all of it runs under one grad mode and autocast, nothing is overwritten meanwhile, and the guard holds.
"""

from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from rewriter.canonical import number, value_of
from rewriter.effects import Effects
from rewriter.pattern import PatternError, Rewrite, Unmet, source_line


@dataclass(frozen=True, eq=False)
class Match:
    """A place where a pattern holds.

    ``bindings`` maps each hole to what it bound, a symbolic float as the number that it is; ``outputs`` are
    the graph's values that the replacement provides, the root first; ``nodes`` are all nodes that it makes
    superfluous; ``inner`` maps the pattern's own values, by their names in its traced graph (``linear_1``),
    to the graph's.
    """

    rewrite: Rewrite
    bindings: dict[str, Any]
    outputs: tuple[Node, ...]
    nodes: frozenset[Node]
    inner: dict[str, Any] = field(default_factory=dict, repr=False)

    def __getitem__(self, hole: str) -> Any:
        return self.bindings[hole]

    def __getattr__(self, hole: str) -> Any:
        if hole.startswith("__") or hole not in self.bindings:
            raise AttributeError(f"{self.rewrite.name} binds {', '.join(self.bindings)}; not `{hole}`")
        return self.bindings[hole]

    @property
    def root(self) -> Node:
        return self.outputs[0]

    def value(self, hole: str) -> Any:
        """The fake tensor or constant that a hole bound."""
        return value_of(self.bindings[hole])


@dataclass(frozen=True)
class Miss:
    """The nearest that a pattern came to a place: how far, and what differed."""

    rewrite: Rewrite
    reason: str
    matched: frozenset[Node] = field(repr=False)
    node: Node | None = field(repr=False)
    pattern_node: Node | None = field(repr=False)

    @property
    def depth(self) -> int:
        return len(self.matched)

    @property
    def pattern_line(self) -> str:
        return source_line(self.pattern_node, self.rewrite.line)

    @property
    def model_line(self) -> str:
        return source_line(self.node)


def accepted(
    rewrite: Rewrite, env: dict[Node, Any], nodes: frozenset[Node], root: Node, effects: Effects
) -> Match | Miss:
    """The match that a search's result is, or why it is none.

    Args:
        env: the pattern's values to the graph's.
        nodes: what the search walked through.
        root: where it began.
    """
    outputs = tuple(env[o] for o in rewrite.outputs)
    holes = {str(n.target): env.get(n) for n in rewrite.graph.find_nodes(op="placeholder")}
    bindings = {hole: number(holes[hole]) for hole in rewrite.holes}
    bound = {b for b in bindings.values() if isinstance(b, Node)}
    reason = (
        _escape(nodes, outputs)
        or effects.mode_border(set(nodes))
        or effects.overwritten(set(nodes), bound, root)
    )
    inner = {n.name: v for n, v in env.items() if isinstance(n, Node) and n.op != "placeholder"}
    found = Match(rewrite, bindings, outputs, nodes, inner)
    reason = reason or _unmet(rewrite, found)
    return found if reason is None else Miss(rewrite, reason, nodes, root, None)


def _escape(nodes: frozenset[Node], outputs: tuple[Node, ...]) -> str | None:
    for node in nodes:
        if node in outputs:
            continue
        user = next((u for u in node.users if u not in nodes), None)
        if user is not None:
            where = "is also returned" if user.op == "output" else f"is also used by `{user.name}`"
            return f"`{node.name}` {where}"
    return None


def _unmet(rewrite: Rewrite, found: Match) -> str | None:
    if rewrite.where is None:
        return None
    try:
        answer = rewrite.where(found)
    except Unmet as unmet:
        return str(unmet)
    if answer is not None:
        raise PatternError(
            f"{rewrite.name}: its guard returned {answer!r}, which nothing reads; state the condition by "
            "rewriter.require(condition, reason)."
        )
    return None
