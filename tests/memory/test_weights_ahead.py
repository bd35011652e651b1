"""Layers' weights from host memory: there when they are read, copied meanwhile, let go after the step."""

from contextlib import nullcontext
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from rewriter.foresee.question import Question
from rewriter.huggingface import prepare
from rewriter.memory.arena import HostArena
from rewriter.memory.in_host import packed_weights
from rewriter.memory.machine import H200
from rewriter.memory.streams import InOrder
from rewriter.memory.transfer import Transfers
from rewriter.memory.weights_ahead import WeightsAhead, buffer_bytes
from tests.families import batch, build
from tests.memory.budgeted import assert_near, compiled, last_plan, short_tiles, steps

CPU = torch.device("cpu")
NAMES = ("q", "up")


def layers_of(count: int, size: int = 600) -> list[list[torch.Tensor]]:
    return [[torch.randint(256, (n, 1), dtype=torch.uint8) for n in (size + i, 77)] for i in range(count)]


def ahead(streams=None) -> WeightsAhead:
    return WeightsAhead(CPU, streams or InOrder(), poison=True)


def run(weights: WeightsAhead, layer, backward: bool = False, returns: bool = True) -> None:
    here = dict(zip(NAMES, layer, strict=True))
    with weights.on_device(here, NAMES, backward=backward, returns=returns and not backward):
        for name, expected in zip(NAMES, layer, strict=True):
            assert torch.equal(here[name], expected) and here[name].data_ptr() != expected.data_ptr()


def step(weights: WeightsAhead, layers) -> None:
    weights.begin(layers)
    for layer in layers:
        run(weights, layer)
    for layer in reversed(layers):
        run(weights, layer, backward=True)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_each_layer_is_copied_once_a_direction_and_those_at_the_turn_once_in_all(count):
    weights, layers = ahead(), layers_of(count)
    for number in (1, 2):
        step(weights, layers)
        both = sum(w.nbytes for layer in layers for w in layer) * 2
        turn = sum(w.nbytes for layer in layers[-2:] for w in layer)
        assert weights.bytes_in == number * (both - turn)
        assert weights.late == number and not weights._buffers


def test_what_is_written_between_steps_is_read():
    weights, layers = ahead(), layers_of(3)
    weights.begin(layers)
    run(weights, layers[0])
    for tensor in [w for layer in layers for w in layer]:
        tensor.add_(1)
    step(weights, layers)


def test_a_forward_without_a_backward_lets_go_at_its_end():
    weights, layers = ahead(), layers_of(3)
    weights.begin(layers)
    for number, layer in enumerate(layers):
        run(weights, layer, returns=False)
        assert len(weights._buffers) == (0 if number == 2 else 2)


@pytest.mark.parametrize("frozen", [(0,), (0, 1), (2,), (0, 2, 3)])
def test_layers_without_a_backward_are_not_waited_for(frozen):
    weights, layers = ahead(), layers_of(5)
    for _ in range(2):
        weights.begin(layers)
        for number, layer in enumerate(layers):
            run(weights, layer, returns=number not in frozen)
        copied, late = weights.bytes_in, weights.late
        trained = [number for number in range(5) if number not in frozen]
        for number in reversed(trained):
            run(weights, layers[number], backward=True)
        assert not weights._buffers and weights.late == late
        # The last two that ran are there.
        again = [w for number in trained if number < 3 for w in layers[number]]
        assert weights.bytes_in - copied == sum(w.nbytes for w in again)


def test_a_layer_that_had_no_backward_may_have_one_in_the_next_step():
    weights, layers = ahead(), layers_of(3)
    weights.begin(layers)
    for layer in layers:
        run(weights, layer, returns=False)
    assert not weights._buffers
    step(weights, layers)
    assert weights.late == 2 and not weights._buffers


def test_two_programs_may_take_turns():
    weights, ours, theirs = ahead(), layers_of(3), layers_of(4, size=900)
    for layers in (ours, theirs):
        weights.begin(layers)
        for layer in layers:
            run(weights, layer)
    for layers in (theirs, ours):
        for layer in reversed(layers):
            run(weights, layer, backward=True)
    assert not weights._buffers and weights.late <= 4


def test_a_layer_that_nobody_foresaw_has_its_weights_when_it_asks():
    weights, layers = ahead(), layers_of(2)
    for layer in (*layers, *reversed(layers)):
        run(weights, layer, backward=layer is layers[0])
    weights.begin(layers)
    del layers[1]
    run(weights, layers[0])
    assert weights._following(layers[0], backward=False) == []


def test_where_the_second_buffer_finds_no_memory_a_copy_begins_at_its_use():
    weights, layers = ahead(), layers_of(4)
    make, room = WeightsAhead._empty, [True]

    def one(self, size):
        if not room:
            raise torch.OutOfMemoryError("no memory, as the test wants it")
        room.pop()
        return make(self, size)

    with patch.object(WeightsAhead, "_empty", one):
        weights.begin(layers)
        with pytest.raises(torch.OutOfMemoryError):
            for layer in layers:
                run(weights, layer)
    step(weights, layers)


