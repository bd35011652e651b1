"""How long the passes take on a model of 32 layers: seconds by pass, without lowering.

    python examples/benchmarks/matching.py                    # all kinds, each in a process of its own
    python examples/benchmarks/matching.py --kind nf4 --profile nf4.prof

The models are the tests' Llama, narrow, since matching sees no values. ``first_seconds`` is what a training
run meets. Python's collector walks all that Dynamo made whenever it comes, three times in a compilation: its
share of that, ``collector_seconds``, is luck, and not in ``seconds``, the median of further runs over the
same graphs. ``cpu_seconds`` of it is what remains on a machine that has nothing else to do. Writes
``matching.json`` to the results' folder.
"""

import argparse
import cProfile
import gc
import importlib.metadata
import json
import platform
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"dtype": torch.float32},
    "lora": {"lora": True},
    "nf4": {"lora": True, "nf4": True, "double_quant": True},
    "checkpoint": {"lora": True},
    "nf4_checkpoint": {"lora": True, "nf4": True, "double_quant": True},
}
REPEATS = 3


def captured(kind: str, layers: int) -> tuple[list[GraphModule], list[dict[str, float]]]:
    """The graphs that Dynamo makes of one training step, and the first times of each."""
    sys.path.append(str(ROOT))
    from tests.families import batch, build

    model: Any = build("llama", layers=layers, **{"dtype": torch.bfloat16, **KINDS[kind]})
    if kind.endswith("checkpoint"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    graphs: list[GraphModule] = []
    first: list[dict[str, float]] = []

    def backend(module: GraphModule, _: Any) -> Any:
        graphs.append(module)
        first.append(passes_over(module))
        return module.forward

    torch.compile(model, backend=backend)(**batch())
    return graphs, first


def passes_over(module: GraphModule) -> dict[str, float]:
    """Seconds by pass, in ``all``, and of the collector within."""
    from rewriter.backend import rewrite_graph
    from rewriter.options import Options
    from rewriter.report import GraphRecord

    record = GraphRecord("")
    wall, busy = {"start": 0.0, "stop": 0.0}, {"start": 0.0, "stop": 0.0}

    def watch(phase: str, _: dict) -> None:
        wall[phase] += time.perf_counter()
        busy[phase] += time.process_time()

    gc.callbacks.append(watch)
    start, cpu = time.perf_counter(), time.process_time()
    rewrite_graph(module, Options(), record)
    whole, cpu = time.perf_counter() - start, time.process_time() - cpu
    gc.callbacks.remove(watch)
    by_pass = {done.name: done.seconds for done in record.passes}
    rewrites = sum(done.count for done in record.passes)
    return {
        **by_pass,
        "all": whole,
        "collector": wall["stop"] - wall["start"],
        "cpu": cpu - (busy["stop"] - busy["start"]),
        "rewrites": rewrites,
    }


def summed(times: list[dict[str, float]]) -> Counter:
    return sum(map(Counter, times), Counter())


def measured(kind: str, layers: int, profile: str | None) -> dict[str, Any]:
    graphs, times = captured(kind, layers)
    first = summed(times)
    again = [summed([passes_over(graph) for graph in graphs]) for _ in range(REPEATS)]
    if profile:
        with cProfile.Profile() as profiler:
            for graph in graphs:
                passes_over(graph)
        profiler.dump_stats(profile)
    names = [name for name in again[0] if name not in ("all", "cpu", "collector", "rewrites")]
    nodes = sum(len(m.graph.nodes) for g in graphs for m in g.modules() if isinstance(m, GraphModule))
    return {
        "kind": kind,
        "layers": layers,
        "graphs": len(graphs),
        "nodes": nodes,
        "rewrites": first["rewrites"],
        "first_seconds": round(first["all"], 4),
        "collector_seconds": round(first["collector"], 4),
        "seconds": round(statistics.median(run["all"] - run["collector"] for run in again), 4),
        "cpu_seconds": round(statistics.median(run["cpu"] for run in again), 4),
        "seconds_by_pass": {n: round(statistics.median(run[n] for run in again), 4) for n in names},
    }


def machine() -> dict[str, str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    packages = ("torch", "transformers", "peft", "bitsandbytes")
    return {
        "cpu": model or platform.processor(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def alone(kind: str, layers: int) -> dict[str, Any]:
    """``measured`` in a process of its own."""
    command = [sys.executable, __file__, "--kind", kind, "--layers", str(layers)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kind", choices=KINDS, help="one kind, in this process; printed, not written")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--profile", help="with --kind: a file for cProfile's statistics of one more run")
    arguments = parser.parse_args()
    if arguments.kind:
        print(json.dumps(measured(arguments.kind, arguments.layers, arguments.profile)))
        return
    result = {**machine(), "rows": [alone(kind, arguments.layers) for kind in KINDS]}
    text = json.dumps(result, indent=2)
    (RESULTS / "matching.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
