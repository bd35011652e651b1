"""Weights that stay dequantised on a device: made once, seen to be current, handed over and given up."""

import pytest
import torch

from rewriter.kernels.resident_weight import Form
from rewriter.memory.residents import Residents, Shelf, Wanted


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


def test_one_program_has_them_at_a_time_and_hands_over_what_another_wants(doubled):
    shelf, inputs = Shelf(), [torch.ones(8, 4), torch.ones(4, 4), torch.ones(2, 4)]
    first = Residents([Wanted(doubled, (0,), None), Wanted(doubled, (1,), None)], shelf)
    second = Residents([Wanted(doubled, (1,), None), Wanted(doubled, (2,), None)], shelf)
    (_, shared), (turn, read) = first.given(inputs), first.settle(inputs)
    assert first.settle(inputs)[0] == turn and read[1] is shared
    again, _ = second.given(inputs)
    # A recording of the first would read what is gone.
    assert again is shared and shelf.nbytes == (4 + 2) * 4 * 4 and first.settle(inputs)[0] > turn
    Residents([], shelf, room=shelf.nbytes).given(inputs)
    assert shelf.nbytes == (8 + 4) * 4 * 4
    Residents([], shelf, room=shelf.nbytes - 1).given(inputs)
    assert not shelf.kept
    first.given(inputs)
    del first
    assert not shelf.kept


def test_a_change_of_a_weight_is_seen_and_a_backward_that_waits_for_the_old_one_refused(doubled):
    shelf, weight = Shelf(), torch.ones(2, 2)
    one = Residents([Wanted(doubled, (0,), None)], shelf)
    x = torch.ones(2, 2, requires_grad=True)
    loss = (x @ one.given([weight])[0]).sum()
    one.given([weight])
    weight.add_(1)
    assert one.given([weight])[0].eq(4).all() and shelf.turn == 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert one.given([torch.full((2, 2), 3.0)])[0].eq(6).all()


def test_two_adapters_of_one_weight_do_not_write_over_each_other(beside):
    shelf, weight = Shelf(), torch.ones(3, 5)
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
    assert x.grad[0].tolist() == [6.0] * 7 + [0.0] * 2


def test_a_matrix_given_as_another_tensor_of_its_memory_is_no_change_and_a_written_one_is(beside):
    shelf, weight, matrix = Shelf(), torch.ones(3, 5), torch.ones(3, 2, requires_grad=True)
    one = Residents([Wanted(beside, (0,), 1)], shelf)
    (whole,) = one.given([weight, matrix])
    version = whole._version
    # So does who records a program.
    one.given([weight, matrix.detach().requires_grad_()])
    assert whole._version == version
    with torch.no_grad():
        matrix.mul_(4)
    assert one.given([weight, matrix])[0] is whole and whole[0, 5] == 8 and whole._version > version


def test_a_weight_of_another_shape_where_one_was_is_made_anew(doubled):
    shelf, memory = Shelf(), torch.ones(48)
    one, other = (Residents([Wanted(doubled, (0,), None)], shelf) for _ in range(2))
    one.given([memory.view(8, 6)])
    turn = shelf.turn
    assert other.given([memory.view(6, 8)])[0].shape == (6, 8) and shelf.turn == turn + 1
