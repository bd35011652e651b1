"""Copies that run as late as they may show each wait that is missing."""

from unittest.mock import patch

import pytest
import torch

from rewriter.memory.arena import HostArena
from rewriter.memory.copier import Copier
from rewriter.memory.transfer import Transfers
from tests.memory import late_copies
from tests.memory.late_copies import late_transfers


@pytest.fixture
def transfers() -> Transfers:
    return _made()


def _made() -> Transfers:
    return late_transfers(HostArena(1 << 20, pin=False, growth=1 << 16))


def _activations(transfers: Transfers, window: int = 0) -> bool:
    """Whether what is offloaded comes back as it was."""
    given, sent, found = [torch.randn(100) for _ in range(6)], [], []
    expected = [tensor.clone() for tensor in given]
    while given:
        with transfers.group(window) as group:
            sent.append((group, transfers.offload(given.pop(0))))
    for group, ticket in reversed(sent):
        transfers.begin_backward(group)
        found.append(transfers.reload(ticket))
    return all(torch.equal(a, b) for a, b in zip(reversed(found), expected, strict=True))


def _weights(transfers: Transfers) -> bool:
    """Whether each layer has its own."""
    layers = [torch.randint(250, (100, 1), dtype=torch.uint8) for _ in range(3)]
    transfers.weights.begin([[layer] for layer in layers])
    right = True
    for layer in layers:
        here = {"w": layer}
        with transfers.weights.on_device(here, ("w",), backward=False):
            right = right and torch.equal(here["w"], layer)
    return right


def test_where_no_wait_is_missing_everything_comes_back(transfers):
    for window in (0, 400, 1000, 0):
        assert _activations(transfers, window) and _weights(transfers)
    assert transfers.stats.bytes_in > 0 and transfers.arena.in_use == 0


@pytest.mark.parametrize("window", [0, 400, 1000])
@pytest.mark.parametrize("owner, name", [(Copier, "give_up"), (Transfers, "reload")])
def test_where_the_computing_stream_does_not_wait_for_a_copy_it_is_shown(owner, name, window):
    function = getattr(owner, name)

    def without_waiting(*arguments):
        with patch.object(late_copies._Computing, "wait_event", lambda *_: None):
            return function(*arguments)

    with patch.object(owner, name, without_waiting):
        assert not _activations(_made(), window)


def test_where_a_layer_does_not_wait_for_its_weights_it_is_shown(transfers):
    with patch.object(late_copies._Computing, "wait_event", lambda *_: None):
        assert not _weights(transfers)


def test_where_a_copy_does_not_wait_for_the_last_reader_of_its_block_it_is_shown(transfers):
    with patch.object(late_copies._Late, "wait_event", lambda *_: None):
        assert not all(_activations(transfers) for _ in range(2))
