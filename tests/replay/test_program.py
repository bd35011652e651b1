"""When a recording serves, and that the results are the program's wherever it does not."""

import threading
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from rewriter.replay.capture import Unrecordable
from rewriter.replay.padding import CutOutput, PaddedInput, Padding, Reading
from rewriter.replay.program import Replayed
from rewriter.replay.room import Limits
from tests.replay.standin import StandInRecorder

WORDS, HIDDEN = 11, 4


def program(length, ids, labels, weight, scale):
    """A loss and hidden states, as a compiled graph takes and returns them."""
    assert ids.shape[1] == length
    hidden = weight[ids] * scale
    logits = hidden @ weight.t()
    return F.cross_entropy(logits.view(-1, WORDS), labels.view(-1)), hidden


class Bench:
    """A replayed program, its weights, and the stand-in that records."""

    def __init__(self, *, padded=True, tokens=4096, long=0, size=0, most=100, run=program):
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(WORDS, HIDDEN))
        self.scale = torch.ones(HIDDEN)
        self.recorder, self.notes = StandInRecorder(size), []
        self.environment, self.reading = self._reading(padded)
        limits = Limits(tokens, most, long)
        self.replayed = Replayed(run, self.reading, limits, self.recorder, self.notes)

    def _reading(self, padded):
        environment = ShapeEnv()
        mode = FakeTensorMode(shape_env=environment)
        context = StatelessSymbolicContext([DimDynamic.STATIC, DimDynamic.DYNAMIC])
        ids = mode.from_tensor(torch.zeros(2, 12, dtype=torch.int64), symbolic_context=context)
        length: Any = ids.shape[1]
        values = (length, ids, ids, mode.from_tensor(self.weight), mode.from_tensor(self.scale))
        inputs = (PaddedInput(1, None), PaddedInput(2, -100))
        padding = Padding(length.node.expr, (0,), inputs, (CutOutput(1, 1, 0),))
        return environment, Reading(values, padding=padding if padded else None)

    def batch(self, length, seed=0):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(WORDS, (2, length), generator=generator)
        return length, ids, ids.clone()

    def __call__(self, length, seed=0):
        return self.replayed(*self.batch(length, seed), self.weight, self.scale)

    def plain(self, length, seed=0):
        """The program itself, on weights of its own."""
        weight = self.weight.detach().clone().requires_grad_()
        return *program(*self.batch(length, seed), weight, self.scale), weight

    def train(self, *lengths):
        """Whole steps, each checked."""
        for length in lengths:
            self.weight.grad = None
            loss, hidden = self(length)
            true, true_hidden, weight = self.plain(length)
            loss.backward()
            true.backward()
            torch.testing.assert_close(loss, true)
            torch.testing.assert_close(hidden, true_hidden)
            torch.testing.assert_close(self.weight.grad, weight.grad)


@pytest.fixture
def bench():
    found = Bench()
    found.train(12, 12)
    return found


def test_lengths_of_one_bucket_share_a_recording_from_the_second_run_on():
    bench = Bench()
    bench.train(12, 20, 64, 5, 70)
    assert [given[0] for given in bench.recorder.recorded] == [64, 128]
    assert bench.recorder.forwards == bench.recorder.backwards == 4
    assert bench.notes[0] == "CUDA graphs: length 64 recorded, 0.00 GiB held in all"


def test_padding_is_the_last_token_and_the_ignored_label(bench):
    bench.train(10)
    _, ids, labels, *_ = bench.recorder.recorded[0]
    true_ids, true_labels = bench.batch(10)[1:]
    assert torch.equal(ids[:, :10], true_ids) and torch.equal(labels[:, :10], true_labels)
    assert torch.equal(ids[:, 10:], true_ids[:, -1:].expand(2, 54)) and (labels[:, 10:] == -100).all()


def test_results_and_gradients_are_the_users_own(bench):
    loss, hidden = bench(12, seed=1)
    loss.backward()
    kept = loss.clone(), hidden.clone(), bench.weight.grad.clone()
    gradient, bench.weight.grad = bench.weight.grad, None
    other, _ = bench(15, seed=2)
    other.backward()
    for value, before in zip((loss, hidden, gradient), kept, strict=True):
        assert torch.equal(value, before)


def test_gradients_accumulate_over_two_batches(bench):
    bench.weight.grad = None
    truth = torch.zeros_like(bench.weight)
    for seed, length in enumerate((12, 17, 70)):
        bench(length, seed)[0].backward()
        loss, _, weight = bench.plain(length, seed)
        loss.backward()
        truth += weight.grad
    torch.testing.assert_close(bench.weight.grad, truth)
    assert bench.recorder.backwards == 4


