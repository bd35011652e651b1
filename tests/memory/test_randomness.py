"""A stage with dropout draws the same numbers again in its backward, and disturbs no one else's."""

import pytest
import torch
import torch.nn.functional as F

from rewriter.memory.randomness import random_state, replaying
from tests.memory.decoder import randn
from tests.memory.small_layers import Piece, SmallLayer, scheduled

TOKENS, TILE = 7, 3


def _branch(x, w, v):
    h = F.dropout(F.linear(x, w), 0.5, True)
    return (x + F.dropout(F.linear(torch.tanh(h), v), 0.25, True),)


def _layer(**settings):
    rows = {"x": 1, "y": 1, "z": 1}
    first = Piece(_branch, ("x", "w", "v"), ("y",), rows)
    second = Piece(_branch, ("y", "v", "w"), ("z",), rows)
    inputs = {"x": randn(2, TOKENS, 8, seed=1), "w": randn(8, 8, seed=2), "v": randn(8, 8, seed=3)}
    inputs = {name: value.requires_grad_() for name, value in inputs.items()}
    return SmallLayer((first, second), inputs, ("z",), frozenset({"w", "v"}), **settings)


def _by_hand(layer, tile):
    """Each stage tile by tile under autograd, drawing as the layer does."""
    x, w, v = layer.inputs.values()
    torch.manual_seed(0)
    for weights in ((w, v), (v, w)):
        x = torch.cat([_branch(part, *weights)[0] for part in x.split(tile, 1)], 1)
    return x, torch.autograd.grad(x, list(layer.inputs.values()), randn(*x.shape, seed=9))


def _run(layer, fates, tile):
    torch.manual_seed(0)
    (z,) = scheduled(layer, fates, tile)(*layer.inputs.values())
    return z, torch.autograd.grad(z, list(layer.inputs.values()), randn(*z.shape, seed=9))


@pytest.mark.parametrize("tile", [TILE, TOKENS])
@pytest.mark.parametrize("fate", ["keep", "offload", "recompute"])
def test_gradients_are_of_the_numbers_that_the_forward_drew(fate, tile):
    layer = _layer()
    expected, truths = _by_hand(layer, tile)
    z, gradients = _run(layer, {"x": "keep", "y": fate}, tile)
    assert torch.equal(z, expected)
    for gradient, truth in zip(gradients, truths, strict=True):
        torch.testing.assert_close(gradient, truth)


def test_a_backward_leaves_the_generator_as_it_found_it():
    layer = _layer()
    torch.manual_seed(0)
    (z,) = scheduled(layer, {"x": "keep", "y": "recompute"}, TILE)(*layer.inputs.values())
    before = random_state(torch.device("cpu"))
    z.sum().backward()
    assert torch.equal(random_state(torch.device("cpu")), before)


def test_the_generator_is_put_back_after_an_error():
    device = torch.device("cpu")
    torch.manual_seed(1)
    before = random_state(device)
    with pytest.raises(KeyError), replaying(torch.Generator().manual_seed(2).get_state(), device):
        torch.rand(3)
        raise KeyError
    assert torch.equal(random_state(device), before)


def test_two_forwards_draw_different_numbers():
    layer = _layer()
    run = scheduled(layer, {"x": "keep", "y": "keep"}, TILE)
    torch.manual_seed(0)
    first, second = (run(*layer.inputs.values())[0] for _ in range(2))
    assert not torch.equal(first, second)


def test_numbers_that_the_backward_does_not_read_are_drawn_again_too():
    def branch(x, w):
        noise = F.dropout(torch.ones_like(x), 0.5, True)
        return (F.dropout(F.linear(x, w), 0.5, True) + noise,)

    inputs = {"x": randn(1, TOKENS, 8, seed=1).requires_grad_(), "w": randn(8, 8, seed=2).requires_grad_()}
    piece = Piece(branch, ("x", "w"), ("y",), {"x": 1, "y": 1})
    layer = SmallLayer((piece,), inputs, ("y",), frozenset({"w"}))
    torch.manual_seed(0)
    (eager,) = branch(*inputs.values())
    tangent = randn(*eager.shape, seed=9)
    truths = torch.autograd.grad(eager, list(inputs.values()), tangent)
    torch.manual_seed(0)
    (y,) = scheduled(layer, {"x": "keep"})(*inputs.values())
    assert torch.equal(y, eager)
    for gradient, truth in zip(torch.autograd.grad(y, list(inputs.values()), tangent), truths, strict=True):
        torch.testing.assert_close(gradient, truth)
