"""How much of a model to trace is in host memory, how much could be, and what a batch reads of it there."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from torch import nn

from rewriter.foresee.packed_linear import PackedLinear
from rewriter.foresee.repetition import Repetition, layers_of
from rewriter.host_weights import EMBEDDING, LAYERS, embedding_of
from rewriter.size_text import size_text


@dataclass(frozen=True)
class HostBytes:
    """Bytes of weights by their kind, "embedding" and "layers".

    Attributes:
        there: in host memory.
        could: on the device, and could be in host memory.
        row: of one of the embedding's.
    """

    there: Mapping[str, int] = field(default_factory=dict)
    could: Mapping[str, int] = field(default_factory=dict)
    row: int = 0

    def read_over_the_bus(self, tokens: int) -> int:
        """Of the embedding, in a step on so many tokens; what layers read is part of their plan."""
        return tokens * self.row if EMBEDDING in self.there else 0

    def notes(self) -> tuple[str, ...]:
        size = sum(self.there.values())
        return (
            (f"{size_text(size)} of weights in host memory: {', '.join(self.there)}",) if self.there else ()
        )


def host_bytes(model: nn.Module, left_out: Repetition | None, host: Collection[str]) -> HostBytes:
    """Bytes of the whole model, of whose layers some are left out.

    Raises:
        ValueError: what ``host`` names cannot be there.
    """
    found: dict[str, int] = {}
    row = 0
    try:
        weight = embedding_of(model).weight
        found[EMBEDDING], row = weight.nbytes, weight[0].nbytes
    except ValueError:
        if EMBEDDING in host:
            raise
    if size := _packed_bytes(model, left_out):
        found[LAYERS] = size
    elif LAYERS in host:
        raise ValueError("plan: host is 'layers', and no linear is in 4 bits; say quantise='nf4'.")
    there = {kind: size for kind, size in found.items() if kind in host}
    return HostBytes(there, {kind: size for kind, size in found.items() if kind not in host}, row)


def _packed_bytes(model: nn.Module, left_out: Repetition | None) -> int:
    size = _packed_bytes_of(model)
    if left_out is not None:
        layers = layers_of(model, left_out.path)
        size += sum(_packed_bytes_of(layers[place]) for place in left_out.window) * left_out.times
    return size


def _packed_bytes_of(module: nn.Module) -> int:
    return sum(m.weight.nbytes for m in module.modules() if isinstance(m, PackedLinear))
