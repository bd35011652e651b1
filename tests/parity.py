"""Whether a compiled model trains as eager does: its loss and every gradient against fp64.

A model is run three times on the same inputs: compiled, eagerly, and eagerly in fp64. The fp64 run is the
truth, so it may not round anywhere: models cast to float32 by name in their norms, rotary embeddings and
softmax, and ``float64_throughout`` turns those casts into float64 and refuses any other float dtype.

The criterion is that of ``tests.accuracy``, on three levels, so that it neither misses one wrong tensor nor
turns on the luck of one:

- the loss;
- every gradient, each as a whole: its relative error may be ``each`` times eager's;
- all gradients' elements pooled, each tensor scaled by its size: ``median`` and ``worst`` times eager's.
"""

import contextlib
import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from tests.accuracy import assert_as_accurate

NARROW = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Step:
    """What one forward and backward gave: the loss, and the gradients by parameter name."""

    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Parity:
    """The three runs of one model on one batch."""

    compiled: Step
    eager: Step
    truth: Step
    dtype: torch.dtype

    def check(self, *, median: float = 1.1, worst: float = 2.0, each: float = 2.0) -> None:
        """Raise ``AssertionError``, naming the tensor, where the compiled run is further from fp64.

        The median's limit is not 1.0, as it is for single kernels: another order of the same sums, which
        plain Inductor chooses too, moves the median of a whole tiny model by 6% in either direction.
        """
        names = self.eager.gradients.keys()
        assert self.compiled.gradients.keys() == names, (
            f"gradients that only one of compiled and eager has: {self.compiled.gradients.keys() ^ names}"
        )
        assert self.truth.gradients.keys() == names, "the fp64 run reached other parameters than eager"
        self._check_loss(worst)
        for name in names:
            self._check_gradient(name, each)
        for dtype in {g.dtype for g in self.eager.gradients.values()}:
            pooled = [self._pooled(step, dtype) for step in (self.compiled, self.eager, self.truth)]
            assert_as_accurate(*pooled, name=f"all {dtype} gradients", median=median, worst=worst)

    def distances(self) -> dict[str, tuple[float, float]]:
        """Each gradient's relative distance from the truth: compiled, eager."""
        return {name: self._relative(name) for name in self.eager.gradients}

    def _check_loss(self, worst: float) -> None:
        ours, eager, truth = (s.loss.double().item() for s in (self.compiled, self.eager, self.truth))
        assert self.compiled.loss.dtype == self.eager.loss.dtype, "loss: another dtype than eager's"
        # Eager's loss can be right by luck: errors of many tokens cancel in the mean.
        limit = max(worst * abs(eager - truth), self._luck() * abs(truth))
        assert abs(ours - truth) <= limit, (
            f"loss: {ours} is further from {truth} than {limit:.3e}; eager: {eager}"
        )

    def _check_gradient(self, name: str, each: float) -> None:
        ours, eager = self.compiled.gradients[name], self.eager.gradients[name]
        assert ours.shape == eager.shape, f"{name}: shape {tuple(ours.shape)}, eager's {tuple(eager.shape)}"
        assert ours.dtype == eager.dtype, f"{name}: dtype {ours.dtype}, eager's {eager.dtype}"
        assert ours.isfinite().all(), f"{name}: the gradient is not finite"
        error, allowed = self._relative(name)
        limit = each * max(allowed, self._typical())
        assert error <= limit, f"{name}: relative error {error:.3e} exceeds {limit:.3e}; eager: {allowed:.3e}"

    def _relative(self, name: str) -> tuple[float, float]:
        truth = self.truth.gradients[name]
        size = max(truth.norm().item(), self._floor() * math.sqrt(truth.numel()))
        if size == 0.0:
            size = 1.0
        return tuple(
            (s.gradients[name].double() - truth).norm().item() / size for s in (self.compiled, self.eager)
        )

    def _typical(self) -> float:
        """Eager's median relative error over the tensors: what a small tensor may have, whatever its luck."""
        return torch.tensor([self._relative(name)[1] for name in self.eager.gradients]).median().item()

    def _floor(self) -> float:
        """The size below which a gradient is nothing but rounding, as a key's bias without rotary is."""
        sizes = [_rms(g) for g in self.truth.gradients.values()]
        return 1e-3 * torch.tensor(sizes, dtype=torch.float64).median().item()

    def _luck(self) -> float:
        """The relative error that any computation in this dtype may have in a mean over a few tokens."""
        unit = torch.finfo(self.dtype).eps
        return unit if self.dtype == torch.float32 else unit / 4

    def _pooled(self, step: Step, dtype: torch.dtype) -> torch.Tensor:
        floor = self._floor()
        parts = []
        for name, eager in self.eager.gradients.items():
            if eager.dtype != dtype or (size := max(_rms(self.truth.gradients[name]), floor)) == 0.0:
                continue
            # A power of two rounds nothing.
            parts.append(step.gradients[name].flatten() * 2.0 ** -round(math.log2(size)))
        return torch.cat(parts)


