"""What regions are for and what they cost: seconds to the first step by depth, and microseconds a call.

    python examples/benchmarks/regions.py                        # all of it: some minutes on a GPU
    python examples/benchmarks/regions.py --depths 16 32 64 --systems rewriter inductor:32
    python examples/benchmarks/regions.py --depths               # the overhead of a call alone: a minute

Each first step is a process of its own, with empty caches, then again with those that the first one filled.
The overhead of a call is the host's time outside of what Inductor compiled, in steps of a tiny model, less
that of the flat graph. Whole steps do not tell it: two models of one process differ by a millisecond anyway.
Writes ``regions.json`` and ``regions_overhead.json`` into ``--results``, by default
``examples/benchmarks/results``.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from end_to_end import synchronise, versions

HERE = Path(__file__).parent
RESULTS = HERE / "results"


def first_step(system: str, depth: int, tokens: int, caches: str, tiny: bool) -> dict:
    """One process of ``end_to_end.py`` with its caches in a folder; where its first step's seconds went."""
    folders = {"TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor", "TRITON_CACHE_DIR": f"{caches}/triton"}
    with tempfile.TemporaryDirectory() as results:
        case = f"{depth}x1x{tokens}"
        command = [sys.executable, str(HERE / "end_to_end.py"), "--system", system, "--case", case]
        command += ["--steps", "2", "--results", results, *(["--tiny"] if tiny else [])]
        subprocess.run(command, env={**os.environ, **folders}, check=True, stdout=subprocess.DEVNULL)
        return split(json.loads(Path(results, f"end_to_end_{case}_{system}.json").read_text()))


def split(result: dict) -> dict:
    """Seconds of the first step by what they were for; ``rest``: kernels' own compilation and first run."""
    seconds = result["compile_s"]
    ours = result.get("rewriter_s", [])
    inductor = seconds.get("compile_fx_inner", 0.0)
    backward = seconds.get("compile_fx.<locals>.bw_compiler", 0.0)
    parts = {
        "dynamo": seconds.get("_compile.compile_inner", 0.0)
        - seconds.get("OutputGraph.call_user_compiler", 0.0),
        "matching": sum(graph["rewriting"] + graph["outlining"] for graph in ours),
        "aot": seconds.get("create_aot_dispatcher_function", 0.0) + backward - inductor,
        "inductor": inductor,
    }
    total = result["first_step_s"]
    parts = {name: round(value, 2) for name, value in parts.items()}
    rest = round(total - sum(parts.values()), 2)
    return {"first_step_s": round(total, 2), **parts, "rest": rest}


def overhead(depth: int, steps: int) -> dict[str, float]:
    """Microseconds of the host a call of a region, of the forward's and of the backward's."""
    outlined, flat = (host_seconds(depth, steps, regions) for regions in (True, False))
    forward, backward = (1e6 * (a - b) / depth for a, b in zip(outlined, flat, strict=True))
    return {"forward_us": round(forward, 1), "backward_us": round(backward, 1), "calls": depth}


def host_seconds(depth: int, steps: int, regions: bool) -> list[float]:
    """Median seconds of a forward and of a backward that pass outside of what Inductor compiled."""
    from models import build

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch._dynamo.reset()
    model = build(depth, False, device, True)
    model.compile(backend="rewriter", options={"regions": regions, "cuda_graphs": False})
    ids = torch.randint(1000, (1, 8), device=device)
    taken: tuple[list[float], list[float]] = ([], [])
    with outside_of_inductor() as seconds:
        for _ in range(steps):
            synchronise(device)
            before = seconds()
            with torch.autocast(device, torch.bfloat16):
                loss = model(input_ids=ids, labels=ids).loss
            taken[0].append(seconds() - before)
            synchronise(device)
            before = seconds()
            loss.backward()
            taken[1].append(seconds() - before)
    return [statistics.median(part[steps // 3 :]) for part in taken]


@contextmanager
def outside_of_inductor() -> Iterator[Callable[[], float]]:
    """A clock that stands still while a graph that Inductor compiled is called."""
    from torch._inductor.output_code import CompiledFxGraph

    inside, call = 0.0, CompiledFxGraph.__call__

    def timed(*arguments: Any) -> Any:
        nonlocal inside
        start = time.perf_counter()
        try:
            return call(*arguments)
        finally:
            inside += time.perf_counter() - start

    with patch.object(CompiledFxGraph, "__call__", timed):
        yield lambda: time.perf_counter() - inside


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--depths", type=int, nargs="*", default=[16, 32, 64])
    parser.add_argument(
        "--systems", nargs="*", default=["rewriter"], metavar="SYSTEM[:DEPTH]", help="at that depth alone"
    )
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument(
        "--calls", type=int, default=8, help="layers of the model that overhead is measured on"
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, to try the script on a CPU")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    machine = {"device": device, "versions": versions()}
    result: dict = dict(machine)
    for named in arguments.systems:
        system, _, only = named.partition(":")
        for depth in [int(only)] if only else arguments.depths:
            with tempfile.TemporaryDirectory() as caches:
                for state in ("cold", "warm"):
                    found = first_step(system, depth, arguments.tokens, caches, arguments.tiny)
                    result[f"{system}, {depth} layers, {state}"] = found
                    print(f"{system}, {depth} layers, {state} caches: {found}", flush=True)
                    # After each row: a run that is cut leaves what it has.
                    write(result, arguments.results / "regions.json")
    cost = overhead(arguments.calls, arguments.steps)
    print("overhead of a region's call:", cost)
    write({**machine, "overhead": cost}, arguments.results / "regions_overhead.json")


def write(result: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
