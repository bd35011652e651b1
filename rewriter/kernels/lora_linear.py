"""Linear layers with LoRA adapters on a 16-bit, 32-bit or 4-bit weight: ``x Wᵀ + bias + scale (x Aᵀ) Bᵀ``.

After Hu et al., "LoRA" (arXiv:2106.09685), and QLoRA (arXiv:2305.14314). Nothing here is a kernel: it is one
autograd function made of PyTorch's own products and the op ``dequantize_4bit``, so that Inductor and a
partitioner see every product. What it saves against the model's own code, for M tokens, a weight (N, K) and
rank r:

- the update is added by the product that makes it, where dtypes allow (``add_product``): ``update``,
  ``update * scale`` and their gradients, M·N each, are not made;
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
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .add_product import add_product
from .dequantize import Packed4bit, dequantize_4bit

# Told apart, so that no compiler merges the two and keeps the 16-bit weight in between.
_FORWARD, _BACKWARD = 0, 1


def adapter_is_narrow(r: int, n: int, k: int) -> bool:
    """Whether rank ``r`` is small beside the weight (n, k); if not, the model's own products are as good."""
    return r * 4 <= min(n, k)


def lora_linear(
    x: Tensor,
    weight: Tensor | Packed4bit,
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
        weight: (N, K), trainable or not; or packed in 4 bits.
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
    packed: Packed4bit,
    bias: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``x Wᵀ + bias`` with a frozen 4-bit weight; only the packed weight is saved for the backward."""
    return lora_linear(x, packed, bias, None, None, 1.0, None, compute_dtype, None, out_dtype)


def lora_linears(
    x: Tensor,
    weights: Sequence[Tensor | Packed4bit],
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
    dropped = (None,) * len(weights) if dropped is None else dropped
    autocast = _autocast_dtype(x.device.type)
    specs, operands = [], []
    for weight, bias, a, b, scale, own in zip(weights, biases, a_list, b_list, scales, dropped, strict=True):
        packed = isinstance(weight, Packed4bit)
        _check(x, weight.shape, bias, a, b, own)
        compute = compute_dtype or (None if packed else autocast) or x.dtype
        adapter = adapter_dtype or autocast or (compute if a is None else a.dtype)
        packing = (weight.shape, weight.blocksize, weight.quant_type) if packed else None
        specs.append(_Spec(packing, scale, compute, adapter, out_dtype or compute))
        operands += _Operands(*_tensors_of(weight), bias, own, a, b)
    # Every dtype is settled by now, and autocast would change it.
    with torch.autocast(x.device.type, enabled=False) if autocast else nullcontext():
        return _LoraLinears.apply(tuple(specs), x, *operands)


def _autocast_dtype(device: str) -> torch.dtype | None:
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


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


# A tensor or None; in the backward also a tensor's dtype, or whether its gradient is wanted. Which of a
# projection's are there follows from the others, which types cannot say.
_Slot = Any


class _Operands(NamedTuple):
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
class _Spec:
    """What is no tensor in a projection. ``packing``: shape, block size and type of a 4-bit weight."""

    packing: tuple | None
    scale: float
    compute: torch.dtype
    adapter: torch.dtype
    out: torch.dtype

    def weight(self, p: _Operands, use: int) -> Tensor:
        """The weight in the product's dtype, (N, K)."""
        if self.packing is None:
            return p.weight.to(self.compute)
        shape, blocksize, quant_type = self.packing
        scales = (p.absmax_8bit, p.absmax_code, p.absmax_offset)
        packed = Packed4bit(p.weight, shape, p.absmax, blocksize, quant_type, *scales)
        return dequantize_4bit(packed, self.compute, use)


def _tensors_of(weight: Tensor | Packed4bit) -> tuple[_Slot, _Slot, _Slot, _Slot, _Slot]:
    if isinstance(weight, Packed4bit):
        return weight.data, weight.absmax, weight.absmax_8bit, weight.absmax_code, weight.absmax_offset
    return weight, None, None, None, None


def _unflatten(tensors: Sequence) -> list[_Operands]:
    width = len(_Operands._fields)
    return [_Operands(*tensors[i : i + width]) for i in range(0, len(tensors), width)]


def _sharing(specs: Sequence[_Spec], members: Sequence[int]) -> dict[torch.dtype, list[int]]:
    """``members`` by the dtype of their adapters' products: those of one dtype share a product."""
    groups: dict[torch.dtype, list[int]] = {}
    for i in members:
        groups.setdefault(specs[i].adapter, []).append(i)
    return groups


def _stacked(matrices: list[Tensor], dim: int) -> Tensor:
    return matrices[0] if len(matrices) == 1 else torch.cat(matrices, dim)


def _add_update(spec: _Spec, base: Tensor, down: Tensor, b: Tensor) -> Tensor:
    """``base + scale · down Bᵀ``: added inside the product where all dtypes are one, else in the widest."""
    up = b.to(spec.adapter).t()
    if spec.compute == spec.adapter == spec.out:
        return add_product(base, down, up, spec.scale)
    wide = torch.promote_types(torch.promote_types(spec.compute, spec.adapter), spec.out)
    return (base.to(wide) + (down @ up).to(wide) * spec.scale).to(spec.out)


def _accumulate(total: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """``total + left right``, in no narrower a dtype than ``dtype``, a total's or the product's."""
    if total is None:
        return (left @ right).to(torch.promote_types(left.dtype, dtype))
    if total.dtype == left.dtype:
        return add_product(total, left, right)
    return total + left @ right


def _scaled(left: Tensor, right: Tensor, scale: float, shape: Tensor) -> Tensor:
    """``scale · left right``, rounded once; of ``shape`` only the shape counts."""
    return torch.addmm(shape, left, right, beta=0, alpha=scale)


class _LoraLinears(torch.autograd.Function):
    """``lora_linears`` and its backward. Operands come flat: autograd tracks no tensors in containers."""

    @staticmethod
    def forward(ctx, specs, x, *tensors):
        operands = _unflatten(tensors)
        rows = x.reshape(-1, x.shape[-1])
        down: list[_Slot] = [None] * len(specs)
        shared = [i for i, p in enumerate(operands) if p.a is not None and p.dropped is None]
        for dtype, members in _sharing(specs, shared).items():
            stack = _stacked([operands[i].a.to(dtype) for i in members], 0)
            parts = (rows.to(dtype) @ stack.t()).split([operands[i].a.shape[0] for i in members], 1)
            for i, part in zip(members, parts, strict=True):
                down[i] = part
        outputs = []
        for i, (spec, p) in enumerate(zip(specs, operands, strict=True)):
            if p.dropped is not None:
                down[i] = p.dropped.reshape(rows.shape).to(spec.adapter) @ p.a.to(spec.adapter).t()
            bias = None if p.bias is None else p.bias.to(spec.compute)
            y = F.linear(rows.to(spec.compute), spec.weight(p, _FORWARD), bias)
            y = y.to(spec.out) if p.a is None else _add_update(spec, y, down[i], p.b)
            # A view made in here could not be written in place, as models do with a linear's result.
            outputs.append(torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1])))
        _save(ctx, specs, x, operands, down)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        x, *saved = ctx.saved_tensors
        down, operands = saved[: len(grads)], _unflatten(saved[len(grads) :])
        needs_x, needs = ctx.needs_input_grad[1], _unflatten(ctx.needs_input_grad[2:])
        results = [dict.fromkeys(_Operands._fields) for _ in grads]
        # None where no gradient reads the input.
        rows: Any = None if x is None else x.reshape(-1, x.shape[-1])
        dx, ddown = None, {}
        for i, (spec, p, need) in enumerate(zip(ctx.specs, operands, needs, strict=True)):
            if grads[i] is None:
                continue
            dy, result, own = grads[i].reshape(-1, grads[i].shape[-1]), results[i], ctx.own[i]
            if need.bias:
                result["bias"] = dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32))
            if need.weight:
                result["weight"] = dy.to(spec.compute).t() @ rows.to(spec.compute)
            if needs_x:
                dx = _accumulate(dx, dy.to(spec.compute), spec.weight(p, _BACKWARD), ctx.dtypes[0])
            if p.b is None:
                continue
            dy, b = dy.to(spec.adapter), p.b.to(spec.adapter)
            if need.b:
                result["b"] = _scaled(dy.t(), down[i], spec.scale, b)
            if need.a or (need.dropped if own else needs_x):
                ddown[i] = _scaled(dy, b, spec.scale, down[i])
            if own and need.a:
                result["a"] = ddown[i].t() @ p.dropped.reshape(-1, p.dropped.shape[-1]).to(spec.adapter)
            if own and need.dropped:
                result["dropped"] = (ddown[i] @ p.a.to(spec.adapter)).view(ctx.shape)
        for dtype, members in _sharing(ctx.specs, [i for i in ddown if not ctx.own[i]]).items():
            stack = _stacked([ddown[i] for i in members], 1)
            if any(needs[i].a for i in members):
                parts = (stack.t() @ rows.to(dtype)).split([ddown[i].shape[1] for i in members], 0)
                for i, part in zip(members, parts, strict=True):
                    results[i]["a"] = part if needs[i].a else None
            if needs_x:
                a = _stacked([operands[i].a.to(dtype) for i in members], 0)
                dx = _accumulate(dx, stack, a, ctx.dtypes[0])
        dx = None if dx is None else dx.to(ctx.dtypes[0]).view(ctx.shape)
        flat = []
        for result, dtypes in zip(results, ctx.dtypes[1], strict=True):
            flat += [
                None if g is None else g.to(dtype) for g, dtype in zip(result.values(), dtypes, strict=True)
            ]
        return None, dx, *flat


def _save(ctx, specs, x, operands, down) -> None:
    """Save what some gradient reads, and no more."""
    ctx.set_materialize_grads(False)
    ctx.specs, ctx.shape = specs, x.shape
    ctx.own = [p.dropped is not None for p in operands]
    ctx.dtypes = x.dtype, [_Operands(*(None if t is None else t.dtype for t in p)) for p in operands]
    needs_x, needs = ctx.needs_input_grad[1], _unflatten(ctx.needs_input_grad[2:])
    reads_x, kept_down, kept = False, [], []
    for p, need, d, own in zip(operands, needs, down, ctx.own, strict=True):
        reads_x |= need.weight or (need.a and not own)
        through = need.dropped if own else needs_x
        adapts = through or need.a or need.b
        kept_down.append(d if adapts else None)
        weight = p[:5] if needs_x else (None,) * 5
        kept += [*weight, None, p.dropped if need.a else None]
        kept += [p.a if through else None, p.b if adapts else None]
    ctx.save_for_backward(x if reads_x else None, *kept_down, *kept)
