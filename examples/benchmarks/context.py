"""The longest context on a card: whole training steps of a long sequence within a memory budget.

    python examples/benchmarks/context.py --case 32x1x200000 --card 24
    python examples/benchmarks/context.py --case 32x1x50000 --card 24 --system unsloth_gc
    python examples/benchmarks/context.py --case 32x1x7680 --card 8 --weights-in-host embedding

``--card`` is the size of the card in GiB: the allocator may take that less 0.6 GiB for the driver's context
(``set_per_process_memory_fraction``), and the rewriter gets it, or ``--budget``, as ``memory_budget``. A step
is that of ``end_to_end.py``. Writes ``results/context_<case>_<card>_<system>.json``: seconds of a step,
tokens a second, the device memory that was allocated and reserved, what the plan predicted, and the plan.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import peers
import torch
from end_to_end import compile_seconds, machine, timed, training_step, versions
from models import Case

RESULTS = Path(__file__).parent / "results"
CONTEXT_GIB = 0.6
GIB = 2**30


def measure(arguments: argparse.Namespace) -> dict:
    case = Case.parse(arguments.case)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    budget = arguments.budget or arguments.card
    options = {"memory_budget": int(budget * GIB)} if budget else {}
    if arguments.host:
        options["host_budget"] = int(arguments.host * GIB)
    model = peers.prepared(
        arguments.system, case, device, arguments.tiny, options if arguments.system == "rewriter" else {}
    )
    if arguments.system == "rewriter" and arguments.weights_in_host:
        import rewriter

        rewriter.prepare(model, host=arguments.weights_in_host)
    if device == "cuda" and arguments.card and not arguments.uncapped:
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((arguments.card - CONTEXT_GIB) * GIB / total)
    step = training_step(model, case, device, arguments.steps)
    forget_peak(device)
    try:
        first, losses = timed(step, 0, device)
    finally:
        plan = planned(arguments.system, device)
    compiling = compile_seconds()
    print(f"first step {first:.1f} s, loss {losses.item():.4f}", flush=True)
    if arguments.steps:
        forget_peak(device)
    before = flushes(device)
    runs = [timed(step, i, device) for i in range(1, 1 + arguments.steps)]
    seconds = min((s for s, _ in runs), default=first)
    tokens = case.rows * case.tokens[1]
    return {
        "system": arguments.system,
        "case": case.name,
        "card_gib": arguments.card,
        "budget_gib": budget,
        "flushed": flushes(device) - before,
        "weights_in_host": list(arguments.weights_in_host),
        **machine(device),
        "versions": versions(),
        "first_step_s": first,
        "compile_s": compiling,
        "seconds": [s for s, _ in runs],
        "tokens": tokens,
        "tokens_per_s": tokens / seconds,
        "peak_gib": memory("max_memory_allocated"),
        "reserved_gib": memory("max_memory_reserved"),
        "losses": [losses.item(), *(loss.item() for _, loss in runs)],
        "plan": plan,
    }


def forget_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def flushes(device: str) -> int:
    """How often the allocator found no room since the process began, and gave back what it had cached."""
    return torch.cuda.memory_stats()["num_alloc_retries"] if device == "cuda" else 0


def memory(what: str) -> float | None:
    return getattr(torch.cuda, what)() / GIB if torch.cuda.is_available() else None


def planned(system: str, device: str) -> dict | None:
    """What the rewriter foresaw, and by which rates."""
    if system != "rewriter":
        return None
    import rewriter
    from rewriter.memory.machine import machine_for

    report = rewriter.report()
    print(report)
    found = [(graph.memory, graph.seconds) for graph in report.graphs if graph.memory is not None]
    if not found:
        return None
    plan, took = found[-1]
    print("first step, s: " + ", ".join(f"{what} {seconds:.1f}" for what, seconds in took.items()))
    return {
        "first_step_s": took,
        "peak_gib": plan.peak / GIB,
        "where": plan.where,
        "static_gib": plan.static / GIB,
        "host_gib": plan.hosted / GIB,
        "seconds": plan.seconds,
        "rates": asdict(machine_for(torch.device(device))),
        "ways": plan.ways,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", default="32x1x65536")
    parser.add_argument("--card", type=float, default=24.0, help="GiB; 0: no limit")
    parser.add_argument("--budget", type=float, default=0.0, help="GiB to plan for; 0: the card")
    parser.add_argument("--host", type=float, default=0.0, help="GiB for offloads; 0: the default")
    parser.add_argument(
        "--weights-in-host", nargs="+", default=(), help="the rewriter's: embedding, head, layers"
    )
    parser.add_argument("--system", default="rewriter", choices=peers.SYSTEMS)
    parser.add_argument("--uncapped", action="store_true", help="plan for the card, and take what is taken")
    parser.add_argument(
        "--steps", type=int, default=1, help="after the first; 0: the first is taken, compilation included"
    )
    parser.add_argument("--tiny", action="store_true", help="a dry run on a CPU")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    result = measure(arguments)
    arguments.results.mkdir(parents=True, exist_ok=True)
    name = f"context_{result['case']}_{arguments.card:g}_{arguments.system}.json"
    (arguments.results / name).write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"{arguments.system} {result['case']} on {arguments.card:g} GiB: "
        f"{result['tokens'] / result['tokens_per_s']:.2f} s, "
        f"{result['tokens_per_s']:.0f} tokens/s, peak {result['peak_gib']} GiB, "
        f"reserved {result['reserved_gib']} GiB"
    )


if __name__ == "__main__":
    main()
