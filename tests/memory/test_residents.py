"""Weights that stay dequantised on a device: made once, seen to be current, handed over and given up."""

import gc
import threading
import weakref
from contextlib import suppress

import pytest
import torch

from rewriter.kernels.resident_rooms import Rooms
from rewriter.kernels.resident_weight import Form
from rewriter.memory.residents import Residents, Wanted
from rewriter.memory.shelf import Kept, Shelf
from rewriter.replay.capture import uncollected


class Doubled:
    """A weight whose dequantisation is twice its numbers."""

    def __init__(self, form):
        self.form = form

    def packed(self, inputs):
        return inputs[0]


def made(form, packed, matrix):
    whole = packed.new_zeros(form.shape(tuple(packed.shape)))
    whole[: packed.shape[0], : packed.shape[1]] = 2 * packed
    if matrix is not None:
        form.place(whole).copy_(matrix)
    return whole


@pytest.fixture
def doubled(monkeypatch):
    monkeypatch.setattr(Form, "made", made)
    return Doubled(Form(torch.float32))


@pytest.fixture
def beside(doubled):
    """With room for an adapter's matrix."""
    return Doubled(Form(torch.float32, dim=1, room=4, rank=2, scale=2.0))


@pytest.fixture
def shelf():
    return Shelf(torch.device("cpu"))


def of(source, *places):
    """What a program wants that has those of the inputs."""
    return [Wanted(source, (place,), None) for place in places]


def test_programs_that_alternate_share_what_is_the_same_and_keep_the_rest_where_there_is_room(shelf, doubled):
    inputs = [torch.ones(8, 4), torch.ones(4, 4), torch.ones(2, 4)]
    # Beside the first, there is room for what the second alone has, and the other way round.
    first = Residents(of(doubled, 0, 1), shelf, room=2 * 4 * 4)
    second = Residents(of(doubled, 1, 2), shelf, room=8 * 4 * 4)
    found = []
    for _ in range(3):
        (turn, ours), (other_turn, others) = first.settle(inputs), second.settle(inputs)
        found.append((turn, other_turn, [whole.data_ptr() for whole in (*ours, *others)]))
    assert found[0] == found[1] == found[2] and len(set(found[0][2])) == 3
    assert shelf.nbytes == (8 + 4 + 2) * 4 * 4 and shelf.changes == 3


def test_what_does_not_fit_beside_another_program_is_all_that_is_made_again(shelf, doubled):
    inputs = [torch.ones(4, 4) for _ in range(4)]
    # Each has two of 64 bytes, and room for one more.
    first, second = (Residents(of(doubled, *some), shelf, room=64) for some in ((0, 1), (2, 3)))
    (turn, _), _ = first.settle(inputs), second.settle(inputs)
    assert shelf.nbytes == 3 * 64
    # A recording of the first would read what is gone.
    changes, (again, wholes) = shelf.changes, first.settle(inputs)
    assert again > turn and shelf.nbytes == 3 * 64 and shelf.changes == changes + 2
    assert all(whole.eq(2).all() for whole in wholes)


def test_they_go_where_a_program_without_any_needs_their_room_and_with_the_last_that_has_them(shelf, doubled):
    inputs = [torch.ones(8, 4), torch.ones(4, 4), torch.ones(2, 4)]
    first, second = Residents(of(doubled, 0, 1), shelf, 1000), Residents(of(doubled, 1, 2), shelf, 1000)
    first.settle(inputs)
    second.settle(inputs)
    Residents([], shelf, room=shelf.nbytes).given(inputs)
    assert len(shelf.kept) == 3
    # The first was not asked for as late as the second.
    Residents([], shelf, room=shelf.nbytes - 1).given(inputs)
    assert shelf.nbytes == (4 + 2) * 4 * 4
    first.settle(inputs)
    del first
    assert shelf.nbytes == (4 + 2) * 4 * 4
    del second
    assert not shelf.kept and not shelf.nbytes


