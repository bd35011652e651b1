"""Whatever plan a model runs under, it drops what it drops without one, and in eager by position."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.families import build
from tests.memory.budgeted import assert_near, batches_of, compiled, last_plan, short_tiles, steps
from tests.memory.kinds import KINDS, only
from tests.positional import dropout_by_position

_ = pytest.fixture(autouse=True)(short_tiles)


class Layer(nn.Module):
    """Attention and an MLP, each with dropout, in fp64: what differs is no rounding."""

    def __init__(self):
        super().__init__()
        shapes = (8, 8), (8, 16), (16, 8)
        self.mix, self.up, self.down = (nn.Linear(*s, bias=False, dtype=torch.float64) for s in shapes)

    def forward(self, x):
        q = F.dropout(self.mix(x), 0.3, self.training)
        x = x + F.scaled_dot_product_attention(q[:, None], x[:, None], x[:, None], is_causal=True)[:, 0]
        return x + self.down(F.dropout(self.up(x), 0.3, self.training))


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def trained(model, *batches):
    """Losses and gradients of two steps on a chain, or of one on each of ``batches``."""
    torch.manual_seed(1)
    if batches:
        return steps(model, batches)
    x = torch.linspace(-1, 1, 2 * 19 * 8, dtype=torch.float64).view(2, 19, 8).requires_grad_()
    losses = [model(x) for _ in range(2)]
    assert losses[0] != losses[1], "each step draws anew"
    torch.stack(losses).sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    return [loss.detach() for loss in losses], {**gradients, "x": x.grad}


def under(kind, model, *batches, **options):
    """``trained`` where plans are of this kind alone, or without a plan."""
    with only(KINDS[kind]) if kind else nullcontext():
        found = trained(compiled(model, 64 << 30 if kind else "off", **options), *batches)
    assert not kind or ("tiles of 8" in str(last_plan().ways)) == ("tiles" in kind)
    return found


@pytest.mark.parametrize(
    ("kind", "lowering"),
    [(None, "eager"), ("recompute", "eager"), ("offload in tiles", "eager"), ("tiles", "inductor")],
)
def test_a_plan_drops_what_is_dropped_without(kind, lowering):
    model = Chain()
    ours = under(kind, copy.deepcopy(model), lowering=lowering)
    with dropout_by_position():
        assert_near(ours, trained(model), 1e-12)


def test_adapters_train_in_tiles_as_in_eager():
    batches = batches_of((24,))
    ours = under("offload in tiles", build("llama", layers=2, lora=True, lora_dropout=0.3), *batches)
    with dropout_by_position():
        truth = trained(build("llama", layers=2, lora=True, lora_dropout=0.3), *batches)
    assert_near(ours, truth, 1e-6)
