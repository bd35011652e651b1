"""Compiles what ``kernel_times.py`` is going to time, in processes side by side, into the caches on disk.

Inductor takes seconds a case, one case after the other; timing takes milliseconds. Each process runs its
share of the cases once, a peer's kernels in a process of their own; nothing is timed until all have ended.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import kernel_peers
import torch
from cases import Case

SCRIPT = Path(__file__).parent / "kernel_times.py"


def room() -> int:
    """Processes by default: each keeps about two cores busy."""
    return max(1, len(os.sched_getaffinity(0)) // 2)


def shares(processes: int, beside: list[str]) -> list[tuple[str, str, str]]:
    """The ``--share`` of each process: what it runs of which cases, every n-th from the i-th on."""
    own = [("cases", str(i), str(processes)) for i in range(processes)]
    return own + [(peer, "0", "1") for peer in kernel_peers.PEERS if peer in beside and processes]


def compile_all(arguments: argparse.Namespace) -> None:
    """Start a process for each share, and wait for all of them."""
    words = [sys.executable, str(SCRIPT), *(["--tiny"] if arguments.tiny else [])]
    words += ["--kernel", *arguments.kernel] if arguments.kernel else []
    words += ["--beside", *arguments.beside]
    environment = {"TORCHINDUCTOR_COMPILE_THREADS": "2"} | os.environ
    running = {
        share: subprocess.Popen([*words, "--share", *share], stdout=subprocess.DEVNULL, env=environment)
        for share in shares(arguments.ahead, arguments.beside)
    }
    try:
        for share, process in running.items():
            if status := process.wait():
                print(f"compiling ahead, {' '.join(share)}: status {status}", flush=True)
    finally:
        for process in running.values():
            process.kill()


def functions(share: str, case: Case, beside: list[str], cuda: bool) -> Iterator[Callable]:
    """What a share compiles of a case."""
    if share != "cases":
        if (function := kernel_peers.of(share, case)) is not None:
            yield function
        return
    yield case.ours
    if case.compiled and cuda and "inductor" in beside:
        torch._dynamo.reset()
        yield torch.compile(case.reference, dynamic=False)
    if case.other is not None and cuda:
        yield case.other


def seconds(cases: list[Case], arguments: argparse.Namespace) -> float:
    """About how long all of it takes on an H200; a guess, for whoever waits."""
    compiled = sum(case.compiled for case in cases) * ("inductor" in arguments.beside)
    flex = sum(case.other_name == "flex" for case in cases)
    compiling = 4 * compiled + 8 * flex + len(cases)
    importing = 20 * ("unsloth" in arguments.beside) + 5 * ("liger" in arguments.beside)
    if not arguments.ahead:
        return 10 + compiling + importing
    return 30 + compiling / arguments.ahead + len(cases) + importing
