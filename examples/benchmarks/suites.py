"""Lists of cases and systems, and the running of them: each system a process of its own, with a time limit.

The processes run one after another with empty compilation caches each, so that first steps compare; or
together (``together.py``), where only timed steps do. After that each result is told how its losses agree
with eager's of the same run.
"""

import argparse
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import together
from agreement import agreement
from jobs import Job, caches, command, kill
from models import Case


@dataclass(frozen=True)
class Jobs:
    """A case and the systems that run it.

    Attributes:
        systems: each with the GiB of the GPU that it takes at its peak, generously.
        idle: GiB that a process holds between steps.
        limit: seconds that each may take.
    """

    case: str
    systems: Mapping[str, float]
    idle: float
    limit: int = 120


QLORA = {
    "rewriter": 12,
    "unsloth": 12,
    "unsloth_gc": 8,
    "inductor": 15,
    "liger": 12,
    "liger_compiled": 12,
    "hf": 20,
}
LENGTHS = {"rewriter": 20, "unsloth": 20, "unsloth_gc": 20, "hf": 20}
DEEP = {"rewriter": 30, "unsloth": 28, "unsloth_gc": 20, "liger_gc": 20, "hf_gc": 26}
LONG = {"rewriter": 44, "unsloth": 44, "unsloth_gc": 18, "liger_gc": 18, "hf_gc": 64}
LORA = {"rewriter": 16, "liger_compiled": 16, "liger": 16, "inductor": 18, "unsloth": 14, "hf": 24}
FULL = {"rewriter": 26, "liger_compiled": 26, "liger": 26, "inductor": 28, "hf": 34}
SMALL = {"rewriter": 18, "unsloth": 16, "liger": 20, "liger_compiled": 20, "inductor": 26, "hf": 36}
SUITES: dict[str, tuple[Jobs, ...]] = {
    "qlora": (Jobs("8x2x2048", QLORA, idle=5),),
    "lengths": (Jobs("32x2x128-255", LENGTHS, idle=10, limit=240),),
    "deep": (Jobs("32x1x4096", DEEP, idle=8, limit=240),),
    "long": (Jobs("8x1x32768", LONG, idle=5, limit=150),),
    "lora": (Jobs("8x2x2048_16bit", LORA, idle=8),),
    "full": (Jobs("2x2x2048_full", FULL, idle=10),),
    "small": (Jobs("16x4x2048_1b_16bit", SMALL, idle=4),),
}


def asked(only: list[str] | None, suite: str, system: str) -> bool:
    """Whether ``--only`` names it, for all suites or for this one; where it is left out, all are."""
    return only is None or bool({system, f"{suite}:{system}"} & set(only))


def chosen(arguments: argparse.Namespace) -> Iterator[tuple[Case, list[Job]]]:
    """The cases of the suites asked for, with what of their systems runs here."""
    suites = SUITES if "all" in arguments.suite else arguments.suite
    for suite, jobs in ((name, jobs) for name in suites for jobs in SUITES[name]):
        case = Case.parse(jobs.case)
        systems = [s for s in jobs.systems if asked(arguments.only, suite, s)]
        if arguments.tiny:
            case, systems = case.shrunk(), [s for s in systems if not s.startswith(("unsloth", "liger"))]
        if arguments.case in (None, jobs.case):
            yield case, [Job(case.name, s, jobs.limit, jobs.systems[s], jobs.idle) for s in systems]


def run(arguments: argparse.Namespace) -> None:
    """Run what was chosen, print a table of each case, end with status 1 where losses differ."""
    end = time.monotonic() + arguments.seconds
    arguments.results.mkdir(parents=True, exist_ok=True)
    cases = list(chosen(arguments))
    if arguments.together:
        run_together(arguments, [job for _, jobs in cases for job in jobs], end)
    differing = []
    for case, jobs in cases:
        for job in () if arguments.together else jobs:
            run_alone(arguments, job, end)
        differing += finished(arguments, case, jobs)
    if differing:
        raise SystemExit(f"losses differ from eager's by more than rounding: {', '.join(differing)}")


def finished(arguments: argparse.Namespace, case: Case, jobs: list[Job]) -> list[str]:
    """Print the case's table; the names of those whose losses differ from eager's."""
    from end_to_end import result_file

    files = {job.system: result_file(arguments.results, case, job.system) for job in jobs}
    results = settled(case, files, arguments.run)
    print(table(case, results), flush=True)
    return [f"{case.name} {s}" for s, r in results.items() if not r.get("eager", {}).get("agree", True)]


def run_together(arguments: argparse.Namespace, jobs: list[Job], end: float) -> None:
    """All of them at once but for their timed steps, with one cache, empty at the beginning."""
    at_once, gib = arguments.at_once or together.host_room(), together.gpu_gib()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        environment = {"TORCHINDUCTOR_COMPILE_THREADS": "4"} | os.environ
        environment |= {} if arguments.keep_caches else caches(folder)
        together.run(jobs, partial(command, arguments), environment, Path(folder), gib, at_once, end)


def run_alone(arguments: argparse.Namespace, job: Job, end: float) -> None:
    """One process; past its limit it is ended with all that it started."""
    limit = min(job.limit, end - time.monotonic())
    if limit < 15:
        print(f"{job.name}: not started, {max(0, limit):.0f} s are left", flush=True)
        return
    began = time.monotonic()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        environment = os.environ | ({} if arguments.keep_caches else caches(folder))
        process = subprocess.Popen(command(arguments, job), env=environment, start_new_session=True)
        try:
            outcome = f"status {process.wait(limit)}"
        except subprocess.TimeoutExpired:
            outcome = f"ended at its limit of {limit:.0f} s"
        finally:
            kill(process)
    print(f"{job.name}: {outcome}, {time.monotonic() - began:.0f} s", flush=True)


def settled(case: Case, files: dict[str, Path], run: str) -> dict[str, dict]:
    """This run's results by system, each file now with how its losses agree with eager's."""
    found = {s: json.loads(path.read_text()) for s, path in files.items() if path.exists()}
    results = {s: result for s, result in found.items() if result["run"] == run}
    eager = next((s for s in ("hf", "hf_gc") if s in results), None)
    if eager is None:
        return results
    tokens = case.rows * case.tokens[0]
    for system, result in results.items():
        alike = result.get("together") == results[eager].get("together")  # the same steps in the same order
        if system != eager and alike:
            result["eager"] = {
                "system": eager,
                **agreement(result["losses"], results[eager]["losses"], tokens),
            }
            files[system].write_text(json.dumps(result, indent=1) + "\n")
    return results


def table(case: Case, results: dict[str, dict]) -> str:
    """The case's results as text, with their ratios to the rewriter's."""
    ours = results.get("rewriter")
    lines = [f"{case.name:20s} {'ms':>9s} {'ratio':>6s} {'GiB':>7s} {'first s':>8s}  off eager's loss, limit"]
    for system, r in results.items():
        ratio = r["median_ms"] / ours["median_ms"] if ours else float("nan")
        same = r.get("eager")
        word = (
            f"{same['largest']:.4f} {same['limit']:.4f} {'agree' if same['agree'] else 'DIFFER'}"
            if same
            else ""
        )
        first = "–" if r["first_step_s"] is None else f"{r['first_step_s']:.1f}"
        times = f"{r['median_ms']:9.1f} {ratio:6.2f} {r['peak_gib'] or 0:7.2f} {first:>8s}"
        plan = " with a memory plan" if r.get("planned") else ""
        lines.append(f"{system:20s} {times}  {word}{plan}")
    return "\n".join(lines)
