"""Which layers' frozen 4-bit weights stay dequantised: what a plan that keeps everything does with its room.

Activations come first. Of 8B, a byte of gate and up that is kept spares 5.9 ps of its product again (2 · 4096
operations for 2 bytes, 715 TFLOP/s); a byte of a weight that stays spares two dequantisations, 5 bytes moved
for 2, 0.7 ps at 3.9 TB/s. So nothing stays of weights while the planner would rather keep an activation: the
question is asked of plans that keep all of them.

Whole layers stay, by seconds a byte, the best first, as long as the rest fits. Classes differ in little (the
first layer of a model under adapters dequantises some weights once, not twice), and calls of one class not at
all: what another order could gain is less than one layer's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from rewriter.memory.plan import Choice, MemoryPlan
from rewriter.seconds_text import seconds_text
from rewriter.size_text import size_text

# Of a step's seconds, what has to be gained. Where not all that could stay fits, a class is compiled twice.
_WORTH = 0.001
_WORTH_COMPILING_TWICE = 0.005


@dataclass(frozen=True)
class Offer:
    """What it takes to keep one call's weights dequantised, and the seconds of a step that it spares."""

    nbytes: int
    forward_seconds: float
    backward_seconds: float

    @property
    def seconds(self) -> float:
        return self.forward_seconds + self.backward_seconds


@dataclass(frozen=True)
class Staying:
    """The ``calls`` whose weights stay, by their number, and the plan that has it so."""

    calls: frozenset[int]
    plan: MemoryPlan
    nbytes: int
    seconds: float

    def note(self, offers: Sequence[Offer | None]) -> str:
        """For the report; of the calls that have such weights."""
        count = sum(offer is not None for offer in offers)
        return (
            f"resident: {len(self.calls)} of {count} layers' weights, {size_text(self.nbytes)}, "
            f"{seconds_text(self.seconds)} a step spared: dequantised once, not at each use"
        )


def staying(
    plan: MemoryPlan, offers: Sequence[Offer | None], fits: Callable[[MemoryPlan], bool]
) -> Staying | None:
    """What stays beside ``plan``, which keeps everything; None where nothing fits, or it is not worth it.

    Args:
        offers: of each call; None for one without such weights.
        fits: whether a plan leaves what it should.
    """
    order = [(offer, i) for i, offer in enumerate(offers) if offer is not None and offer.nbytes]
    order.sort(key=lambda pair: (-pair[0].seconds / pair[0].nbytes, pair[1]))
    taken: list[tuple[Offer, int]] = []
    static = plan.problem.static
    for offer, i in order:
        more = static + offer.nbytes
        if fits(replace(plan, problem=replace(plan.problem, static=more))):
            static = more
            taken.append((offer, i))
    seconds = sum(offer.seconds for offer, _ in taken)
    worth = _WORTH if len(taken) == len(order) else _WORTH_COMPILING_TWICE
    if not taken or seconds < worth * plan.seconds:
        return None
    choices = list(plan.choices)
    for offer, i in taken:
        choices[i] = _spared(choices[i], offer)
    found = replace(plan, problem=replace(plan.problem, static=static), choices=tuple(choices))
    return Staying(frozenset(i for _, i in taken), found, static - plan.problem.static, seconds)


def _spared(choice: Choice, offer: Offer) -> Choice:
    return replace(
        choice,
        name=f"{choice.name} · weights dequantised once",
        forward_seconds=max(choice.forward_seconds - offer.forward_seconds, 0.0),
        backward_seconds=max(choice.backward_seconds - offer.backward_seconds, 0.0),
    )
