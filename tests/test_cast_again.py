"""Casts of weights: which are taken again in the backward, and that they are then not kept."""

import pytest
import torch
from torch import nn
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._functorch.aot_autograd import aot_function
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.autograd.graph import saved_tensors_hooks

import rewriter.lower
from rewriter.cast_again import cast_again

BF16 = torch.bfloat16


def adapter(x, a, b, c):
    stacked = torch.cat([a.to(BF16), b.to(BF16)])
    return (x @ stacked.t()) @ c.to(BF16).t()


def boxed(gm, example_inputs):
    return make_boxed_func(gm)


@pytest.mark.parametrize(("weights", "kept"), [((), {(4, 8), (6, 4)}), ((1, 2, 3), set())])
def test_casts_of_weights_are_not_kept(weights, kept):
    x = torch.randn(64, 8, dtype=BF16, requires_grad=True)
    adapters = [torch.randn(size, requires_grad=True) for size in ((2, 8), (2, 8), (6, 4))]
    inputs, read = (x, *adapters), []

    def partition(joint, given, **kwargs):
        cast_again(joint.graph, inputs, weights)
        forward, backward = min_cut_rematerialization_partition(joint, given, **kwargs)
        read.extend(n.meta["val"] for n in backward.graph.find_nodes(op="placeholder"))
        return forward, backward

    call = aot_function(adapter, fw_compiler=boxed, partition_fn=partition)
    found = torch.autograd.grad(call(*inputs).sum(), inputs)
    true = torch.autograd.grad(adapter(*inputs).sum(), inputs)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, true, strict=True))
    casts = {(4, 8), (8, 4), (6, 4), (4, 6), (2, 8)}
    assert {tuple(v.shape) for v in read if v.dtype == BF16 and tuple(v.shape) in casts} == kept


def test_a_graph_of_other_inputs_is_left_alone():
    graph = torch.fx.Graph()
    graph.placeholder("primals_1").meta["val"] = torch.zeros(3)
    cast = graph.call_function(torch.ops.aten._to_copy.default, (next(iter(graph.nodes)),))
    cast.meta["val"] = torch.zeros(3, dtype=BF16)
    cast_again(graph, (torch.zeros(4),), (0,))
    cast_again(graph, (torch.zeros(3), torch.zeros(3)), (0, 1))
    assert "recompute" not in cast.meta
    cast_again(graph, (torch.zeros(3),), (0,))
    assert "recompute" in cast.meta


class Adapted(nn.Module):
    def __init__(self):
        super().__init__()
        sizes = ((2, 8), (2, 8), (6, 4))
        self.weights = nn.ParameterList(torch.randn(size) for size in sizes)

    def forward(self, x):
        return adapter(x, *self.weights)


def test_aot_autograd_alone_keeps_no_casts_and_its_gradients_are_the_same_bits(monkeypatch):
    torch.manual_seed(0)
    model, x = Adapted(), torch.randn(64, 8, dtype=BF16, requires_grad=True)

    def trained():
        torch._dynamo.reset()
        call = torch.compile(model, backend="rewriter", options={"lowering": "eager"})
        call(x)
        kept = []
        with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
            result = call(x)
        return kept, torch.autograd.grad(result.sum(), list(model.parameters()))

    ours, found = trained()
    monkeypatch.setattr(rewriter.lower, "cast_again", lambda *_: None)
    before, true = trained()
    assert all(map(torch.equal, found, true))
    # The weights themselves are there anyway.
    spared = [sum(t.nbytes for t in kept if t.dtype == BF16) for kept in (before, ours)]
    assert spared[0] - spared[1] == 2 * (2 * 2 * 8 + 6 * 4)


class Counted(nn.Module):
    """Its scale is used, then overwritten, as running statistics are."""

    def __init__(self, scale):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8) / 8)
        self.scale = scale

    def forward(self, x):
        result = (torch.sin(x @ self.weight.to(BF16)) @ self.scale.to(BF16)).sum()
        self.scale.add_(1)
        return result


@pytest.mark.parametrize("made", [nn.Buffer, lambda given: nn.Parameter(given, requires_grad=False)])
def test_what_the_forward_or_a_caller_overwrites_is_not_cast_again(made):
    torch.manual_seed(0)
    first, x = torch.randn(8, 8) / 8, torch.randn(4, 8, dtype=BF16)
    model = Counted(made(first.clone()))
    (true,) = torch.autograd.grad(model(x), model.weight)
    model.scale.copy_(first)
    torch._dynamo.reset()
    loss = torch.compile(model, backend="rewriter")(x)
    assert torch.equal(model.scale, first + 1)
    if made is nn.Buffer:
        model.scale.add_(1)
    (ours,) = torch.autograd.grad(loss, model.weight)
    assert torch.allclose(ours, true, rtol=0.02, atol=0.02)
