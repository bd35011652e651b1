"""The products of linear layers with LoRA adapters, forward and backward: ``lora_linears`` for autograd."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .add_product import add_product
from .dequantize import Packed4bit, dequantize_4bit, dequantize_4bit_extended
from .extended_product import extended, folded, room
from .lora_extended import beneath, beside, read_beside

# Told apart, so that no compiler merges the two and keeps the 16-bit weight in between.
_FORWARD, _BACKWARD = 0, 1

# A tensor or None; in the backward also a tensor's dtype, or whether its gradient is wanted. Which of a
# projection's are there follows from the others, which types cannot say.
_Slot = Any


class Operands(NamedTuple):
    """A projection's tensors. With a 4-bit weight ``weight`` is the packed data, and the scales follow it."""

    weight: _Slot
    absmax: _Slot
    absmax_8bit: _Slot
    absmax_code: _Slot
    absmax_offset: _Slot
    bias: _Slot
    dropped: _Slot
    a: _Slot
    b: _Slot


@dataclass(frozen=True, slots=True)
class Projection:
    """What of a projection is no tensor. ``packing``: shape, block size and type of a 4-bit weight."""

    packing: tuple | None
    scale: float
    compute: torch.dtype
    adapter: torch.dtype
    out: torch.dtype

    def weight(self, p: Operands, use: int) -> Tensor:
        """The weight in the product's dtype, (N, K)."""
        if self.packing is None:
            return p.weight.to(self.compute)
        return dequantize_4bit(self.packed(p), self.compute, use)

    def weight_beside(self, p: Operands, vacant: int, start: int, use: int) -> Tensor:
        """``[W | 0 | B | 0]``, (N, K + vacant), with B ``start`` columns after W."""
        return dequantize_4bit_extended(self.packed(p), self.compute, p.b, 1, vacant, start, use)

    def weight_above(self, p: Operands, vacant: int, use: int) -> Tensor:
        """``[W ; A ; 0]``, (N + vacant, K)."""
        return dequantize_4bit_extended(self.packed(p), self.compute, p.a, 0, vacant, 0, use)

    def packed(self, p: Operands) -> Packed4bit:
        assert self.packing is not None
        shape, blocksize, quant_type = self.packing
        scales = (p.absmax_8bit, p.absmax_code, p.absmax_offset)
        return Packed4bit(p.weight, shape, p.absmax, blocksize, quant_type, *scales)

    @property
    def may_extend(self) -> bool:
        """Whether the weight is made anew, in the one 16-bit dtype that the adapter and the result have."""
        return (
            self.packing is not None
            and self.compute == self.adapter == self.out
            and self.compute.itemsize == 2
        )


def tensors_of(weight: Tensor | Packed4bit) -> tuple[_Slot, _Slot, _Slot, _Slot, _Slot]:
    if isinstance(weight, Packed4bit):
        return weight.data, weight.absmax, weight.absmax_8bit, weight.absmax_code, weight.absmax_offset
    return weight, None, None, None, None


def _unflatten(tensors: Sequence) -> list[Operands]:
    width = len(Operands._fields)
    return [Operands(*tensors[i : i + width]) for i in range(0, len(tensors), width)]


def _sharing(projections: Sequence[Projection], members: Sequence[int]) -> dict[torch.dtype, list[int]]:
    """``members`` by the dtype of their adapters' products: those of one dtype share a product."""
    groups: dict[torch.dtype, list[int]] = {}
    for i in members:
        groups.setdefault(projections[i].adapter, []).append(i)
    return groups


def _stacked(matrices: list[Tensor], dim: int) -> Tensor:
    return matrices[0] if len(matrices) == 1 else torch.cat(matrices, dim)


def _add_update(projection: Projection, base: Tensor, down: Tensor, b: Tensor) -> Tensor:
    """``base + scale · down Bᵀ``: added inside the product where all dtypes are one, else in the widest."""
    up = b.to(projection.adapter).t()
    if projection.compute == projection.adapter == projection.out:
        return add_product(base, down, up, projection.scale)
    wide = torch.promote_types(torch.promote_types(projection.compute, projection.adapter), projection.out)
    return (base.to(wide) + (down @ up).to(wide) * projection.scale).to(projection.out)


