"""What a pass is: a name, the operations it looks for, and a function over one graph.

A pass runs on a copy and its result is taken only when it succeeds: a pass that raises is reported, the
graph stays as it was, and training goes on.
"""

import copy
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch.fx import Graph, GraphModule

from rewriter.effects import Effects
from rewriter.match import Match, Miss
from rewriter.pattern import Rewrite, source_line
from rewriter.replace import drop_dead, find, graphs_of, put, sweep
from rewriter.report import MissRecord, PassRecord, count_misses, count_places

log = logging.getLogger(__name__)


@dataclass
class Applied:
    """What a pass did to one graph.

    ``sites`` are (rewrite's name, place in the model's source) of each rewrite.
    """

    sites: list[tuple[str, str]] = field(default_factory=list)
    misses: list[Miss] = field(default_factory=list)

    def add(self, found: Match, place: str) -> None:
        self.sites.append((found.rewrite.name, place))

    def extend(self, other: "Applied") -> None:
        self.sites += other.sites
        self.misses += other.misses


@dataclass(frozen=True)
class Pass:
    """A fusion: ``run`` rewrites one graph in place and says what it did."""

    name: str
    run: Callable[[Graph], Applied]

    def over(self, module: GraphModule) -> Applied:
        """Run on the graph of ``module`` and on the bodies of the checkpoints in it."""
        whole = Applied()
        for part in graphs_of(module):
            whole.extend(self.run(part.graph))
            sweep(part)
        return whole


@dataclass(frozen=True)
class CrossingPass(Pass):
    """A pass whose proofs cross the borders of checkpoints: ``run`` takes and sweeps the outermost one."""

    run: Callable[[GraphModule], Applied]

    def over(self, module: GraphModule) -> Applied:
        return self.run(module)


def pattern_pass(name: str, rewrites: Sequence[Rewrite], anchors: Sequence[str]) -> Pass:
    """The pass that replaces each match of ``rewrites``, the first to hold, and reports ``anchors`` left."""

    def run(graph: Graph) -> Applied:
        effects = Effects.of(graph)
        found = find(graph, rewrites, anchors, effects)
        applied = Applied(misses=found.misses)
        for match in found.matches:
            place = source_line(match.root)
            outcome = put(graph, match, effects)
            if isinstance(outcome, Miss):
                applied.misses.append(outcome)
            else:
                applied.add(match, place)
        return applied

    return Pass(name, run)


def apply(fusion: Pass, module: GraphModule) -> tuple[GraphModule, PassRecord]:
    """Run a pass on ``module`` and the checkpoint bodies in it; the module unchanged where the pass fails."""
    start = time.perf_counter()
    work = duplicate(module)
    try:
        for part in graphs_of(work):
            # Bodies of checkpoints have unused results, which would count as uses of what a match erases.
            drop_dead(part.graph)
        applied = fusion.over(work)
    except Exception as error:
        log.warning("pass %s failed and was left out: %s", fusion.name, error, exc_info=True)
        record = PassRecord(
            fusion.name, (), (), time.perf_counter() - start, f"{type(error).__name__}: {error}"
        )
        return module, record
    seconds = time.perf_counter() - start
    matches, misses = count_places(applied.sites), count_misses(map(_record, applied.misses))
    log.debug("pass %s: %d rewrites, %d misses", fusion.name, len(applied.sites), len(applied.misses))
    return (work if applied.sites else module), PassRecord(fusion.name, matches, misses, seconds, None)


def _record(miss: Miss) -> MissRecord:
    return MissRecord(miss.rewrite.name, miss.pattern_line, miss.model_line, miss.reason)


def duplicate(module: GraphModule) -> GraphModule:
    """A copy whose graphs can be changed: parameters and metadata are shared, nested graphs copied too."""
    graph = Graph()
    output = graph.output(graph.graph_copy(module.graph, {}))
    output.meta = copy.copy(next(iter(module.graph.find_nodes(op="output"))).meta)
    attributes = {n.target: _attribute(module, n.target) for n in module.graph.find_nodes(op="get_attr")}
    attributes = {k: duplicate(v) if isinstance(v, GraphModule) else v for k, v in attributes.items()}
    clone = GraphModule(attributes, graph, type(module).__name__)
    clone.meta = dict(module.meta)
    return clone


def _attribute(module: torch.nn.Module, target: str) -> object:
    for part in target.split("."):
        module = getattr(module, part)
    return module
