"""``rewriter.plan``: what fits in how much memory, and how fast it will run, without a GPU or weights.

    plan(config, tokens=200_000, memory_budget="24GB", lora_rank=32, quantise="nf4")

A model of fake tensors is traced, rewritten and parted as for training, and the planner is asked as the
backend asks it. Layers that repeat others are traced once, so that depth costs nothing. Time goes by a
machine's rates, and memory by the kernels that run on a GPU, wherever it is asked.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from rewriter.foresee.longest import longest
from rewriter.foresee.question import Question
from rewriter.hostable import LAYERS
from rewriter.memory.head_ahead import begun_ahead
from rewriter.memory.machine import H200, KNOWN, Machine, machine_for
from rewriter.memory.movable import in_cards
from rewriter.memory.plan import Infeasible, MemoryPlan
from rewriter.memory.planner import roomy
from rewriter.memory.resident_choice import Offer, staying
from rewriter.memory.timeline import svg, text
from rewriter.options import parse_budget, parse_host_budget
from rewriter.seconds_text import seconds_text
from rewriter.size_text import size_text

_GIB = 2**30
# AdamW reads parameter, gradient and two moments, and writes all but the gradient.
_UPDATE_PASSES = 7
# Until the host has checked guards and launched the first kernels: seen with 8 layers of 8B, on an H200.
_IDLE = 4e-3
# What a machine with one GPU has to spare, where it is not said.
_HOST = 128 * _GIB
# Of weights that are trained or adapted; 4-bit ones are asked for by ``quantise``.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Foresight:
    """A step as it will run, in predicted numbers; prints as text.

    Attributes:
        model: its class, with so many ``parameters`` as it was given; ``trained`` of them, or of adapters.
        rows, tokens: of a batch.
        machine: whose rates were taken.
        memory_budget: bytes of the card, or of the share of it that may be taken.
        host_budget: bytes that offloads may take, without weights in host memory.
        seconds: of a step: forward, backward, the update of what is trained, reading an embedding in host
            memory, and what the device waits for the host before its first kernel.
        plan: what each layer does, with the memory that it takes over the step.
        notes: what the plan could not do, or does otherwise than the model asks for.
    """

    model: str
    parameters: int
    trained: int
    rows: int
    tokens: int
    machine: str
    memory_budget: int
    host_budget: int
    seconds: float
    plan: MemoryPlan
    notes: tuple[str, ...]

    @property
    def tokens_per_second(self) -> float:
        return self.rows * self.tokens / self.seconds

    @property
    def peak(self) -> int:
        """Device bytes at the worst moment, without the driver's context."""
        return self.plan.peak

    @property
    def hosted(self) -> int:
        """Host bytes that offloads take."""
        return self.plan.hosted

    @property
    def picture(self) -> str:
        """Memory over the step, as SVG."""
        return svg(self.plan)

    def __str__(self) -> str:
        plan = self.plan
        ways = [f"  {kind} × {count}: {way}" for (kind, way), count in plan.counts.items()]
        return "\n".join(
            [
                f"{self.model}, {_count(self.parameters)} parameters, {_count(self.trained)} trained: "
                f"{self.rows} × {self.tokens:,} tokens in "
                f"{size_text(self.memory_budget, 1)} of {self.machine}",
                f"  {seconds_text(self.seconds)} a step, {self.tokens_per_second:,.0f} tokens/s",
                *ways,
                *(f"  {note}" for note in self.notes),
                text(plan),
            ]
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and texts: what the fields say, and the plan's ways and timeline."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "plan"}
        plan = self.plan
        return fields | {
            "notes": list(self.notes),
            "tokens_per_second": self.tokens_per_second,
            "peak": plan.peak,
            "where": plan.where,
            "static": plan.problem.static,
            "hosted": plan.hosted,
            "ways": [
                {"kind": kind, "way": way, "count": count} for (kind, way), count in plan.counts.items()
            ],
            "moments": [asdict(moment) for moment in plan.moments],
        }


def plan(
    config_or_model: Any,
    *,
    tokens: int | None = None,
    memory_budget: int | float | str,
    host_budget: int | float | str | None = None,
    machine: Machine | str | Path | None = None,
    rows: int = 1,
    lora_rank: int | None = None,
    quantise: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    autocast: torch.dtype | None = torch.bfloat16,
    host: str | Iterable[str] = (),
) -> Foresight:
    """How a step of ``rows`` × ``tokens`` labelled tokens would run within ``memory_budget``.

    Args:
        config_or_model: a config whose package has an ``AutoModelForCausalLM``, or a model, as prepared for
            training as it will be; on "meta" it needs no memory. Left as it was.
        tokens: None for the most that fit, to within one in a hundred.
        memory_budget: bytes, "24GB", or a fraction of the machine's memory, as the backend's option.
        host_budget: bytes or a size, for activations in host memory; 0 for none, None for 128 GiB.
        machine: a ``Machine``, the name of a known card, or a file that ``Machine.save`` wrote. None: this
            machine's GPU, measured; without one, an H200.
        lora_rank: freeze the model and put LoRA adapters of that rank on all linears but the head. None: a
            model is trained as it is, a config's in full.
        quantise: "nf4" or "fp4": weights of linears in 4 bits, with double quantisation.
        dtype: of a config's weights.
        autocast: as entered around the model's forward in training; None: not entered.
        host: frozen weights that ``prepare(model, host=...)`` will have moved to host memory, "embedding",
            "head" and "layers"; beside those of a model that is prepared so already.

    Raises:
        Infeasible: nothing fits; ``least_device`` is the ``memory_budget`` that would do.
        Untraceable: the model is not one graph, or no part of it repeats.
        ValueError: for arguments that are malformed or contradict each other.
    """
    _check_numbers(rows=rows, tokens=tokens, lora_rank=lora_rank)
    _check_dtypes(dtype, autocast)
    chosen, budget = _machine(machine), parse_budget("memory_budget", memory_budget)
    card = _bytes("memory_budget", budget, chosen.device_bytes)
    offloads = _HOST if host_budget is None else _bytes("host_budget", parse_host_budget(host_budget), 0)
    ask = Question(config_or_model, lora_rank, quantise, dtype, autocast, rows, card, offloads, chosen, host)
    if tokens is None:
        tokens = longest(lambda n: ask.problem(n)[0])
    problems, notes = ask.problems(tokens)
    made = ask.made
    try:
        found = roomy(problems)
    except Infeasible as error:
        raise in_cards(error, made.host.could, made.host.there) from None
    kept, stays = MemoryPlan(problems[0], tuple(part.choices[0] for part in problems[0].parts)), []
    # Layers in host memory are planned for wherever they fit, as their weights come in several ways.
    if kept.leaves_room and LAYERS not in made.host.there:
        found, stays = _with_residents(found, kept, ask.offers(tokens))
    elif (head := ask.head(tokens)) is not None:
        found = begun_ahead(found, head, chosen) or found
    update = _UPDATE_PASSES * made.trained_bytes / chosen.bandwidth
    bus = made.host.read_over_the_bus(rows * tokens) / chosen.to_device
    return Foresight(
        made.name,
        made.parameters,
        made.trained,
        rows,
        tokens,
        chosen.name,
        card,
        offloads,
        found.foreseen_seconds + update + bus + _IDLE,
        found,
        (*notes, *stays, *made.notes, *made.host.notes()),
    )


def _with_residents(
    found: MemoryPlan, kept: MemoryPlan, offers: Sequence[Offer | None]
) -> tuple[MemoryPlan, list[str]]:
    """``found``; with room to spare all that is ``kept``, and dequantised weights that stay, with a note."""
    chosen = staying(kept, offers, lambda plan: plan.leaves_room)
    return (found, []) if chosen is None else (chosen.plan, [chosen.note(offers)])


def _check_numbers(**given: Any) -> None:
    for name, value in given.items():
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not (whole and value > 0 or value is None and name != "rows"):
            or_none = "" if name == "rows" else ", or None"
            raise ValueError(f"plan: {name} is {value!r}; give a whole number above 0{or_none}.")


def _check_dtypes(dtype: Any, autocast: Any) -> None:
    if dtype not in _DTYPES:
        known = ", ".join(map(str, _DTYPES))
        raise ValueError(f"plan: dtype is {dtype!r}; give a dtype of weights, as torch.bfloat16 ({known}).")
    if autocast not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"plan: autocast is {autocast!r}; give torch.bfloat16, torch.float16 or None.")


def _machine(given: Machine | str | Path | None) -> Machine:
    if isinstance(given, Machine):
        return given
    if given is None:
        return machine_for("cuda") if torch.cuda.is_available() else H200
    if str(given) in KNOWN:
        return KNOWN[str(given)]
    if not isinstance(given, (str, Path)) or not Path(given).exists():
        near = [name for name in KNOWN if _squeezed(str(given)) in _squeezed(name)]
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else "."
        raise ValueError(
            f"plan: machine is {str(given)!r}, neither a known card ({', '.join(KNOWN)}) nor a file, as "
            f"Machine.save writes one{hint}"
        )
    return Machine.load(given)


def _squeezed(name: str) -> str:
    return name.upper().replace(" ", "")


def _bytes(name: str, parsed: int | float | None, whole: int) -> int:
    if isinstance(parsed, float) and not whole:
        raise ValueError(
            f"plan: {name} is {parsed!r}, a fraction of an unknown amount; give bytes or a size."
        )
    if parsed is None:
        raise ValueError(f"plan: {name} is None; give bytes, a size or a fraction.")
    return int(parsed * whole) if isinstance(parsed, float) else min(parsed, whole or parsed)


def _count(number: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)