def test_one_goes_with_its_packed_weight_while_the_program_is_there(shelf, doubled):
    inputs = [torch.ones(8, 4), torch.ones(4, 4)]
    one = Residents(of(doubled, 0, 1), shelf)
    made = weakref.ref(one.given(inputs)[0])
    del inputs[0]
    assert made() is None and shelf.nbytes == 4 * 4 * 4
    # What one program has of two models stays, as of one whose weights were moved it does not.
    other = [torch.ones(8, 4), inputs[0]]
    one.given(other)
    address = other[0].data_ptr()
    other[0].data = torch.full((8, 4), 3.0)
    assert other[0].data_ptr() != address and one.given(other)[0].eq(6).all() and len(shelf.kept) == 2


def test_after_making_one_failed_the_next_call_has_the_right_ones(shelf, doubled, monkeypatch):
    inputs = [torch.ones(4, 4), torch.ones(4, 4)]
    one = Residents(of(doubled, 0, 1), shelf)
    one.given(inputs)
    for tensor in inputs:
        tensor.add_(1)

    def failing(form, packed, matrix):
        if packed is inputs[1]:
            raise torch.OutOfMemoryError("no memory, as the test wants it")
        return made(form, packed, matrix)

    with monkeypatch.context() as patch:
        patch.setattr(Form, "made", failing)
        with pytest.raises(torch.OutOfMemoryError):
            one.given(inputs)
    assert all(whole.eq(4).all() for whole in one.given(inputs))


def test_a_change_of_a_weight_is_seen_and_a_backward_that_waits_for_the_old_one_refused(shelf, doubled):
    weight = torch.ones(2, 2)
    one = Residents([Wanted(doubled, (0,), None)], shelf)
    x = torch.ones(2, 2, requires_grad=True)
    loss = (x @ one.given([weight])[0]).sum()
    one.given([weight])
    weight.add_(1)
    assert one.given([weight])[0].eq(4).all() and one.turn == 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    other = torch.full((2, 2), 3.0)
    assert one.given([other])[0].eq(6).all() and one.turn == 2


def test_two_adapters_of_one_weight_do_not_write_over_each_other(shelf, beside):
    weight = torch.ones(3, 5)
    first, second = (torch.full((3, 2), value, requires_grad=True) for value in (1.0, 3.0))
    both = Residents([Wanted(beside, (0,), 1), Wanted(beside, (0,), 2)], shelf)
    wholes = both.given([weight, first, second])
    assert [whole[0, 5].item() for whole in wholes] == [2, 6]
    # As two programs, one forward before the other's backward.
    one, other = (Residents([Wanted(beside, (0,), 1)], shelf) for _ in range(2))
    x = torch.ones(2, 9, requires_grad=True)
    loss = (x @ one.given([weight, first])[0].t()).sum()
    (x @ other.given([weight, second])[0].t()).sum().backward()
    x.grad = None
    loss.backward()
    assert x.grad is not None and x.grad[0].tolist() == [6.0] * 7 + [0.0] * 2


@pytest.mark.parametrize("optimizer", [{"fused": True}, {"foreach": True}], ids=["fused", "foreach"])
def test_what_an_optimizer_writes_is_read_whether_it_counts_its_writes_or_not(shelf, beside, optimizer):
    weight, matrix = torch.ones(3, 5), torch.nn.Parameter(torch.ones(3, 2))
    one = Residents([Wanted(beside, (0,), 1)], shelf)
    update = torch.optim.AdamW([matrix], lr=0.5, **optimizer)
    for _ in range(2):
        (whole,) = one.given([weight, matrix])
        assert torch.equal(whole[:, 5:7], 2 * matrix)
        matrix.grad = torch.ones_like(matrix)
        update.step()
    assert not torch.equal(whole[:, 5:7], 2 * matrix)


def test_a_matrix_given_as_another_tensor_of_its_memory_is_no_change_and_a_written_one_is(shelf, beside):
    weight, matrix = torch.ones(3, 5), torch.ones(3, 2, requires_grad=True)
    one = Residents([Wanted(beside, (0,), 1)], shelf)
    (whole,) = one.given([weight, matrix])
    version = whole._version
    # So does who records a program.
    one.given([weight, matrix.detach().requires_grad_()])
    assert whole._version == version
    with torch.no_grad():
        matrix.mul_(4)
    assert one.given([weight, matrix])[0] is whole and whole[0, 5] == 8 and whole._version > version


