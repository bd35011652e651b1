"""Whether training follows eager PyTorch: loss curves of a pretrained model, each run in its own process.

    python examples/benchmarks/loss_curve.py                      # every run, on the demo's model and data
    python examples/benchmarks/loss_curve.py --run rewriter-0     # that one again; the others as they are
    python examples/benchmarks/loss_curve.py --bf16 --batch-size 8 --max-length 512    # the demo's options

Two eager runs differ in the order of the same rows alone: what lies between them is the noise of training. A
compiled run, in the first order, must stay within it. Compared are the loss of every step, and the loss on
held-out rows at every tenth of the run. Between two orders the first differs mostly by the rows that a step
happened to get, the second by what was learnt.

Writes ``examples/benchmarks/results/loss_curve.json``: curves, differences, versions, and what a step took,
in seconds and in those of the processor, which other processes on the machine disturb less. A compiled run
ends with status 1 where its mean difference from eager is not below the noise.
"""

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path

import torch
from end_to_end import RESULTS, versions

sys.path.append(str(Path(__file__).parents[1]))

from conversations import Collator  # noqa: E402
from curves import typical  # noqa: E402
from finetune import parse as parse_demo  # noqa: E402
from progress import StepBar  # noqa: E402
from training import console, prepared, trainer_for  # noqa: E402

EAGER, OTHER_ORDER = "eager-0", "eager-1"
COMPILED = ("inductor-0", "rewriter-0")
RUNS = (EAGER, OTHER_ORDER, *COMPILED)
CURVES = ("losses", "held_out")
FILE = "loss_curve.json"


def train(run: str, options: list[str], steps: int) -> dict:
    """One run, its curves and its settings; the weights begin alike in all of them."""
    system, order = run.split("-")
    backend = "none" if system == "eager" else system
    demo = parse_demo([*options, "--steps", str(steps), "--backend", backend])
    model, tokenizer, rows, held_out = prepared(demo)
    rows = rows.take(min(len(rows), steps * demo.batch_size * demo.gradient_accumulation))
    if backend != "none":
        model.compile(backend=backend)
    trainer = trainer_for(
        model,
        rows.shuffle(seed=int(order)),
        held_out,
        Collator(tokenizer.pad_token_id, demo.pad_to),
        demo,
        bar := StepBar(run, steps, console, first=f"{run}, first step"),
        eval_strategy="steps",
        eval_steps=max(1, steps // 10),
    )
    trainer.train()
    evaluations = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    of_no_account = ("backend", "compare", "beside", "prompt", "output")
    return {
        "settings": {
            name: value if isinstance(value, (int, float)) else str(value)
            for name, value in vars(demo).items()
            if value is not None and name not in of_no_account
        },
        "versions": versions(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "threads": torch.get_num_threads(),
        "first_step_s": round(bar.curve.seconds[0], 2),
        "typical_step_s": round(typical(bar.curve.seconds), 3),
        "typical_step_processor_s": round(typical(bar.curve.processor_seconds), 3),
        "losses": [round(loss, 6) for loss in bar.curve.losses],
        "held_out": [round(loss, 6) for loss in evaluations],
    }


def differences(runs: dict[str, dict]) -> dict[str, dict[str, dict[str, float]]]:
    """For each curve: largest and mean distance from the first eager run, of all runs with its settings."""
    if EAGER not in runs:
        return {}
    alike = [name for name in runs if runs[name]["settings"] == runs[EAGER]["settings"] and name != EAGER]
    return {
        curve: {name: _distance(runs[name][curve], runs[EAGER][curve]) for name in alike} for curve in CURVES
    }


def _distance(found: list[float], expected: list[float]) -> dict[str, float]:
    between = [abs(a - b) for a, b in zip(found, expected, strict=True)]
    return {"max": round(max(between), 6), "mean": round(sum(between) / len(between), 7)}


def within_noise(found: dict[str, dict[str, dict[str, float]]], run: str) -> bool:
    return all(found[curve][run]["mean"] < found[curve][OTHER_ORDER]["mean"] for curve in CURVES)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--run", choices=RUNS, help="only this one, in this process")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder to write to")
    args, options = parser.parse_known_args()
    if args.run is None:
        for run in RUNS:
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--run", run], check=run not in COMPILED)
        return
    path = args.results / FILE
    result = train(args.run, options, args.steps)
    runs = json.loads(path.read_text())["runs"] if path.exists() else {}
    runs = {name: runs[name] for name in RUNS if name in runs} | {args.run: result}
    found = differences(runs)
    args.results.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"differences": found, "runs": runs}, indent=1) + "\n")
    print(json.dumps(found, indent=1), f"-> {path}")
    if args.run in COMPILED and OTHER_ORDER in found.get(CURVES[0], {}) and not within_noise(found, args.run):
        sys.exit(f"{args.run}: further from eager than another order of the rows is.")


if __name__ == "__main__":
    main()
