"""Gradients that are given out without a copy, and when they may be overwritten."""

from typing import Any

import pytest
import torch
from torch import nn

from rewriter.replay.lending import Lender, Lent


@pytest.fixture
def places():
    return [torch.arange(6.0).view(2, 3), torch.ones(5, dtype=torch.bfloat16), torch.ones(4)]


def parameters(*gradients):
    found = [nn.Parameter(torch.zeros_like(g)) for g in gradients]
    for parameter, gradient in zip(found, gradients, strict=True):
        parameter.grad = gradient
    return found


def test_what_is_given_is_lent_until_its_holders_let_go(places):
    lender, lent = Lender(), Lent(places)
    given = lender.give(lent)
    assert [g.data_ptr() for g in given] == [p.data_ptr() for p in places]
    assert not lender.reclaim([])
    del given
    assert lender.reclaim([])


def test_views_and_autograds_own_references_are_holders(places):
    lender, lent = Lender(), Lent(places)
    part = lender.give(lent)[0][1:]
    assert not lender.reclaim([])
    del part
    assert lender.reclaim([])


def test_gradients_of_parameters_become_copies_and_all_from_then_on(places):
    lender, lent = Lender(), Lent(places)
    owners = parameters(*lender.give(lent))
    assert lender.reclaim(owners)
    for place in places:
        place.zero_()
    assert owners[0].grad is not None and torch.equal(owners[0].grad, torch.arange(6.0).view(2, 3))
    for place in places:
        place.fill_(2)
    copies = lender.give(lent)
    assert lender.reclaim([])
    for copy, place in zip(copies, places, strict=True):
        assert copy.data_ptr() != place.data_ptr() and copy.dtype == place.dtype
        assert torch.equal(copy, place) and copy.shape == place.shape


@pytest.mark.parametrize(
    "hold",
    [
        lambda gradient: gradient,
        lambda gradient: gradient.detach(),
        lambda gradient: gradient.view(-1)[2:],
        lambda gradient: gradient.untyped_storage(),
        lambda gradient: gradient.numpy(),
        lambda gradient: gradient.__dlpack__(),
    ],
    ids=["itself", "detached", "view", "storage", "array", "capsule"],
)
def test_a_parameters_gradient_that_somebody_else_has_too_stays_where_it_is(places, hold):
    lender, lent = Lender(), Lent(places)
    first, *others = parameters(*lender.give(lent))
    held = hold(first.grad)
    assert not lender.reclaim([first, *others])
    for parameter, place in zip((first, *others), places, strict=True):
        assert parameter.grad is not None and parameter.grad.data_ptr() == place.data_ptr()
    del held
    assert lender.reclaim([first, *others])
    assert first.grad is not None and first.grad.data_ptr() != places[0].data_ptr()


def test_a_gradient_that_is_no_parameters_any_more_is_counted(places):
    lender, lent = Lender(), Lent(places)
    owners = parameters(*lender.give(lent))
    held, owners[0].grad = owners[0].grad, None
    assert not lender.reclaim(owners)
    assert owners[1].grad is not None and owners[1].grad.data_ptr() == places[1].data_ptr()
    del held
    assert lender.reclaim(owners)


def test_streams_that_used_what_was_lent_are_told_once_it_is_back(places):
    lender, lent, stream = Lender(), Lent(places), torch.Stream("cpu")
    lender.used_on(places[0], stream)
    given = lender.give(lent)
    lender.used_on(torch.ones(3), stream)
    assert not lender.take_streams(), "of other tensors, or before"
    lender.used_on(given[0][1:], stream)
    assert lender.take_streams() == {stream}
    assert not lender.take_streams()


def test_a_stream_that_is_told_while_others_are_taken_is_told_the_next_time(places):
    lender, lent = Lender(), Lent(places)
    (given, *_), taken = lender.give(lent), []

    class Told:
        def __hash__(self):
            # As another thread would, between what is asked for and what is added.
            if not taken:
                taken.append(lender.take_streams())
            return 0

    stream: Any = Told()
    lender.used_on(given, stream)
    assert taken == [set()] and lender.take_streams() == {stream}


def test_two_recordings_gradients_are_counted_apart(places):
    lender = Lender()
    first, second = Lent(places), Lent([torch.ones(7)])
    one, two = lender.give(first), lender.give(second)
    del one
    assert not lender.reclaim([])
    del two
    assert lender.reclaim([])


def test_after_all_is_forgotten_who_holds_a_gradient_keeps_it(places):
    lender = Lender()
    given = lender.give(Lent(places))
    lender.forget()
    assert lender.reclaim([])
    assert torch.equal(given[2], torch.ones(4))


def test_streams_that_use_what_is_forgotten_are_told_all_the_same(places):
    lender, stream = Lender(), torch.Stream("cpu")
    given = lender.give(Lent(places))
    lender.used_on(given[0], stream)
    lender.forget()
    assert lender.take_streams() == {stream}
