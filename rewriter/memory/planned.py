"""A program under a memory budget: which of its layers run how, and the program that says so.

The planner chooses for every call among the ways to run its region (``ways.py``).
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from rewriter.memory.applied import StagedRegion, applied
from rewriter.memory.arena import HostArena
from rewriter.memory.at_once import AtOnceUncompiled
from rewriter.memory.budgets import Budgets
from rewriter.memory.choices import StagedChoice, StagesOnce
from rewriter.memory.head_ahead import HeadBegun, begun_ahead, head_away, with_head_ahead, with_head_waiting
from rewriter.memory.in_host import HEAD_COMES, over_the_bus, packed_in_host_memory
from rewriter.memory.made_once import made_once
from rewriter.memory.plan import Infeasible, MemoryPlan, Part, Problem
from rewriter.memory.planner import least, roomy
from rewriter.memory.residents import Residents, WithResidents, residents_beside
from rewriter.memory.spare import Spare, spare_of
from rewriter.memory.transfer import Transfers
from rewriter.memory.walk import Link
from rewriter.memory.ways import Aside, Ways
from rewriter.regions.program import Program, Region, RegionCall

if TYPE_CHECKING:
    from rewriter.memory.longer import Longer

# Of host memory, for blocks that begin at multiples of 512 bytes.
_SPARE = 1 << 20


@dataclass(frozen=True, eq=False)
class PlannedProgram:
    """A program whose regions are those of ``program`` under a plan.

    Attributes:
        program: each region once for every way in which it runs.
        staged: those that run in stages; the others are compiled as they are.
        plan: what was chosen, and what it comes to.
        notes: why layers could not be run in stages.
        transfers: to host memory and back, made when they are first asked for.
        choosing: what it was chosen from; None where there was nothing to choose.
        longer: how it is planned for longer batches; None where those are compiled anew.
        head: how the copy of a head's weight begins ahead; None where the head waits for it, or has it.
        residents: makes what the program takes after its inputs, weights that stay dequantised; without any,
            what gives up those of other programs where this one needs their room.
    """

    program: Program
    staged: Mapping[Region, StagedRegion]
    plan: MemoryPlan
    notes: tuple[str, ...]
    transfers: Callable[[], Transfers]
    choosing: "Choosing | None" = None
    longer: "Longer | None" = None
    residents: Callable[[], Residents] | None = None
    head: HeadBegun | None = None

    @cached_property
    def layers(self) -> dict[StagesOnce, str]:
        """What runs in stages, once for all regions that share them, by the first one's name."""
        found: dict[StagesOnce, str] = {}
        for region, staged in self.staged.items():
            found.setdefault(staged.stages, region.name)
        return found

    @property
    def whole(self) -> list[Region]:
        """The regions that are compiled as they are."""
        return [r for r in self.program.regions if r not in self.staged and not self._begins_head(r)]

    @property
    def compilations(self) -> int:
        """How many are compiled: layers in stages, and regions as they are."""
        return len(self.layers) + len(self.whole)

    def _begins_head(self, region: Region) -> bool:
        return self.head is not None and region is self.head.region

    def without(self, stages: StagesOnce, error: Exception) -> "PlannedProgram":
        """Planned anew where ``stages`` cannot be compiled; the notes say why.

        No later plan of the program runs them either. Where a graph is at fault that does at once what
        another does in parts, that is all that is given up.
        """
        assert self.choosing is not None
        kind, refused = self.layers[stages], stages.at_fault(error)
        self.choosing.ways.refuse(refused)
        found = self.choosing.chosen()
        reason = error.reason if isinstance(error, AtOnceUncompiled) else error
        what = f"its stages{refused.words}"
        why = f"{kind} runs in other ways, compiling {what} failed: {type(reason).__name__}: {reason}"
        notes = (note for note in self.notes if not note.startswith(HEAD_COMES))
        return replace(found, notes=(*notes, why, *found.notes), longer=self.longer)

    def host_memory(self) -> AbstractContextManager:
        """Have what the plan offloads in one piece: grown bit by bit, it would leave a rest in each.

        It is locked while the caller compiles within, and given back where that fails.
        """
        if not self.plan.hosted:
            return nullcontext()
        return self.transfers().arena.reserved(self.plan.hosted + _SPARE)

    def announced(self, run: Callable) -> Callable:
        """``run``, the linked program, that first says what is to come.

        Which layers' weights come from host memory when, and what device memory each layer leaves free.
        Weights that stay dequantised are given to it.
        """
        run = self._told(run)
        if self.head is not None:
            run = self.head.within(run)
        return run if self.residents is None else WithResidents(run, self.residents())

    def _told(self, run: Callable) -> Callable:
        places = {n: i for i, n in enumerate(self.program.source.graph.find_nodes(op="placeholder"))}
        layers = [
            [places[call.inputs[i]] for i in staged.way.in_host.places(call.region)]
            for call in self.program.calls
            if (staged := self.staged.get(call.region)) and staged.way.in_host.ahead
        ]
        spares = self._spares()
        if not layers and not spares:
            return run

        def program(*inputs: Any) -> Any:
            transfers = self.transfers()
            forward = transfers.expect(spares)
            if layers:
                transfers.weights.begin([[inputs[i] for i in layer] for layer in layers])
            try:
                return run(*inputs)
            except BaseException:
                # The exception may be kept, and with its frames what layers sent.
                transfers.forget(forward)
                raise

        return program

    def _spares(self) -> list[Spare]:
        """Of the calls that bound copies, in order, what is spare for those."""
        calls = [call for call in self.program.calls if not self._begins_head(call.region)]
        bounds = [_bounds(call.region, self.staged.get(call.region)) for call in calls]
        window = max((staged.way.window for staged in self.staged.values()), default=0)
        return spare_of(self.plan, bounds, window, None if self.head is None else self.head.taken)