def test_a_layer_whose_own_weights_find_no_memory_leaves_nothing_behind():
    streams, layers = _Streams(), layers_of(3)
    larger = layers_of(2, size=5000)
    weights = WeightsAhead(CPU, streams)
    weights.begin(layers)
    run(weights, layers[0])
    assert len(weights._buffers) == 2
    with (
        patch.object(WeightsAhead, "_empty", side_effect=torch.OutOfMemoryError("as the test wants it")),
        pytest.raises(torch.OutOfMemoryError),
    ):
        run(weights, larger[0])
    assert not weights._buffers and streams.log[-1] == ("compute", "waits for all of", "back")
    step(weights, larger)


def test_a_layer_that_fails_lets_go_once_what_is_being_copied_has_arrived():
    streams, layers = _Streams(), layers_of(3)
    weights = WeightsAhead(CPU, streams)
    weights.begin(layers)
    here: dict[str, torch.Tensor] = dict(zip(NAMES, layers[0], strict=True))
    with pytest.raises(torch.OutOfMemoryError), weights.on_device(here, NAMES, backward=False):
        raise torch.OutOfMemoryError("no memory, as the test wants it")
    assert not weights._buffers and streams.log[-1] == ("compute", "waits for all of", "back")
    step(weights, layers)


class _Stream:
    """Writes down what it is told to wait for, and when it records."""

    def __init__(self, name: str, log: list):
        self.name, self.log = name, log

    def wait_event(self, event) -> None:
        self.log.append((self.name, "waits for", event))

    def wait_stream(self, stream) -> None:
        self.log.append((self.name, "waits for all of", stream.name))

    def record_event(self) -> int:
        self.log.append((self.name, "records", len(self.log)))
        return len(self.log) - 1


class _Streams(InOrder):
    def __init__(self):
        self.log: list = []
        self.computing, self.back = _Stream("compute", self.log), _Stream("back", self.log)

    def compute(self):
        return self.computing

    def on(self, stream):
        self.log.append((stream.name, "copies", ""))
        return nullcontext()


def test_copies_wait_for_what_was_computed_and_a_layer_for_its_copies():
    streams = _Streams()
    weights, layers = WeightsAhead(CPU, streams), layers_of(3)
    weights.begin(layers)
    arrived = []
    for number, layer in enumerate(layers):
        before = len(streams.log)
        run(weights, layer)
        said = streams.log[before:]
        copied = [i for i, (_, what, _) in enumerate(said) if what == "copies"]
        assert all(said[i - 1] == ("back", "waits for all of", "compute") for i in copied)
        assert all(said[i + 1][:2] == ("back", "records") for i in copied)
        arrived += [said[i + 1][2] for i in copied]
        waited = [event for name, what, event in said if (name, what) == ("compute", "waits for")]
        # Not for the copy of the next one, which is still under way.
        assert waited == [arrived[number]]


def test_a_buffer_has_each_weight_at_an_aligned_address():
    assert buffer_bytes([1, 512, 513]) == 512 * 4


@pytest.fixture
def _tiles(monkeypatch):
    yield from short_tiles(monkeypatch)


def model_of(**settings):
    model = build("llama", layers=3, lora=True, nf4=True, **settings)
    # Then one class of layers: the first is as the others.
    model.get_input_embeddings().weight.requires_grad_(True)
    prepare(model, host="layers")
    return model


def test_a_model_trains_the_same_whose_weights_come_a_layer_ahead(_tiles):
    given = [batch(rows=2, length=24)] * 2
    transfers = Transfers(HostArena(64 << 20, pin=False, growth=1 << 20), "cpu", poison=True)
    with (
        patch("rewriter.memory.planned.packed_in_host_memory", lambda program, _: packed_weights(program)),
        patch("rewriter.memory.planned.transfers_of", lambda *_: transfers),
        patch("rewriter.memory.under_budget.machine_for", lambda _: replace(H200, to_device=2e9)),
    ):
        model = compiled(model_of(), "1GB")
        ours = steps(model, given)
    assert_near(ours, steps(model_of(), given), 1e-5)
    ways = [way for _, way, _ in last_plan().ways]
    assert sum(way.endswith("weights a layer ahead") for way in ways) == 1, ways
    packed = [w for n, w in model.state_dict().items() if n.endswith("proj.base_layer.weight")]
    assert transfers.weights.bytes_in >= len(given) * sum(w.nbytes for w in packed) > 0
    assert transfers.weights.late == len(given)
    assert not transfers.weights._buffers and transfers.arena.in_use == 0


def test_what_is_foreseen_of_it_is_time_and_room_for_two_layers(_tiles):
    question = Question(
        build("llama", layers=2).config,
        4,
        "nf4",
        torch.bfloat16,
        torch.bfloat16,
        1,
        2**33,
        2**33,
        H200,
        ["layers"],
    )
    problems, notes = question.problems(512)
    over_the_bus, a_layer_ahead, *_ = problems
    assert not notes and over_the_bus.window == 0 < a_layer_ahead.window
    for slow, fast in zip(over_the_bus.parts, a_layer_ahead.parts, strict=True):
        kept, *waiting = slow.choices
        if not waiting:
            continue
        assert kept.name.endswith("weights over the bus")
        pairs = [(a, b) for a, b in zip(waiting, fast.choices[1:], strict=True)]
        assert all(b.name.endswith("weights a layer ahead") for _, b in pairs)
        assert all(b.forward_seconds < a.forward_seconds for a, b in pairs)
        assert all(b.backward_seconds < a.backward_seconds for a, b in pairs)
        assert all(b.reload_seconds > a.reload_seconds for a, b in pairs)
