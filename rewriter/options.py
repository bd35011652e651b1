"""The options of ``torch.compile(model, backend="rewriter", options={...})``, validated before any work.

An option, pass or value that is not known is an error that lists what is known and names the nearest.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from types import NoneType
from typing import Any, Literal

_UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}
# A number without a unit below this was meant in another one.
_LEAST = 1 << 20
_LOWERINGS = ("inductor", "eager")
_MODES = (None, "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


class OptionError(ValueError):
    """An option that is unknown or malformed; says what is known."""


@dataclass(frozen=True)
class Options:
    """What a user may ask of the backend.

    Attributes:
        memory_budget: device memory to stay within, in bytes, as "24GB", or a fraction of the device; None
            for what is free on a GPU, where nothing is planned that fits; "off" to keep everything unasked.
        host_budget: host memory that offloaded activations may take, likewise, of all processes of the
            machine together; 0 to offload nothing.
        max_tokens: the most tokens of a batch, rows times length, that the memory plan has to hold for where
            lengths vary; None: those of the batch at hand. A larger batch is planned anew.
        passes: names of the passes to run, none in an empty list; None for all. Names with a leading "-" are
            left out instead.
        verify: compare loss and gradients with the unrewritten graph on each graph's first call.
        lowering: "inductor", or "eager" for AOTAutograd without Inductor.
        regions: outline repeated layers, and compile each kind once.
        cuda_graphs: record steps on few tokens, and somewhat longer ones whose size comes back, as CUDA
            graphs; where memory is planned, short ones alone, within what a plan that keeps all leaves.
        mode: Inductor's mode, as ``torch.compile(mode=...)`` takes it.
    """

    memory_budget: int | float | Literal["off"] | None = None
    host_budget: int | float | None = None
    max_tokens: int | None = None
    passes: tuple[str, ...] | None = None
    verify: bool = False
    lowering: str = "inductor"
    regions: bool = True
    cuda_graphs: bool = True
    mode: str | None = None

    @classmethod
    def parse(
        cls, given: Mapping[str, Any] | None, mode: str | None, known_passes: Sequence[str]
    ) -> "Options":
        """Validate ``options=`` and ``mode=`` of ``torch.compile``.

        Raises:
            OptionError: for an unknown name or a malformed value.
        """
        if not isinstance(given, (Mapping, NoneType)):
            raise OptionError(
                f'rewriter: options is {given!r}; give a dictionary, as {{"memory_budget": "24GB"}}.'
            )
        given = dict(given or {})
        names = [f.name for f in fields(cls) if f.name != "mode"]
        for name in given:
            if name not in names:
                raise OptionError(f"rewriter: unknown option {name!r}{_nearest(str(name), names)}")
        if mode not in _MODES:
            raise OptionError(
                f"rewriter: unknown mode {mode!r}{_nearest(str(mode), [m for m in _MODES if m])}"
            )
        lowering = given.get("lowering", "inductor")
        if lowering not in _LOWERINGS:
            raise OptionError(f"rewriter: unknown lowering {lowering!r}{_nearest(str(lowering), _LOWERINGS)}")
        return cls(
            memory_budget=_parse_memory_budget(given.get("memory_budget")),
            host_budget=parse_host_budget(given.get("host_budget")),
            max_tokens=_parse_count("max_tokens", given.get("max_tokens")),
            passes=_parse_passes(given.get("passes"), known_passes),
            verify=_parse_switch("verify", given.get("verify", False)),
            lowering=lowering,
            regions=_parse_switch("regions", given.get("regions", True)),
            cuda_graphs=_parse_switch("cuda_graphs", given.get("cuda_graphs", True)),
            mode=mode,
        )

    def runs(self, pass_name: str) -> bool:
        """Whether the pass of that name is asked for."""
        if self.passes is None:
            return True
        if f"-{pass_name}" in self.passes:
            return False
        left_out_alone = bool(self.passes) and all(name.startswith("-") for name in self.passes)
        return left_out_alone or pass_name in self.passes


def _parse_count(name: str, value: Any) -> int | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    raise OptionError(f"rewriter: option {name!r} is {value!r}; give a whole number above 0, as 8192.")


def _parse_memory_budget(value: Any) -> int | float | Literal["off"] | None:
    return "off" if value == "off" else parse_budget("memory_budget", value, '; or "off" to plan nothing')


def parse_budget(name: str, value: Any, otherwise: str = "") -> int | float | None:
    """Bytes from 24_000_000_000, "24GB" or "22GiB"; a fraction of the device in (0, 1] from a float.

    Args:
        otherwise: what the option takes beside, for the message.

    Raises:
        OptionError: for anything else, with the forms that are understood; for a number without a unit that
            is below 1 MiB.
    """
    if value is None:
        return None
    forms = 'bytes (24_000_000_000), a size ("24GB", "22GiB") or a fraction of the memory (0.9)'
    if isinstance(value, float) and 0.0 < value <= 1.0:
        return value
    if (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and value > 1
        and float(value).is_integer()
    ):
        return _meant(name, int(value))
    if not (size := _size(value)):
        raise OptionError(f"rewriter: option {name!r} is {value!r}; give {forms}{otherwise}.")
    return size


def parse_host_budget(value: Any) -> int | float | None:
    """As ``parse_budget``; 0 or "0GB" where nothing is to be offloaded."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if (value if number else _size(value)) == 0:
        return 0
    return parse_budget("host_budget", value, "; or 0 to offload nothing")


def _size(value: Any) -> int | None:
    """Bytes of a number with a unit."""
    if not isinstance(value, str):
        return None
    matched = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B)\s*", value, re.IGNORECASE)
    return None if matched is None else int(float(matched[1]) * _UNITS[matched[2].upper()])


def _meant(name: str, size: int) -> int:
    if size >= _LEAST:
        return size
    likely = f"{size}GB" if size < 1024 else f"{size}MB"
    raise OptionError(
        f"rewriter: option {name!r} is {size}, which is {size} bytes, less than any step takes; write "
        f'"{likely}", or "{size}B" where bytes are meant.'
    )


def _parse_switch(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise OptionError(f"rewriter: option {name!r} is True or False, got {value!r}.")
    return value


def _parse_passes(value: Any, known: Sequence[str]) -> tuple[str, ...] | None:
    if value is None:
        return None
    if (
        isinstance(value, str)
        or not isinstance(value, Sequence)
        or not all(isinstance(v, str) for v in value)
    ):
        raise OptionError(
            f"rewriter: option 'passes' is {value!r}; give a list of names, as [\"norm\"] to run it alone or "
            '["-norm"] to leave it out.'
        )
    for name in value:
        if name.removeprefix("-") not in known:
            raise OptionError(f"rewriter: unknown pass {name!r}{_nearest(name.removeprefix('-'), known)}")
    return tuple(value)


def _nearest(name: str, known: Sequence[str]) -> str:
    near = get_close_matches(name, known, 1, 0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"{hint} Known: {', '.join(sorted(known))}."
