"""Lists of cases and systems, and the running of them: each system a process of its own, with a time limit.

Every process has empty compilation caches, so that first steps compare. After a case's last system, each
result is told how its losses agree with eager's of the same run.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from agreement import agreement
from models import Case

SCRIPT = Path(__file__).parent / "end_to_end.py"


@dataclass(frozen=True)
class Jobs:
    """A case, the systems that run it, and the seconds that each may take."""

    case: str
    systems: tuple[str, ...]
    limit: int = 120


SUITES: dict[str, tuple[Jobs, ...]] = {
    "qlora": (
        Jobs("8x2x2048", ("rewriter", "unsloth", "unsloth_gc", "inductor", "liger", "liger_compiled", "hf")),
    ),
    "lengths": (Jobs("32x2x128-255", ("rewriter", "unsloth", "unsloth_gc", "hf"), 240),),
    "deep": (Jobs("32x1x4096", ("rewriter", "unsloth", "unsloth_gc", "liger_gc", "hf_gc"), 240),),
    "long": (Jobs("8x1x32768", ("rewriter", "unsloth", "unsloth_gc", "liger_gc", "hf_gc"), 150),),
    "lora": (Jobs("8x2x2048_16bit", ("rewriter", "liger_compiled", "liger", "inductor", "unsloth", "hf")),),
    "full": (Jobs("2x2x2048_full", ("rewriter", "liger_compiled", "liger", "inductor", "hf")),),
    "small": (
        Jobs("16x4x2048_1b_16bit", ("rewriter", "unsloth", "liger", "liger_compiled", "inductor", "hf")),
    ),
}


def chosen(arguments: argparse.Namespace) -> Iterator[tuple[Case, tuple[str, ...], int]]:
    """The cases of the suites asked for, with what of their systems runs here."""
    names = SUITES if "all" in arguments.suite else arguments.suite
    for jobs in (jobs for name in names for jobs in SUITES[name]):
        case = Case.parse(jobs.case)
        systems = tuple(s for s in jobs.systems if s in (arguments.only or jobs.systems))
        if arguments.tiny:
            case, systems = case.shrunk(), tuple(s for s in systems if not s.startswith(("unsloth", "liger")))
        if arguments.case in (None, jobs.case):
            yield case, systems, jobs.limit


def run(arguments: argparse.Namespace) -> None:
    """Run what was chosen, print a table of each case, end with status 1 where losses differ."""
    from end_to_end import result_file

    end = time.monotonic() + arguments.seconds
    differing = []
    for case, systems, limit in chosen(arguments):
        for system in systems:
            run_job(arguments, case, system, min(limit, end - time.monotonic()))
        files = {system: result_file(arguments.results, case, system) for system in systems}
        results = settled(case, files, arguments.run)
        print(table(case, results), flush=True)
        differing += [
            f"{case.name} {s}" for s, r in results.items() if not r.get("eager", {}).get("agree", True)
        ]
    if differing:
        raise SystemExit(f"losses differ from eager's by more than rounding: {', '.join(differing)}")


def run_job(arguments: argparse.Namespace, case: Case, system: str, limit: float) -> None:
    """One process; past its limit it is ended with all that it started."""
    if limit < 15:
        print(f"{case.name} {system}: not started, {max(0, limit):.0f} s are left", flush=True)
        return
    command = [sys.executable, str(SCRIPT), "--case", case.name, "--system", system, "--run", arguments.run]
    command += ["--steps", str(arguments.steps), "--results", str(arguments.results)]
    command += ["--options", json.dumps(arguments.options)]
    command += [flag for flag in ("--tiny", "--profile") if getattr(arguments, flag[2:])]
    began = time.monotonic()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        fresh = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "TRITON_CACHE_DIR": f"{folder}/triton"}
        environment = {**os.environ, **({} if arguments.keep_caches else fresh)}
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        try:
            outcome = f"status {process.wait(limit)}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            outcome = f"ended at its limit of {limit:.0f} s"
    print(f"{case.name} {system}: {outcome}, {time.monotonic() - began:.0f} s", flush=True)


def settled(case: Case, files: dict[str, Path], run: str) -> dict[str, dict]:
    """This run's results by system, each file now with how its losses agree with eager's."""
    found = {s: json.loads(path.read_text()) for s, path in files.items() if path.exists()}
    results = {s: result for s, result in found.items() if result["run"] == run}
    eager = next((s for s in ("hf", "hf_gc") if s in results), None)
    if eager is None:
        return results
    tokens = case.rows * case.tokens[0]
    for system, result in results.items():
        if system != eager:
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
        times = f"{r['median_ms']:9.1f} {ratio:6.2f} {r['peak_gib'] or 0:7.2f} {r['first_step_s']:8.1f}"
        lines.append(f"{system:20s} {times}  {word}")
    return "\n".join(lines)
