"""Which of the projections of one input have their adapters in the base's own product (``extended_product``).

By widths, ranks and dtypes alone. Left as products of their own: what is not in one 16-bit dtype, weights
that are there in 16 bits, scales that differ, and what would cost more than it saves.
"""

from collections.abc import Sequence
from typing import Any

import torch

from .extended_product import few_enough, pays_to_read_beside, room, wide_enough
from .lora_projection import Operands, Projection
from .resident_weight import Form


def beside(projections: Sequence[Projection], operands: Sequence[Operands]) -> list[int]:
    """Whose update is added by the base's own product, in columns beside the input and the weight."""
    wide = [
        i
        for i, p in enumerate(operands)
        if p.a is not None and projections[i].may_extend and wide_enough(p.b.shape[0], p.a.shape[1])
    ]
    few = few_enough([operands[i].a.shape[0] for i in wide])
    return wide if few and _alike([projections[i].scale for i in wide]) else []


def _alike(scales: Sequence[Any]) -> bool:
    """Whether one product can scale all. Symbols are not compared: that would be a guard."""
    return len(scales) == 1 or all(isinstance(s, (int, float)) and s == scales[0] for s in scales)


def read_beside(projections: Sequence[Projection], operands: Sequence[Operands], x: torch.dtype) -> bool:
    """Whether the products that sum up to the gradient of their one input, of dtype ``x``, make ``dy B``."""
    if len(projections) == 1 or any(p.a is None or p.dropped is not None for p in operands):
        return False
    alike = _alike([p.scale for p in projections]) and all(p.compute == x for p in projections)
    ranks, results = zip(*(p.a.shape[:1] + p.b.shape[:1] for p in operands), strict=True)
    pays = pays_to_read_beside(results, operands[0].a.shape[1], ranks)
    return pays and alike and all(p.may_extend for p in projections)


def beneath(projections: Sequence[Projection], operands: Sequence[Operands], x: torch.dtype) -> bool:
    """Whether the base's own product adds the adapter's gradient of the only input, of dtype ``x``."""
    (p, *more), projection = operands, projections[0]
    if more or p.a is None or p.dropped is not None or not projection.may_extend or projection.compute != x:
        return False
    return wide_enough(p.a.shape[1], p.b.shape[0]) and few_enough([p.a.shape[0]])


def starts_beside(projections: Sequence[Projection], operands: Sequence[Operands]) -> dict[int, int]:
    """Of each projection in ``beside``, the first of its columns, in the order of their products."""
    groups: dict[int, list[int]] = {}
    for i in beside(projections, operands):
        groups.setdefault(-1 if operands[i].dropped is None else i, []).append(i)
    starts, start = {}, 0
    for i in (i for members in groups.values() for i in members):
        starts[i] = start
        start += operands[i].a.shape[0]
    return starts


def forms(
    projections: Sequence[Projection], operands: Sequence[Operands], x: torch.dtype
) -> list[Form | None]:
    """What would stay of each projection's packed weight to serve its forward and its backward.

    Args:
        x: dtype of the input.

    Returns:
        None for a weight that the two want in two forms, whose scale is a symbol, or that is not packed.
    """
    starts = starts_beside(projections, operands)
    ranks = [0 if p.a is None else p.a.shape[0] for p in operands]
    reads, under = read_beside(projections, operands, x), beneath(projections, operands, x)
    return [
        None if projection.packing is None else _form(projection, i, starts, ranks, reads, under)
        for i, projection in enumerate(projections)
    ]


def _form(
    projection: Projection, i: int, starts: dict[int, int], ranks: list[int], reads: bool, under: bool
) -> Form | None:
    assert projection.packing is not None
    (n, k), *_ = projection.packing
    plain = Form(projection.compute)
    forward = backward = plain
    if i in starts:
        if not isinstance(projection.scale, (int, float)):
            return None
        vacant = room(k, [ranks[j] for j in starts])
        forward = plain._replace(
            dim=1, room=vacant, start=starts[i], rank=ranks[i], scale=projection.shares[1]
        )
    if reads:
        vacant, start = room(k, ranks), sum(ranks[:i])
        backward = plain._replace(dim=1, room=vacant, start=start, rank=ranks[i], scale=projection.shares[1])
    elif under:
        backward = plain._replace(room=room(n, ranks), rank=ranks[i])
    wider = {form for form in (forward, backward) if form.room}
    return None if len(wider) > 1 else next(iter(wider), plain)
