"""Functions and models through Dynamo, the passes and the outliner: the program, and what it computes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from rewriter.backend import rewrite_graph
from rewriter.deferred import split_deferred
from rewriter.lower import lower_beside
from rewriter.options import Options
from rewriter.passes import pass_names
from rewriter.regions.outline import Unsplittable, outline
from rewriter.regions.program import Program, Region, link
from rewriter.report import GraphRecord


@dataclass(frozen=True)
class Outlined:
    """One graph: as the passes left it, and as a program of regions.

    Attributes:
        body: what was outlined.
        program: None where it was refused, and ``reason`` says why.
        values: the real inputs of the graph.
        compiled: of each region, where lowering was asked for.
    """

    body: GraphModule
    program: Program | None
    reason: str
    values: tuple
    compiled: dict[Region, Callable] | None

    @property
    def times(self) -> list[tuple[str, int]]:
        """Names of the regions and how often each is called."""
        assert self.program is not None, self.reason
        return [(region.name, times) for region, times in self.program.times().items()]

    @property
    def order(self) -> str:
        """Names of the regions in the order of their calls, layers by their letter."""
        assert self.program is not None, self.reason
        return " ".join(call.region.name.removeprefix("layer_") for call in self.program.calls)


def outlined(
    function: Callable, *args: Any, lowered: bool = False, dynamic: bool | None = None, **kwargs: Any
) -> Outlined:
    """Outline the one graph that Dynamo makes of ``function(*args, **kwargs)``.

    Args:
        lowered: compile the regions by AOTAutograd, without Inductor.
    """
    found: list[Outlined] = []
    options = Options.parse({"lowering": "eager"}, None, pass_names())

    def backend(module: GraphModule, examples: Sequence[Any]) -> Callable:
        rewritten = rewrite_graph(module, options, GraphRecord("test"))[-1].module
        body, _ = split_deferred(rewritten)
        program, reason, compiled = None, "", None
        try:
            program = outline(body, examples)
        except Unsplittable as refusal:
            reason = str(refusal)
        if program is not None and lowered:
            compiled = {r: lower_beside(r.module, r.inputs, options) for r in program.regions}

        def run(*values: Any) -> Any:
            copies = tuple(v.clone() if isinstance(v, Tensor) and not v.requires_grad else v for v in values)
            found.append(Outlined(body, program, reason, copies, compiled))
            return module(*values)

        return run

    torch._dynamo.reset()
    with torch.enable_grad():
        torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=True)(*args, **kwargs)
    torch._dynamo.reset()
    (only,) = found
    return only


def run_program(case: Outlined) -> Callable:
    """The linked program, by the regions' own graphs where they were not lowered.

    Each region refuses inputs that are not laid out as those that it was compiled for.
    """
    assert case.program is not None, case.reason
    functions = case.compiled or {region: region.module for region in case.program.regions}
    return link(case.program, {r: _strict(r, function) for r, function in functions.items()})


def _strict(region: Region, function: Callable) -> Callable:
    def run(*values: Any) -> Any:
        assert len(values) == len(region.inputs)
        for index, (value, expected) in enumerate(zip(values, region.inputs, strict=True)):
            assert _layout(value, expected) == _layout(expected, expected), f"{region.name}, input {index}"
        return function(*values)

    return run


def _layout(value: Any, like: Any) -> Any:
    """All that a compiled function takes for granted; of what varies in ``like``, nothing."""
    if not isinstance(value, Tensor):
        return type(value) if type(value) is not torch.SymInt else int
    fixed = [i for i, size in enumerate(like.shape) if isinstance(size, int) and size != 1]
    strides = tuple(value.stride(i) for i in fixed if isinstance(like.stride(i), int))
    shape = tuple(value.shape[i] for i in fixed)
    return value.dim(), shape, strides, value.dtype, value.device, value.requires_grad


@dataclass(frozen=True)
class Numbers:
    """What a function gave: results, and the gradients of the inputs that need one."""

    results: list[Any]
    gradients: list[Tensor | None]


def numbers(function: Callable, values: Sequence[Any], seed: int = 0) -> Numbers:
    """Run ``function(*values)``, and backwards from random gradients of all results that have one."""
    torch.manual_seed(seed)
    values = [_own(v) for v in values]
    results = torch.utils._pytree.tree_leaves(function(*values))
    ends = [r for r in results if isinstance(r, Tensor) and r.requires_grad]
    leaves = [v for v in values if isinstance(v, Tensor) and v.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    seeds = [torch.randn(r.shape, generator=generator, dtype=r.dtype) for r in ends]
    gradients = list(torch.autograd.grad(ends, leaves, seeds, allow_unused=True)) if ends and leaves else []
    results = [r.detach().clone() if isinstance(r, Tensor) else r for r in results]
    return Numbers(results, gradients)


def _own(value: Any) -> Any:
    """A tensor that may be written into without changing ``value``; one that needs a gradient, itself."""
    return value.clone() if isinstance(value, Tensor) and not value.requires_grad else value


def assert_equal(ours: Numbers, theirs: Numbers) -> None:
    """Results and gradients are equal bit for bit."""
    for what in ("results", "gradients"):
        mine, other = getattr(ours, what), getattr(theirs, what)
        assert len(mine) == len(other)
        for index, (a, b) in enumerate(zip(mine, other, strict=True)):
            assert _same(a, b), f"{what}[{index}]: {_difference(a, b)}"


def _same(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return a == b
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def _difference(a: Any, b: Any) -> str:
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape:
        return f"differ by up to {(a.double() - b.double()).abs().max().item():.3e}"
    return f"{a} and {b}"
