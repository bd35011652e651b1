"""What copies to host memory cost: the same plans with what they offload, and with that kept on the device.

    python examples/benchmarks/offloading.py                        # 8,192 and 32,768 tokens
    python examples/benchmarks/offloading.py --tiny                 # a dry run on a CPU
    python examples/benchmarks/predictions.py --offloading          # after those, of the same compiled model

Of each length the plan for a budget that is ``--share`` of the way from the least that does to what keeping
everything takes; the two forms take turns, so that the clock of the card is the same. Writes
``results/offloading.json``: of each length what is offloaded, the seconds of each step, and by how much
the median is longer with the copies. See ``replanned.py`` for what is not as in a model of its own.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from context import GIB
from end_to_end import machine, timed, versions
from replanned import TINY, Replanned, compiled_once

RESULTS = Path(__file__).parent / "results"
SHARE, TURNS, STEPS = 0.4, 2, 3


def measure(
    compiled: Replanned, step, tokens: int, share: float, device: str, turns: int, steps: int
) -> dict:
    """Both forms of one plan, in turn."""
    least, everything = compiled.range_of(tokens)
    usable = int(least + (everything - least) * share)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(turns):
        for resident in (False, True):
            plan = compiled.plan(tokens, usable, resident)
            step(tokens)
            seconds[resident] += [timed(step, tokens, device)[0] for _ in range(steps)]
    offloaded, resident = (statistics.median(seconds[form]) for form in (False, True))
    return {
        "tokens": tokens,
        "usable_gib": usable / GIB,
        "foreseen_gib": plan.peak / GIB,
        "host_gib": plan.hosted / GIB,
        "foreseen_s": plan.foreseen_seconds,
        "seconds": seconds[False],
        "seconds_resident": seconds[True],
        "slower": offloaded / resident - 1,
        "ways": [(kind, way, count) for (kind, way), count in plan.counts.items()],
    }


def compare(
    compiled: Replanned, step, lengths: list[int], share: float, device: str, turns: int, steps: int
) -> list[dict]:
    """``measure`` of each length, printed."""
    rows = []
    for tokens in lengths:
        rows.append(measure(compiled, step, tokens, share, device, turns, steps))
        row = rows[-1]
        print(
            f"{tokens:,} tokens, {row['host_gib']:.2f} GiB offloaded: "
            f"{statistics.median(row['seconds']):.4f} s, {statistics.median(row['seconds_resident']):.4f} "
            f"with that kept, {row['slower']:+.1%}",
            flush=True,
        )
    return rows


def write(folder: Path, device: str, layers: int, rows: list[dict]) -> None:
    told = {**machine(device), "versions": versions(), "layers": layers, "lengths": rows}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "offloading.json").write_text(json.dumps(told, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", default="8192,32768", help="with commas between")
    parser.add_argument("--share", type=float, default=SHARE, help="0: the least; 1: all that could be kept")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--tiny", action="store_true", help="a dry run on a CPU")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    start = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lengths = sorted(map(int, arguments.tokens.split(",")))
    if arguments.tiny:
        lengths, arguments.layers, arguments.turns, arguments.steps = [TINY.tokens[1]], TINY.layers, 1, 1
    compiled, step = compiled_once(arguments.layers, lengths, device, arguments.tiny)
    with torch._dynamo.config.patch(error_on_recompile=True):
        rows = compare(compiled, step, lengths, arguments.share, device, arguments.turns, arguments.steps)
    write(arguments.results, device, arguments.layers, rows)
    print(f"{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
