"""Whether a compiled model trains as eager does: its loss and every gradient against fp64.

A model is run three times on the same inputs: compiled, eagerly, and eagerly in fp64. The fp64 run is the
truth, so it may not round anywhere: models cast to float32 by name in their norms, rotary embeddings and
softmax, and ``float64_throughout`` turns those casts into float64 and refuses any other float dtype.

The criterion is that of ``tests.accuracy``, on three levels, so that it neither misses one wrong tensor nor
turns on the luck of one, and over several batches, which are compiled once:

- the loss: its root mean square error may be ``worst`` times eager's;
- every gradient, each as a whole: its root mean square error may be ``each`` times eager's, and more where
  it is of a few numbers: twice that for one;
- all gradients' elements pooled, each tensor scaled by its size: the median error may be eager's own, and
  the worst ``worst`` times eager's.

The errors within one batch are not independent: a rounding near the model's end reaches every gradient
before it. Two computations of the same roundings in other orders therefore differ in the median of a whole
batch, and by how much the batches themselves tell: three standard errors of that are allowed, 3% for four
batches. Over the 40 families and 8 batches the median is 0.995 of eager's in bf16 and 0.988 with LoRA on a
CPU, 0.961 and 0.954 through the kernels on an H200, where no family's mean is above 1.
"""

import contextlib
import copy
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from tests.accuracy import assert_as_accurate

NARROW = (torch.float32, torch.bfloat16, torch.float16)

# Standard deviations of one batch's median error over eager's, as logarithms.
TYPICAL_SPREAD, LARGEST_SPREAD = 0.02, 0.05


