"""A plan's choices to a program that runs by them: some regions run in stages, the others whole.

Calls of one region that run differently become regions of their own, so that the program's text shows what
the plan does.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from rewriter.memory.choices import StagedChoice, StagesOnce
from rewriter.memory.layer import LayerStages, ScheduledLayer
from rewriter.memory.plan import MemoryPlan
from rewriter.memory.transfer import Transfers
from rewriter.memory.ways import owns_gradient
from rewriter.regions.program import Program, Region, RegionCall


@dataclass(frozen=True, eq=False)
class StagedRegion:
    """How a region of a planned program runs in stages."""

    stages: StagesOnce
    way: StagedChoice
    owns_gradient: bool

    def scheduled(self, stages: LayerStages, transfers: Callable[[], Transfers]) -> ScheduledLayer:
        """What stands for the region, once its stages are compiled."""
        way = self.way
        assert way.schedule is not None
        return ScheduledLayer(
            stages,
            way.schedule,
            way.tile,
            self.stages.layer.shared,
            transfers,
            self.owns_gradient,
            way.in_tiles,
            way.window,
            way.in_host.names if way.in_host.ahead else (),
        )


def applied(
    program: Program,
    ways: Mapping[Region, Sequence[StagedChoice]],
    found: MemoryPlan,
) -> tuple[Program, dict[Region, StagedRegion]]:
    """``program`` under the plan ``found``, whose choices are among ``ways``; and what runs in stages."""
    taken = {n.name for n in program.source.graph.nodes} | {r.name for r in program.regions}
    made: dict[tuple[Region, str], Region] = {}
    staged: dict[Region, StagedRegion] = {}
    calls: list[RegionCall] = []
    for call, choice in zip(program.calls, found.choices, strict=True):
        region, key = call.region, (call.region, choice.name)
        if key not in made:
            name = region.name
            if any(r is region for r, _ in made):
                numbers = (f"{region.name}_{i}" for i in itertools.count(2))
                name = next(n for n in numbers if n not in taken)
                taken.add(name)
            made[key] = Region(name, region.module, region.inputs)
            forms = (form for way in ways[region] for form in (way, *way.quicker))
            way = next(form for form in forms if form.choice.name == choice.name)
            if way.stages is not None:
                staged[made[key]] = StagedRegion(way.stages, way, owns_gradient(program, region))
        calls.append(RegionCall(made[key], call.inputs, call.outputs))
    return replace(program, calls=tuple(calls)), staged
