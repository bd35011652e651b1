"""Time and memory of whole training steps, one system a process.

    python examples/benchmarks/end_to_end.py --suite qlora          # all systems of a suite's cases, in turn
    python examples/benchmarks/end_to_end.py --case 8x2x2048 --system rewriter
    python examples/benchmarks/end_to_end.py --suite lora full --together   # set up side by side
    python examples/benchmarks/end_to_end.py --suite all --tiny     # a dry run on a CPU: no Unsloth, no Liger

A step is forward, backward and a fused AdamW on what is trained, under bf16 autocast, on random tokens and
random weights that are the same for every system. What a case is stands in ``models.py``, what a suite holds
in ``suites.py``. Writes ``results/end_to_end_<case>_<system>.json``: device, versions, the median step in ms,
the first step in s (none where set-ups ran side by side), peak memory in GiB, the losses, and after a suite
how they agree with eager's.
"""

import argparse
import gc
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import peers
import torch
from models import Case, build, with_random_adapters
from turns import MEMORY, TIMING, Turn

__all__ = ["RESULTS", "build", "versions", "with_random_adapters"]

RESULTS = Path(__file__).parent / "results"
WARM = 4  # steps before the clock runs; as many batches where all have one length
AGAIN = 2  # of them once more where the process has slept since, for the allocator and the clocks
Step = Callable[[int], torch.Tensor]


def training_step(model: torch.nn.Module, case: Case, device: str, steps: int) -> Step:
    """The function of a step's number that trains once and returns the loss."""
    count = WARM if len(set(case.tokens)) == 1 else WARM + steps
    sizes = [(case.rows, length) for length in case.lengths(count)]
    batches = random_tokens(model, sizes, device)
    return step_on(model, lambda index: batches[index % len(batches)], device)


