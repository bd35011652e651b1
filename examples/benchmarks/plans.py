"""The longest context that each card is foreseen to train, without a GPU or weights.

    python examples/benchmarks/plans.py                        # some minutes a card on a CPU
    python examples/benchmarks/plans.py --models 8b --cards 24 80

QLoRA with NF4, r=32 on all linears, one row, an H200's rates, and 128 GiB of host memory less what the
process itself takes. Writes ``results/plans.json``; what was run stands in ``context_*.json``.
"""

import argparse
import json
import time
from pathlib import Path

from models import Case, configuration
from transformers import LlamaConfig

import rewriter

RESULTS = Path(__file__).parent / "results"
GIB = 2**30
LAYERS = {"8b": 32, "70b": 80}
CARDS = {"8b": (12, 16, 24, 40, 48, 80), "70b": (48, 80)}


def whole(shape: str) -> LlamaConfig:
    """The configuration of all of a model's layers."""
    return configuration(Case(LAYERS[shape], 1, (1, 1), shape))


def foreseen(shape: str, card: float, host: float) -> dict:
    """The longest, or why nothing fits."""
    from rewriter.memory.plan import Infeasible

    start = time.perf_counter()
    budgets = {"memory_budget": int(card * GIB), "host_budget": int(host * GIB)}
    try:
        found = rewriter.plan(whole(shape), machine="H200", lora_rank=32, quantise="nf4", **budgets)
    except Infeasible as error:
        return {"model": shape, "card_gib": card, "host_gib": host, "infeasible": str(error)}
    return {
        "model": shape,
        "card_gib": card,
        "host_gib": host,
        "tokens": found.tokens,
        "seconds": found.seconds,
        "tokens_per_s": found.tokens_per_second,
        "peak_gib": found.peak / GIB,
        "hosted_gib": found.hosted / GIB,
        "asked_s": round(time.perf_counter() - start, 1),
    }


def line(found: dict) -> str:
    name = f"{found['model']:>4s} {found['card_gib']:>5g} GiB"
    if "infeasible" in found:
        return f"{name}  {found['infeasible']}"
    rate = f"{found['seconds']:>7.1f} s {found['tokens_per_s']:>7,.0f} tokens/s"
    memory = f"peak {found['peak_gib']:.1f} GiB, host {found['hosted_gib']:.1f} GiB"
    return f"{name} {found['tokens']:>9,} tokens {rate}  {memory} ({found['asked_s']:.0f} s to ask)"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--cards", nargs="+", type=float, help="GiB; default: those that suit the model")
    parser.add_argument("--host", type=float, default=120.0, help="GiB of host memory for offloads")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    found = []
    for shape in arguments.models:
        for card in arguments.cards or CARDS[shape]:
            found.append(foreseen(shape, card, arguments.host))
            print(line(found[-1]), flush=True)
    arguments.results.mkdir(parents=True, exist_ok=True)
    (arguments.results / "plans.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
