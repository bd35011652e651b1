"""How much of a model to trace is in host memory, how much could be, and what a batch reads of it there."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from rewriter.foresee.packed_linear import PackedLinear
from rewriter.foresee.repetition import Repetition, layers_of
from rewriter.hostable import EMBEDDING, HEAD, LAYERS, embedding_of, head_of, read_elsewhere, refuse_shared
from rewriter.size_text import size_text


@dataclass(frozen=True)
class HostBytes:
    """Bytes of weights by their kind, "embedding", "head" and "layers".

    A head that is tied to the embedding has none of its own.

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
    weights = _weights(model, host)
    found = {kind: weight.nbytes for kind, weight in weights.items()}
    if len(weights) > len(set(weights.values())):
        found[HEAD] = 0
    if size := _packed_bytes(model, left_out):
        found[LAYERS] = size
    elif LAYERS in host:
        raise ValueError("plan: host is 'layers', and no linear is in 4 bits; say quantise='nf4'.")
    there = {kind: size for kind, size in found.items() if kind in host}
    could = {kind: size for kind, size in found.items() if kind not in host}
    row = weights[EMBEDDING][0].nbytes if EMBEDDING in weights else 0
    return HostBytes(there, could, row)


def _weights(model: nn.Module, host: Collection[str]) -> dict[str, nn.Parameter]:
    """Of the embedding and the head, what is in host memory or could be; one weight where they are tied."""
    found: dict[str, Any] = {}
    for kind, find in ((EMBEDDING, embedding_of), (HEAD, head_of)):
        try:
            found[kind] = find(model)
        except ValueError:
            if kind in host:
                raise
    refuse_shared(model, [module for kind, module in found.items() if kind in host])
    stay = {module for module, _ in read_elsewhere(model, found.values())}
    return {kind: module.weight for kind, module in found.items() if module not in stay}


def _packed_bytes(model: nn.Module, left_out: Repetition | None) -> int:
    size = _packed_bytes_of(model)
    if left_out is not None:
        layers = layers_of(model, left_out.path)
        size += sum(_packed_bytes_of(layers[place]) for place in left_out.window) * left_out.times
    return size


def _packed_bytes_of(module: nn.Module) -> int:
    return sum(m.weight.nbytes for m in module.modules() if isinstance(m, PackedLinear))
