"""Linear layers with LoRA adapters on a 16-bit, 32-bit or 4-bit weight: ``x Wᵀ + bias + scale (x Aᵀ) Bᵀ``.

After Hu et al., "LoRA" (arXiv:2106.09685), and QLoRA (arXiv:2305.14314). Nothing here is a kernel: it is one
autograd function (``lora_products``) made of PyTorch's own products and ops that make their operands, as
``dequantize_4bit``, so that Inductor and a partitioner see every product. What it saves against the model's
own code, for M tokens, a weight (N, K) and rank r:

- the base's product adds to the update in place, where dtypes allow (``add_product``): ``update * scale``,
  the sum and their gradients, M·N each, are not made;
- over a 4-bit weight whose result is much wider than its input, or the other way round in the backward, the
  base's own product adds it (``extended_product``), and the wide result is written once;
- projections of one input (q, k, v; gate and up) share the product with their stacked A matrices, so that
  ``x`` is read once for them, and one gradient of ``x`` is accumulated for all;
- a 4-bit weight is dequantised again in the backward, not kept: 2·N·K bytes;
- a frozen weight gets no gradient, and neither does an input that needs none.

Saved for the backward: ``x`` (and dropped inputs), the weights as given (packed), A, B, and ``x Aᵀ`` (M·r),
each only where a gradient needs it.

Precision is the graph's: each product in the dtype that the model's code has for it, sums in fp32 inside a
product, and never a rounding more than the model's code makes. A parameter in another dtype is cast, and its
gradient comes back in its own.

It pays only where adapters are narrow (``adapter_is_narrow``). Not differentiated: 4-bit weights, the scale;
nor is there a second derivative.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .dequantize import Packed4bit
from .lora_extended import forms
from .lora_products import LoraProducts
from .lora_projection import Operands, Projection, tensors_of
from .resident_weight import Form, ResidentWeight


def adapter_is_narrow(r: int, n: int, k: int) -> bool:
    """Whether rank ``r`` is small beside the weight (n, k); if not, the model's own products are as good."""
    return r * 4 <= min(n, k)


