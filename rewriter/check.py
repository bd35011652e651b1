"""``check(pattern, *example_inputs)``: a proof of a rewrite on examples, before training relies on it.

The pattern's function is captured as a model's code is and must match itself there; its replacement must give
the same results and gradients to rounding, by the criterion of ``rewriter.verify``, and AOTAutograd must be
able to trace it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from rewriter.effects import Effects
from rewriter.lower import lower
from rewriter.match import Miss
from rewriter.nested import duplicate
from rewriter.options import Options
from rewriter.pattern import PatternError, Rewrite
from rewriter.replace import find, put, sweep
from rewriter.search import match
from rewriter.verify import Allowed, run, true_results, unit_of


class CheckError(PatternError):
    """A rewrite that does not match its own pattern, or changes a result; says where they differ."""


@dataclass(frozen=True)
class Compared:
    """One output or gradient: how far it is from fp64, relative to its size."""

    name: str
    error: float
    error_without: float
    limit: float


@dataclass(frozen=True)
class Checked:
    """A rewrite that holds: what it replaces, and how exact it is. Prints as text."""

    pattern: str
    replacement: str
    operations: int
    results: tuple[Compared, ...]

    def __str__(self) -> str:
        lines = [f"{self.pattern}: {self.operations} operations become one call of {self.replacement}"]
        width = max(len(r.name) for r in self.results)
        lines += [
            f"  {r.name:{width}}  error {r.error:.1e}, before {r.error_without:.1e}, allowed {r.limit:.1e}"
            for r in self.results
        ]
        return "\n".join(lines)


def check(pattern: Rewrite, *example_inputs: Any) -> Checked:
    """Prove ``pattern`` on ``example_inputs``.

    Args:
        pattern: what ``@rewrite`` made of a function.
        example_inputs: one for each parameter of the pattern: tensors, numbers or None. Gradients are
            compared of those that require one; of every floating tensor where none does.

    Raises:
        CheckError: the pattern does not match its own function, with the nearest miss; that, its guard or the
            replacement raises; or the replacement cannot be traced, or gives another shape, dtype, value or
            gradient.
        PatternError: not a rewrite, not one input a parameter, or inputs without values.
    """
    if not isinstance(pattern, Rewrite):
        raise PatternError(
            f"check: takes what @rewrite returns, got {type(pattern).__name__} {pattern!r}; write "
            "@rewriter.rewrite(to=...) above the function first."
        )
    if len(example_inputs) != len(pattern.holes):
        expected = f"{len(pattern.holes)} inputs ({', '.join(pattern.holes)})"
        raise PatternError(f"check: {pattern.name} takes {expected}, got {len(example_inputs)}.")
    if any(isinstance(value, Tensor) and value.is_meta for value in example_inputs):
        raise PatternError(
            f"check: {pattern.name} is given tensors on meta, which have no values to compare."
        )
    values = _with_gradients(example_inputs)
    # Dynamo's words for a function that fails are about Dynamo.
    _attempt(pattern, "its own function raises on the example inputs", lambda: pattern.function(*values))
    module, inputs = _capture(pattern, values)
    rewritten, operations = _rewrite(pattern, module)
    eager, (truth, _) = run(module, inputs), true_results(module, inputs)
    allowed = Allowed.of(eager, truth, unit_of(inputs, eager))
    ours = _attempt(pattern, f"{_name(pattern)} raises on the example inputs", lambda: run(rewritten, inputs))
    if difference := allowed.difference(ours):
        raise CheckError(f"{pattern.name}: {_name(pattern)} changes the result: {difference}.")
    _attempt(
        pattern,
        f"{_name(pattern)} cannot be traced",
        lambda: lower(rewritten, inputs, Options(lowering="eager")),
    )
    errors, errors_without = allowed.errors(ours), allowed.errors(eager)
    results = tuple(Compared(n, errors[n], errors_without[n], limit) for n, limit in allowed.limits.items())
    return Checked(pattern.name, _name(pattern), operations, results)


def _name(pattern: Rewrite) -> str:
    return getattr(pattern.to, "__name__", repr(pattern.to))


def _attempt(pattern: Rewrite, failure: str, step: Callable[[], Any]) -> Any:
    try:
        return step()
    except PatternError:
        raise
    except Exception as error:
        raise CheckError(f"{pattern.name}: {failure}: {type(error).__name__}: {error}") from error


def _with_gradients(values: Sequence[Any]) -> list[Any]:
    asked = any(isinstance(v, Tensor) and v.requires_grad for v in values)

    def leaf(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.detach().requires_grad_(value.requires_grad if asked else value.is_floating_point())

    return [leaf(value) for value in values]


def _capture(pattern: Rewrite, values: Sequence[Any]) -> tuple[GraphModule, list[Any]]:
    """The graph that Dynamo makes of the pattern's function, its inputs named by hole, and their values."""
    graphs: list[GraphModule] = []
    given: list[Any] = []

    def record(module: GraphModule, _: Sequence[Any]) -> Callable:
        graphs.append(module)

        def forward(*inputs: Any) -> Any:
            given.extend(inputs)
            return module(*inputs)

        return forward

    try:
        with torch.enable_grad():
            torch.compile(pattern.function, backend=record, fullgraph=True, dynamic=False)(*values)
    except Exception as error:
        raise CheckError(f"{pattern.name}: Dynamo cannot capture it as one graph: {error}") from error
    finally:
        torch._dynamo.reset_code(pattern.function.__code__)  # pyright: ignore[reportPrivateImportUsage]
    if not graphs:
        raise CheckError(f"{pattern.name}: computes nothing from these inputs; give at least one tensor.")
    (module,) = graphs
    holes = {id(value): hole for hole, value in zip(pattern.holes, values, strict=True)}
    for node, value in zip(module.graph.find_nodes(op="placeholder"), given, strict=True):
        node._rename(holes.get(id(value), node.name))
    return module, given


def _rewrite(pattern: Rewrite, module: GraphModule) -> tuple[GraphModule, int]:
    """The graph with the replacement in it, and how many operations it replaces."""
    work = duplicate(module)
    effects = Effects.of(work.graph)
    found = _attempt(pattern, "its guard raises", lambda: find(work.graph, [pattern], (), effects).matches)
    if not found:
        raise CheckError(f"{pattern.name}: does not match its own function: {_nearest_miss(pattern, work)}.")
    outcome = _attempt(
        pattern, f"{_name(pattern)} raises on fake tensors", lambda: put(work.graph, found[0], effects)
    )
    if isinstance(outcome, Miss):
        raise CheckError(f"{pattern.name}: cannot be put in: {outcome.reason}.")
    sweep(work)
    return work, len(found[0].nodes)


def _nearest_miss(pattern: Rewrite, module: GraphModule) -> str:
    effects = Effects.of(module.graph)
    tried = [match(pattern, node, effects) for node in module.graph.nodes]
    misses = [miss for attempt in tried if isinstance(attempt, list) for miss in attempt]
    if not misses:
        return f"nothing in it looks like its last operation, `{pattern.root.name}`"
    nearest = max(misses, key=lambda miss: miss.depth)
    return f"{nearest.reason} ({nearest.pattern_line.rpartition('/')[2]})"
