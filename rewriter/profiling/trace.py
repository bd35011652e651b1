"""Reads what ``torch.profiler`` exports: calls on the host, kernels on the device, and whose they are.

The file is Chrome's trace format, the one form in which shapes, types, launches and kernels are all there. A
kernel is tied to its launch by a correlation number, and the launch to the innermost call around it in time.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

_CALLS = {"cpu_op", "user_annotation"}
_LAUNCHES = {"cuda_runtime", "cuda_driver"}
_GRAPHS = {"cudaGraphLaunch", "cuGraphLaunch"}
_KERNELS = {"kernel": "kernel", "gpu_memcpy": "copy", "gpu_memset": "copy"}


@dataclass(frozen=True, eq=False)
class Call:
    """An operator or annotation on the host; times in microseconds.

    Attributes:
        dims, strides, types, values: of each argument, as the profiler writes them: a tensor has dims,
            strides and a type, a number its value as text.
        parent: the call that it was made in.
        inside: microseconds that calls within it took.
    """

    name: str
    start: float
    end: float
    dims: tuple = ()
    strides: tuple = ()
    types: tuple[str, ...] = ()
    values: tuple[str, ...] = ()
    parent: "Call | None" = None
    inside: list[float] = field(default_factory=list)

    @property
    def alone(self) -> float:
        """Microseconds in itself and not in calls within it."""
        return max(0.0, self.end - self.start - sum(self.inside))

    def upwards(self) -> Iterator["Call"]:
        """Itself and the calls around it, inside out."""
        call: Call | None = self
        while call is not None:
            yield call
            call = call.parent


@dataclass(frozen=True)
class Kernel:
    """Something that the device did, in microseconds.

    Attributes:
        call: what launched it, where that is known; None of what a CUDA graph launched, which is ``recorded``
            and no one call's.
    """

    name: str
    start: float
    end: float
    copied: bool = False
    bytes: int | None = None
    call: Call | None = None
    recorded: bool = False


@dataclass(frozen=True)
class Trace:
    calls: list[Call]
    kernels: list[Kernel]


def read(trace: dict) -> Trace:
    """What a trace holds, kernels in order of time."""
    events = [e for e in trace["traceEvents"] if e.get("ph") == "X"]
    calls, launched = _nested(e for e in events if e.get("cat") in _CALLS | _LAUNCHES)
    graphs = {e["args"].get("correlation") for e in events if e["name"] in _GRAPHS}
    kernels = [_kernel(e, launched, graphs) for e in events if e.get("cat") in _KERNELS]
    return Trace(calls, sorted(kernels, key=lambda k: k.start))


def _nested(events: Iterable[dict]) -> tuple[list[Call], dict[int, Call]]:
    """Calls with their parents, and by correlation number the call around each launch."""
    threads = defaultdict(list)
    for event in events:
        threads[event["pid"], event["tid"]].append(event)
    calls: list[Call] = []
    launched: dict[int, Call] = {}
    for thread in threads.values():
        around: list[Call] = []
        # Of two that begin together the longer one is the outer one.
        for event in sorted(thread, key=lambda e: (e["ts"], -e["dur"])):
            while around and around[-1].end <= event["ts"]:
                around.pop()
            if event["cat"] in _LAUNCHES:
                if around and "correlation" in event["args"]:
                    launched[event["args"]["correlation"]] = around[-1]
                continue
            call = _call(event, around[-1] if around else None)
            if call.parent is not None:
                call.parent.inside.append(call.end - call.start)
            calls.append(call)
            around.append(call)
    return calls, launched


def _call(event: dict, parent: Call | None) -> Call:
    found: dict[str, Any] = event.get("args", {})
    return Call(
        event["name"],
        event["ts"],
        event["ts"] + event["dur"],
        tuple(found.get("Input Dims", ())),
        tuple(found.get("Input Strides", ())),
        tuple(found.get("Input type", ())),
        tuple(found.get("Concrete Inputs", ())),
        parent,
    )


def _kernel(event: dict, launched: dict[int, Call], graphs: set[int]) -> Kernel:
    found = event.get("args", {})
    recorded = found.get("correlation") in graphs
    return Kernel(
        event["name"],
        event["ts"],
        event["ts"] + event["dur"],
        _KERNELS[event["cat"]] == "copy",
        found.get("bytes"),
        None if recorded else launched.get(found.get("correlation")),
        recorded,
    )


def busy(kernels: Iterable[Kernel]) -> tuple[float, list[tuple[float, Kernel]]]:
    """Microseconds in which at least one kernel ran, and each pause with the kernel that ended it."""
    total, end, pauses = 0.0, None, []
    for kernel in kernels:
        if end is not None and kernel.start > end:
            pauses.append((kernel.start - end, kernel))
        total += max(0.0, kernel.end - (kernel.start if end is None else max(end, kernel.start)))
        end = kernel.end if end is None else max(end, kernel.end)
    return total, pauses
