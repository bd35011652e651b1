"""``options={"verify": True}``: is a rewritten graph as near to the truth as the graph that Dynamo gave?

On the first call of a compiled graph, three graphs run eagerly on the real inputs: the one that Dynamo gave,
the rewritten one with the ops that it will use, and the former in fp64, the truth (``rewriter.widen``). Their
floating outputs are compared, the inputs that they write in place, and the gradients of all inputs that
require one: from the scalars among the outputs, as a loss, or from all, weighed by fixed random numbers.

A result may be twice as far from the truth as the result of Dynamo's graph, by root mean square, or as far as
rounding explains. One that is further puts the pass at fault into the log and the report, and the unrewritten
graph is used from that call on. The price is a slow first call, with fp64 copies of weights and activations,
and a second compilation. Random numbers are drawn from the same state in each run, and it is left as it was.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from rewriter.effects import Effects
from rewriter.nested import graphs_of
from rewriter.report import GraphRecord
from rewriter.saved_hooks import beside_saved_hooks
from rewriter.widen import WIDENED, widened, without_narrow_floats

log = logging.getLogger(__name__)

# How far two orders of the same fp32 sums may be apart, where eager happens to be exact.
_FP32_SUMS = 16 * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Stage:
    """A graph as one pass left it; the first stage is the graph that Dynamo gave, after no pass."""

    pass_name: str
    module: GraphModule


def verified(
    compiled: Callable, unrewritten: Callable, stages: Sequence[Stage], record: GraphRecord
) -> Callable:
    """``compiled``, after a first call that decides between it and ``unrewritten``.

    Args:
        compiled: from the last of ``stages``.
        unrewritten: from the first of them.
        record: gets a note with the outcome.
    """
    chosen: Callable | None = None

    def call(*inputs: Any) -> Any:
        nonlocal chosen
        if chosen is None:
            fault, note = find_fault(stages, inputs)
            chosen = compiled if fault is None else unrewritten
            record.notes.append(note)
            if fault is not None:
                log.warning("graph %s: %s", record.name, note)
        return chosen(*inputs)

    return call


def find_fault(stages: Sequence[Stage], inputs: Sequence[Any]) -> tuple[str | None, str]:
    """The first pass after which ``inputs`` give a result that rounding does not explain, and a line on it.

    Args:
        stages: from Dynamo's graph to the last pass.
        inputs: real tensors and sizes, one a placeholder; unchanged.
    """
    original, *rewritten = stages
    eager = run(original.module, inputs)
    truth, refusal = true_results(original.module, inputs)
    allowed = Allowed.of(eager, truth, unit_of(inputs, eager))
    if (difference := _compare(rewritten[-1].module, inputs, allowed)) is None:
        against = "and fp64" if refusal is None else f"({refusal})"
        count = len(eager)
        return None, f"verified: {count} outputs and gradients agree with the unrewritten graph {against}"
    for stage in rewritten[:-1]:
        if earlier := _compare(stage.module, inputs, allowed):
            return stage.pass_name, _blame(stage.pass_name, earlier)
    return rewritten[-1].pass_name, _blame(rewritten[-1].pass_name, difference)


def _blame(pass_name: str, difference: str) -> str:
    return f"pass {pass_name} changes the result: {difference}; the unrewritten graph is used"


def _compare(module: GraphModule, inputs: Sequence[Any], allowed: "Allowed") -> str | None:
    try:
        return allowed.difference(run(module, inputs))
    except Exception as error:  # whatever a replacement raises on real inputs is what this looks for
        return f"it raises {type(error).__name__}: {error}"


def true_results(module: GraphModule, inputs: Sequence[Any]) -> tuple[dict[str, Tensor] | None, str | None]:
    """The graph's results in fp64, or None and why they cannot be had."""
    try:
        with without_narrow_floats():
            return run(widened(module), [_wide(x) for x in inputs]), None
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        return None, f"an operation refuses fp64: {str(error).splitlines()[0]}"


