"""A model of fake tensors to the rewritten program of its step, by the passes that a compilation runs."""

import inspect
import types
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch._guards import TracingContext, tracing
from torch.fx import GraphModule

from rewriter.deferred import split_deferred
from rewriter.foresee.blueprint import Blueprint
from rewriter.foresee.like_gpu import LikeGpu
from rewriter.fusion import apply_all
from rewriter.memory.borders import parted_at_borders
from rewriter.passes import ordered_passes
from rewriter.regions.outline import outline
from rewriter.regions.program import Program


class Untraceable(ValueError):
    """The model is not one graph, or nothing in it repeats: there is no plan to foresee."""


def traced(made: Blueprint, rows: int, tokens: int, autocast: torch.dtype | None) -> Program:
    """The program of one step on ``(rows, tokens)`` of labelled tokens, its layers' norms their own.

    Raises:
        Untraceable: with Dynamo's reason, or the outliner's.
    """
    with made.mode:
        ids = torch.zeros(rows, tokens, dtype=torch.int64)
    with _autocast(autocast):
        module, inputs = _captured(made.model, ids, made)
        with tracing(TracingContext(made.mode)), LikeGpu():
            rewritten = apply_all(ordered_passes(), module, keep_stages=False).stages[-1:]
            body, _ = split_deferred(rewritten[0][1] if rewritten else module)
            program = outline(body, inputs)
            if program is None:
                raise Untraceable(f"plan: no layer of {made.name} repeats; there is nothing to choose from.")
            parted = parted_at_borders(program)
            return program if parted is None else outline(parted, inputs) or program


def in_tracing(made: Blueprint, autocast: torch.dtype | None, run: Callable[[], Any]) -> Any:
    """``run()`` with the modes that the program was traced in."""
    with _autocast(autocast), tracing(TracingContext(made.mode)), LikeGpu():
        return run()


def _autocast(dtype: torch.dtype | None) -> Any:
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype)


class _Done(BaseException):
    pass


def _captured(model: nn.Module, ids: Tensor, made: Blueprint) -> tuple[GraphModule, list[Any]]:
    found: list[tuple[GraphModule, list[Any]]] = []
    try:
        inspect.signature(model.forward).bind(input_ids=ids, labels=ids)
    except TypeError as error:
        raise Untraceable(
            f"plan: {made.name} is no model of tokens and labels, model(input_ids=..., labels=...): {error}."
        ) from error

    def record(module: GraphModule, inputs: list[Any]) -> Callable:
        found.append((module, list(inputs)))
        return _stop

    def _step() -> Any:
        return model(input_ids=ids, labels=ids)

    # Dynamo keeps what it compiled by code object: one of our own leaves nothing behind in the model's.
    code = _step.__code__.replace(co_name="step")
    step = types.FunctionType(code, globals(), "step", None, _step.__closure__)
    try:
        with made.mode, torch.enable_grad():
            torch.compile(step, backend=record, fullgraph=True, dynamic=False)()
    except _Done:
        return found[0]
    except TorchDynamoException as error:
        reason = str(error).strip().splitlines()[0]
        raise Untraceable(f"plan: {made.name} does not trace to one graph: {reason}") from error
    raise Untraceable(f"plan: {made.name} was not traced; is torch.compile disabled?")


def _stop(*_: Any) -> Any:
    raise _Done