def lora_linear(
    x: Tensor,
    weight: Tensor | Packed4bit | ResidentWeight,
    bias: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    scale: float = 1.0,
    dropped: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    adapter_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``x Wᵀ + bias + scale (dropped Aᵀ) Bᵀ``, with ``x`` for ``dropped`` where there is no dropout.

    Args:
        x: (..., K).
        weight: (N, K), trainable or not; or packed in 4 bits; or what stays of a packed one, dequantised.
        bias: (N,) or None.
        a, b: (r, K) and (N, r); both None for the bare linear.
        scale: LoRA's α/r, or rsLoRA's α/√r; a number, not a tensor.
        dropped: (..., K), ``x`` after dropout; its gradient is its own.
        compute_dtype: of the product with the weight. None: what eager would take where this is called,
            autocast's dtype, else ``x.dtype``; with a 4-bit weight always ``x.dtype``.
        adapter_dtype: of the adapter's products. None: autocast's dtype, else ``a.dtype``.
        out_dtype: of the result. None: ``compute_dtype``, as PEFT returns it. The sum of base and update is
            taken in the widest of the three.

    Returns:
        (..., N).

    Raises:
        ValueError: shapes do not fit, or only one of ``a`` and ``b`` is given.
    """
    inputs = None if dropped is None else (dropped,)
    dtypes = (compute_dtype, adapter_dtype, out_dtype)
    return lora_linears(x, (weight,), (bias,), (a,), (b,), (scale,), inputs, *dtypes)[0]


def linear_4bit(
    x: Tensor,
    packed: Packed4bit | ResidentWeight,
    bias: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``x Wᵀ + bias`` with a frozen 4-bit weight; only the packed weight is saved for the backward.

    Args, result and errors as of ``lora_linear`` without an adapter: (..., K) to (..., N).
    """
    return lora_linear(x, packed, bias, None, None, 1.0, None, compute_dtype, None, out_dtype)


def lora_linears(
    x: Tensor,
    weights: Sequence[Tensor | Packed4bit | ResidentWeight],
    biases: Sequence[Tensor | None],
    a_list: Sequence[Tensor | None],
    b_list: Sequence[Tensor | None],
    scales: Sequence[float],
    dropped: Sequence[Tensor | None] | None = None,
    compute_dtype: torch.dtype | None = None,
    adapter_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """Several projections of one ``x``, each as in ``lora_linear``; any of them may have no adapter.

    The adapters that read ``x`` itself and compute in one dtype share one product with their stacked A
    matrices. One with its own dropout reads its entry of ``dropped`` in a product of its own.

    Returns:
        a tuple of (..., N_i), one a weight.

    Raises:
        ValueError: as ``lora_linear``, or the sequences differ in length.
    """
    columns = (weights, biases, a_list, b_list, scales, dropped)
    given = _Given(x, *columns, compute_dtype, adapter_dtype, out_dtype)
    projections, operands = given.parts()
    # Every dtype is settled by now, and autocast would change it.
    with torch.autocast(x.device.type, enabled=False) if given.autocast else nullcontext():
        return LoraProducts.apply(tuple(projections), x, *(t for p in operands for t in p))


def resident_forms(*arguments: Any) -> list[Form | None]:
    """In which form each packed weight of ``lora_linears``, called with these, could stay dequantised.

    Only shapes and dtypes of tensors are read. None for a weight that is not packed, or would be there twice.
    """
    given = _Given(*arguments)
    return forms(*given.parts(), given.x.dtype)


class _Given(NamedTuple):
    """The arguments of ``lora_linears``."""

    x: Tensor
    weights: Sequence[Tensor | Packed4bit | ResidentWeight]
    biases: Sequence[Tensor | None]
    a_list: Sequence[Tensor | None]
    b_list: Sequence[Tensor | None]
    scales: Sequence[float]
    dropped: Sequence[Tensor | None] | None = None
    compute_dtype: torch.dtype | None = None
    adapter_dtype: torch.dtype | None = None
    out_dtype: torch.dtype | None = None

    @property
    def autocast(self) -> torch.dtype | None:
        """What autocast computes in on the device of ``x``, where it is on."""
        device = self.x.device.type
        if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
            return None
        return torch.get_autocast_dtype(device)

    def parts(self) -> tuple[list[Projection], list[Operands]]:
        """What of each projection is no tensor, and its tensors."""
        dropped = (None,) * len(self.weights) if self.dropped is None else self.dropped
        rows = zip(self.weights, self.biases, self.a_list, self.b_list, self.scales, dropped, strict=True)
        projections, operands = [], []
        for weight, bias, a, b, scale, own in rows:
            _check(self.x, weight.shape, bias, a, b, own)
            projections.append(self._projection(weight, a, scale))
            operands.append(Operands(*tensors_of(weight), bias, own, a, b))
        return projections, operands

    def _projection(self, weight: Any, a: Tensor | None, scale: float) -> Projection:
        packed, resident = isinstance(weight, Packed4bit), isinstance(weight, ResidentWeight)
        autocast = self.autocast
        compute = self.compute_dtype or (None if packed or resident else autocast) or self.x.dtype
        adapter = self.adapter_dtype or autocast or (compute if a is None else a.dtype)
        packing = (weight.shape, weight.blocksize, weight.quant_type) if packed else None
        shape = tuple(weight.shape) if resident else None
        return Projection(packing, scale, compute, adapter, self.out_dtype or compute, shape)


def _check(x, shape, bias, a, b, own) -> None:
    n, k = shape
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"lora_linear: input {tuple(x.shape)} does not end in {k}, the weight's ({n}, {k}).")
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"lora_linear: bias {tuple(bias.shape)}; weight ({n}, {k}) asks for ({n},).")
    if (a is None) != (b is None):
        raise ValueError("lora_linear: one of the adapter's matrices is missing; give both, or neither.")
    if a is not None and (a.shape[1:] != (k,) or b.shape != (n, a.shape[0])):
        raise ValueError(
            f"lora_linear: adapter {tuple(a.shape)}, {tuple(b.shape)} does not fit weight ({n}, {k}); "
            f"(r, {k}) and ({n}, r) would."
        )
    if own is not None and (own.shape != x.shape or a is None):
        raise ValueError(
            f"lora_linear: dropped input {tuple(own.shape)} needs an adapter and the input's shape "
            f"{tuple(x.shape)}."
        )