def _wide(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().to(WIDENED).requires_grad_(value.requires_grad)


def run(module: GraphModule, inputs: Sequence[Any]) -> dict[str, Tensor]:
    """Outputs, inputs written in place and gradients of one eager run, by name; detached.

    ``inputs`` and the state of random numbers stay as they were.
    """
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    devices = sorted({x.device.index for x in tensors if x.is_cuda})
    writes = any(Effects.of(part.graph).writes for part in graphs_of(module))
    names = [n.name for n in module.graph.find_nodes(op="placeholder")]
    leaves: dict[str, Tensor] = {}
    given: list[Any] = []
    for name, value in zip(names, inputs, strict=True):
        if isinstance(value, Tensor):
            if value.requires_grad and torch.is_grad_enabled():
                value = leaves[name] = value.detach().requires_grad_()
            value = value.clone() if writes else value
        given.append(value)
    with torch.random.fork_rng(devices), beside_saved_hooks():
        outputs = [o for o in tree_leaves(module(*given)) if isinstance(o, Tensor)]
        gradients = _gradients(outputs, leaves)
    results = {f"output {i}": o for i, o in enumerate(outputs)}
    if writes:
        results |= {f"input `{n}`": x for n, x in zip(names, given, strict=True) if isinstance(x, Tensor)}
    results |= gradients
    return {n: x.detach() for n, x in results.items() if x.is_floating_point()}


def _gradients(outputs: Sequence[Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    roots = [o for o in outputs if o.requires_grad and o.is_floating_point()]
    roots = [o for o in roots if o.numel() == 1] or roots
    if not roots or not leaves:
        return {}
    generator = torch.Generator().manual_seed(0)
    weights = [_weight(o, generator) for o in roots]
    wanted = list(leaves.values())
    found = torch.autograd.grad(roots, wanted, weights, allow_unused=True, materialize_grads=True)
    return {f"gradient of `{n}`": g for n, g in zip(leaves, found, strict=True)}


def _weight(output: Tensor, generator: torch.Generator) -> Tensor:
    if output.numel() == 1:
        return torch.ones_like(output)
    # Through bf16, so that every dtype gets the same numbers.
    drawn = torch.randn(output.shape, generator=generator, dtype=torch.float32).bfloat16()
    return drawn.to(output.device, output.dtype)


def unit_of(inputs: Sequence[Any], eager: dict[str, Tensor]) -> float:
    """The rounding unit of the narrowest float of 16 bits or more in the computation."""
    floats = [x for x in (*inputs, *eager.values()) if isinstance(x, Tensor) and x.is_floating_point()]
    dtypes = {x.dtype for x in floats if x.dtype.itemsize >= 2}
    devices = {x.device.type for x in floats}
    dtypes |= {torch.get_autocast_dtype(d) for d in devices if torch.is_autocast_enabled(d)}
    return max((torch.finfo(d).eps for d in dtypes), default=0.0)


@dataclass(frozen=True)
class Allowed:
    """What the results are measured against, and how far from it each may be.

    Attributes:
        truth: in fp64, by name.
        sizes: what an error is relative to; a tensor of nothing but rounding has the size of its peers.
        limits: the largest relative error of each result.
    """

    truth: dict[str, Tensor]
    sizes: dict[str, float]
    limits: dict[str, float]

    @classmethod
    def of(cls, eager: dict[str, Tensor], truth: dict[str, Tensor] | None, unit: float) -> "Allowed":
        """``truth`` None: without fp64, as far from eager as a sum of a few hundred roundings."""
        rounding = max(unit / 2, _FP32_SUMS) if truth is not None else max(16 * unit, 1e-4)
        truth = truth or {name: value.double() for name, value in eager.items()}
        # What overflows in eager may overflow in ours.
        truth = {n: torch.where(value.isfinite(), truth[n], torch.nan) for n, value in eager.items()}
        scale = {name: _rms(value) for name, value in truth.items()}
        floor = 1e-3 * median(scale.values()) if scale else 0.0
        sizes = {name: max(size, floor) or 1.0 for name, size in scale.items()}
        errors = {name: _error(value, truth[name]) / sizes[name] for name, value in eager.items()}
        # One result can be exact by luck: what is typical of the graph is allowed to each.
        typical = median(errors.values()) if errors else 0.0
        return cls(truth, sizes, {n: 2 * max(e, typical) + rounding for n, e in errors.items()})

    def difference(self, ours: dict[str, Tensor]) -> str | None:
        """The result that is furthest beyond its limit, in words; None where all are within."""
        for name, truth in self.truth.items():
            if name not in ours or ours[name].shape != truth.shape:
                return f"{name} has shape {tuple(truth.shape)} without it"
            wrong = ~ours[name].isfinite() & truth.isfinite()
            if wrong.any():
                return f"{name} has {int(wrong.sum())} values that are not finite"
        errors = self.errors(ours)
        name = max(errors, key=lambda name: errors[name] / self.limits[name], default=None)
        if name is None or errors[name] <= self.limits[name]:
            return None
        error, limit = errors[name], self.limits[name]
        return f"{name} has a relative error of {error:.1e}, where rounding explains {limit:.1e}"

    def errors(self, ours: dict[str, Tensor]) -> dict[str, float]:
        """The distance of each result from the truth, relative to its size."""
        return {n: _error(ours[n], truth) / self.sizes[n] for n, truth in self.truth.items()}


def _rms(value: Tensor) -> float:
    value = value.double()
    value = value[value.isfinite()]
    return value.square().mean().sqrt().item() if value.numel() else 0.0


def _error(value: Tensor, truth: Tensor) -> float:
    return _rms(value.double() - truth)