def parity(
    model: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    compile_kwargs: Mapping,
    *,
    autocast: torch.dtype | None = None,
    same_dropout: bool = False,
    seed: int = 0,
) -> Parity:
    """Run ``model(**inputs).loss.backward()`` compiled with ``compile_kwargs``, eagerly and in fp64.

    Args:
        autocast: entered around the compiled and the eager forward, not around the fp64 one.
        same_dropout: make Inductor draw eager's random numbers (``fallback_random``). Without, a model with
            dropout cannot be compared.
    """
    torch._dynamo.reset()
    with torch._inductor.config.patch(fallback_random=same_dropout):
        compiled = step(model, inputs, torch.compile(model, **compile_kwargs), autocast=autocast, seed=seed)
    torch._dynamo.reset()
    eager = step(model, inputs, autocast=autocast, seed=seed)
    dtypes = [p.dtype for p in model.parameters() if p.is_floating_point()] + ([autocast] if autocast else [])
    coarsest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    return Parity(compiled, eager, true_step(model, inputs, seed=seed), coarsest)


def step(
    model: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    call=None,
    *,
    autocast: torch.dtype | None = None,
    seed: int = 0,
) -> Step:
    """One forward and backward of ``call``, the model itself if None; the model's gradients end as None."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    device = next(iter(inputs.values())).device.type
    with torch.autocast(device, dtype=autocast) if autocast else contextlib.nullcontext():
        loss = (model if call is None else call)(**inputs).loss
    loss.backward()
    gradients = {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return Step(loss.detach().clone(), gradients)


def true_step(model: nn.Module, inputs: Mapping[str, torch.Tensor], *, seed: int = 0) -> Step:
    """The same step in fp64, from the model's weights as they are: rounded, or dequantised from 4 bits."""
    twin = copy.deepcopy(model)
    _dequantise(twin)
    _ungroup_experts(twin)
    twin.double()
    with float64_throughout():
        return step(twin, inputs, seed=seed)


@contextlib.contextmanager
def float64_throughout() -> Iterator[None]:
    """Turn every cast to a narrower float into one to float64; raise where a narrow result appears yet."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _WidenedCasts(), _OnlyFloat64():
            yield
    finally:
        torch.set_default_dtype(before)


class _WidenedCasts(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16):
            return args[0].double()
        args = tuple(_widened(a) for a in args)
        return function(*args, **{k: _widened(v) for k, v in (kwargs or {}).items()})


def _widened(argument):
    return torch.float64 if isinstance(argument, torch.dtype) and argument in NARROW else argument


class _OnlyFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and value.dtype in NARROW:
                raise AssertionError(f"{function} gave {value.dtype} in the fp64 run")
        return result


def _dequantise(model: nn.Module) -> None:
    """Replace 4-bit linear layers by plain ones with the weight that their products see, in place."""
    quantised = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if hasattr(child._parameters.get("weight"), "quant_state")
    ]
    for parent, name, child in quantised:
        import bitsandbytes.functional as bnb

        weight = bnb.dequantize_4bit(child.weight.data, child.weight.quant_state)
        plain = nn.Linear(child.in_features, child.out_features, bias=child.bias is not None)
        plain.weight = nn.Parameter(weight, requires_grad=False)
        plain.bias = child.bias
        setattr(parent, name, plain)


def _ungroup_experts(model: nn.Module) -> None:
    """Compute the experts by products that exist in fp64, which the grouped product does not."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module._can_set_experts_implementation():
            module.set_experts_implementation("batched_mm")


def _rms(tensor: torch.Tensor) -> float:
    return tensor.double().square().mean().sqrt().item() if tensor.numel() else 0.0
