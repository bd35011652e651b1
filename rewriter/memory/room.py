"""Whether a step fits what the device has free, with everything kept: what decides if there is a plan at all.

Most steps fit by far, and are compiled as if there were no planner: that they do is seen from the sizes of
the values in the graph, in milliseconds. All that the forward makes, half as much again for what operations
save inside, twice the largest region's (the gradients of one region's values live at a time, and what they
are computed from) and what kernels need is meant to be more than is ever there at once; it is no proof. Where
that is too much, the planner's own number decides, in seconds. To fit is to leave the allocator what a plan
leaves it: a step that does not is planned.

A graph of symbolic lengths fits up to some length: a guard sends longer batches back to the compiler, and the
question is asked again. Graphs without gradients keep nothing, and are not asked about.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from rewriter.canonical import value_of
from rewriter.memory.budgets import Budgets, budgets, device_of, free_bytes
from rewriter.memory.costs import value_bytes
from rewriter.memory.crowding import roomy_bytes
from rewriter.memory.growth import Growth
from rewriter.memory.lengths import counts_pairs, growth_of, hold_to
from rewriter.memory.operations import int_hint
from rewriter.nested import graphs_of
from rewriter.regions.program import Program
from rewriter.size_text import size_text

if TYPE_CHECKING:
    from rewriter.memory.plan import MemoryPlan

# Logits in chunks, attention's sums in fp32, and the like.
_INSIDE_KERNELS = 1 << 30
# Times what there is.
_MUCH = 4
# A packed 4-bit weight in 16 bit.
_UNPACKED = 4


@dataclass(frozen=True)
class Need:
    """Bytes of a step, in the order of ``budgets``.

    Attributes:
        static: there all the time.
        beside: the most that there is beside that.
        usable: what tensors may take, less what is left to the allocator.
    """

    static: int
    beside: int
    usable: int

    @classmethod
    def of(cls, plan: "MemoryPlan") -> "Need":
        problem = plan.problem
        return cls(problem.static, plan.peak - problem.static, problem.roomy)

    @property
    def fits(self) -> bool:
        return self.static + self.beside <= self.usable

    def growth(self, program: Program, counted: float) -> float:
        """How many times the tokens at hand would fit: bytes grow with them, those of pairs of them squared.

        Args:
            program: what needs them; which share of them is of pairs is as in what its forward makes.
            counted: how many times the tokens at hand ``beside`` is of, all taken to grow with them.
        """
        pairs = _share_of_pairs(program)
        alone = 1 - pairs
        room = (self.usable - self.static) * counted * (alone + pairs * counted) / max(self.beside, 1)
        return max(2 * room / (alone + sqrt(alone * alone + 4 * pairs * max(room, 0))), 1.0)


def fits_unplanned(
    program: Program,
    example_inputs: Sequence[Any],
    host_budget: int | float | None,
    max_tokens: int | None,
    notes: list[str],
) -> bool:
    """Whether the step fits what is free with everything kept, as it is compiled without a plan.

    Args:
        max_tokens: batches of so many have to fit, where lengths vary.
        notes: told the two sizes that decided.
    """
    device = device_of(example_inputs)
    if free_bytes(device) is None or not _is_trained(example_inputs):
        return True
    given = budgets(program, None, host_budget, device)
    growth = growth_of(program, max_tokens)
    beside = int(most_bytes(program) * _times(program, growth))
    need = Need(given.static, beside, roomy_bytes(given.device))
    if not need.fits:
        need = _planners(program, replace(given, growth=growth), device)
    size = f"{size_text(need.static + need.beside)} of the {size_text(need.usable)} that may be filled"
    if not need.fits:
        notes.append(f"memory: planned, since keeping everything takes {size}")
        return False
    notes.append(f"memory: nothing to plan, a step takes at most {size}")
    hold_to(program, need.growth(program, growth.tokens))
    return True


def fits_twice(
    module: GraphModule,
    example_inputs: Sequence[Any],
    memory_budget: int | float,
    host_budget: int | float | None,
) -> bool:
    """Whether a budget has room for all that a step makes, and for a recording of it beside; from sizes."""
    need = _from_sizes(module, example_inputs, memory_budget, host_budget)
    return need.static + 2 * need.beside <= need.usable


def told_unplanned(
    module: GraphModule,
    example_inputs: Sequence[Any],
    memory_budget: int | float,
    host_budget: int | float | None,
    reason: str,
) -> None:
    """Warn where a graph that cannot be planned, for ``reason``, may take more than the budget."""
    if not _is_trained(example_inputs):
        return
    need = _from_sizes(module, example_inputs, memory_budget, host_budget)
    if not need.fits:
        warnings.warn(
            f"rewriter: memory_budget is not held to, {reason}: by its sizes a step takes at most "
            f"{size_text(need.static + need.beside)}, of the budget {size_text(need.usable)} may be filled.",
            stacklevel=2,
        )


def _from_sizes(
    module: GraphModule,
    example_inputs: Sequence[Any],
    memory_budget: int | float,
    host_budget: int | float | None,
) -> Need:
    given = budgets(Program(module, ()), memory_budget, host_budget, device_of(example_inputs))
    made = sum(map(made_bytes, graphs_of(module)))
    return Need(given.static, made * 3 // 2 + _INSIDE_KERNELS, roomy_bytes(given.device))


def _is_trained(example_inputs: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in example_inputs)


def _planners(program: Program, given: Budgets, device: torch.device) -> Need:
    # Scheduling imports more of PyTorch than a step that fits needs.
    from rewriter.memory.machine import machine_for
    from rewriter.memory.planned import kept_plan

    return Need.of(kept_plan(program, given, machine_for(device)))


def cannot_keep_all(program: Program, example_inputs: Sequence[Any], given: Budgets) -> bool:
    """Whether a step makes so many times what there is that the planner need not be asked about keeping all.

    Backwards read more than a quarter of it. Where one would not, the planner is asked later, of layers that
    begin with their own norms.
    """
    made = {region: made_bytes(region.module) for region in program.regions}
    total = sum(made[call.region] for call in program.calls) * _times(program, given.growth)
    return _is_trained(example_inputs) and total > _MUCH * max(given.device - given.static, 0)


def most_bytes(program: Program) -> int:
    """More than a step takes beside weights, gradients and optimizer states, everything kept; from sizes."""
    made = {region: made_bytes(region.module) for region in program.regions}
    inside = {region: sum(map(made_bytes, graphs_of(region.module))) for region in program.regions}
    values = map(value_of, program.source.graph.find_nodes(op="placeholder"))
    weights = [x for x in values if isinstance(x, Tensor) and x.dim() > 1]
    # Under autocast, each fp32 weight is kept in 16 bit.
    cast = sum(value_bytes(x) // 2 for x in weights if x.dtype == torch.float32)
    largest = max(map(value_bytes, weights), default=0) * _UNPACKED
    kept = sum(made[call.region] for call in program.calls)
    return kept * 3 // 2 + 2 * max(inside.values()) + cast + largest + _INSIDE_KERNELS


def _times(program: Program, growth: Growth) -> float:
    """How many times as much as at hand a batch of that ``growth`` takes, if all that a step takes grows."""
    return growth.tokens * (1 + _share_of_pairs(program) * (growth.length - 1))


def _share_of_pairs(program: Program) -> float:
    pairs = counts_pairs(program)
    made = {r: (made_bytes(r.module), made_bytes(r.module, counts=pairs)) for r in program.regions}
    whole, of_pairs = (sum(made[call.region][i] for call in program.calls) for i in (0, 1))
    return of_pairs / max(whole, 1)


def made_bytes(
    module: GraphModule,
    amount: Callable[[Any], int] = int_hint,
    counts: Callable[[Tensor], bool] = lambda _: True,
) -> int:
    """Bytes of the memory that a graph's own operations make, each once: views add nothing.

    Args:
        amount: a number of bytes, which may be symbolic, as one that is not.
        counts: which values are asked for.
    """
    taken = {_storage(value_of(n)) for n in module.graph.find_nodes(op="placeholder")}
    total = 0
    for node in module.graph.nodes:
        if node.op in ("placeholder", "output", "get_attr"):
            continue
        for value in tree_leaves(value_of(node)):
            if isinstance(value, Tensor) and (key := _storage(value)) not in taken:
                taken.add(key)
                total += amount(value.untyped_storage().nbytes()) if counts(value) else 0
    return total


def _storage(value: Any) -> int | None:
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None
