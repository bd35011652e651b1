"""The products of linear layers with LoRA adapters, forward and backward: ``lora_linears`` for autograd.

One function of autograd for all projections of an input, so that they share its product with their stacked A
matrices and one gradient of it. ``lora_linear`` says what that saves and what is kept for the backward.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .extended_product import extended, room
from .lora_extended import beneath, read_beside, starts_beside
from .lora_gradients import Call, LoraGradients
from .lora_projection import (
    FORWARD,
    Operands,
    Projection,
    Slot,
    scaled_product,
    stacked,
    unflatten,
    with_update,
)


class _Down(NamedTuple):
    """What each B multiplies.

    Attributes:
        parts: (tokens, r) of each projection, None without an adapter; with its share of the scale where that
            is among ``columns``.
        columns: matrices to extend the input by.
        starts: of each projection whose update is added by the base's product: its first column of those.
    """

    parts: list[Slot]
    columns: list[Tensor]
    starts: dict[int, int]


def _down(projections: Sequence[Projection], operands: Sequence[Operands], rows: Tensor) -> _Down:
    made = _Down([None] * len(operands), [], starts_beside(projections, operands))
    # Who reads one input in one dtype shares a product; an input after dropout is a projection's own.
    groups: dict[tuple[int, torch.dtype, bool], list[int]] = {}
    for i, p in enumerate(operands):
        if p.a is not None:
            own = -1 if p.dropped is None else i
            groups.setdefault((own, projections[i].adapter, i in made.starts), []).append(i)
    for (own, dtype, scaled), members in groups.items():
        source = rows if own < 0 else operands[own].dropped.reshape(rows.shape)
        left, stack = source.to(dtype), stacked([operands[i].a.to(dtype) for i in members], 0)
        ranks = [operands[i].a.shape[0] for i in members]
        if scaled:
            down = scaled_product(left, stack.t(), projections[members[0]].shares[0], left.narrow(1, 0, 1))
            made.columns.append(down)
        else:
            down = left @ stack.t()
        for i, part in zip(members, down.split(ranks, 1), strict=True):
            made.parts[i] = part
    return made


class LoraProducts(torch.autograd.Function):
    """The projections of one input and their backward. Operands come flat: autograd tracks no containers."""

    @staticmethod
    def forward(ctx, projections, x, *tensors):
        operands = unflatten(tensors)
        rows = x.reshape(-1, x.shape[-1])
        down = _down(projections, operands, rows)
        outputs = _results(projections, operands, rows, down)
        _save(ctx, projections, x, operands, down)
        # A view made in here could not be written in place, as models do with a linear's result.
        return tuple(torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1])) for y in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        needs_x, needs = ctx.needs_input_grad[1], unflatten(ctx.needs_input_grad[2:])
        gradients = {i: dy.reshape(-1, dy.shape[-1]) for i, dy in enumerate(grads) if dy is not None}
        return None, *LoraGradients(ctx.call, ctx.saved_tensors, needs_x, needs).of_all(gradients)


def _results(
    projections: Sequence[Projection], operands: Sequence[Operands], rows: Tensor, down: _Down
) -> list[Tensor]:
    """(tokens, N) of each projection."""
    vacant = room(rows.shape[1], [c.shape[1] for c in down.columns])
    outputs, wide = [], None
    for i, (projection, p) in enumerate(zip(projections, operands, strict=True)):
        left = rows.to(projection.compute)
        bias = None if p.bias is None else p.bias.to(projection.compute)
        if i in down.starts:
            wide = extended(left, down.columns, vacant) if wide is None else wide
            y = F.linear(
                wide, projection.weight_beside(p, vacant, down.starts[i], projection.shares[1], FORWARD), bias
            )
        elif p.a is None:
            y = F.linear(left, projection.weight(p, FORWARD), bias).to(projection.out)
        else:
            y = with_update(projection, left, projection.weight(p, FORWARD), bias, down.parts[i], p.b)
        outputs.append(y)
    return outputs


def _save(ctx, projections, x, operands, down: _Down) -> None:
    """Save what some gradient reads, and no more."""
    ctx.set_materialize_grads(False)
    own = [p.dropped is not None for p in operands]
    ctx.call = Call(
        projections,
        x.shape,
        x.dtype,
        [Operands(*(None if t is None else t.dtype for t in p)) for p in operands],
        own,
        [p.shares[1] if i in down.starts else p.scale for i, p in enumerate(projections)],
        beneath(projections, operands, x.dtype),
        read_beside(projections, operands, x.dtype),
    )
    needs_x, needs = ctx.needs_input_grad[1], unflatten(ctx.needs_input_grad[2:])
    reads_x, kept_down, kept = False, [], []
    for p, need, d, drops in zip(operands, needs, down.parts, own, strict=True):
        reads_x |= need.weight or (need.a and not drops)
        through = need.dropped if drops else needs_x
        adapts = through or need.a or need.b
        kept_down.append(d if adapts else None)
        weight = p[:5] if needs_x else (None,) * 5
        kept += [*weight, None, p.dropped if need.a else None]
        kept += [p.a if through else None, p.b if adapts else None]
    ctx.save_for_backward(x if reads_x else None, *kept_down, *kept)
