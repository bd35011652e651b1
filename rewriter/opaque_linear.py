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

from rewriter.seal import sealed, traced_as_a_whole

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
    # One line after another, no calls or comparisons of tuples: Dynamo steps through it at every layer.
    whole = torch.compiler.is_dynamo_compiling() and traced_as_a_whole()
    known = _known_product(id(self)) if whole else None
    if known is not None:
        bias = self.bias if known[1] else None
        return known_product(x, self.weight, bias, self._quant_state, self._quant_state2, known)
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


def known_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: dict[str, Any],
    second: dict[str, Any],
    known: tuple,
) -> Tensor:
    """The line above where its layer's facts are ``known``, and its weight's states given as dictionaries."""
    compute, _, dtype, shape, blocksize, quant_type, twice = known
    given = x.dtype
    if given != compute:
        x = x.to(compute)
    if twice:
        parts = second["absmax"], blocksize, quant_type, bias, state["absmax"], second["code"]
    else:
        parts = state["absmax"], blocksize, quant_type, bias, None, None
    result = linear_4bit(x, weight, shape, *parts, state["offset"], dtype)
    return result if given == compute else result.to(given)


def _known_product(layer: int) -> tuple | None:
    """Of the sealed layer of this ``id`` what ``known_product`` takes; None where the line may not stand."""
    found: Any = sealed(layer)
    return None if found is None else give_product(found, found)


def give_product(layer: Any, to: nn.Module) -> tuple | None:
    """The facts of a layer's product; ``to`` gets its weight's states, as the dictionaries that they are.

    Dynamo sees those change. None where the layer does more than one product.
    """
    state, compute, bias = getattr(layer.weight, "quant_state", None), layer.compute_dtype, layer.bias
    if state is None:
        return None
    second = state.state2
    if (
        compute is None
        or not layer.compute_type_is_set
        or layer.support_avx512bf16_for_cpu
        or tuple(state.shape) != (layer.out_features, layer.in_features)
        or (second is not None and (second.blocksize, second.dtype) != (_SECOND_BLOCKSIZE, _SECOND_DTYPE))
        or (bias is not None and bias.dtype != compute)
    ):
        return None
    vars(to)["_quant_state"] = vars(state)
    vars(to)["_quant_state2"] = None if second is None else vars(second)
    shape, biased, twice = tuple(state.shape), bias is not None, second is not None
    return compute, biased, state.dtype, shape, state.blocksize, state.quant_type, twice


def forget_product(layer: nn.Module) -> None:
    """Undo ``give_product``."""
    for name in ("_quant_state", "_quant_state2"):
        vars(layer).pop(name, None)


def products(layers: Sequence[nn.Module]) -> list[Any]:
    """Of each layer what decides how its product is traced, other than its tensors' dtypes and sizes."""
    facts: list[Any] = []
    for own in map(vars, layers):
        parameters = own["_parameters"]
        weight = parameters.get("weight")
        if weight is None:
            weight = own.get("weight")
        state = getattr(weight, "quant_state", None)
        if state is None:
            facts += (weight, None)
            continue
        of, second = vars(state), state.state2
        facts += (
            weight, state, second, of["dtype"], of["shape"], of["blocksize"], of["quant_type"],
            own["compute_dtype"], own["compute_type_is_set"], own["support_avx512bf16_for_cpu"],
            parameters["bias"],
        )  # fmt: skip
        if second is not None:
            facts += (second.blocksize, second.dtype)
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
    torch.compiler.assume_constant_result(traced_as_a_whole)
    for layer in model.modules():
        if isinstance(layer, library.nn.Linear4bit) and _has_the_forward_of(layer, library.nn.Linear4bit):
            vars(layer)["forward"] = MethodType(forward, layer)
            yield layer


def make_transparent(layer: nn.Module) -> None:
    """Undo ``make_opaque``; a ``forward`` that somebody put over it stays."""
    if is_opaque(layer):
        del vars(layer)["forward"]
    forget_product(layer)


def is_opaque(layer: nn.Module) -> bool:
    """Whether ``make_opaque`` changed it."""
    return getattr(vars(layer).get("forward"), "__func__", None) is forward


def _has_the_forward_of(layer: nn.Module, known: type[nn.Module]) -> bool:
    return "forward" not in vars(layer) and type(layer).forward is known.forward
