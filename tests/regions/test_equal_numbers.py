"""Floats of layers, symbols with ``dynamic=True``: equal ones make one kind, and others are never taken."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import rewriter
from rewriter import backend


class Layer(nn.Module):
    def __init__(self, scale: float):
        super().__init__()
        self.linear, self.scale = nn.Linear(8, 8), scale

    def forward(self, x):
        return x + torch.tanh(self.linear(x)) * self.scale


class Chain(nn.Module):
    def __init__(self, *scales: float):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(map(Layer, scales))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x.square().sum()


def step(chain, rows: int):
    chain.zero_grad()
    loss = chain(torch.randn(rows, 8, generator=torch.Generator().manual_seed(rows)))
    loss.backward()
    return loss, *[p.grad.clone() for p in chain.parameters()]


@pytest.mark.parametrize("scales", [(0.5,) * 4, (0.5, 0.25) * 3])
def test_layers_are_of_one_kind_where_their_numbers_are_equal(scales):
    torch._dynamo.reset()
    ours, theirs = Chain(*scales), Chain(*scales)
    ours.compile(backend="rewriter", dynamic=True, options={"lowering": "eager"})
    with rewriter.inspect() as report:
        torch.testing.assert_close(step(ours, 3), step(theirs, 3))
    program = report.graphs[-1].program
    assert program is not None
    assert max(region.times for region in program.regions) > 1
    # One number is another now: code that holds the old one must not run.
    for chain in (ours, theirs):
        vars(chain.layers[2])["scale"] = 0.125
    torch.testing.assert_close(step(ours, 3), step(theirs, 3))


def test_numbers_that_were_seen_to_change_stay_symbols():
    torch._dynamo.reset()
    counters.clear()
    ours, theirs = Chain(0.5, 0.5), Chain(0.5, 0.5)
    ours.compile(backend="rewriter", options={"lowering": "eager"})
    for scale in (0.5, 0.25, 0.3, 0.7):
        for layer in (*ours.layers, *theirs.layers):
            vars(layer)["scale"] = scale
        torch.testing.assert_close(step(ours, 3), step(theirs, 3))
    assert counters["stats"]["unique_graphs"] == 2


def test_layers_of_equal_numbers_are_traced_anew_once(monkeypatch):
    torch._dynamo.reset()
    calls, compile = [], backend._compile
    monkeypatch.setattr(backend, "_compile", lambda *given: calls.append(None) or compile(*given))
    chain = Chain(*(0.5,) * 4)
    chain.compile(backend="rewriter", dynamic=True, options={"lowering": "eager"})
    step(chain, 3)
    assert len(calls) == 2