def random_tokens(model: torch.nn.Module, sizes: list[tuple[int, int]], device: str) -> list[torch.Tensor]:
    """Of the model's vocabulary, the same in every process; one tensor a size, (rows, length)."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size  # pyright: ignore[reportAttributeAccessIssue]
    return [torch.randint(vocabulary, size, generator=generator).to(device) for size in sizes]


def step_on(model: torch.nn.Module, batch: Callable[[int], torch.Tensor], device: str) -> Step:
    """The function of what ``batch`` knows a batch by that trains on it and returns the loss."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def step(which: int) -> torch.Tensor:
        ids = batch(which)
        with torch.autocast(device, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def timed(step: Step, index: int, device: str) -> tuple[float, torch.Tensor]:
    """Seconds of a step on an idle device, and its loss."""
    synchronise(device)
    start = time.perf_counter()
    loss = step(index)
    synchronise(device)
    return time.perf_counter() - start, loss


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure(
    system: str, case: Case, steps: int, options: dict, tiny: bool, turn: Turn | None
) -> tuple[dict, Step]:
    """What the JSON holds, and the step, for a profile.

    With ``turn``, other processes are set up meanwhile, so that what the first step took is left out; before
    the clock runs this one waits for its turn.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    peers.imports(system)
    if turn:
        turn.wait(MEMORY)
    model = peers.prepared(system, case, device, tiny, options)
    step = training_step(model, case, device, steps)
    first, loss = timed(step, 0, device)
    compiling, losses = compile_seconds(), [loss, *(step(i) for i in range(1, WARM))]
    if turn:
        give_back_memory(device)
        turn.wait(TIMING)
        losses += [step(i) for i in range(WARM - AGAIN, WARM)]
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    runs = [timed(step, i, device) for i in range(WARM, WARM + steps)]
    times = [1e3 * seconds for seconds, _ in runs]
    losses += [loss for _, loss in runs]
    result = {
        "system": system,
        "case": case.name,
        **({"options": options} if options else {}),
        **machine(device),
        "versions": versions(),
        "together": turn is not None,
        "median_ms": statistics.median(times),
        "min_ms": min(times),
        "times_ms": [round(t, 3) for t in times],
        "first_step_s": None if turn else first,
        **({} if turn else {"compile_s": compiling}),
        "peak_gib": peak_bytes() / 2**30 if device == "cuda" else None,
        "losses": [round(loss.item(), 6) for loss in losses],
    }
    return result, step


def peak_bytes() -> int:
    """The most that was allocated, and what CUDA graphs hold: their activations count as free otherwise."""
    pools = [s for s in torch.cuda.memory_snapshot() if tuple(s["segment_pool_id"]) != (0, 0)]
    held = sum(s["total_size"] - s["allocated_size"] for s in pools)
    return torch.cuda.max_memory_allocated() + held


def give_back_memory(device: str) -> None:
    """What the allocator keeps for later, to other processes."""
    synchronise(device)
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def machine(device: str) -> dict[str, str]:
    if device == "cuda":
        return {
            "device": torch.cuda.get_device_name(),
            "gpu": str(torch.cuda.get_device_properties(0).uuid),
        }
    return {"device": platform.processor() or platform.machine()}


def compile_seconds() -> dict[str, float]:
    """What the first step spent where: PyTorch's own counts of seconds, each with those inside it."""
    from torch._dynamo.utils import compilation_time_metrics

    return {
        name: round(sum(seconds), 2)
        for name, seconds in compilation_time_metrics.items()
        if sum(seconds) > 0.1
    }


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in ("torch", "triton", "transformers", "peft", "bitsandbytes", "unsloth", "liger_kernel"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def result_file(folder: Path, case: Case, system: str) -> Path:
    return folder / f"end_to_end_{case.name}_{system}.json"


def run_one(arguments: argparse.Namespace) -> None:
    """One system on one case, in this process."""
    case, turn = Case.parse(arguments.case), arguments.turn and Turn(*arguments.turn)
    result, step = measure(arguments.system, case, arguments.steps, arguments.options, arguments.tiny, turn)
    result = {"run": arguments.run, **result}
    if arguments.system == "rewriter":
        import rewriter

        found = rewriter.report()
        result |= {"counts": found.counts(), "planned": found.memory is not None}
        if not turn:
            result["rewriter_s"] = [graph.seconds for graph in found.graphs]
        if not arguments.brief:
            print(found)
    if arguments.profile:
        import rewriter

        indices = itertools.count(WARM)
        profile = rewriter.profile(lambda: step(next(indices)))
        print(profile)
        result["profile"] = profile.to_dict()
    arguments.results.mkdir(parents=True, exist_ok=True)
    path = result_file(arguments.results, case, arguments.label or arguments.system)
    path.write_text(json.dumps(result, indent=1) + "\n")
    first = "" if turn else f", first {result['first_step_s']:.1f} s"
    print(f"{arguments.system}: {result['median_ms']:.1f} ms a step{first} -> {path}")


def parse() -> argparse.Namespace:
    import suites

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_argument_group("what runs")
    what.add_argument("--suite", nargs="+", choices=[*suites.SUITES, "all"], help="cases and their systems")
    what.add_argument(
        "--case", help="<layers>x<rows>x<tokens or a range>[_1b|_70b][_16bit|_full]; default 8x2x2048"
    )
    what.add_argument("--system", choices=peers.SYSTEMS, help="default rewriter")
    own = [f"{suite}:{system}" for suite, all_jobs in suites.SUITES.items() for jobs in all_jobs
           for system in jobs.systems]  # fmt: skip
    what.add_argument("--only", nargs="+", choices=[*peers.SYSTEMS, *own], metavar="[SUITE:]SYSTEM",
                      help="of the suites' systems, or of a suite's, these")  # fmt: skip
    what.add_argument("--options", type=json.loads, default={}, help="the rewriter's options, as JSON")
    what.add_argument("--steps", type=int, default=20)
    what.add_argument(
        "--together",
        action="store_true",
        help="a suite's processes are set up side by side, and timed in turn",
    )
    what.add_argument("--at-once", type=int, help="the most of them; as many as the host has room for")
    what.add_argument("--tiny", action="store_true", help="a tiny shape, to try the script on a CPU")
    out = parser.add_argument_group("what comes of it")
    out.add_argument(
        "--profile", action="store_true", help="also where a step's time goes (rewriter.profile)"
    )
    out.add_argument("--brief", action="store_true", help="without the rewriter's report")
    out.add_argument("--label", help="the system's name in the file's name, as for a run with options")
    out.add_argument("--results", type=Path, default=RESULTS)
    out.add_argument(
        "--run", default=datetime.now(UTC).isoformat(timespec="seconds"), help="a name for the run"
    )
    out.add_argument(
        "--seconds", type=float, default=3600, help="a suite starts no system that may pass them"
    )
    out.add_argument("--keep-caches", action="store_true", help="a suite's first steps find warm caches")
    parser.add_argument("--turn", nargs=2, type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.suite:
        import suites

        suites.run(arguments)
        return
    arguments.case = arguments.case or "8x2x2048"
    arguments.system = arguments.system or "rewriter"
    run_one(arguments)


if __name__ == "__main__":
    main()