@dataclass(frozen=True)
class Step:
    """What one forward and backward gave: the loss, and the gradients by parameter name."""

    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Run:
    """One batch, three times."""

    compiled: Step
    eager: Step
    truth: Step

    def check_kinds(self) -> None:
        """The same gradients in all three, of the same shapes and dtypes, and finite."""
        names = self.eager.gradients.keys()
        assert self.compiled.gradients.keys() == names, (
            f"gradients that only one of compiled and eager has: {self.compiled.gradients.keys() ^ names}"
        )
        assert self.truth.gradients.keys() == names, "the fp64 run reached other parameters than eager"
        for name, eager in self.eager.gradients.items():
            ours = self.compiled.gradients[name]
            assert ours.shape == eager.shape, f"{name}: shape {tuple(ours.shape)}, eager's {eager.shape}"
            assert ours.dtype == eager.dtype, f"{name}: dtype {ours.dtype}, eager's {eager.dtype}"
            assert ours.isfinite().all(), f"{name}: the gradient is not finite"
        assert self.compiled.loss.dtype == self.eager.loss.dtype, "loss: not eager's dtype"

    def distances(self) -> dict[str, tuple[float, float]]:
        """Each gradient's relative distance from the truth: compiled, eager."""
        return {name: self._relative(name) for name in self.eager.gradients}

    def losses(self) -> tuple[float, float, float]:
        return tuple(s.loss.double().item() for s in (self.compiled, self.eager, self.truth))

    def pooled(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """All gradients of a dtype as one tensor, each scaled by its size: compiled, eager, truth."""
        floor, parts = self._floor(), []
        for name, eager in self.eager.gradients.items():
            if eager.dtype != dtype or (size := max(_rms(self.truth.gradients[name]), floor)) == 0.0:
                continue
            # A power of two rounds nothing.
            scale = 2.0 ** -round(math.log2(size))
            steps = (self.compiled, self.eager, self.truth)
            parts.append([step.gradients[name].flatten() * scale for step in steps])
        return [torch.cat(tensors) for tensors in zip(*parts, strict=True)]

    def _relative(self, name: str) -> tuple[float, float]:
        truth = self.truth.gradients[name]
        size = max(truth.norm().item(), self._floor() * math.sqrt(truth.numel())) or 1.0
        return tuple(
            (s.gradients[name].double() - truth).norm().item() / size for s in (self.compiled, self.eager)
        )

    def _floor(self) -> float:
        """The size below which a gradient is nothing but rounding, as a key's bias without rotary is."""
        sizes = [_rms(g) for g in self.truth.gradients.values()]
        return 1e-3 * torch.tensor(sizes, dtype=torch.float64).median().item()


@dataclass(frozen=True)
class Parity:
    """The runs of one model, one a batch; ``dtype`` is the coarsest that it computes in."""

    runs: tuple[Run, ...]
    dtype: torch.dtype

    def check(self, *, worst: float = 2.0, each: float = 2.0) -> None:
        """Raise ``AssertionError``, naming the tensor, where the compiled runs are further from fp64."""
        for run in self.runs:
            run.check_kinds()
        self._check_losses(worst)
        self._check_each(each)
        for dtype in {g.dtype for run in self.runs for g in run.eager.gradients.values()}:
            pooled = [torch.cat(parts) for parts in zip(*(r.pooled(dtype) for r in self.runs), strict=True)]
            median = math.exp(3 * self._noise(dtype))
            assert_as_accurate(*pooled, name=f"all {dtype} gradients", median=median, worst=worst)

    def medians(self, dtype: torch.dtype) -> list[float]:
        """The median error of the pooled gradients over eager's, a batch."""
        ratios = []
        for run in self.runs:
            ours, eager, truth = run.pooled(dtype)
            errors = [(value.double() - truth).abs().median().item() for value in (ours, eager)]
            ratios.append(errors[0] / errors[1] if errors[1] else 1.0)
        return ratios

    def _noise(self, dtype: torch.dtype) -> float:
        """The standard error of the logarithm of the medians' ratio."""
        logs = [math.log(max(ratio, 1e-3)) for ratio in self.medians(dtype)]
        measured = statistics.stdev(logs) if len(logs) > 1 else 0.0
        return min(max(measured, TYPICAL_SPREAD), LARGEST_SPREAD) / math.sqrt(len(logs))

    def _check_each(self, each: float) -> None:
        distances = [run.distances() for run in self.runs]
        errors = {name: [_rms(torch.tensor(d)) for d in zip(*(b[name] for b in distances), strict=True)]
                  for name in distances[0]}  # fmt: skip
        # Eager's median relative error over the tensors: what a small tensor may have, whatever its luck.
        typical = torch.tensor([eager for _, eager in errors.values()]).median().item()
        for name, (error, allowed) in errors.items():
            luck = 1 + 1 / math.sqrt(self.runs[0].eager.gradients[name].numel())
            limit = each * luck * max(allowed, typical)
            assert error <= limit, f"{name}: error {error:.3e} exceeds {limit:.3e}; eager: {allowed:.3e}"

    def _check_losses(self, worst: float) -> None:
        losses = [run.losses() for run in self.runs]
        ours, allowed = (_rms(torch.tensor([x[i] - x[2] for x in losses])) for i in (0, 1))
        # Eager's loss can be right by luck: errors of many tokens cancel in the mean.
        luck = self._luck() * _rms(torch.tensor([truth for _, _, truth in losses]))
        limit = max(worst * allowed, luck)
        assert ours <= limit, f"loss: {ours:.3e} is further from fp64 than {limit:.3e}; eager: {allowed:.3e}"

    def _luck(self) -> float:
        """The relative error that any computation in this dtype may have in a mean over a few tokens."""
        unit = torch.finfo(self.dtype).eps
        return 2 * unit if self.dtype == torch.float32 else unit / 4


def parity(
    model: nn.Module,
    batches: Sequence[Mapping[str, torch.Tensor]],
    compile_kwargs: Mapping,
    *,
    autocast: torch.dtype | None = None,
    eagerly: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    seed: int = 0,
) -> Parity:
    """Run ``model(**inputs).loss.backward()`` compiled with ``compile_kwargs``, eagerly and in fp64.

    Args:
        batches: the inputs, of one shape each; compiled once.
        autocast: entered around the compiled and the eager forward, not around the fp64 one.
        eagerly: entered around the runs that are not compiled; ``dropout_by_position`` for dropout that the
            backend under test compiles.
    """
    torch._dynamo.reset()
    call = torch.compile(model, **compile_kwargs)
    compiled = [step(model, inputs, call, autocast=autocast, seed=seed) for inputs in batches]
    torch._dynamo.reset()
    twin = double(model)
    with eagerly():
        eager = [step(model, inputs, autocast=autocast, seed=seed) for inputs in batches]
        with float64_throughout():
            truth = [step(twin, inputs, seed=seed) for inputs in batches]
    dtypes = [p.dtype for p in model.parameters() if p.is_floating_point()] + ([autocast] if autocast else [])
    coarsest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    return Parity(tuple(map(Run, compiled, eager, truth)), coarsest)


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


def double(model: nn.Module) -> nn.Module:
    """The model in fp64, with its weights as they are: rounded, or dequantised from 4 bits."""
    twin = copy.deepcopy(model)
    _dequantise(twin)
    _ungroup_experts(twin)
    return twin.double()


def true_step(model: nn.Module, inputs: Mapping[str, torch.Tensor], *, seed: int = 0) -> Step:
    """The same step in fp64."""
    twin = double(model)
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
