"""The gradients of linear layers with LoRA adapters, from those of their results.

With v = scale · dy B, (tokens, r), of each projection:

    dx = Σ dy W + v A     dW = dyᵀ x     dB = scale · dyᵀ (x Aᵀ)     dA = vᵀ x     dbias = Σ dy

The sum for dx is taken in one of three ways: product after product into one total, the adapters' short one
first (``with_update`` says why); in one product with the adapter's part (``[dy | v] · [W ; A]``); or with v
for all projections read beside it (``[dx | dy B] = Σ dy · [W | B]``). ``extended_product`` says when the last
two pay.

Gradients of A of projections on one input are one product: rows of one tensor, whose memory they share.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .extended_product import extended, folded, room
from .lora_projection import (
    BACKWARD,
    Operands,
    Projection,
    Slot,
    accumulate,
    scaled_product,
    stacked,
    unflatten,
)


@dataclass(frozen=True, slots=True)
class Call:
    """What of one call of projections is no tensor.

    Attributes:
        shape, dtype: of the input.
        dtypes: of each projection's operands.
        own: whether it has an input after dropout, of its own.
        unscaled: what of the scale its saved ``x Aᵀ`` has not.
        beneath: whether the only one's adapter is in the product that gives the input's gradient.
        read_beside: whether the products for that make ``dy B`` too.
    """

    projections: Sequence[Projection]
    shape: Sequence[int]
    dtype: torch.dtype
    dtypes: Sequence[Operands]
    own: Sequence[bool]
    unscaled: Sequence[float]
    beneath: bool
    read_beside: bool


class _WideGradient:
    """``[dx | dy B of each projection]``, the sum of their products; nothing until the first is added."""

    def __init__(self, projections: Sequence[Projection], operands: Sequence[Operands]):
        self._projections, self._operands = projections, operands
        self.ranks = [p.a.shape[0] for p in operands]
        self._a = stacked([p.a.to(projections[0].compute) for p in operands], 0)
        # As the forward has it: of the two, one weight may stay.
        self._scale, self._share = projections[0].shares
        self.total: Tensor | None = None

    def add(self, i: int, dy: Tensor) -> None:
        projection, p = self._projections[i], self._operands[i]
        vacant = room(self._a.shape[1], self.ranks)
        weight = projection.weight_beside(p, vacant, sum(self.ranks[:i]), self._share, BACKWARD)
        self.total = accumulate(self.total, dy, weight, dy.dtype)

    def gradients(self, rows: Tensor) -> Tensor:
        """Of each A, one beneath the other, with the input ``rows``."""
        assert self.total is not None
        rank, inner = self._a.shape
        columns = self.total.narrow(1, inner, rank)
        return scaled_product(columns.t(), rows, self._scale, self._a)

    def folded(self) -> Tensor:
        """The whole gradient of the input; what else is read of the sum has to be read before."""
        assert self.total is not None
        return folded(self.total, self._a, self._scale)


class LoraGradients:
    """The gradients of one call, from those of its results.

    Args:
        saved: the rows of x that gradients read or None; ``x Aᵀ`` of each projection; operands, flat.
        needs_x, needs: of which gradients are wanted.
    """

    def __init__(self, call: Call, saved: Sequence[Slot], needs_x: bool, needs: Sequence[Operands]):
        self._call, self._needs_x, self._needs = call, needs_x, needs
        x, *rest = saved
        # None where no gradient reads the input.
        self._rows: Any = None if x is None else x.reshape(-1, x.shape[-1])
        count = len(call.projections)
        self._down, self._operands = rest[:count], unflatten(rest[count:])
        self._beneath = needs_x and call.beneath
        wide = needs_x and call.read_beside
        self._wide = _WideGradient(call.projections, self._operands) if wide else None
        self._dx: Tensor | None = None
        # Of each projection: v, where something reads it by itself.
        self._v: dict[int, Tensor] = {}
        self._found: list[dict[str, Slot]] = [dict.fromkeys(Operands._fields) for _ in needs]

    def of_all(self, gradients: dict[int, Tensor]) -> tuple[Slot, ...]:
        """The gradient of x, and of each operand, flat; each in its dtype.

        Args:
            gradients: (tokens, N) of the results that have one, by projection.
        """
        call = self._call
        for i, dy in gradients.items():
            if self._operands[i].b is not None:
                self._add_adapter(i, dy.to(call.projections[i].adapter))
        groups = self._sharing()
        computed = {call.projections[i].compute for i in gradients}
        # In another dtype they would make the total as wide, for the base's products too.
        first = {dtype: members for dtype, members in groups.items() if {dtype} == computed}
        for dtype, members in first.items():
            self._add_shared(dtype, members)
        for i, dy in gradients.items():
            self._add_base(i, dy)
        for dtype, members in groups.items():
            if dtype not in first:
                self._add_shared(dtype, members)
        if self._wide is not None and self._wide.total is not None:
            self._finish_wide(self._wide)
        dx = None if self._dx is None else self._dx.to(call.dtype).view(call.shape)
        found = [
            None if g is None else g.to(dtype)
            for gradients, dtypes in zip(self._found, call.dtypes, strict=True)
            for g, dtype in zip(gradients.values(), dtypes, strict=True)
        ]
        return dx, *found

    def _add_base(self, i: int, dy: Tensor) -> None:
        """Of bias and weight, and what the weight hands to x."""
        projection, need, found = self._call.projections[i], self._needs[i], self._found[i]
        if need.bias:
            found["bias"] = dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32))
        if need.weight:
            found["weight"] = dy.to(projection.compute).t() @ self._rows.to(projection.compute)
        if self._wide is not None:
            self._wide.add(i, dy)
        elif self._needs_x and not self._beneath:
            weight = projection.weight(self._operands[i], BACKWARD)
            self._dx = accumulate(self._dx, dy.to(projection.compute), weight, self._call.dtype)

    def _add_adapter(self, i: int, dy: Tensor) -> None:
        """Of B, and of all that v gives without the other projections."""
        projection, p, need = self._call.projections[i], self._operands[i], self._needs[i]
        b, down, own = p.b.to(projection.adapter), self._down[i], self._call.own[i]
        if need.b:
            self._found[i]["b"] = scaled_product(dy.t(), down, self._call.unscaled[i], b)
        if self._wide is None and (need.a or (need.dropped if own else self._needs_x)):
            self._v[i] = scaled_product(dy, b, projection.scale, down)
        if self._beneath:
            vacant = room(dy.shape[1], [self._v[i].shape[1]])
            self._dx = extended(dy, [self._v[i]], vacant) @ projection.weight_above(p, vacant, BACKWARD)
        if own:
            self._add_dropped(i)

    def _add_dropped(self, i: int) -> None:
        """Of A, and of the projection's own input after dropout."""
        projection, p, need = self._call.projections[i], self._operands[i], self._needs[i]
        if need.a:
            rows = p.dropped.reshape(-1, p.dropped.shape[-1])
            self._found[i]["a"] = self._v[i].t() @ rows.to(projection.adapter)
        if need.dropped:
            self._found[i]["dropped"] = (self._v[i] @ p.a.to(projection.adapter)).view(self._call.shape)

    def _sharing(self) -> dict[torch.dtype, list[int]]:
        """The projections whose A reads x, by the dtype in which their adapters compute."""
        groups: dict[torch.dtype, list[int]] = {}
        for i in self._v:
            if not self._call.own[i]:
                groups.setdefault(self._call.projections[i].adapter, []).append(i)
        return groups

    def _add_shared(self, dtype: torch.dtype, members: Sequence[int]) -> None:
        """Of each A of ``members``, and what those hand to x: one product for all."""
        stack = stacked([self._v[i] for i in members], 1)
        if any(self._needs[i].a for i in members):
            ranks = [self._v[i].shape[1] for i in members]
            self._keep_a(members, ranks, stack.t() @ self._rows.to(dtype))
        if self._needs_x and not self._beneath:
            a = stacked([self._operands[i].a.to(dtype) for i in members], 0)
            self._dx = accumulate(self._dx, stack, a, self._call.dtype)

    def _finish_wide(self, wide: _WideGradient) -> None:
        """Of each A from the columns beside dx, and then the adapters' part of it."""
        if self._rows is not None:
            self._keep_a(range(len(self._needs)), wide.ranks, wide.gradients(self._rows))
        self._dx = wide.folded()

    def _keep_a(self, members: Sequence[int], ranks: Sequence[int], gradients: Tensor) -> None:
        """Of each A of ``members``: so many rows of ``gradients``."""
        dtypes = {self._call.dtypes[i].a for i in members}
        if len(dtypes) == 1:
            # Before they are parted: one launch, and one block of memory. Allocators keep tensors of up to
            # 1 MiB where no larger one can use their room.
            gradients = gradients.to(dtypes.pop())
        for i, gradient in zip(members, gradients.split(list(ranks)), strict=True):
            self._found[i]["a"] = gradient if self._needs[i].a else None
