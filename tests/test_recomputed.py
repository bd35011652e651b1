"""What a backward computes again instead of keeping it: a gated activation, with its gradients."""

from uuid import uuid4

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import rewriter.lower
from rewriter.kernels import gated_activation

TOKENS, HIDDEN, WIDTH = 6, 8, 32


class Mlp(nn.Module):
    def __init__(self, packed):
        super().__init__()
        self.gate = nn.Linear(HIDDEN, WIDTH * (1 + packed), bias=False)
        self.up = None if packed else nn.Linear(HIDDEN, WIDTH, bias=False)
        self.down = nn.Linear(WIDTH, HIDDEN, bias=False)

    def forward(self, x):
        gate, up = self.gate(x).chunk(2, -1) if self.up is None else (self.gate(x), self.up(x))
        return self.down(up * F.silu(gate))


@pytest.fixture(params=[False, True], ids=["two", "packed"])
def mlp(request, monkeypatch):
    """One whose gate is the kernel's op, as on a GPU."""
    ops = torch.ops.rewriter
    packed = lambda x, name, order="gate_up": ops.gated_activation_packed(x, name, order)  # noqa: E731
    monkeypatch.setattr(gated_activation, "gated_activation_reference", ops.gated_activation)
    monkeypatch.setattr(gated_activation, "gated_activation_packed_reference", packed)
    torch.manual_seed(0)
    return Mlp(request.param)


def trained(model, lowering):
    """The sizes of what a forward saves, and the gradients."""
    torch._dynamo.reset()
    call = torch.compile(model, backend="rewriter", options={"lowering": lowering})
    x = torch.ones(TOKENS, HIDDEN).cumsum(0).requires_grad_()
    saved = []

    def pack(tensor):
        saved.append(tensor.numel())
        return tensor

    call(x).sum().backward()
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call(x)
    weights = list(model.parameters())
    return saved, torch.autograd.grad(result.square().sum(), [x, *weights])


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_a_gated_activation_is_computed_again_from_what_its_own_backward_keeps(mlp, lowering, monkeypatch):
    graphs, run = [], uuid4().hex
    join = rewriter.lower.join_gate_gradients
    monkeypatch.setattr(
        rewriter.lower,
        "join_gate_gradients",
        lambda graph, functional: (join(graph, functional=functional), graphs.append(str(graph))),
    )
    # PyTorch's caches know the package by its sources alone; nothing of an earlier run is taken.
    monkeypatch.setattr(rewriter.lower, "source_hash", lambda: run)
    saved, gradients = trained(mlp, lowering)
    assert "backward_with_result_" in graphs[-1]
    monkeypatch.setattr(rewriter.lower, "RECOMPUTED", frozenset())
    monkeypatch.setattr(rewriter.lower, "source_hash", lambda: "without")
    kept, same = trained(mlp, lowering)
    assert sum(kept) - sum(saved) == TOKENS * WIDTH
    for ours, true in zip(gradients, same, strict=True):
        assert torch.equal(ours, true)


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_what_an_operation_of_others_makes_of_sizes_is_kept_since_it_may_differ_next_time(lowering):
    calls = iter(range(1, 100))
    made = []

    @torch.library.custom_op(f"test_recomputed::level_{lowering}", mutates_args=())
    def level(size: int) -> torch.Tensor:
        made.append(torch.full((size,), float(next(calls))))
        return made[-1].clone()

    level.register_fake(lambda size: torch.empty(size))

    def scaled(x):
        by = level(TOKENS)
        return (x * by).sin() * by

    torch._dynamo.reset()
    call = torch.compile(scaled, backend="rewriter", options={"lowering": lowering})
    x = torch.ones(TOKENS, requires_grad=True)
    result = call(x)
    by = made[-1]
    (found,) = torch.autograd.grad(result.sum(), x)
    torch.testing.assert_close((result, found), ((x * by).sin() * by, (x * by).cos() * by * by))
