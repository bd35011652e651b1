"""What the memory planner is asked and what it answers: plain numbers, and no tensors.

A step runs *parts* (instances of region classes) forward in order and backward in reverse. For each part one
of its class's *choices* says what stays on the device between the two, what waits in host memory, what is
recomputed, and in how many tiles it runs. All that a choice costs is in its numbers, so that planning knows
neither models nor devices, and any card can be planned on any machine.

Memory at the two moments of part i, where j runs over the parts before it::

    device(forward i)  = static + window + sum(saved j) + flight (i-1) + forward peak i
    device(backward i) = static + window + sum(saved j) + flight (i-1) + backward peak i

Copies run one part ahead in both directions: while part i runs forward, the source of part i-1's offload may
still be on the device, and while part i runs backward, the reload for part i-1 is already there. All that it
offloads is in flight then, unless a *window* is set aside for copies under way: what leaves and returns in
tiles is never there beyond it, and of the rest what exceeds it is in flight.

Time, as the same two overlaps give it, and as the planner minimises it::

    sum over i of max(forward i, offload (i-1)) + max(backward i, reload (i-1))
    + offload and reload of the last part

A copy hides behind the computation of the one part that runs meanwhile, and what does not hide is waited for.
The copies of the last part have nothing to hide behind: its backward begins when its forward ends.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import accumulate
from math import isfinite

from rewriter.memory.crowding import crowded, in_pieces, roomy_bytes, spacious_bytes


class Infeasible(ValueError):
    """No plan stays within the budgets; raised before any work.

    Attributes:
        least_device: the least device budget, in bytes, that would do under the same host budget; None where
            the host budget is at fault.
        least_host: the host bytes that the plan of ``least_device`` takes, or at least takes where the host
            budget is at fault.
        at_end: the device bytes that it takes at the last part's forward, which is the head's.
    """

    def __init__(self, message: str, least_device: int | None, least_host: int, at_end: int = 0):
        super().__init__(message)
        self.least_device = least_device
        self.least_host = least_host
        self.at_end = at_end

    def least_with(self, spared: int, back: int) -> int:
        """A device budget that would do with less static bytes, some of which the head's forward has back."""
        assert self.least_device is not None
        return max(self.least_device - spared, self.at_end - spared + back)


@dataclass(frozen=True)
class Choice:
    """One way to run one class of parts. Bytes are whole numbers, seconds floats; none is negative.

    Attributes:
        name: what it does, for people: "keep h, out · recompute q, k, v · tiles 8192".
        saved: bytes on the device from the part's forward to its backward.
        hosted: bytes in host memory from the part's forward to its backward.
        forward_peak: bytes on the device at the worst moment of the forward, beyond what earlier parts saved:
            inputs, results and its own ``saved`` included, as far as they are there at that moment.
        backward_peak: the same for the backward, what has been reloaded for it included.
        forward_seconds: computation of the forward; or of the next part's weights, which come meanwhile, the
            copy, if that takes longer.
        backward_seconds: computation of the backward, with what it recomputes.
        offload_seconds: copying ``hosted`` to the host, which overlaps the next part's forward.
        reload_seconds: copying it back, and weights that come ahead from host memory, which overlaps the
            backward of the part that runs before this one's.
        flight: of ``hosted``, what is on the device while a neighbour runs, beyond the problem's window; all
            of it where it is not said.
        quicker: the same in less time, for more memory while it runs: with weights made once, heads at once.
    """

    name: str
    saved: int
    hosted: int
    forward_peak: int
    backward_peak: int
    forward_seconds: float
    backward_seconds: float
    offload_seconds: float = 0.0
    reload_seconds: float = 0.0
    flight: int = -1
    quicker: tuple["Choice", ...] = ()

    def __post_init__(self):
        if self.flight == -1:
            object.__setattr__(self, "flight", self.hosted)
        for field in fields(self)[1:-1]:
            value = getattr(self, field.name)
            if not isfinite(value) or value < 0:
                raise ValueError(f"choice {self.name!r}: {field.name} is {value!r}, not a finite number >= 0")
            if field.type is int and not isinstance(value, int):
                raise ValueError(f"choice {self.name!r}: {field.name} is {value!r}, not whole bytes")

    @property
    def peak(self) -> int:
        """Bytes at the worse of both moments, beyond what earlier parts saved and what is in flight."""
        return max(self.forward_peak, self.backward_peak)


@dataclass(frozen=True)
class Part:
    """One call of a region: ``name`` is its own, ``kind`` its class's; parts of a kind have equal choices."""

    name: str
    kind: str
    choices: tuple[Choice, ...]

    def __post_init__(self):
        if not self.choices:
            raise ValueError(f"part {self.name!r} has no choices: there must be at least one way to run it")


