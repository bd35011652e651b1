"""Runs the tests that need a GPU and writes down what ran, where, and on which sources.

``python -m tests.gpu.record [PYTEST OPTIONS]`` from the repository's root is what ``make gpu-test`` runs.
The record, ``tests/gpu/record.json``, is written whether the tests pass or not; the exit status is pytest's,
and 1 where there is no GPU. Its ``sources`` equals

    git ls-files -z 'rewriter/*.py' 'rewriter/**/*.py' | LC_ALL=C sort -z | xargs -0 cat | sha256sum

so that anybody can tell whether the tests ran on the code as it stands.
"""

import hashlib
import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent
RECORD = ROOT / "tests/gpu/record.json"
TESTS = ["tests/gpu", "tests/kernels"]


class Counter:
    """A pytest plugin that counts the outcomes of tests; an error in a fixture counts as a failure."""

    def __init__(self) -> None:
        self.outcomes = {"passed": 0, "failed": 0, "skipped": 0}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.outcome] += 1

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.outcome != "passed":
            self.outcomes[report.outcome] += 1


def sources() -> str:
    """SHA-256 of the package's Python files, joined in the byte order of their paths."""
    files = {path.relative_to(ROOT).as_posix().encode(): path for path in (ROOT / "rewriter").rglob("*.py")}
    return hashlib.sha256(b"".join(files[name].read_bytes() for name in sorted(files))).hexdigest()


def driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main(options: list[str]) -> int:
    if not torch.cuda.is_available():
        print("gpu-test: torch sees no GPU here; run it on a machine with one.", file=sys.stderr)
        return 1
    counter, hashed, began = Counter(), sources(), time.time()
    status = int(pytest.main([*TESTS, *options], plugins=[counter]))
    record = {
        "device": torch.cuda.get_device_name(),
        "driver": driver(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "triton", "transformers", "peft", "bitsandbytes")},
        "sources": hashed,
        "options": options,
        "date": time.strftime("%Y-%m-%d", time.gmtime(began)),
        "seconds": round(time.time() - began),
        **counter.outcomes,
        "exit_status": status,
    }
    RECORD.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