def _accumulate(total: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """``total + left right``, in no narrower a dtype than ``dtype``, a total's or the product's."""
    if total is None:
        return (left @ right).to(torch.promote_types(left.dtype, dtype))
    if total.dtype == left.dtype:
        return add_product(total, left, right)
    return total + left @ right


def _scaled(left: Tensor, right: Tensor, scale: float, shape: Tensor) -> Tensor:
    """``scale · left right``, rounded once; of ``shape``, which may broadcast, only the shape counts."""
    return torch.addmm(shape, left, right, beta=0, alpha=scale)


class _Down(NamedTuple):
    """What each B multiplies.

    Attributes:
        parts: (tokens, r) of each projection, None without an adapter; scaled where it is among ``columns``.
        columns: matrices to extend the input by.
        starts: of each projection whose update is added by the base's product: its first column of those.
    """

    parts: list[_Slot]
    columns: list[Tensor]
    starts: dict[int, int]


def _down(projections: Sequence[Projection], operands: Sequence[Operands], rows: Tensor) -> _Down:
    made = _Down([None] * len(operands), [], {})
    wide = beside(projections, operands)
    # Who reads one input in one dtype shares a product; an input after dropout is a projection's own.
    groups: dict[tuple[int, torch.dtype, bool], list[int]] = {}
    for i, p in enumerate(operands):
        if p.a is not None:
            own = -1 if p.dropped is None else i
            groups.setdefault((own, projections[i].adapter, i in wide), []).append(i)
    start = 0
    for (own, dtype, scaled), members in groups.items():
        source = rows if own < 0 else operands[own].dropped.reshape(rows.shape)
        left, stack = source.to(dtype), _stacked([operands[i].a.to(dtype) for i in members], 0)
        ranks = [operands[i].a.shape[0] for i in members]
        if scaled:
            down = _scaled(left, stack.t(), projections[members[0]].scale, left.narrow(1, 0, 1))
            made.columns.append(down)
        else:
            down = left @ stack.t()
        for i, part in zip(members, down.split(ranks, 1), strict=True):
            made.parts[i] = part
            if scaled:
                made.starts[i] = start
                start += part.shape[1]
    return made


class _WideGradient:
    """``[dx | dy B of each projection]``, the sum of their products; nothing until the first is added."""

    def __init__(self, projections: Sequence[Projection], operands: Sequence[Operands]):
        self._projections, self._operands = projections, operands
        self._ranks = [p.a.shape[0] for p in operands]
        self._a = _stacked([p.a.to(projections[0].compute) for p in operands], 0)
        self._scale = projections[0].scale
        self.total: Tensor | None = None

    def add(self, i: int, dy: Tensor) -> None:
        projection, p = self._projections[i], self._operands[i]
        vacant = room(self._a.shape[1], self._ranks)
        weight = projection.weight_beside(p, vacant, sum(self._ranks[:i]), _BACKWARD)
        self.total = _accumulate(self.total, dy, weight, dy.dtype)

    def gradients(self, rows: Tensor) -> Sequence[Tensor]:
        """Of each A, with the input ``rows``."""
        assert self.total is not None
        rank, inner = self._a.shape
        columns = self.total.narrow(1, inner, rank)
        return _scaled(columns.t(), rows, self._scale, self._a).split(self._ranks)

    def folded(self) -> Tensor:
        """The whole gradient of the input; what else is read of the sum has to be read before."""
        assert self.total is not None
        return folded(self.total, self._a, self._scale)


class LoraProducts(torch.autograd.Function):
    """The projections of one input and their backward. Operands come flat: autograd tracks no containers."""

    @staticmethod
    def forward(ctx, projections, x, *tensors):
        operands = _unflatten(tensors)
        rows = x.reshape(-1, x.shape[-1])
        down = _down(projections, operands, rows)
        vacant = room(rows.shape[1], [c.shape[1] for c in down.columns])
        outputs, wide = [], None
        for i, (projection, p) in enumerate(zip(projections, operands, strict=True)):
            left = rows.to(projection.compute)
            bias = None if p.bias is None else p.bias.to(projection.compute)
            if i in down.starts:
                wide = extended(left, down.columns, vacant) if wide is None else wide
                y = F.linear(wide, projection.weight_beside(p, vacant, down.starts[i], _FORWARD), bias)
            else:
                y = F.linear(left, projection.weight(p, _FORWARD), bias)
                y = y.to(projection.out) if p.a is None else _add_update(projection, y, down.parts[i], p.b)
            # A view made in here could not be written in place, as models do with a linear's result.
            outputs.append(torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1])))
        _save(ctx, projections, x, operands, down)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        x, *saved = ctx.saved_tensors
        down, operands = saved[: len(grads)], _unflatten(saved[len(grads) :])
        needs_x, needs = ctx.needs_input_grad[1], _unflatten(ctx.needs_input_grad[2:])
        results = [dict.fromkeys(Operands._fields) for _ in grads]
        # None where no gradient reads the input.
        rows: Any = None if x is None else x.reshape(-1, x.shape[-1])
        dx, ddown = None, {}
        extends = needs_x and ctx.beneath
        wide = _WideGradient(ctx.projections, operands) if needs_x and ctx.read_beside else None
        for i, (projection, p, need) in enumerate(zip(ctx.projections, operands, needs, strict=True)):
            if grads[i] is None:
                continue
            dy, result, own = grads[i].reshape(-1, grads[i].shape[-1]), results[i], ctx.own[i]
            if need.bias:
                result["bias"] = dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32))
            if need.weight:
                result["weight"] = dy.to(projection.compute).t() @ rows.to(projection.compute)
            if wide is not None:
                wide.add(i, dy)
            elif needs_x and not extends:
                dx = _accumulate(
                    dx, dy.to(projection.compute), projection.weight(p, _BACKWARD), ctx.dtypes[0]
                )
            if p.b is None:
                continue
            dy, b = dy.to(projection.adapter), p.b.to(projection.adapter)
            if need.b:
                # What was made for columns beside the input is scaled.
                result["b"] = (
                    dy.t() @ down[i] if ctx.scaled[i] else _scaled(dy.t(), down[i], projection.scale, b)
                )
            if wide is None and (need.a or (need.dropped if own else needs_x)):
                ddown[i] = _scaled(dy, b, projection.scale, down[i])
            if extends:
                vacant = room(dy.shape[1], [ddown[i].shape[1]])
                dx = extended(dy, [ddown[i]], vacant) @ projection.weight_above(p, vacant, _BACKWARD)
            if own and need.a:
                result["a"] = ddown[i].t() @ p.dropped.reshape(-1, p.dropped.shape[-1]).to(projection.adapter)
            if own and need.dropped:
                result["dropped"] = (ddown[i] @ p.a.to(projection.adapter)).view(ctx.shape)
        for dtype, members in _sharing(ctx.projections, [i for i in ddown if not ctx.own[i]]).items():
            stack = _stacked([ddown[i] for i in members], 1)
            if any(needs[i].a for i in members):
                parts = (stack.t() @ rows.to(dtype)).split([ddown[i].shape[1] for i in members], 0)
                for i, part in zip(members, parts, strict=True):
                    results[i]["a"] = part if needs[i].a else None
            if needs_x and not extends:
                a = _stacked([operands[i].a.to(dtype) for i in members], 0)
                dx = _accumulate(dx, stack, a, ctx.dtypes[0])
        if wide is not None and wide.total is not None:
            if rows is not None:
                for result, need, da in zip(results, needs, wide.gradients(rows), strict=True):
                    result["a"] = da if need.a else None
            dx = wide.folded()
        dx = None if dx is None else dx.to(ctx.dtypes[0]).view(ctx.shape)
        flat = []
        for result, dtypes in zip(results, ctx.dtypes[1], strict=True):
            flat += [
                None if g is None else g.to(dtype) for g, dtype in zip(result.values(), dtypes, strict=True)
            ]
        return None, dx, *flat


def _save(ctx, projections, x, operands, down: _Down) -> None:
    """Save what some gradient reads, and no more."""
    ctx.set_materialize_grads(False)
    ctx.projections, ctx.shape = projections, x.shape
    ctx.scaled = [i in down.starts for i in range(len(operands))]
    ctx.own = [p.dropped is not None for p in operands]
    ctx.dtypes = x.dtype, [Operands(*(None if t is None else t.dtype for t in p)) for p in operands]
    ctx.beneath = beneath(projections, operands, x.dtype)
    ctx.read_beside = read_beside(projections, operands, x.dtype)
    needs_x, needs = ctx.needs_input_grad[1], _unflatten(ctx.needs_input_grad[2:])
    reads_x, kept_down, kept = False, [], []
    for p, need, d, own in zip(operands, needs, down.parts, ctx.own, strict=True):
        reads_x |= need.weight or (need.a and not own)
        through = need.dropped if own else needs_x
        adapts = through or need.a or need.b
        kept_down.append(d if adapts else None)
        weight = p[:5] if needs_x else (None,) * 5
        kept += [*weight, None, p.dropped if need.a else None]
        kept += [p.a if through else None, p.b if adapts else None]
    ctx.save_for_backward(x if reads_x else None, *kept_down, *kept)
