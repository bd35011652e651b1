"""Floats of layers, symbols with ``dynamic=True``: equal ones make one kind, and others are never taken."""

import pytest
import torch
from torch import nn

import rewriter


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
