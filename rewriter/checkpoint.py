"""Values that cross the border of an activation checkpoint.

The body of a checkpoint is a graph of its own, whose placeholders stand for the arguments of one call in the
graph around it. Here a proof about a placeholder becomes one about that argument; a rewrite in the body gets
a value of the graph around it; and an argument that a rewrite made superfluous, as an attention mask, is no
longer passed, so that the graph around need not compute it.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from torch.fx import Graph, GraphModule, Node

from rewriter.canonical import value_of
from rewriter.effects import Effects
from rewriter.nested import checkpoint_body, graphs_of


@dataclass(frozen=True)
class Checkpoints:
    """The graphs of a module, with the call that each body belongs to.

    Args:
        graphs: the bodies, each before the graph that calls it; the outermost graph is last.
        calls: a body's only call. A body that is called twice has no entry: its placeholders stand for no
            one value.
        effects: of each graph, as it was before any rewrite.
    """

    graphs: tuple[GraphModule, ...]
    calls: dict[Graph, Node]
    effects: dict[Graph, Effects]
    read: frozenset[Node]

    @classmethod
    def of(cls, module: GraphModule) -> "Checkpoints":
        parts = tuple(dict.fromkeys(reversed(graphs_of(module))))
        calls = defaultdict(list)
        for part in parts:
            for node in part.graph.nodes:
                body = checkpoint_body(node)
                if body is not None and len(_placeholders(body.graph)) == len(node.args) - 1:
                    calls[body.graph].append(node)
        return cls(
            parts,
            {graph: found[0] for graph, found in calls.items() if len(found) == 1},
            {part.graph: Effects.of(part.graph) for part in parts},
            frozenset(p for part in parts for p in _placeholders(part.graph) if p.users),
        )

    def callers(self, graph: Graph) -> Iterator[Node]:
        """The calls around ``graph``, the innermost first."""
        while graph in self.calls:
            yield self.calls[graph]
            graph = self.calls[graph].graph

    def origin(self, node: Node) -> Node:
        """The value that ``node`` is, followed through placeholders into the graphs around."""
        while node.op == "placeholder" and node.graph in self.calls:
            argument = self.calls[node.graph].args[1 + _placeholders(node.graph).index(node)]
            if not isinstance(argument, Node):
                return node
            node = argument
        return node

    def bring(self, node: Node, graph: Graph) -> Node:
        """``node``, of ``graph`` or of a graph around it, as a value of ``graph``, passed in if need be."""
        if node.graph is graph:
            return node
        call = self.calls[graph]
        outer = self.bring(node, call.graph)
        placeholders = _placeholders(graph)
        for placeholder, argument in zip(placeholders, call.args[1:], strict=True):
            if argument is outer:
                return placeholder
        name, taken = outer.name, {p.target for p in placeholders}
        while name in taken:
            name += "_outer"
        following = placeholders[-1].next
        with graph.inserting_before(following):
            added = graph.placeholder(name)
        added.meta["example_value"] = value_of(outer)
        self.effects[graph].put(added, following)
        call.args = (*call.args, outer)
        return added

    def drop_unread(self, graph: Graph) -> None:
        """Stop passing to a body what it read before and reads no more."""
        call = self.calls.get(graph)
        if call is None:
            return
        kept = [call.args[0]]
        for placeholder, argument in zip(_placeholders(graph), call.args[1:], strict=True):
            if placeholder.users or placeholder not in self.read:
                kept.append(argument)
            else:
                graph.erase_node(placeholder)
        call.args = tuple(kept)


def _placeholders(graph: Graph) -> list[Node]:
    return list(graph.find_nodes(op="placeholder"))
