"""What a pass is: a name, the operations it looks for, and a function over one graph.

A pass that raises is reported and left out: the graph is what the others make of it, and training goes on.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch.fx import Graph, GraphModule

from rewriter.effects import Effects
from rewriter.fake import remembering
from rewriter.match import Match, Miss
from rewriter.nested import drop_unread_graphs, duplicate, graphs_of
from rewriter.pattern import Rewrite, source_line
from rewriter.replace import drop_dead, find, put, sweep
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
            applied = self.run(part.graph)
            if applied.sites:
                sweep(part)
            whole.extend(applied)
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


@dataclass(frozen=True)
class Rewritten:
    """What passes made of a graph.

    Attributes:
        module: the result; the graph given itself where nothing was rewritten.
        records: one a pass, in order.
        stages: (pass, the graph as it left it) of each pass that rewrote something; the last one's graph is
            ``module``. Earlier ones are kept on demand alone.
    """

    module: GraphModule
    records: list[PassRecord]
    stages: list[tuple[str, GraphModule]]


def apply(fusion: Pass, module: GraphModule) -> tuple[GraphModule, PassRecord]:
    """Run one pass on ``module`` and the checkpoint bodies in it; ``module`` itself where nothing changed."""
    done = apply_all([fusion], module)
    return done.module, done.records[0]


def apply_all(passes: Sequence[Pass], module: GraphModule, *, keep_stages: bool = False) -> Rewritten:
    """Run ``passes`` in order; ``module`` is left as it was.

    All passes share one copy. Where one raises, the copy is thrown away and the others begin anew: the
    result is what they give without it.

    Args:
        keep_stages: copy the graph after each pass, for those who look for the one at fault.
    """
    failed: dict[int, PassRecord] = {}
    with remembering():
        while True:
            attempt = _attempt(passes, module, failed, keep_stages)
            if attempt is not None:
                return attempt


def _attempt(
    passes: Sequence[Pass], module: GraphModule, failed: dict[int, PassRecord], keep_stages: bool
) -> Rewritten | None:
    """Run all passes but those that ``failed``; None, and one more of them, where one fails."""
    work = duplicate(module)
    for part in graphs_of(work):
        # Bodies of checkpoints have unused results, which would count as uses of what a match erases.
        drop_dead(part.graph)
    records: list[PassRecord] = []
    stages: list[tuple[str, GraphModule]] = []
    for index, fusion in enumerate(passes):
        if index in failed:
            records.append(failed[index])
            continue
        start = time.perf_counter()
        try:
            applied = fusion.over(work)
        except Exception as error:
            log.warning("pass %s failed and was left out: %s", fusion.name, error, exc_info=True)
            seconds, reason = time.perf_counter() - start, f"{type(error).__name__}: {error}"
            failed[index] = PassRecord(fusion.name, (), (), seconds, reason)
            return None
        records.append(_record(fusion, applied, time.perf_counter() - start))
        if applied.sites:
            stages.append((fusion.name, duplicate(work) if keep_stages else work))
    if not stages:
        return Rewritten(module, records, [])
    drop_unread_graphs(work)
    last = (stages[-1][0], work)
    return Rewritten(work, records, [*stages[:-1], last] if keep_stages else [last])


def _record(fusion: Pass, applied: Applied, seconds: float) -> PassRecord:
    matches = count_places(applied.sites)
    misses = count_misses(
        MissRecord(miss.rewrite.name, miss.pattern_line, miss.model_line, miss.reason)
        for miss in applied.misses
    )
    log.debug("pass %s: %d rewrites, %d misses", fusion.name, len(applied.sites), len(applied.misses))
    return PassRecord(fusion.name, matches, misses, seconds, None)
