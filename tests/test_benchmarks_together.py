"""Benchmarks set up side by side: who waits for whom, on processes that do nothing."""

import os
import re
import sys
import time
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "examples/benchmarks"
MODULES = ("together", "turns", "jobs")

CHILD = """
import sys, time
sys.path.insert(0, {folder!r})
from turns import MEMORY, TIMING, Turn
kind, record, turn = sys.argv[1], open(sys.argv[2], "a"), Turn(*map(int, sys.argv[4:6]))
def note(word):
    record.write(f"{{kind}} {{word}}\\n")
    record.flush()
turn.wait(MEMORY)
note("set up")
print("a library's words")
if kind == "dies":
    raise ValueError("no such model")
if kind == "hangs":
    time.sleep(60)
time.sleep(0.2 if kind == "slow" else 0)
turn.wait(TIMING)
note("begins")
time.sleep(0.05)
note("ends")
"""


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for name in MODULES:
        sys.modules.pop(name, None)


def job(system="quick", peak=1.0, idle=1.0, limit=20.0):
    from jobs import Job

    return Job("case", system, limit, peak, idle)


def ran(tmp_path, jobs, gib=100.0, at_once=8, seconds=20.0):
    """What the processes noted, in the order in which they did."""
    import together

    record = tmp_path / "record"
    record.touch()
    code = CHILD.format(folder=str(FOLDER))
    together.run(
        jobs,
        lambda job: [sys.executable, "-S", "-c", code, job.system, str(record)],
        os.environ,
        tmp_path,
        gib,
        at_once,
        time.monotonic() + seconds,
    )
    return record.read_text().splitlines()


def test_all_are_set_up_before_the_first_is_timed_and_no_two_are_timed_at_once(tmp_path):
    notes = ran(tmp_path, [job("slow", peak=3), job("quick", peak=2), job("other", peak=1)])
    assert sorted(notes[:3]) == ["other set up", "quick set up", "slow set up"]
    assert notes[3:] == [f"{s} {word}" for s in ("other", "quick", "slow") for word in ("begins", "ends")]


def test_one_that_dies_or_passes_its_limit_is_named_and_the_rest_go_on(tmp_path, capsys):
    notes = ran(tmp_path, [job("dies"), job("hangs", limit=3), job("quick")])
    assert notes[-2:] == ["quick begins", "quick ends"] and len(notes) == 5
    printed = capsys.readouterr().out
    assert re.search("case dies: set-up took . s, status 1", printed)
    assert "    a library's words\n" in printed and "    ValueError: no such model\n" in printed
    assert "case hangs: set-up took 3 s, ended at its limit of 3 s" in printed


def test_nothing_runs_past_the_time_that_is_left(tmp_path, capsys):
    ran(tmp_path, [job("hangs"), job("quick")], at_once=1, seconds=1)
    printed = capsys.readouterr().out
    assert "ended, as no time is left" in printed
    assert "not started, no time is left: case quick" in printed


def test_waves_hold_what_fits_beside_larger_ones_that_wait():
    from together import fits, waves

    long, deep, small = job("long", 64, 5), job("deep", 30, 8), job("small", 20, 4)
    assert fits([small, deep, long], 64) and not fits([small, deep, long], 63)
    assert fits([deep] * 5, 62) and not fits([deep] * 6, 62)
    assert waves([deep] * 7, gib=62, at_once=9) == [[deep] * 5, [deep] * 2]
    assert waves([small] * 5, gib=62, at_once=2) == [[small] * 2, [small] * 2, [small]]
    assert waves([long, small, small], gib=40, at_once=9) == [[long], [small] * 2]


def test_memory_is_given_to_the_largest_that_asks_unless_that_would_bar_the_rest(tmp_path):
    from together import Child, admitted

    def child(state, of):
        return Child(of, None, 0, 0, tmp_path, state)  # pyright: ignore[reportArgumentType]

    long, small = job("long", 64, 5), job("small", 20, 8)
    asks, importing = child("asks", small), child("imports", long)
    assert admitted([asks, importing], gib=100) is asks
    assert admitted([asks, importing], gib=70) is None, "beside a small one the long one would never fit"
    both = [asks, child("asks", long)]
    assert admitted(both, gib=70) is both[1]
    assert admitted([asks, child("set-up", long)], gib=80) is None
    assert admitted([asks, child("ready", long)], gib=80) is asks
    assert admitted([child("asks", long)], gib=10) is not None, "alone it may try"
