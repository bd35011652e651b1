"""What a machine does in a second, in the few numbers that plans are made of, measured once or given.

``machine_for(device)`` measures a device in two seconds and keeps the result under ``~/.cache/rewriter``
(or ``$XDG_CACHE_HOME/rewriter``). ``REWRITER_MACHINE``, a JSON file of a ``Machine`` or the name of a known
card, takes its place, so that any card can be planned on any machine. A card that is nearly full is measured
with smaller tensors, and a full one not at all: the known card of its name takes its place, else the slowest.

Known cards other than the H200, which is measured, are the dense bf16 rate, memory bandwidth and PCIe rate
that NVIDIA publishes (data sheets of the H100, A100, L40S and L4; the Ada whitepaper for the RTX 4090), times
the share of its own that ``measured.py`` found an H200 to reach, which its power limits: 685 of 989 TFLOP/s
in products, 580 and 525 in attention forward and backward, 4.1 of 4.8 TB/s, 55 of 64 GB/s. They are
estimates: measure where you can.
"""

import json
import os
import re
import tempfile
import warnings
from dataclasses import asdict, dataclass, fields, replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_GIB = 2**30
_OVERRIDE = "REWRITER_MACHINE"
# Ends the names of machines that stand for one that had no room to be measured.
ASSUMED = "assumed"


class MachineError(ValueError):
    """A machine file that cannot be used; names the file, the field and what is expected."""


@dataclass(frozen=True)
class Machine:
    """Rates that were reached, not peaks.

    Attributes:
        name: of the device.
        device_bytes: its memory, as its driver reports it.
        matrix_flops: bf16 matrix products, FLOP/s.
        attention_forward_flops: causal attention forward, FLOP/s, where only the lower half counts.
        attention_backward_flops: the same for its backward, at 2.5 times the operations.
        bandwidth: bytes read and written a second by a copy on the device.
        to_host: bytes a second from the device to pinned host memory.
        to_device: bytes a second the other way.
        launch_seconds: from one small kernel to the next.
    """

    name: str
    device_bytes: int
    matrix_flops: float
    attention_forward_flops: float
    attention_backward_flops: float
    bandwidth: float
    to_host: float
    to_device: float
    launch_seconds: float

    @classmethod
    def load(cls, path: str | Path) -> "Machine":
        """Read a file that ``save`` wrote, or somebody by hand.

        Raises:
            MachineError: for a file that is missing, is no JSON object, lacks a field or has one that is
                unknown or not a positive number.
        """
        try:
            given = json.loads(Path(path).read_text())
        except OSError as error:
            raise MachineError(f"rewriter: machine file {path}: {error.strerror}.") from error
        except ValueError as error:
            raise MachineError(f"rewriter: machine file {path} is not JSON: {error}.") from error
        if not isinstance(given, dict):
            raise MachineError(f"rewriter: machine file {path} holds {given!r}, not an object of numbers.")
        return cls(**_checked(given, path))

    def save(self, path: str | Path) -> None:
        """Write a JSON file, in one piece: another process sees the old file or the new one."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            file.write(json.dumps(asdict(self), indent=2) + "\n")
        os.replace(file.name, path)


def _checked(given: dict[str, Any], path: str | Path) -> dict[str, Any]:
    known = {field.name: field.type for field in fields(Machine)}
    if missing := [name for name in known if name not in given]:
        raise MachineError(f"rewriter: machine file {path} lacks {', '.join(map(repr, missing))}.")
    if unknown := [name for name in given if name not in known]:
        raise MachineError(
            f"rewriter: machine file {path} has {unknown[0]!r}, which is none of {', '.join(known)}."
        )
    for name, kind in known.items():
        value = given[name]
        if kind is str:
            if not isinstance(value, str):
                raise MachineError(f"rewriter: machine file {path}: {name!r} is {value!r}, not a text.")
            continue
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not isfinite(value) or value <= 0:
            raise MachineError(f"rewriter: machine file {path}: {name!r} is {value!r}, not a number above 0.")
    return {**given, "device_bytes": int(given["device_bytes"])}


H200 = Machine("H200", int(139.8 * _GIB), 685e12, 580e12, 525e12, 4.1e12, 55e9, 55e9, 4e-6)


def _published(name: str, gib: float, flops: float, bandwidth: float, pcie: float) -> Machine:
    """A card by its data sheet, at the share of it that the H200 reaches."""
    share = flops / 989e12
    copies = pcie * 55 / 64
    return Machine(
        name,
        int(gib * _GIB),
        share * H200.matrix_flops,
        share * H200.attention_forward_flops,
        share * H200.attention_backward_flops,
        bandwidth * 4.1 / 4.8,
        copies,
        copies,
        H200.launch_seconds,
    )


KNOWN = {
    machine.name: machine
    for machine in (
        H200,
        _published("H100 80GB", 79.1, 989e12, 3.35e12, 64e9),
        _published("A100 80GB", 79.1, 312e12, 2.04e12, 32e9),
        _published("A100 40GB", 39.4, 312e12, 1.56e12, 32e9),
        _published("L40S", 44.4, 362e12, 0.864e12, 32e9),
        _published("RTX 4090", 23.5, 165e12, 1.008e12, 32e9),
        _published("L4", 22.0, 121e12, 0.3e12, 32e9),
    )
}


def machine_for(device: "str | torch.device") -> Machine:
    """The override where there is one, else the known card of that name, else what the device measures.

    A device without room for that is taken for one that is known; nothing is kept then.

    Raises:
        MachineError: for an override or a kept measurement that cannot be read.
    """
    if override := os.environ.get(_OVERRIDE):
        return KNOWN[override] if override in KNOWN else Machine.load(override)
    if isinstance(device, str) and device in KNOWN:
        return KNOWN[device]
    path = _cache_file(device)
    if path.exists():
        return Machine.load(path)
    import torch

    from rewriter.memory.measured import measure

    try:
        machine = measure(device)
    except torch.OutOfMemoryError:
        return _assumed(device)
    try:
        machine.save(path)
    except OSError as error:
        warnings.warn(f"rewriter: {path} cannot be written ({error}); measured anew next time.", stacklevel=2)
    return machine


def _assumed(device: "str | torch.device") -> Machine:
    """The known card that the device's name names, else the slowest, under a name that says so."""
    import torch

    words = re.split(r"\W+", device_name(torch.device(device)))
    slowest = min(KNOWN.values(), key=lambda machine: machine.matrix_flops)
    named = (m for name, m in KNOWN.items() if name.removeprefix("RTX ").split()[0] in words)
    found = next(named, slowest)
    return replace(found, name=f"{found.name}, {ASSUMED}")


def _cache_file(device: "str | torch.device") -> Path:
    import torch

    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    key = f"{device_name(torch.device(device))} torch {torch.__version__}"
    return root / "rewriter" / f"machine-{re.sub(r'[^a-z0-9.]+', '-', key.lower())}.json"


def device_name(device: "torch.device") -> str:
    import platform

    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {platform.machine()} {torch.get_num_threads()} threads"