def test_a_weight_of_another_shape_where_one_was_is_made_anew(shelf, doubled):
    memory = torch.ones(48)
    one, other = (Residents([Wanted(doubled, (0,), None)], shelf) for _ in range(2))
    inputs = [memory.view(8, 6)]
    turn, (whole,) = one.settle(inputs)
    assert other.given([memory.view(6, 8)])[0].shape == (6, 8)
    assert one.settle(inputs)[0] > turn and one.given(inputs)[0].shape == whole.shape


class Cycle:
    """Holds something until garbage is collected."""

    def __init__(self, held):
        self.me, self.held = self, held


def test_a_weight_stays_where_a_tensor_that_had_its_memory_is_collected_while_others_are_made(shelf, beside):
    class Collecting(Doubled):
        def packed(self, inputs):
            gc.collect()
            return inputs[0]

    data, other, matrices = torch.ones(3, 5), torch.ones(3, 5), [torch.ones(3, 2), torch.ones(3, 2)]
    wanted = [Wanted(beside, (0,), 2), Wanted(Collecting(beside.form), (1,), 3)]
    one = Residents(wanted, shelf)
    one.given([data, other, *matrices])
    inputs = [data.detach(), other.add_(1), *matrices]
    with uncollected():
        Cycle(data)
        del data
        turn, _ = one.settle(inputs)
    assert turn == 1 and len(shelf.kept) == 2
    # What was lost unseen would be made anew here, and its matrix never written again.
    other.add_(1)
    one.given(inputs)
    matrices[0].mul_(5)
    assert one.given(inputs)[0][0, 5] == 10


def test_a_weight_stays_where_another_program_is_collected_just_as_it_is_there(shelf, doubled, monkeypatch):
    put = Shelf.put

    def collecting(self, key, kept):
        put(self, key, kept)
        gc.collect()

    monkeypatch.setattr(Shelf, "put", collecting)
    one, inputs = Residents(of(doubled, 0), shelf), [torch.ones(4, 4)]
    with uncollected():
        Cycle(Residents([], shelf))
        one.given(inputs)
    assert shelf.nbytes == 4 * 4 * 4


def test_threads_that_ask_at_once_have_one_weight(shelf, beside):
    both, asked = threading.Barrier(2), []

    class Slow(Doubled):
        def packed(self, inputs):
            asked.append(threading.get_ident())
            with suppress(threading.BrokenBarrierError):
                both.wait(0.2)
            return inputs[0]

    inputs = [torch.ones(3, 5), torch.ones(3, 2)]
    one = Residents([Wanted(Slow(beside.form), (0,), 1)], shelf)
    threads = [threading.Thread(target=one.given, args=(inputs,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(asked) == 1 and one.turn == 1


def test_what_runs_on_another_stream_comes_after_those_before_and_holds_the_memory(
    shelf, doubled, monkeypatch
):
    inputs, used = [torch.ones(8, 4), torch.ones(4, 4)], []
    stream: list[str | None] = ["first"]
    monkeypatch.setattr(shelf, "stream", lambda: stream[0])
    monkeypatch.setattr(Kept, "used_on", lambda kept, stream: used.append((kept.whole.shape[0], stream)))
    monkeypatch.setattr(Rooms, "used_on", lambda _, stream: used.append(("rooms", stream)))
    one, other = (Residents(of(doubled, *places), shelf, room=1 << 10) for places in ((0, 1), (0,)))
    for program in (one, other, one):
        program.given(inputs)
    rooms = ("rooms", "first")
    assert used == [(8, "first"), (4, "first"), rooms, (8, "first"), rooms]
    stream[0] = "second"
    other.given(inputs)
    assert used[5:] == [(8, "second"), ("rooms", "second")] and one.turn == 1
    # As while a graph is captured.
    stream[0] = None
    for program in (one, other):
        program.given(inputs)
    assert len(used) == 7
