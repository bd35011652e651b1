"""Reads the results of ``end_to_end.py`` for the table and the plot, and says in words what each is of."""

import json
from collections.abc import Iterable
from pathlib import Path

from models import Case
from peers import SYSTEMS

FOLDER = Path(__file__).parent / "results"
ORDER = tuple(SYSTEMS)
WEIGHTS = {"nf4": "QLoRA", "16bit": "16-bit LoRA", "full": "full fine-tuning"}


def load(folder: Path) -> dict[Case, list[dict]]:
    """The runs of each case, the rewriter's first, the others in the order of ``peers.SYSTEMS``."""
    runs = [json.loads(path.read_text()) for path in folder.glob("end_to_end_*.json")]
    cases = sorted({Case.parse(run["case"]) for run in runs}, key=rank)
    return {case: sorted((r for r in runs if r["case"] == case.name), key=place) for case in cases}


def rank(case: Case) -> tuple:
    """QLoRA before LoRA before full fine-tuning, each by size."""
    return list(WEIGHTS).index(case.weights), case.shape != "8b", case.layers, case.tokens


def place(run: dict) -> tuple[int, str]:
    return ORDER.index(run["system"]), json.dumps(run.get("options", {}))


def words(case: Case) -> str:
    """As "8 layers, 2 × 2048, QLoRA"."""
    tokens = " to ".join(map(str, dict.fromkeys(case.tokens)))
    return f"{layers(case)}, {case.rows} × {tokens}, {WEIGHTS[case.weights]}"


def layers(case: Case) -> str:
    """As "8 layers", or "16 layers of the 1B shape"."""
    shape = "" if case.shape == "8b" else f" of the {case.shape.upper()} shape"
    return f"{case.layers} layers{shape}"


def name(run: dict) -> str:
    """The system's, with the options it was given."""
    options = ", ".join(f"{key} {value}" for key, value in run.get("options", {}).items())
    return f"{SYSTEMS[run['system']]}, {options}" if options else SYSTEMS[run["system"]]


def ours(runs: Iterable[dict]) -> dict | None:
    """The rewriter's run without options, which ratios are to."""
    return next((r for r in runs if r["system"] == "rewriter" and not r.get("options")), None)


def apart(run: dict, other: dict | None) -> bool:
    """Whether two results are of different runs, so that their ratio holds another machine's noise."""
    return other is not None and run["run"] != other["run"]


def setup(run: dict) -> str:
    """What it ran on."""
    versions = ", ".join(f"{package} {v}" for package, v in run["versions"].items() if v != "absent")
    return f"{run['device']}; {versions}"
