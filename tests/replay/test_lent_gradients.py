"""What users do with gradients that are lent: they see what they would of the program itself."""

import threading

import pytest
import torch
from torch import nn

from rewriter.replay import side_streams
from tests.replay.test_program import Bench, program


@pytest.fixture
def bench():
    found = Bench()
    found.train(12, 12)
    return found


def gradient(bench, seed):
    """Of a step, which leaves it with the parameter."""
    bench.weight.grad = None
    bench(12, seed)[0].backward()
    assert bench.weight.grad is not None
    return bench.weight.grad


def assert_same(bench, loop):
    """``loop`` finds the same where steps are replayed; it gets a parameter, and what runs a step."""
    twin = nn.Parameter(bench.weight.detach().clone())
    bench.weight.grad = None
    steps = iter(range(100)), iter(range(100))

    def step():
        seed = next(steps[0])
        bench(12 + seed % 3, seed)[0].backward()

    def true_step():
        seed = next(steps[1])
        length, ids, labels = bench.batch(12 + seed % 3, seed)
        program(length, ids, labels, twin, bench.scale)[0].backward()

    ours, true = loop(bench.weight, step), loop(twin, true_step)
    assert len(ours) > 1
    torch.testing.assert_close(ours, true)
    torch.testing.assert_close(bench.weight, twin)


def test_gradients_that_are_dropped_after_each_step_are_lent_not_copied(bench):
    assert len({gradient(bench, seed).data_ptr() for seed in range(3)}) == 1
    assert bench.recorder.forwards == 4


def test_a_gradient_that_a_parameter_still_has_becomes_its_own(bench):
    first = gradient(bench, 1).clone()
    bench(12, 2)
    torch.testing.assert_close(bench.weight.grad, first, rtol=0.0, atol=0.0)
    assert bench.recorder.forwards == 3
    gradient(bench, 3)
    bench(12, 4)
    assert bench.recorder.forwards == 5, "copied from then on"


def test_while_a_gradient_is_held_elsewhere_the_program_runs_and_the_report_says_why(bench):
    held = gradient(bench, 1)
    before = held.clone()
    bench.train(12)
    assert torch.equal(held, before) and bench.recorder.forwards == 2
    bench.train(12)
    assert sum("while gradients are held elsewhere" in note for note in bench.notes) == 1
    bench.weight.grad = held = None
    bench.train(12)
    assert bench.recorder.forwards == 3


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("steps", [1, 3])
def test_an_optimizer_of_many_tensors_at_once_and_clipping(bench, to_none, steps):
    def loop(parameter, step):
        optimizer = torch.optim.AdamW([parameter], lr=0.1, foreach=True)
        found = []
        for _ in range(3):
            for _ in range(steps):
                step()
            found.append(nn.utils.clip_grad_norm_([parameter], 0.01, foreach=True))
            optimizer.step()
            optimizer.zero_grad(set_to_none=to_none)
        return found

    assert_same(bench, loop)
    assert bench.recorder.forwards == 1 + 3 * steps, "all are replayed"


@pytest.mark.parametrize("hold", [lambda g: g, lambda g: g.detach(), lambda g: g[0]])
@pytest.mark.parametrize("to_none", [True, False])
def test_gradients_that_are_kept_from_step_to_step_are_what_they_would_be(bench, hold, to_none):
    """Of a parameter's gradient that stays, they are the sums of all steps; of others, of one."""

    def loop(parameter, step):
        found = []
        for _ in range(4):
            step()
            found.append(hold(parameter.grad))
            if to_none:
                parameter.grad = None
        return found

    assert_same(bench, loop)


def test_a_gradient_that_is_taken_once_shows_each_step_while_it_is_zeroed_in_place(bench):
    def loop(parameter, step):
        step()
        held = parameter.grad
        found = []
        for _ in range(3):
            held.zero_()
            step()
            found.append(held.clone())
        return found

    assert_same(bench, loop)


def test_a_hook_may_update_the_weight_and_drop_the_gradient(bench):
    def loop(parameter, step):
        found = []

        def update(parameter):
            found.append(parameter.grad.norm())
            parameter.data.sub_(parameter.grad)
            parameter.grad = None

        parameter.register_post_accumulate_grad_hook(update)
        for _ in range(3):
            step()
        return found

    assert_same(bench, loop)
    assert bench.recorder.forwards == 4