def test_an_optimizer_that_writes_weights_in_place_is_seen(bench):
    with torch.no_grad():
        bench.weight.mul_(0.5)
    bench.train(12)
    assert len(bench.recorder.recorded) == 1 and bench.recorder.forwards == 2


def test_two_forwards_before_their_backwards_are_both_right(bench):
    bench.weight.grad = None
    first, second = bench(12, 1)[0], bench(30, 2)[0]
    assert bench.recorder.forwards == 2
    (first + second).backward()
    one, _, weight = bench.plain(12, 1)
    one.backward()
    two, _, other = bench.plain(30, 2)
    two.backward()
    torch.testing.assert_close(bench.weight.grad, weight.grad + other.grad)
    bench.train(12)
    assert bench.recorder.forwards == 3


def test_a_forward_whose_results_are_dropped_holds_up_nothing(bench):
    bench(12)
    bench(13)
    assert bench.recorder.forwards == 3
    _, hidden = bench(14)
    bench(15)
    assert bench.recorder.forwards == 4, "while its hidden states live, a backward may come"
    del hidden


def test_without_gradients_the_program_runs(bench):
    with torch.no_grad():
        bench(12)
    with torch.inference_mode():
        bench(12)
    assert bench.recorder.forwards == 1
    bench.train(12)


def test_under_hooks_of_saved_tensors_the_program_runs(bench):
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        bench.train(12)
    assert bench.recorder.forwards == 1
    bench.train(12)
    assert bench.recorder.forwards == 2


def test_a_second_backward_is_an_error(bench):
    loss, _ = bench(12)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r'second backward.*"cuda_graphs": False'):
        loss.backward()


@pytest.mark.parametrize("both", [False, True])
def test_gradients_of_other_results_are_the_programs(bench, both):
    bench.weight.grad = None
    loss, hidden = bench(12, 1)
    true, true_hidden, weight = bench.plain(12, 1)
    (hidden.square().sum() + (loss if both else 0.0)).backward()
    (true_hidden.square().sum() + (true if both else 0.0)).backward()
    torch.testing.assert_close(bench.weight.grad, weight.grad)
    assert bench.recorder.backwards == 1
    bench.train(12)


def test_where_other_results_are_trained_again_and_again_nothing_is_recorded_any_more(bench):
    for _ in range(6):
        bench(12)[1].sum().backward()
    assert bench.recorder.forwards == 5
    assert "gradients of other results than its loss" in bench.notes[-1]
    bench.train(12)


def test_without_a_loss_the_hidden_states_gradients_are_recorded():
    bench = Bench(run=lambda *inputs: (program(*inputs)[1].detach().mean(), program(*inputs)[1]))
    for length in (12, 9, 20):
        bench.weight.grad = None
        factor = torch.randn(2, length, HIDDEN)
        (bench(length)[1] * factor).sum().backward()
        _, hidden, weight = bench.plain(length)
        (hidden * factor).sum().backward()
        torch.testing.assert_close(bench.weight.grad, weight.grad)
    assert bench.recorder.backwards == 2


def test_a_batch_written_before_the_program_has_to_run_again_is_an_error(bench):
    inputs = bench.batch(12)
    _, hidden = bench.replayed(*inputs, bench.weight, bench.scale)
    inputs[1].zero_()
    with pytest.raises(RuntimeError, match="the batch was written in place since"):
        hidden.sum().backward()


def test_gradients_of_other_results_are_an_error_where_dropout_would_be_another():
    bench = Bench()
    bench.reading.draws = True
    bench.train(12, 12)
    with pytest.raises(RuntimeError, match="its dropout would be another"):
        bench(12)[1].sum().backward()


def test_weights_written_between_forward_and_backward_are_an_error(bench):
    loss, _ = bench(12)
    with torch.no_grad():
        bench.weight.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_weights_that_moved_are_recorded_anew_and_at_last_given_up(bench):
    for _ in range(8):
        bench.weight.data = bench.weight.detach().clone()
        bench.train(12)
    assert len(bench.recorder.recorded) == 9
    bench.weight.data = bench.weight.detach().clone()
    bench.train(12)
    assert len(bench.recorder.recorded) == 9
    assert "lie elsewhere in memory" in bench.notes[-1]


def test_recordings_are_made_anew_in_another_turn_of_what_the_program_keeps():
    bench, turns = Bench(), [1, 1, 1, 2, 2, 2]
    limits = Limits(4096, 100)
    bench.replayed = Replayed(
        program, bench.reading, limits, bench.recorder, bench.notes, lambda inputs: (turns.pop(0), ())
    )
    bench.train(12, 12, 12)
    assert len(bench.recorder.recorded) == 1
    bench.train(12, 12, 12)
    assert len(bench.recorder.recorded) == 2 and not turns