@dataclass(frozen=True)
class Problem:
    """What to plan.

    Attributes:
        parts: in the order of the forward.
        static: bytes on the device all the time: weights, gradients, optimizer states.
        device_budget: bytes that no moment may exceed, ``static`` included.
        host_budget: bytes that all offloads together may take.
        name: what needs the memory, for messages: "32 layers at 65,536 tokens".
        static_name: what ``static`` is, for messages.
        window: bytes set aside on the device for copies under way, weights that come ahead among them.
    """

    parts: tuple[Part, ...]
    static: int
    device_budget: int
    host_budget: int
    name: str = "this step"
    static_name: str = "weights and optimizer states"
    window: int = 0

    def __post_init__(self):
        if not self.parts:
            raise ValueError("a problem without parts: there is nothing to plan")
        for name in ("static", "device_budget", "host_budget", "window"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} is {value!r}, not whole bytes >= 0")

    @property
    def roomy(self) -> int:
        """Of the device budget, what a plan fills where it can, and leaves the rest to the allocator."""
        return roomy_bytes(self.device_budget)

    @property
    def spacious(self) -> int:
        """The same of a plan that offloads, whose copies leave the allocator's memory in pieces."""
        return spacious_bytes(self.device_budget, self.static)


@dataclass(frozen=True)
class Moment:
    """Bytes in use at the worst moment of one part's forward or backward.

    ``static``, ``earlier`` (saved by the parts before), ``flight`` (copies under way) and ``own`` sum up to
    ``device``.
    """

    part: int
    backward: bool
    name: str
    static: int
    earlier: int
    flight: int
    own: int
    host: int

    @property
    def device(self) -> int:
        return self.static + self.earlier + self.flight + self.own


@dataclass(frozen=True)
class MemoryPlan:
    """One choice for each part, and what it comes to.

    Attributes:
        slack: seconds by which another plan within the budgets might at most be faster; 0 where this one is
            proven to be the fastest.
        hidden: seconds that a part waits for by the formula and that pass beside the part before it: those of
            a head's copy (``head_ahead.py``).
    """

    problem: Problem
    choices: tuple[Choice, ...]
    slack: float = 0.0
    hidden: float = 0.0

    @cached_property
    def seconds(self) -> float:
        """Of forward and backward together, by the module's formula: what the planner minimises."""
        return seconds(self.choices) - self.hidden

    @cached_property
    def moments(self) -> tuple[Moment, ...]:
        """The forward of every part, then the backward of every part in reverse."""
        return moments(self.problem, self.choices)

    @cached_property
    def worst(self) -> Moment:
        """The first of the moments that need the most device memory."""
        return max(self.moments, key=lambda moment: moment.device)

    @property
    def peak(self) -> int:
        """Device bytes at the worst moment."""
        return self.worst.device

    @property
    def leaves_room(self) -> bool:
        """Whether some of the budget is left to the allocator."""
        return self.peak <= self.problem.roomy

    @property
    def limit(self) -> int:
        """Device bytes to which copies that begin early, or end late, may fill a moment that takes less.

        The allocator keeps its part of these moments, also where the worst one takes of it.
        """
        return self.problem.spacious if self.hosted else self.problem.roomy

    @property
    def foreseen_seconds(self) -> float:
        """``seconds``, with the allocator's waits where too little of the budget is left to it."""
        if not self.leaves_room:
            return crowded(self.seconds)
        return self.seconds if self.peak <= self.limit else in_pieces(self.seconds)

    @property
    def beside(self) -> int:
        """Of the peak, what is not there all the time."""
        return self.peak - self.problem.static

    @property
    def left(self) -> int:
        """Device bytes that a plan which leaves the allocator its part does not use."""
        return max(self.limit - self.peak, 0)

    @property
    def where(self) -> str:
        """Name of the worst moment: "backward of layer 31"."""
        return self.worst.name

    @property
    def hosted(self) -> int:
        """Host bytes, at the turn from forward to backward, when all of them are in use."""
        return sum(choice.hosted for choice in self.choices)

    @cached_property
    def counts(self) -> dict[tuple[str, str], int]:
        """How many parts of each kind take each choice: (kind, name of the choice) to number, in order."""
        names = (
            (part.kind, choice.name) for part, choice in zip(self.problem.parts, self.choices, strict=True)
        )
        return dict(Counter(names))

    def timeline(self) -> list[tuple[str, int, int]]:
        """(name of the moment, device bytes, host bytes), in the order of a step."""
        return [(moment.name, moment.device, moment.host) for moment in self.moments]


def seconds(choices: Sequence[Choice]) -> float:
    """What a step takes: computation, and the copies that do not hide behind it."""
    offloads = [0.0, *(choice.offload_seconds for choice in choices)]
    reloads = [0.0, *(choice.reload_seconds for choice in choices)]
    waits = offloads.pop() + reloads.pop()
    forward = sum(max(c.forward_seconds, copy) for c, copy in zip(choices, offloads, strict=True))
    backward = sum(max(c.backward_seconds, copy) for c, copy in zip(choices, reloads, strict=True))
    return forward + backward + waits


def moments(problem: Problem, choices: Sequence[Choice]) -> tuple[Moment, ...]:
    """Memory at the forward of every part, then at the backward of every part in reverse."""
    earlier = [0, *accumulate(choice.saved for choice in choices)]
    host = [0, *accumulate(choice.hosted for choice in choices)]

    def at(i: int, backward: bool) -> Moment:
        own = choices[i].backward_peak if backward else choices[i].forward_peak
        flight = problem.window + (choices[i - 1].flight if i else 0)
        name = f"{'backward' if backward else 'forward'} of {problem.parts[i].name}"
        in_host = host[i + 1] if backward else host[i]
        return Moment(i, backward, name, problem.static, earlier[i], flight, own, in_host)

    order = range(len(choices))
    return (*(at(i, False) for i in order), *(at(i, True) for i in reversed(order)))