def test_a_hook_may_keep_what_it_is_given_and_return_another(bench):
    def loop(parameter, step):
        found = []

        def keep(gradient):
            found.append(gradient)
            return gradient * 2

        parameter.register_hook(keep)
        for _ in range(3):
            step()
            found.append(parameter.grad.clone())
        return found

    assert_same(bench, loop)


@pytest.mark.parametrize("drop", [True, False])
def test_another_thread_may_read_a_gradient_while_the_next_step_runs(bench, drop):
    true = gradient(bench, 1).clone()
    has_it, may_read = threading.Event(), threading.Event()
    found = []

    def read():
        held = bench.weight.grad
        has_it.set()
        assert may_read.wait(10)
        found.append(held.clone())

    reader = threading.Thread(target=read)
    reader.start()
    assert has_it.wait(10)
    if drop:
        bench.weight.grad = None
    loss, _ = bench(12, 2)
    may_read.set()
    reader.join()
    loss.backward()
    torch.testing.assert_close(found[0], true, rtol=0.0, atol=0.0)


@pytest.fixture
def hearing(monkeypatch):
    """``record_stream`` for tensors on a CPU, which have none; it tells as it does of others."""
    monkeypatch.setattr(side_streams, "_listen_on_gpus", lambda: None)
    calls = []
    library = torch.library.Library("aten", "IMPL")
    library.impl("record_stream", lambda tensor, stream: calls.append(stream), "CPU")
    telling = side_streams.telling("CPU")
    yield calls
    telling._destroy()
    library._destroy()


def drop_gradient(parameter, stream):
    parameter.grad.record_stream(stream)
    parameter.grad = None


def after_the_backward(parameter, stream, run):
    run()
    drop_gradient(parameter, stream)


def in_a_hook_after_accumulation(parameter, stream, run):
    parameter.register_post_accumulate_grad_hook(lambda p: drop_gradient(p, stream))
    run()


def in_a_hook_of_the_tensor(parameter, stream, run):
    parameter.register_hook(lambda gradient: gradient.record_stream(stream))
    run()
    parameter.grad = None


def in_a_hook_of_autograds_node(parameter, stream, run):
    node = parameter.view_as(parameter).grad_fn.next_functions[0][0]
    node.register_hook(lambda *_: drop_gradient(parameter, stream))
    run()
    del node


def of_a_view(parameter, stream, run):
    run()
    parameter.grad.detach()[1:].record_stream(stream)
    parameter.grad = None


def where_nothing_is_differentiated(parameter, stream, run):
    run()
    with torch.inference_mode():
        drop_gradient(parameter, stream)


@pytest.mark.parametrize(
    "use",
    [
        after_the_backward,
        in_a_hook_after_accumulation,
        in_a_hook_of_the_tensor,
        in_a_hook_of_autograds_node,
        of_a_view,
        where_nothing_is_differentiated,
    ],
)
def test_the_next_step_waits_for_a_stream_that_a_dropped_gradient_was_used_on(bench, hearing, use):
    """Whenever the user began to do so: the recording is there already."""
    side_streams.listen(bench.recorder.lender)
    stream = torch.Stream("cpu")
    bench.weight.grad = None
    loss, _ = bench(12, 1)
    assert not bench.recorder.waited
    use(bench.weight, stream, loss.backward)
    assert hearing == [stream], "the allocator is told as ever"
    assert not bench.recorder.waited
    bench(12, 2)
    assert bench.recorder.waited == {stream} and bench.recorder.forwards == 3


def test_streams_of_other_tensors_are_not_waited_for(bench, hearing):
    side_streams.listen(bench.recorder.lender)
    loss, hidden = bench(12, 1)
    hidden.detach().record_stream(torch.Stream("cpu"))
    loss.backward()
    del loss, hidden
    bench.weight.grad = None
    bench(12, 2)
    assert hearing and not bench.recorder.waited


def test_who_listens_is_not_kept_alive(hearing):
    class Ear:
        def used_on(self, tensor, stream):
            heard.append(stream)

    heard, stream, ear = [], torch.Stream("cpu"), Ear()
    side_streams.listen(ear)
    torch.ones(2).record_stream(stream)
    del ear
    torch.ones(2).record_stream(stream)
    assert heard == [stream] and hearing == [stream] * 2
