"""Longer batches of models with a number for each pair of tokens: foreseen as they are, trained the same."""

import gc
import random
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rewriter
from rewriter.memory.arena import HostArena
from rewriter.memory.growth import AS_TRACED, Growth
from rewriter.memory.transfer import Transfers
from rewriter.memory.ways import Ways
from tests.memory.budgeted import short_tiles
from tests.memory.test_choices import Linked
from tests.regions.outlined import outlined

WIDTH, HEADS = 16, 2


@pytest.fixture(autouse=True)
def _tiles(monkeypatch):
    yield from short_tiles(monkeypatch)


class Layer(nn.Module):
    def __init__(self, attend):
        super().__init__()
        self.attend, self.qkv, self.out = attend, nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, mask):
        heads = self.qkv(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        return x + self.out(self.attend(*heads.chunk(3, -1), mask).transpose(1, 2).flatten(2)).tanh()


class Chain(nn.Module):
    """Its mask has all rows; that of ``_own_mask``, one of a layer's own, has none."""

    def __init__(self, attend):
        super().__init__()
        self.first, self.last = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 4)
        self.layers = nn.ModuleList(Layer(attend) for _ in range(3))

    def forward(self, x):
        x, mask = self.first(x), _distances(x.shape[1]) * x[:, None, None, :, 0]
        for layer in self.layers:
            x = layer(x, mask)
        return self.last(x)


def _distances(length):
    places = torch.arange(length)
    return (places - places[:, None]).abs().float()


def _scores_written_out(q, k, v, mask):
    return (q @ k.transpose(-1, -2) - mask.abs()).softmax(-1) @ v


def _own_mask(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=-_distances(q.shape[2]))


def _both(q, k, v, mask):
    return _own_mask(q, k, _scores_written_out(q, k, v, mask), mask)


def _chain(attend, dtype=torch.float32):
    torch.manual_seed(0)
    return Chain(attend).to(dtype)


def _foreseen(rows, length, growth=AS_TRACED):
    """All numbers of all ways to run each region, by what is set aside."""
    case = outlined(_chain(_both), torch.randn(rows, length, 8), dynamic=True)
    assert case.program is not None, case.reason
    ways = Ways(case.program, Linked(), reach=growth.tokens)
    found = ways.all(growth)
    assert not ways.notes
    return {
        (aside, region.name, _untiled(way.choice.name)): {**vars(way.choice), "name": ""}
        for aside, by_region in found.items()
        for region, some in by_region.items()
        for way in some
    }


def _untiled(name):
    return re.sub(r"tiles of \d+", "tiles", name)


def test_more_and_longer_sequences_are_foreseen_as_if_they_were_traced(monkeypatch):
    traced = _foreseen(6, 48)
    # Tiles of three times the sequences are a third as long, so that as many tokens are in one.
    monkeypatch.setattr("rewriter.memory.choices._TILES", (None, 3 * 8))
    grown = _foreseen(2, 12, Growth(12.0, 4.0))
    names = {name for _, _, name in traced}
    assert any("tiles" in name and "offload" in name for name in names) and len(names) > 10
    assert grown.keys() == traced.keys()
    for key, choice in traced.items():
        assert grown[key] == {n: x if n == "name" else pytest.approx(x, rel=1e-9) for n, x in choice.items()}


def _gradients(model, lengths):
    """Of one batch after the other."""
    found = []
    for length in lengths:
        generator = torch.Generator().manual_seed(length)
        model.zero_grad()
        batch = torch.randn(2, length, 8, generator=generator, dtype=torch.float64)
        model(batch).square().sum().backward()
        found.append([p.grad for p in model.parameters()])
    return found


@pytest.fixture
def arena(monkeypatch):
    """Host memory of plans that are made whether everything fits or not."""
    arena = HostArena(64 << 20, pin=False, growth=1 << 16)
    transfers = Transfers(arena, "cpu", poison=True)
    monkeypatch.setattr("rewriter.memory.planned.transfers_of", lambda *_: transfers)
    monkeypatch.setattr("rewriter.memory.planned._everything_kept", lambda *_: None)
    monkeypatch.setattr("rewriter.memory.under_budget.everything_kept", lambda *_: None)
    return arena


def _held():
    gc.collect()
    return [o for o in gc.get_objects() if issubclass(type(o), Tensor)]


def test_steps_of_many_lengths_train_the_same_and_leave_nothing_behind(arena):
    model, draw = _chain(_scores_written_out, torch.float64), random.Random(0)
    options = {"lowering": "eager", "memory_budget": "600000B"}
    model.compile(backend="rewriter", dynamic=True, options=options)
    lengths = [12, 48, *(draw.randint(2, 48) for _ in range(6))]
    with rewriter.inspect() as report:
        ours = _gradients(model, lengths)
    (graph,) = report.graphs
    assert "planned anew, and not compiled anew" in str(graph.notes)
    theirs = _gradients(_chain(_scores_written_out, torch.float64), lengths)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    del ours, theirs
    model.zero_grad()
    # What other tests left stays as long as it is listed here.
    held, slabs = _held(), arena.capacity
    _gradients(model, [draw.randint(2, 48) for _ in range(20)])
    model.zero_grad()
    assert len(_held()) == len(held)
    assert arena.capacity == slabs > 0 and arena.in_use == 0
