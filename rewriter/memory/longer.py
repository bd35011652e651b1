"""A planned program that is planned anew, not compiled anew, when a batch is longer than its plan holds for.

What costs minutes of a first step does not depend on the length: tracing, matching, and compiling stages for
symbolic lengths. What does is which ways are chosen, seconds of search. So a longer batch is planned for when
it comes, and what the new plan runs and is not compiled yet is compiled. Shorter batches keep the plan that
they had, which is no slower than one for more. Each plan holds for an eighth more tokens than the one before,
if that fits, so that lengths that creep up are not planned for at every step. Where a program holds a number
for each pair of tokens, as a dense mask has, a plan does not hold for longer sequences either, however few.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rewriter.memory.budgets import Budgets
from rewriter.memory.growth import Growth
from rewriter.memory.plan import Infeasible
from rewriter.memory.planned import PlannedProgram
from rewriter.saved_hooks import without_saved_hooks

# A note begins so, of which a report has the last.
PLANNED_ANEW = "memory: planned anew, and not compiled anew,"
# Tokens that a plan holds for, over those of the one before.
_STEP = 1.125


@dataclass(frozen=True, eq=False)
class Longer:
    """How a program is planned for longer batches.

    Attributes:
        tokens: of a call, from its inputs.
        length: of a call's sequences, from its inputs.
        here: tokens that the program was compiled with.
        length_here: of the sequences that it was compiled with.
        growth: how many times the tokens here the first plan holds for.
        reach: how many times those what is compiled serves.
        budgets: to plan within a call of these inputs, as they are then.
        chosen: the plan within budgets.
        at_worst: the same for a batch that is there, whatever it takes where no budget was asked for.
        lengthened: how many times as long the sequences of so many times the tokens are.
        pairs: whether bytes go by the length of sequences, too.
    """

    tokens: Callable[[Sequence[Any]], int]
    length: Callable[[Sequence[Any]], int]
    here: int
    length_here: int
    growth: float
    reach: float
    budgets: Callable[[Sequence[Any]], Budgets]
    chosen: Callable[[Budgets], PlannedProgram]
    at_worst: Callable[[Budgets], PlannedProgram]
    lengthened: Callable[[float], float] = float
    pairs: bool = False

    def planned_for(self, inputs: Sequence[Any], before: float) -> tuple[float, PlannedProgram]:
        """A plan for as many tokens as ``inputs`` have or more, and for how many.

        The one before held for ``before``.

        Raises:
            Infeasible: no plan for so many stays within the budgets.
        """
        given, tokens = self.budgets(inputs), self.tokens(inputs)
        length = self.length(inputs) / self.length_here

        def budgets(most: float) -> Budgets:
            # More tokens than are there now are taken for longer sequences, if their length varies.
            return replace(given, growth=Growth(most / self.here, length * self.lengthened(most / tokens)))

        most = max(tokens, min(before * _STEP, self.here * self.reach))
        try:
            return most, self.chosen(budgets(most))
        except Infeasible:
            return tokens, self.at_worst(budgets(tokens))


class PlannedByLength:
    """The code of a planned program, called with its inputs.

    Args:
        run: of the first plan.
        linked: a plan's code, and the plan that it follows.
        tell: told each plan.
    """

    def __init__(
        self,
        longer: Longer,
        run: Callable,
        linked: Callable[[PlannedProgram], tuple[Callable, PlannedProgram]],
        tell: Callable[[PlannedProgram], None],
    ):
        self._longer, self._linked, self._tell = longer, linked, tell
        # Tokens and lengths that each plan holds for, and its code, in the order in which they were made.
        tokens, length = longer.here * longer.growth, longer.length_here * longer.lengthened(longer.growth)
        self._plans: list[tuple[float, float, Callable]] = [(round(tokens, 3), round(length, 3), run)]

    def __call__(self, *inputs: Any) -> Any:
        """Raises Infeasible, before any work, where no plan for so many tokens stays within the budgets."""
        tokens = self._longer.tokens(inputs)
        length = self._longer.length(inputs) if self._longer.pairs else 0
        run = next((run for most, long, run in self._plans if tokens <= most and length <= long), None)
        return (run or self._planned_for(inputs))(*inputs)

    def _planned_for(self, inputs: Sequence[Any]) -> Callable:
        tokens, length = self._longer.tokens(inputs), self._longer.length(inputs)
        with without_saved_hooks():
            most, planned = self._longer.planned_for(inputs, min(self._plans[-1][0], tokens))
            run, planned = self._linked(planned)
        self._plans.append((most, round(length * self._longer.lengthened(most / tokens), 3), run))
        note = f"{PLANNED_ANEW} for batches of up to {int(most):,} tokens"
        self._tell(replace(planned, notes=(*planned.notes, note)))
        return run
