"""Runs many jobs so that their set-ups overlap and their timed steps have the machine to themselves.

Most of a process's time goes to imports, to building its model and to compiling it: those of a *wave* of
jobs run side by side. A job that has taken its first steps frees what the allocator keeps, says that it is
ready, and sleeps. When each of the wave is ready, or has died, they are timed in turn: nothing else runs
then, but the others' models wait in the GPU's memory. What a first step took is no fair figure here, and is
left out.

The memory of the GPU is shared out by what the jobs say they need. A wave is chosen so that its jobs can be
set up from the largest to the smallest and be timed from the smallest to the largest, in which order each has
only larger ones waiting beside it; they may begin in any other order that does not bar this one.
"""

import contextlib
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jobs import Job, kill
from turns import MEMORY, TIMING

HOST_GIB = 8  # of memory that a process may take on the host, with those that compile for it
SHARE = 0.85  # of the GPU's memory that is shared out: rewriter and Unsloth look at what is free
TAIL = 15  # lines of its output that are shown of a job that failed
POLL = 0.2  # seconds


def fits(jobs: Iterable[Job], gib: float) -> bool:
    """Whether each can come to its peak while those that are larger wait."""
    waiting = 0.0
    for job in sorted(jobs, key=lambda job: -job.peak):
        if waiting + job.peak > gib:
            return False
        waiting += job.idle
    return True


def waves(jobs: Iterable[Job], gib: float, at_once: int) -> list[list[Job]]:
    """The jobs in order, cut into waves; one that does not fit by itself is a wave and may fail."""
    found: list[list[Job]] = []
    for job in jobs:
        if found and len(found[-1]) < at_once and fits([*found[-1], job], gib):
            found[-1].append(job)
        else:
            found.append([job])
    return found


def host_room() -> int:
    """How many processes the host has memory and cores for."""
    sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        sizes.append(int(text))
    return max(1, min(int(min(sizes) / 2**30 / HOST_GIB), len(os.sched_getaffinity(0))))


@dataclass
class Child:
    """A job's process.

    Attributes:
        state: "imports", then "asks" for memory, "set-up", is "ready", "timing", and has "ended".
        since: when the state began.
    """

    job: Job
    process: subprocess.Popen
    answers: int
    points: int
    log: Path
    state: str = "imports"
    since: float = field(default_factory=time.monotonic)

    def enter(self, state: str) -> None:
        self.state, self.since = state, time.monotonic()

    def answer(self, state: str) -> None:
        """Let it go on."""
        self.enter(state)
        with contextlib.suppress(BrokenPipeError):  # it has died, which the next look at it finds
            os.write(self.answers, b".")

    def end(self, outcome: str, failed: bool) -> None:
        kill(self.process)
        seconds = time.monotonic() - self.since
        print(f"{self.job.name}: {self.state} took {seconds:.0f} s, {outcome}", flush=True)
        if failed:
            lines = self.log.read_text(errors="replace").splitlines()[-TAIL:]
            print("".join(f"    {line}\n" for line in lines), end="", flush=True)
        for descriptor in (self.answers, self.points):
            os.close(descriptor)
        self.enter("ended")

    def look(self, heard: bool, last: float) -> None:
        """Take notice of what it says, of its end, and of its limit."""
        said = os.read(self.points, 64).decode() if heard else ""
        if said:
            seconds = time.monotonic() - self.since
            print(f"{self.job.name}: {self.state} took {seconds:.0f} s", flush=True)
            self.enter({MEMORY: "asks", TIMING: "ready"}[said])
            return
        if heard:  # it has closed its end
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(POLL)
        if (status := self.process.poll()) is not None:
            self.end(f"status {status}", failed=status != 0)
        elif time.monotonic() > last:
            self.end("ended, as no time is left", failed=True)
        elif self.state not in ("asks", "ready") and time.monotonic() - self.since > self.job.limit:
            self.end(f"ended at its limit of {self.job.limit:.0f} s", failed=True)


def admitted(children: Sequence[Child], gib: float) -> Child | None:
    """Of those that ask for memory the largest that may have it, so that the rest can still follow."""
    hold = {"set-up": lambda job: job.peak, "ready": lambda job: job.idle, "timing": lambda job: job.peak}
    taken = sum(hold[c.state](c.job) for c in children if c.state in hold)
    later = sum(c.job.idle for c in children if c.state in hold)
    outside = [c for c in children if c.state in ("imports", "asks")]
    for child in sorted((c for c in outside if c.state == "asks"), key=lambda c: -c.job.peak):
        rest = [c.job for c in outside if c is not child]
        alone = not taken and len(children) == 1
        if alone or (taken + child.job.peak <= gib and fits(rest, gib - later - child.job.idle)):
            return child
    return None


def observe(children: Sequence[Child], last: float) -> None:
    """Wait for a word of any child, a moment at most."""
    alive = [c for c in children if c.state != "ended"]
    heard, _, _ = select.select([c.points for c in alive], [], [], POLL)
    for child in alive:
        child.look(child.points in heard, last)


def run_wave(children: Sequence[Child], gib: float, last: float) -> None:
    """Set all up, then time each."""
    while any(c.state not in ("ready", "ended") for c in children):
        if (child := admitted(children, gib)) is not None:
            child.answer("set-up")
            continue
        observe(children, last)
    for child in sorted(children, key=lambda c: c.job.peak):
        if child.state == "ready":
            child.answer("timing")
        while child.state != "ended":
            observe(children, last)


def run(
    jobs: Iterable[Job],
    words: Callable[[Job], list[str]],
    environment: Mapping[str, str],
    folder: Path,
    gib: float,
    at_once: int,
    last: float,
) -> None:
    """Run all jobs; what they print goes to files in ``folder``.

    Args:
        words: a job's command, to which its pipes are appended as ``--turn <answers> <points>``.
        gib: of the GPU's memory that may be shared out.
        at_once: the most processes of a wave.
        last: the monotonic clock at which whatever still runs is ended.
    """
    for wave in waves(jobs, gib, at_once):
        if time.monotonic() > last:
            print(f"not started, no time is left: {', '.join(job.name for job in wave)}", flush=True)
            continue
        print(f"together: {', '.join(job.name for job in wave)}", flush=True)
        began, children = time.monotonic(), []
        try:
            for job in wave:
                children.append(start(job, words(job), environment, folder))
            run_wave(children, gib, last)
        finally:
            for child in children:
                kill(child.process)
        print(f"all of them: {time.monotonic() - began:.0f} s", flush=True)


def start(job: Job, words: Sequence[str], environment: Mapping[str, str], folder: Path) -> Child:
    log = folder / f"{job.case}_{job.system}.log"
    # Unsloth writes sources to its folder, under names that are the same in each process.
    own = {"UNSLOTH_COMPILE_LOCATION": f"{log}.unsloth"}
    theirs, answers = os.pipe()
    points, mine = os.pipe()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*words, "--turn", str(theirs), str(mine)],
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            env={**environment, **own}, pass_fds=(theirs, mine), start_new_session=True,
        )  # fmt: skip
    os.close(theirs)
    os.close(mine)
    return Child(job, process, answers, points, log)


def gpu_gib() -> float:
    """GiB that may be shared out; without bound where there is no GPU."""
    import torch

    if not torch.cuda.is_available():
        return sys.float_info.max
    return SHARE * torch.cuda.get_device_properties(0).total_memory / 2**30
