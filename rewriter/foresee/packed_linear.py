"""Frozen linears in 4 bits without their values: what planning needs to know of them is shapes.

Each becomes a ``PackedLinear`` with the tensors that bitsandbytes makes of a weight, and stands in a graph as
the product that ``opaque_linear`` makes of a prepared layer, so that the LoRA pass treats it alike.
bitsandbytes itself quantises values, on a device; here there are none.
"""

import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.opaque_linear import linear_4bit

_BLOCK, _SECOND_BLOCK, _CODE = 64, 256, 256
KINDS = ("nf4", "fp4")


class PackedLinear(nn.Module):
    """A frozen linear in 4 bits, in bitsandbytes' own layout; ``nested``: its scales are quantised too."""

    weight: Tensor
    absmax: Tensor
    absmax_8bit: Tensor | None
    absmax_code: Tensor | None
    absmax_offset: Tensor | None

    def __init__(
        self,
        outputs: int,
        inputs: int,
        bias: Tensor | None,
        kind: str,
        dtype: torch.dtype,
        nested: bool = True,
    ):
        super().__init__()
        self.shape, self.kind, self.dtype, self.bias = (outputs, inputs), kind, dtype, bias
        blocks = -(-outputs * inputs // _BLOCK)
        first = -(-blocks // _SECOND_BLOCK) if nested else blocks
        self.register_buffer("weight", _empty(torch.uint8, -(-outputs * inputs // 2), 1))
        self.register_buffer("absmax", _empty(torch.float32, first))
        self.register_buffer("absmax_8bit", _empty(torch.uint8, blocks) if nested else None)
        self.register_buffer("absmax_code", _empty(torch.float32, _CODE) if nested else None)
        self.register_buffer("absmax_offset", _empty(torch.float32) if nested else None)

    def forward(self, x: Tensor) -> Tensor:
        return linear_4bit(
            x.to(self.dtype), self.weight, self.shape, self.absmax, _BLOCK, self.kind, self.bias,
            self.absmax_8bit, self.absmax_code, self.absmax_offset, self.dtype,
        ).to(x.dtype)  # fmt: skip


def _empty(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def pack_linears(model: nn.Module, kind: str, dtype: torch.dtype) -> None:
    """Put a ``PackedLinear`` in the place of every linear but the head and the adapters.

    Args:
        dtype: what weights are dequantised to, and products taken in.

    Raises:
        ValueError: bitsandbytes has no such ``kind``, or is not installed.
    """
    if kind not in KINDS:
        raise ValueError(
            f"plan: quantise is {kind!r}; known are 'nf4' and 'fp4', as bitsandbytes names them."
        )
    head = getattr(model, "get_output_embeddings", lambda: None)()
    adapters = {m for name, m in model.named_modules() if "lora_" in name}
    _replace(
        model,
        lambda m: type(m) is nn.Linear and m is not head and m not in adapters,
        lambda m: PackedLinear(m.out_features, m.in_features, m.bias, kind, dtype),
    )


def repack_linears(model: nn.Module) -> None:
    """The same for bitsandbytes' own layers, whose state holds tensors that a copy on "meta" has lost."""
    library = sys.modules.get("bitsandbytes")
    if library is not None:
        _replace(model, lambda m: type(m) is library.nn.Linear4bit, _repacked)


def _repacked(layer: Any) -> PackedLinear:
    state = getattr(layer.weight, "quant_state", None)
    kind, nested = (state.quant_type, state.nested) if state is not None else ("nf4", True)
    dtype = layer.compute_dtype or torch.bfloat16
    return PackedLinear(layer.out_features, layer.in_features, layer.bias, kind, dtype, nested)


def _replace(
    model: nn.Module, chosen: Callable[[nn.Module], bool], make: Callable[[Any], PackedLinear]
) -> None:
    found = [(m, name, c) for m in model.modules() for name, c in m.named_children() if chosen(c)]
    if not found:
        return
    try:
        importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise ValueError("plan: 4-bit weights need bitsandbytes, which is not installed.") from error
    # As ``prepare`` does for a model that will be trained.
    torch.compiler.allow_in_graph(linear_4bit)
    for parent, name, child in found:
        setattr(parent, name, make(child))
