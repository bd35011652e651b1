"""What dropout of adapters costs: by position, as the pass has it, and as PyTorch draws it.

    python examples/benchmarks/dropout.py --case 8x2x2048        # or --tiny, on a CPU

Llama-3.1-8B's shape, NF4, LoRA of rank 32 on all seven linears with a dropout of 0.1, and without. Each is
compiled anew in one process. Writes ``results/dropout.json``: seconds of each
step and the peak of memory.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from end_to_end import machine, peak_bytes, synchronise, timed, training_step, versions
from models import Case, model_of
from torch import nn

import rewriter

RESULTS = Path(__file__).parent / "results"
PROBABILITY = 0.1
SYSTEMS = {"none": (0.0, None), "by position": (PROBABILITY, None), "PyTorch's": (PROBABILITY, ["-dropout"])}


def with_dropout(model: nn.Module, p: float) -> nn.Module:
    """``model`` whose adapters drop with probability ``p`` what they read."""
    for module in model.modules():
        if isinstance(adapters := getattr(module, "lora_dropout", None), nn.ModuleDict) and p:
            adapters.update({name: nn.Dropout(p) for name in adapters})
    return model.train()


def measure(case: Case, p: float, passes: list[str] | None, device: str, tiny: bool, steps: int) -> dict:
    torch._dynamo.reset()
    model = with_dropout(model_of(case, device, tiny), p)
    rewriter.prepare(model)
    options = {"passes": passes} if passes else {}
    model.compile(backend="rewriter", options=options | ({"lowering": "eager"} if tiny else {}))
    step = training_step(model, case, device, steps)
    for warming in range(3):
        timed(step, warming, device)
    synchronise(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = [timed(step, index, device)[0] for index in range(steps)]
    return {"seconds": seconds, "peak_gib": peak_bytes() / 2**30 if device == "cuda" else None}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", default="8x2x2048")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--tiny", action="store_true", help="a small model")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    device, case = "cuda" if torch.cuda.is_available() else "cpu", Case.parse(arguments.case)
    case = case.shrunk() if arguments.tiny else case
    found = {}
    for name, (p, passes) in SYSTEMS.items():
        found[name] = measure(case, p, passes, device, arguments.tiny, arguments.steps)
        peak = found[name]["peak_gib"]
        print(
            f"{name:12s} {1e3 * statistics.median(found[name]['seconds']):8.1f} ms, peak {peak} GiB",
            flush=True,
        )
    told = {**machine(device), "versions": versions(), "case": case.name, "p": PROBABILITY, "systems": found}
    arguments.results.mkdir(parents=True, exist_ok=True)
    (arguments.results / "dropout.json").write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
