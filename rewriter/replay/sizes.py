"""The size of a call as it would be recorded: calls of one size share a recording.

That is the length, padded to a bucket where the graph admits it, and every other size among the inputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.replay.buckets import bucket, fine_bucket
from rewriter.replay.padding import Reading, admits, conditions


@dataclass(frozen=True)
class Size:
    """A call's size: its length as recorded, padded if ``is_bucket``, and its tokens at that length."""

    key: tuple
    is_bucket: bool
    tokens: int
    short: bool

    @property
    def length(self) -> int | None:
        return self.key[0]


class Sizes:
    """Tells the sizes of a program's calls.

    Args:
        reading: of its graph.
        short: calls of at most so many tokens, padded, are short.
    """

    def __init__(self, reading: Reading, short: int):
        self._reading, self._short = reading, short
        values, padding = reading.values, reading.padding
        lengths = () if padding is None else padding.sizes
        self._others = [i for i, v in enumerate(values) if not isinstance(v, Tensor) and i not in lengths]
        self._batches = [i for i in batches(reading) if values[i].dim() == 2]
        self._admitted: dict[tuple, bool] = {}

    def of(self, inputs: Sequence[Any]) -> Size:
        others = tuple(inputs[i] for i in self._others)
        padding = self._reading.padding
        found = [inputs[i].shape for i in self._batches]
        if padding is None:
            tokens = max((rows * length for rows, length in found), default=0)
            return Size((None, *others), False, tokens, tokens <= self._short)
        rows, own = max((rows for rows, _ in found), default=0), inputs[padding.sizes[0]]
        short = rows * bucket(own) <= self._short
        longer = bucket(own) if short else fine_bucket(own)
        length = longer if self._admits(longer, inputs, others) else own
        return Size((length, *others), length == longer, rows * length, short)

    def _admits(self, length: int, inputs: Sequence[Any], others: tuple) -> bool:
        padding, values = self._reading.padding, self._reading.values
        # Lowering a backward, which is done late, may add conditions.
        case = (length, *others, conditions(values))
        if case not in self._admitted:
            self._admitted[case] = padding is not None and admits(padding, values, inputs, length)
        return self._admitted[case]


def batches(reading: Reading) -> set[int]:
    """Positions of the inputs that are likely other tensors at each step."""
    found = {i for i, value in enumerate(reading.values) if isinstance(value, Tensor) and is_batch(value)}
    return found | (set() if reading.padding is None else {p.position for p in reading.padding.inputs})


def is_batch(value: Tensor) -> bool:
    """Whether an input is likely another tensor at each step: ids, labels, masks, numbers of items."""
    integers = (torch.int64, torch.int32, torch.bool)
    return value.dtype in integers and not isinstance(value, nn.Parameter)
