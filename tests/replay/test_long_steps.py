"""Which steps beyond the launch-bound ones are recorded, and that the memory of others is left to them."""

import pytest
import torch

from rewriter.replay import sightings
from rewriter.replay.capture import NoRoom
from rewriter.replay.program import Replayed
from rewriter.replay.room import Limits
from tests.replay.test_program import Bench, program

SHORT, LONG = 256, 2048


def long_bench(*, labels=(), free=2**40, **given):
    """One that records up to 128 tokens a row as short steps, up to 1024 as long ones."""
    bench = Bench(tokens=SHORT, long=LONG, **given)
    bench.reading.labels = labels
    bench.recorder.free = free
    return bench


def lengths(bench):
    return [given[0] for given in bench.recorder.recorded]


def test_a_long_step_is_recorded_at_the_third_of_its_size_in_a_row():
    bench = long_bench()
    bench.train(512, 512)
    assert not bench.recorder.recorded
    bench.train(512, 512)
    assert lengths(bench) == [512] and bench.recorder.forwards == 2


def test_long_lengths_that_vary_are_recorded_once_they_are_frequent(monkeypatch):
    monkeypatch.setattr(sightings, "_FREQUENT", 4)
    bench = long_bench()
    bench.train(*(400, 600) * 3)
    assert not bench.recorder.recorded
    bench.train(400, 600)
    assert lengths(bench) == [400, 608]


def test_long_steps_are_padded_by_less_than_a_thirty_second():
    bench = long_bench()
    bench.train(500, 501, 502, 503)
    assert lengths(bench) == [504]


def test_beyond_the_limit_nothing_is_recorded():
    bench = long_bench()
    bench.train(1040, 1040, 1040, 1040)
    assert not bench.recorder.recorded


def test_short_steps_are_recorded_as_without_long_ones():
    bench = long_bench()
    bench.train(512, 12, 512, 12, 100, 512)
    assert lengths(bench) == [64, 128]


def test_a_size_that_is_fixed_is_recorded_at_its_third_step():
    bench = long_bench(padded=False)
    bench.train(512, 512, 512, 512)
    assert lengths(bench) == [512] and bench.recorder.forwards == 2


def test_a_long_step_with_few_labels_is_left_to_the_program_which_leaves_rows_out():
    bench = long_bench(labels=((2, -100),))
    batch = bench.batch

    def masked(length, seed=0):
        length, ids, labels = batch(length, seed)
        labels[:, : length // 2] = -100
        return length, ids, labels

    bench.batch = masked
    bench.train(512, 512, 512, 512)
    assert not bench.recorder.recorded
    assert bench.notes == ["CUDA graphs: 1024 tokens not recorded, 50% of them have no label"]
    bench.batch = batch
    bench.train(640, 640, 640)
    assert lengths(bench) == [640]


@pytest.mark.parametrize(
    ("size", "free", "reason"),
    [
        (2**20 + 1, 2**30, "1.00 MiB to hold, more than 1.00 MiB"),
        (2**20, 2**21, "1.00 MiB for steps as compiled, 2.00 MiB are free"),
    ],
)
def test_a_recording_that_would_take_the_memory_of_other_steps_is_not_made(size, free, reason):
    bench = long_bench(size=size, most=2**20, free=free)
    bench.train(512, 512, 512, 512)
    assert bench.recorder.forwards == 0
    assert "steps of 1024 tokens or more are not recorded" in bench.notes[0] and reason in bench.notes[0]
    bench.train(640, 640, 640)
    assert len(bench.notes) == 1, "larger ones are not tried"


def test_the_largest_step_that_was_seen_has_to_fit_beside_a_recording():
    bench = long_bench(size=2**20, most=2**20, free=2**22)
    bench.train(2000, 512, 512, 512)
    assert not bench.recorder.forwards and "not recorded" in bench.notes[0]
    bench = long_bench(size=2**20, most=2**20, free=2**22)
    bench.train(512, 512, 512)
    assert bench.recorder.forwards == 1


def test_recordings_are_given_up_for_a_step_that_needs_their_memory():
    bench = long_bench(size=2**20, most=2**20, free=2**23)
    bench.train(512, 512, 512, 2000)
    assert bench.recorder.bytes() == 2**20, "four times the activations fit beside it"
    bench.train(8192, 512)
    assert bench.recorder.bytes() == 0 and "are needed for 16384 tokens" in bench.notes[-1]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), NoRoom("of no room")])
def test_memory_that_runs_out_for_a_long_step_leaves_short_ones_recorded(monkeypatch, error):
    bench = long_bench()
    bench.train(12, 12, 12)
    record = bench.recorder.record

    def refuse(program, inputs, *rest):
        if inputs[0] > 128:
            raise error
        return record(program, inputs, *rest)

    monkeypatch.setattr(bench.recorder, "record", refuse)
    bench.train(512, 512, 512, 512)
    assert "steps of 1024 tokens or more are not recorded" in bench.notes[-1]
    before = bench.recorder.forwards
    bench.train(12, 12)
    assert bench.recorder.forwards == before + 2


def test_they_are_given_up_for_a_step_that_a_budget_has_no_room_for_beside_them():
    bench = Bench(size=2**20, most=2**20)
    limits = Limits(4096, 2**20, free=2**23)
    bench.replayed = Replayed(program, bench.reading, limits, bench.recorder, bench.notes)
    bench.train(512, 512)
    assert bench.recorder.bytes() == 2**20
    bench.train(8192)
    assert bench.recorder.bytes() == 0 and "are needed for 16384 tokens" in bench.notes[-1]