def test_where_what_the_program_keeps_is_made_anew_again_and_again_nothing_is_recorded_any_more():
    bench, calls = Bench(), iter(range(1000))
    limits = Limits(4096, 100)
    bench.replayed = Replayed(
        program, bench.reading, limits, bench.recorder, bench.notes, lambda inputs: (next(calls) // 3, ())
    )
    bench.train(*[12] * 40)
    assert len(bench.recorder.recorded) == 9 and "made anew" in bench.notes[-1]


def test_what_a_recording_reads_lives_until_its_backward_and_no_longer():
    bench, kept = Bench(), [torch.ones(2)]
    given = (program, bench.reading, Limits(4096, 100), bench.recorder, bench.notes)
    bench.replayed = Replayed(*given, lambda inputs: (0, list(kept)))
    bench.train(12)
    loss, _ = bench(12)
    read = weakref.ref(kept.pop())
    assert bench.recorder.forwards == 1 and read() is not None
    loss.backward()
    assert read() is None


def test_another_tensor_that_is_no_weight_is_copied_from_then_on(bench):
    kept = [bench.scale]
    for factor in (2.0, 3.0, 4.0):
        bench.scale = torch.full((HIDDEN,), factor)
        kept.append(bench.scale)
        bench.train(12)
    assert len(bench.recorder.recorded) == 2


def test_a_moved_tensor_that_is_copied_is_no_batch_of_tokens():
    def run(length, ids, labels, weight, scale):
        return program(length, ids, labels, weight, scale[0])

    bench = Bench(tokens=256, run=run)
    for _ in range(4):
        bench.scale = torch.ones(64, HIDDEN)
        bench.weight.grad = None
        bench(12)[0].backward()
    assert len(bench.recorder.recorded) == 2 and bench.recorder.forwards == 3


def test_elsewhere_than_where_it_is_ready_the_program_runs(bench):
    bench.recorder.is_ready = False
    bench.train(12, 12)
    assert bench.recorder.forwards == 1


def test_of_two_threads_that_call_at_once_one_has_the_recordings(bench, monkeypatch):
    reclaim, inside, other_is_done = bench.recorder.reclaim, threading.Event(), threading.Event()
    found = []

    def pause(parameters):
        inside.set()
        assert other_is_done.wait(10)
        return reclaim(parameters)

    monkeypatch.setattr(bench.recorder, "reclaim", pause)
    first = threading.Thread(target=lambda: found.append(bench(12, 1)[0]))
    first.start()
    assert inside.wait(10)
    monkeypatch.setattr(bench.recorder, "reclaim", reclaim)
    found.append(bench(12, 2)[0])
    other_is_done.set()
    first.join()
    assert bench.recorder.forwards == 2
    for loss, true in zip(found, (bench.plain(12, seed)[0] for seed in (2, 1)), strict=True):
        torch.testing.assert_close(loss, true)
        loss.backward()


def test_many_tokens_are_not_recorded():
    bench = Bench(tokens=256)
    bench.train(12, 12, 130, 130, 100)
    assert [given[0] for given in bench.recorder.recorded] == [64, 128]


def test_a_first_recording_beyond_the_limit_is_dropped():
    bench = Bench(size=101)
    bench.train(12, 12, 12)
    assert bench.recorder.forwards == 0 and "they would hold more than" in bench.notes[-1]


def test_beyond_the_limit_no_further_size_is_recorded():
    bench = Bench(size=60)
    bench.train(12, 12, 70, 150, 12, 70)
    assert [given[0] for given in bench.recorder.recorded] == [64, 128]
    assert bench.recorder.forwards == 4 and "no further size" in bench.notes[-1]


@pytest.mark.parametrize("error", [Unrecordable("it returns a size"), torch.OutOfMemoryError("no memory")])
def test_what_cannot_be_recorded_runs_as_compiled_and_says_why(monkeypatch, error):
    bench = Bench()

    def refuse(*_):
        raise error

    monkeypatch.setattr(bench.recorder, "record", refuse)
    bench.train(12, 12, 12)
    assert str(error) in bench.notes[-1]


def test_a_length_that_the_graph_does_not_admit_is_recorded_as_it_is_once_it_comes_back():
    bench = Bench()
    length = bench.reading.values[0]
    assert bool(length < 60)
    bench.train(12, 12, 12, 9, 9, 12, 12, 9)
    assert [given[0] for given in bench.recorder.recorded] == [12]
    assert bench.recorder.forwards == 2


def test_without_padding_sizes_that_come_back_are_recorded():
    bench = Bench(padded=False)
    bench.train(12, 13, 12, 12, 12, 13, 12)
    assert [given[0] for given in bench.recorder.recorded] == [12]
    assert bench.recorder.forwards == 2
