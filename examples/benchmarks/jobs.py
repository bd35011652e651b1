"""One system on one case as a process of its own: what it needs, how it is started, how it is ended."""

import argparse
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

SCRIPT = Path(__file__).parent / "end_to_end.py"


@dataclass(frozen=True)
class Job:
    """
    Attributes:
        case: its name.
        limit: seconds that it may take.
        peak: GiB of the GPU that it may take at its peak.
        idle: GiB of the GPU that it holds between steps: the model, the optimizer, the CUDA context.
    """

    case: str
    system: str
    limit: float
    peak: float
    idle: float

    @property
    def name(self) -> str:
        return f"{self.case} {self.system}"


def command(arguments: argparse.Namespace, job: Job) -> list[str]:
    """What runs the job as ``end_to_end.py`` was asked to run a suite."""
    words = [sys.executable, str(SCRIPT), "--case", job.case, "--system", job.system, "--run", arguments.run]
    words += ["--steps", str(arguments.steps), "--results", str(arguments.results), "--brief"]
    words += ["--options", json.dumps(arguments.options)]
    return words + [flag for flag in ("--tiny", "--profile") if getattr(arguments, flag[2:])]


def caches(folder: str | Path) -> dict[str, str]:
    """The environment in which what is compiled is kept in ``folder``."""
    return {
        "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
        "TRITON_CACHE_DIR": f"{folder}/triton",
        "UNSLOTH_COMPILE_LOCATION": f"{folder}/unsloth",
    }


def kill(process: subprocess.Popen) -> None:
    """End it with all that it started; it leads a session of its own."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
