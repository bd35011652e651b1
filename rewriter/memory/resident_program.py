"""A program that keeps everything to one of which some layers' weights stay dequantised."""

import itertools
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace

import torch
from torch import Tensor

from rewriter.memory.plan import MemoryPlan
from rewriter.memory.planned import PlannedProgram
from rewriter.memory.resident_choice import Offer, staying
from rewriter.memory.resident_weights import Given, Lasting, dequantised_source, given_dequantised, lasting
from rewriter.memory.residents import Wanted, residents_beside
from rewriter.memory.walk import Link
from rewriter.memory.weights_ahead import buffer_bytes
from rewriter.nested import duplicate
from rewriter.regions.program import Program, Region, RegionCall


def with_residents(
    found: PlannedProgram, machine: Link, device: torch.device, fits: Callable[[MemoryPlan], bool]
) -> PlannedProgram:
    """``found``, which keeps everything, with the weights that stay in what it leaves free; or as it is.

    Args:
        fits: whether a plan leaves what it should.
    """
    program = found.program
    if not torch.is_grad_enabled() or not any(_is_trained(region) for region in program.regions):
        return found
    weights = {
        region: some
        for region, some in weights_of(program).items()
        # Those of another device are not in this one's budget.
        if all(weight.device == device for weight in some)
    }
    offers = [offer(weights.get(call.region, ()), machine) for call in program.calls]
    chosen = staying(found.plan, offers, fits)
    if chosen is None:
        return found
    program, wanted = _rewritten(program, chosen.calls, weights)
    make = residents_beside(chosen.plan.problem.device_budget - chosen.plan.peak, device, wanted)
    note = chosen.note(offers)
    return replace(found, program=program, plan=chosen.plan, notes=(*found.notes, note), residents=make)


def _is_trained(region: Region) -> bool:
    return any(isinstance(x, Tensor) and x.requires_grad for x in region.inputs)


def weights_of(program: Program) -> dict[Region, list[Lasting]]:
    """Of each region that has some, the weights that could stay."""
    return {region: some for region in program.regions if (some := lasting(program, region))}


def offer(weights: Sequence[Lasting], machine: Link) -> Offer | None:
    """What it takes and spares if all of a call's ``weights`` stay; None where there are none."""
    if not weights:
        return None
    # As a step's other kernels are foreseen: none is shorter than a launch.
    each = [max((w.packed_bytes + w.nbytes) / machine.bandwidth, machine.launch_seconds) for w in weights]
    seconds = [[n * one for n in w.uses] for w, one in zip(weights, each, strict=True)]
    forward, backward = (sum(some) for some in zip(*seconds, strict=True))
    return Offer(buffer_bytes(w.nbytes for w in weights), forward, backward)


def _rewritten(
    program: Program, chosen: Set[int], weights: Mapping[Region, Sequence[Lasting]]
) -> tuple[Program, list[Wanted]]:
    """The program whose ``chosen`` calls are given their weights, and what they are given."""
    source = duplicate(program.source)
    same = dict(zip(program.source.graph.nodes, source.graph.nodes, strict=True))
    inputs = list(program.source.graph.find_nodes(op="placeholder"))
    places, last = {node: i for i, node in enumerate(inputs)}, same[inputs[-1]]
    taken = {n.name for n in source.graph.nodes} | {r.name for r in program.regions}
    given: dict[Region, Given] = {}
    calls, wanted = [], []
    for i, call in enumerate(program.calls):
        nodes = tuple(same[n] for n in call.inputs)
        region = call.region
        if i in chosen:
            if region not in given:
                name = _name(program, region, chosen, taken)
                given[region] = given_dequantised(region, weights[region], name)
            added = []
            for weight in weights[region]:
                last = dequantised_source(call, weight, source.graph, last)
                added.append(last)
                takes = tuple(places[call.inputs[place]] for place in weight.takes)
                matrix = None if weight.matrix is None else places[call.inputs[weight.matrix]]
                wanted.append(Wanted(weight, takes, matrix))
            nodes = (*(nodes[place] for place in given[region].left), *added)
            region = given[region].region
        calls.append(RegionCall(region, nodes, tuple(same[n] for n in call.outputs)))
    return Program(source, tuple(calls)), wanted


def _name(program: Program, region: Region, chosen: Set[int], taken: Set[str]) -> str:
    """Its own, where all of its calls are ``chosen``."""
    if all(i in chosen for i, call in enumerate(program.calls) if call.region is region):
        return region.name
    names = (f"{region.name}_{i}" for i in itertools.count(2))
    return next(name for name in names if name not in taken)
