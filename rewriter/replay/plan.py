"""Whether a graph's program is worth recording as CUDA graphs, and may be: the backend's one call.

Recording pays where the host is the slower: where the products of a step take less time than their launches.
Both are estimated from the graph. Products: 4 operations a token and weight at 690 TFLOP/s (an H200,
measured). Launches: 100 µs an operation of the graph, forward and backward, of the 154 ms that 32 layers in
4 bits with adapters were seen to take on some 900. On a graphics card that is slower the limit is generous.

Steps up to five times as long can gain what the device waits for the host at their beginning and between
kernels: at most 4.4 ms of 71 in a trace of 8 layers of 8B on 4,096 tokens, a seventh of the launches'
estimate, and less where the device is at its power limit: it runs the slower the less it waits. Their sizes
have to come back, and their gradients, which are copied where they are accumulated, must not take that again:
those of adapters do not, those of a fully trained model do.

Refused: graphs with an operation that no rule knows, since it could wait for the device; inputs that need a
gradient and are no parameters; tensors off the one device; several processes, whose gradients are sent while
the backward runs.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import SymInt, Tensor, nn
from torch.fx import GraphModule
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from rewriter.canonical import value_of
from rewriter.nested import count_operations, graphs_of
from rewriter.replay.capture import CudaRecorder
from rewriter.replay.padding import Reading, read, separate_labels
from rewriter.replay.program import Replayed
from rewriter.replay.recorded import count, recorded_bytes
from rewriter.replay.room import Limits
from rewriter.replay.sizes import is_batch
from rewriter.replay.step import Recorder
from rewriter.size_text import size_text

log = logging.getLogger(__name__)

_OPERATIONS_PER_SECOND = 690e12
_SECONDS_PER_LAUNCH = 100e-6
_SHARE_OF_DEVICE = 0.15
_LONG = 5
_SHARE_SAVED = 1 / 7
_BYTES_PER_SECOND = 4e12


@dataclass
class Plan:
    """How a graph's program will be run; ``reading`` is None where it is run as it is.

    ``module`` is what to compile, for ``example_inputs``.
    """

    module: GraphModule
    example_inputs: Sequence[Any]
    reading: Reading | None = None
    limits: Limits | None = None
    device: torch.device | None = None

    def replayed(self, program: Callable, notes: list[str], recorder: Recorder | None = None) -> Callable:
        """``program``, recorded where the plan says so."""
        if self.reading is None or self.limits is None or self.device is None:
            return program
        recorder = recorder or CudaRecorder(self.device)
        count(recorder, self.device)
        settle = getattr(program, "settle", lambda inputs: (0, ()))
        replayed = Replayed(program, self.reading, self.limits, recorder, notes, settle)
        return lambda *inputs: replayed(*inputs)

    def within(self, room: int, step: int, notes: list[str]) -> "Plan":
        """Recordings of short steps alone, in ``room`` bytes; none where a step's ``step`` bytes are more.

        Recordings of other programs that are made from now on take of the same room.
        """
        assert self.limits is not None and self.device is not None
        device, counted = self.device, recorded_bytes(self.device)
        what = f"of {size_text(room)} that the memory plan leaves" if step <= room else "none"
        notes.append(f"CUDA graphs: under a memory_budget those of short steps alone, {what}")
        tokens = self.limits.tokens if step <= room else 0
        limits = Limits(
            tokens,
            min(self.limits.bytes, room),
            free=room + step,
            held=lambda: recorded_bytes(device) - counted,
        )
        return replace(self, limits=limits)


def plan_recordings(module: GraphModule, example_inputs: Sequence[Any], notes: list[str]) -> Plan:
    """Decide for ``module``, which is left as it was.

    Args:
        notes: told why a graph on a GPU is not recorded, or what of it is.
    """
    devices = {value.device for value in example_inputs if isinstance(value, Tensor)}
    if not any(device.type == "cuda" for device in devices) or not torch.is_grad_enabled():
        return Plan(module, example_inputs)
    return planned(module, example_inputs, notes)


def planned(module: GraphModule, example_inputs: Sequence[Any], notes: list[str]) -> Plan:
    """``plan_recordings`` without a look at the device: what tests call on a CPU."""
    if (reason := refusal(module, example_inputs)) is not None:
        notes.append(f"CUDA graphs: none, {reason}")
        return Plan(module, example_inputs)
    try:
        separated, examples, doubled = separate_labels(module, example_inputs)
        reading = read(separated, doubled)
    except Exception as error:
        log.warning("reading failed, the graph is not recorded: %s", error, exc_info=True)
        notes.append(f"CUDA graphs: none, reading failed: {type(error).__name__}: {error}")
        return Plan(module, example_inputs)
    if reading.unknown is not None:
        notes.append(f"CUDA graphs: none, {reading.unknown}")
        return Plan(module, example_inputs)
    device = next(value.device for value in example_inputs if isinstance(value, Tensor))
    tokens = most_tokens(module, example_inputs)
    long = _LONG * tokens if copies_pay(module, example_inputs) else tokens
    limits = Limits(tokens, int(_SHARE_OF_DEVICE * _memory(device)), long)
    varying = "" if reading.padding is None else ", lengths padded to buckets"
    if reading.unpaddable is not None:
        varying = f", sizes that come back alone: {reading.unpaddable}"
    longer = f"; up to {long} where their size comes back" if long > tokens else ""
    notes.append(f"CUDA graphs: steps of up to {tokens} tokens{varying}{longer}")
    return Plan(separated, examples, reading, limits, device)


def _memory(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 2**34


def refusal(module: GraphModule, example_inputs: Sequence[Any]) -> str | None:
    """Why a program may not be recorded, as far as its inputs say."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return "several processes share a step"
    if any(not isinstance(e, (Tensor, SymInt, int)) for e in example_inputs):
        return "an input is neither a tensor nor a size"
    if any(is_traceable_wrapper_subclass(e) for e in example_inputs):
        return "an input is a tensor subclass"
    tensors = [e for e in example_inputs if isinstance(e, Tensor)]
    values = [value_of(n) for n in module.graph.nodes]
    devices = {t.device for t in [*tensors, *(v for v in values if isinstance(v, Tensor))]}
    if len(devices) != 1:
        return f"its tensors are on {len(devices)} devices"
    trained = [t for t in tensors if t.requires_grad]
    if not any(is_batch(t) and t.dim() == 2 for t in tensors):
        return "no input is a batch of ids"
    if not trained:
        return "nothing is trained"
    if not all(isinstance(t, nn.Parameter) and t.is_contiguous() for t in trained):
        return "an input that is no dense parameter needs a gradient"
    return None


def most_tokens(module: GraphModule, example_inputs: Sequence[Any]) -> int:
    """The number of tokens up to which a step's launches take longer than its products."""
    weights = sum(
        _weights(e) for e in example_inputs if isinstance(e, Tensor) and e.dim() > 1 and not is_batch(e)
    )
    return int(_launch_seconds(module) * _OPERATIONS_PER_SECOND / (4 * max(weights, 1)))


def copies_pay(module: GraphModule, example_inputs: Sequence[Any]) -> bool:
    """Whether a long step's recording saves at least four times what it takes to copy the gradients."""
    trained = sum(e.nbytes for e in example_inputs if isinstance(e, Tensor) and e.requires_grad)
    # A read and a write, where gradients are accumulated.
    return 4 * 2 * trained / _BYTES_PER_SECOND <= _SHARE_SAVED * _launch_seconds(module)


def _launch_seconds(module: GraphModule) -> float:
    return sum(map(count_operations, graphs_of(module))) * _SECONDS_PER_LAUNCH


def _weights(tensor: Tensor) -> int:
    """How many a tensor holds: packed in 4 bits, two a byte."""
    return tensor.numel() * (2 if tensor.dtype == torch.uint8 else 1)
