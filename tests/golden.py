"""Small functions through Dynamo and one pass: the calls of the rewritten graph as text, and its numbers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from rewriter.fusion import Pass, apply
from rewriter.report import PassRecord
from rewriter.signatures import target_name
from rewriter.verify import Stage, find_fault


@dataclass(frozen=True)
class Rewritten:
    """What a pass made of a function's graph."""

    before: GraphModule
    after: GraphModule
    record: PassRecord
    inputs: tuple

    @property
    def calls(self) -> list[str]:
        """The operations of the rewritten graph, as ``rms_norm(x, weight, 1e-06)``."""
        return calls(self.after)

    @property
    def rewrites(self) -> dict[str, int]:
        return {m.rewrite: m.count for m in self.record.matches}

    @property
    def reasons(self) -> list[str]:
        return [m.reason for m in self.record.misses]

    def assert_same_numbers(self) -> None:
        """Results and gradients are those of the graph as it was, by the criterion of ``rewriter.verify``."""
        fault, note = find_fault([Stage("", self.before), Stage(self.record.name, self.after)], self.inputs)
        assert fault is None, note


def trace(function: Callable, *inputs: Any, dynamic: bool = False) -> tuple[GraphModule, tuple]:
    """The one graph that Dynamo makes of ``function(*inputs)``, and the values of its placeholders.

    Placeholders are named as the parameters that they are.
    """
    graphs, given = [], []

    def record(module: GraphModule, _):
        graphs.append(module)

        def forward(*values):
            given.extend(values)
            return module(*values)

        return forward

    torch._dynamo.reset()
    torch.compile(function, backend=record, dynamic=dynamic, fullgraph=True)(*inputs)
    (module,) = graphs
    for node in module.graph.find_nodes(op="placeholder"):
        node._rename(node.name.removeprefix("l_").removesuffix("_"))
    return module, tuple(given)


def rewrite_with(fusion: Pass, function: Callable, *inputs: Any, dynamic: bool = False) -> Rewritten:
    """Trace ``function(*inputs)`` and run one pass on its graph."""
    module, values = trace(function, *inputs, dynamic=dynamic)
    after, record = apply(fusion, module)
    assert record.error is None, record.error
    return Rewritten(module, after, record, values)


def calls(module: GraphModule) -> list[str]:
    """Each operation as ``name(arguments)``, in order."""
    nodes = [n for n in module.graph.nodes if n.op in ("call_function", "call_method")]
    return [f"{target_name(n).rpartition('.')[2]}({_arguments(n)})" for n in nodes]


def _arguments(node: Node) -> str:
    return ", ".join([*map(str, node.args), *(f"{k}={v}" for k, v in node.kwargs.items())])