def _bounds(region: Region, staged: StagedRegion | None) -> bool:
    """Whether a call of ``region`` bounds copies; one without gradients has none to send."""
    trained = any(isinstance(x, torch.Tensor) and x.requires_grad for x in region.inputs)
    return trained and staged is not None


def planned(program: Program, given: Budgets, machine: Link, device: torch.device) -> PlannedProgram:
    """Choose for every call of ``program`` how it runs: as without a budget where everything fits.

    Raises:
        Infeasible: no plan stays within the budgets.
    """
    in_host = packed_in_host_memory(program, device)
    ways = Ways(program, machine, in_host, given.reach)
    # Layers that run as without a budget wait for weights in host memory: there is more to choose then.
    if not in_host and (found := _everything_kept(program, ways, given, device)):
        return found
    found = Choosing(program, ways, given, machine, device).chosen()
    return replace(found, notes=(*ways.notes, *found.notes))


@dataclass(frozen=True, eq=False)
class Choosing:
    """The ways to run the regions of ``program``, which all plans of it share, and the budgets of one."""

    program: Program
    ways: Ways
    given: Budgets
    machine: Link
    device: torch.device

    def chosen(self) -> PlannedProgram:
        """The fastest plan; where ways were refused and nothing fits, the smallest, and a note of it.

        Raises:
            Infeasible: no plan stays within the budgets.
        """
        given, notes, by_aside = self.given, (), self.ways.all(self.given.growth)
        problems = [_problem(self.program, ways, given, aside) for aside, ways in by_aside.items()]
        try:
            found = roomy(problems)
        except Infeasible as error:
            if not self.ways.refused:
                raise
            found, notes = least(problems[0]), (f"memory: this step may run out of it. {error}",)
        asked = zip(by_aside.values(), problems, strict=True)
        ways = next(w for w, problem in asked if problem.parts is found.problem.parts)
        return self.following(found, ways, notes)

    def following(
        self, found: MemoryPlan, ways: Mapping[Region, Sequence[StagedChoice]], notes: tuple[str, ...] = ()
    ) -> PlannedProgram:
        """The program under a plan whose choices are among ``ways``; a head's copy may change one of them."""
        head = head_away(self.program, self.device)
        ahead = None if head is None else begun_ahead(found, head, self.machine)
        found = ahead or found
        program, staged = applied(self.program, ways, found)
        transfers = _transfers(self.given, self.device)
        planned = PlannedProgram(program, staged, found, notes, transfers, self)
        if head is not None:
            told = with_head_waiting(planned, head)
            planned = told if ahead is None else with_head_ahead(planned, head, self.device)
        fills = found.hosted > 0 or planned.head is not None
        most = max(found.problem.roomy, found.peak) if fills else found.peak
        none = _no_residents(found, most, self.device)
        return replace(planned, residents=none)


def everything_kept(
    program: Program, given: Budgets, machine: Link, device: torch.device
) -> PlannedProgram | None:
    """``program`` as it runs without a budget; None where that does not fit, or waits for weights.

    It is held to what a plan is held to: where it would leave the allocator too little, a plan that computes
    a little again is as fast but for a hundredth, and ``roomy`` weighs that against filling the budget.
    """
    if packed_in_host_memory(program, device):
        return None
    return _everything_kept(program, Ways(program, machine), given, device)


def _everything_kept(
    program: Program, ways: Ways, given: Budgets, device: torch.device
) -> PlannedProgram | None:
    found = _kept_plan(program, ways, given)
    if not found.leaves_room:
        return None
    transfers, none = _transfers(given, device), _no_residents(found, found.peak, device)
    notes = tuple(over_the_bus(program.source, device))
    return PlannedProgram(program, {}, found, notes, transfers, residents=none)


def kept_plan(program: Program, given: Budgets, machine: Link) -> MemoryPlan:
    """The plan that keeps everything, whether it fits or not."""
    return _kept_plan(program, Ways(program, machine), given)


def _kept_plan(program: Program, ways: Ways, given: Budgets) -> MemoryPlan:
    problem = _problem(program, ways.kept(given.growth), given, Aside())
    return MemoryPlan(problem, tuple(part.choices[0] for part in problem.parts))


def _transfers(given: Budgets, device: torch.device) -> Callable[[], Transfers]:
    return functools.partial(transfers_of, str(device), given.host)


def _no_residents(found: MemoryPlan, most: int, device: torch.device) -> Callable[[], Residents]:
    """Leaves those of other programs what a step that takes ``most`` bytes leaves of the budget."""
    return residents_beside(found.problem.device_budget - most, device)


def _problem(
    program: Program, ways: Mapping[Region, Sequence[StagedChoice]], given: Budgets, aside: Aside
) -> Problem:
    parts, host = parts_of(program.calls, ways), max(given.host - _SPARE, 0)
    return Problem(parts, given.static, given.device, host, window=aside.nbytes)


def parts_of(calls: Sequence[RegionCall], ways: Mapping[Region, Sequence[StagedChoice]]) -> tuple[Part, ...]:
    """What the planner decides for each call; calls of one region share their choices."""
    choices = {region: tuple(way.choice for way in found) for region, found in ways.items()}
    return tuple(
        Part(f"{call.region.name} {i}", call.region.name, choices[call.region])
        for i, call in enumerate(calls)
    )


@made_once
def transfers_of(device: str, host_budget: int) -> Transfers:
    """The process's own to and from ``device``: all graphs share its host memory."""
    return Transfers(HostArena(host_budget, device=torch.device(device)), device)
