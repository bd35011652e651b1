"""bitsandbytes' quantised linear as one call of a graph, which Dynamo does not trace into.

Dynamo traces the product's autograd function anew for each layer, forward and backward: a third to a half of
its time for a model in 4 bits, and two nested graphs a layer, over all of which torch 2.11 walks once a node.
Here a prepared layer's ``forward`` becomes

    x.to(compute_dtype) -> linear_4bit(x, the weight's parts) -> .to(the input's dtype)

where ``linear_4bit`` stands in the graph as it is. Where no pass replaces it, AOTAutograd looks into it: it
calls bitsandbytes' own ``matmul_4bit``, so that results and gradients are what they were. Outside of Dynamo
the layer runs its class's ``forward``, unless its weight is in host memory, which is then copied for the
product; so it does under Dynamo where that does more than the above: a weight that lost its state or was
quantised transposed, a bias to be cast, a compute dtype that the first input decides.

bitsandbytes is not imported here: where a layer of it is, it is loaded.
"""

import sys
from collections.abc import Iterator, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.seal import sealed

# Of the second level of double quantisation, as bitsandbytes quantises and as ``gemm_4bit`` takes it.
_SECOND_BLOCKSIZE = 256
_SECOND_DTYPE = torch.float32


def linear_4bit(
    x: Tensor,
    data: Tensor,
    shape: tuple[int, int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None,
    absmax_8bit: Tensor | None,
    absmax_code: Tensor | None,
    absmax_offset: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """``x`` (..., K) times the 4-bit weight (N, K): the arguments of ``gemm_4bit``, and the weight's dtype.

    Returns:
        (..., N) in the dtype of ``x``; differentiable in ``x``. Autograd saves the packed weight alone; of
        one in host memory, its copy on the device.
    """
    library = sys.modules["bitsandbytes"]
    parts: dict[str, Any] = {"absmax": absmax}
    if absmax_8bit is not None:
        second = library.functional.QuantState(
            absmax=absmax, code=absmax_code, blocksize=_SECOND_BLOCKSIZE, dtype=_SECOND_DTYPE
        )
        parts = {"absmax": absmax_8bit, "offset": absmax_offset, "state2": second}
    state = library.functional.QuantState(
        shape=torch.Size(shape), blocksize=blocksize, quant_type=quant_type, dtype=dtype, **parts
    )
    if data.device != x.device:
        data = data.detach().to(x.device, non_blocking=True)
    return library.matmul_4bit(x, data, bias=bias, quant_state=state)


def forward(self: Any, x: Tensor) -> Tensor:
    """The ``forward`` of a layer that ``make_opaque`` changed. A copy by pickle has its class's again."""
    # One line after another, no helpers or comparisons of tuples: Dynamo steps through it at every layer.
    known = None
    if (
        torch.compiler.is_dynamo_compiling()
        and self.compute_type_is_set
        and not self.support_avx512bf16_for_cpu
    ):
        known = _known_product(id(self))
    if known is not None:
        dtype, given, bias, parts = known[0], x.dtype, self.bias, self._quant_state
        if x.shape[-1] == parts["shape"][1] and (bias is None or bias.dtype == dtype):
            second = self._quant_state2 if known[2] else None
            if second is not None and second["blocksize"] != _SECOND_BLOCKSIZE:
                return type(self).forward(self, x)
            result = linear_4bit(
                x if dtype == given else x.to(dtype),
                self.weight, parts["shape"], parts["absmax"] if second is None else second["absmax"],
                parts["blocksize"], parts["quant_type"], bias, None if second is None else parts["absmax"],
                None if second is None else second["code"], parts["offset"], known[1],
            )  # fmt: skip
            return result if dtype == given else result.to(given)
    state = getattr(self.weight, "quant_state", None)
    if (
        (not torch.compiler.is_dynamo_compiling() and self.weight.device == x.device)
        or state is None
        or not self.compute_type_is_set
        or self.support_avx512bf16_for_cpu
        or len(state.shape) != 2
        or x.shape[-1] != state.shape[1]
    ):
        return type(self).forward(self, x)
    given, dtype, bias, second = x.dtype, self.compute_dtype, self.bias, state.state2
    first, first_8bit, code = state.absmax, None, None
    if second is not None:
        if second.blocksize != _SECOND_BLOCKSIZE or second.dtype != _SECOND_DTYPE:
            return type(self).forward(self, x)
        first, first_8bit, code = second.absmax, first, second.code
    if dtype is None:
        dtype = given
    if bias is not None and bias.dtype != dtype:
        return type(self).forward(self, x)
    result = linear_4bit(
        x if dtype == given else x.to(dtype),
        self.weight, state.shape, first, state.blocksize, state.quant_type, bias,
        first_8bit, code, state.offset, state.dtype,
    )  # fmt: skip
    return result if dtype == given else result.to(given)


def _known_product(layer: int) -> tuple[torch.dtype, torch.dtype, bool] | None:
    """Of the sealed layer of this ``id``: compute dtype, weight's dtype, and whether it is quantised twice.

    None where the line above may not stand. The layer gets its weight's state as dictionaries, which Dynamo
    sees change: those are the states' own.
    """
    found: Any = sealed(layer)
    if found is None:
        return None
    state = getattr(found.weight, "quant_state", None)
    if state is None:
        return None
    second = state.state2
    if (
        found.compute_dtype is None
        or len(state.shape) != 2
        or (second is not None and second.dtype != _SECOND_DTYPE)
    ):
        return None
    vars(found)["_quant_state"] = vars(state)
    if second is not None:
        vars(found)["_quant_state2"] = vars(second)
    return found.compute_dtype, state.dtype, second is not None


def products(layers: Sequence[nn.Module]) -> list[Any]:
    """Of each layer what its product is traced by that no dictionary of Dynamo's tells of."""
    facts = []
    for own in map(vars, layers):
        weight = own["_parameters"].get("weight")
        if weight is None:
            weight = own.get("weight")
        state = getattr(weight, "quant_state", None)
        facts += weight, state, own["compute_dtype"]
        if state is not None:
            second = state.state2
            facts += state.dtype, second
            if second is not None:
                facts.append(second.dtype)
    return facts


def make_opaque(model: nn.Module) -> Iterator[nn.Module]:
    """Give every 4-bit linear of ``model`` the ``forward`` above, unless its own was replaced before.

    Returns:
        The layers that it changed.
    """
    library = sys.modules.get("bitsandbytes")
    if library is None or not hasattr(torch.ops.bitsandbytes, "gemm_4bit"):
        return
    torch.compiler.allow_in_graph(linear_4bit)
    torch.compiler.assume_constant_result(_known_product)
    for layer in model.modules():
        if isinstance(layer, library.nn.Linear4bit) and _has_the_forward_of(layer, library.nn.Linear4bit):
            vars(layer)["forward"] = MethodType(forward, layer)
            yield layer


def make_transparent(layer: nn.Module) -> None:
    """Undo ``make_opaque``; a ``forward`` that somebody put over it stays."""
    if getattr(vars(layer).get("forward"), "__func__", None) is forward:
        del vars(layer)["forward"]
    for name in ("_quant_state", "_quant_state2"):
        vars(layer).pop(name, None)


def _has_the_forward_of(layer: nn.Module, known: type[nn.Module]) -> bool:
    return "forward" not in vars(layer) and type(layer).forward is known.forward
