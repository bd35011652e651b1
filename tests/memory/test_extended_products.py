"""An MLP with adapters that the bases' own products add, in tiles: the gradients are those of the whole."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch.fx import Proxy
from torch.utils._pytree import tree_leaves

from rewriter.kernels.dequantize import Packed4bit
from rewriter.kernels.lora_linear import lora_linear, lora_linears
from tests.memory.decoder import randn
from tests.memory.small_layers import Piece, SmallLayer, every_fate, new_transfers, scheduled
from tests.memory.test_layer import _assert_same, _step, _whole

bitsandbytes = pytest.importorskip("bitsandbytes.functional")

HIDDEN, WIDTH, R, LENGTH = 32, 96, 4, 13
BF16 = torch.bfloat16


def _node(function, *args):
    """A call of ``function`` in the graph that is being traced."""
    tracer = next(leaf for leaf in tree_leaves(args) if isinstance(leaf, Proxy)).tracer
    return tracer.create_proxy("call_function", function, args, {})


def _packed(shape, data, absmax):
    return Packed4bit(data, shape, absmax, 64, "nf4")


def _normed(h):
    """By the kernel's op, as on a GPU."""
    return _node(operator.getitem, _node(torch.ops.rewriter.rms_norm, h, None, 1e-5, 0.0, True, None), 0)


def _wide(h, gate, gate_absmax, up, up_absmax, gate_a, gate_b, up_a, up_b):
    weights = [_packed((WIDTH, HIDDEN), *w) for w in ((gate, gate_absmax), (up, up_absmax))]
    made = _node(lora_linears, _normed(h), weights, [None, None], [gate_a, up_a], [gate_b, up_b], [0.5, 0.5])
    return F.silu(made[0]) * made[1]


def _mlp(h, *operands):
    down, down_absmax, down_a, down_b = operands[8:]
    inner = _wide(h, *operands[:8])
    return (
        h + _node(lora_linear, inner, _packed((HIDDEN, WIDTH), down, down_absmax), None, down_a, down_b, 2.0),
    )


def _layer(saving):
    inputs = {"h": randn(2, LENGTH, HIDDEN, dtype=BF16, grad=True)}
    shapes = {"gate": (WIDTH, HIDDEN), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
    for name, (n, k) in shapes.items():
        data, state = bitsandbytes.quantize_4bit(randn(n, k, scale=k**-0.5), quant_type="nf4", blocksize=64)
        inputs |= {name: data, f"{name}_absmax": state.absmax}
    for name, (n, k) in shapes.items():
        inputs[f"{name}_a"] = randn(R, k, dtype=BF16, grad=True, scale=k**-0.5)
        inputs[f"{name}_b"] = randn(n, R, dtype=BF16, grad=True)
    names = [name for name in inputs if not name.startswith("down")]
    takes = (*names, *(name for name in inputs if name.startswith("down")))
    pieces = (Piece(_mlp, takes, ("out",), {"h": 1, "out": 1}),)
    return SmallLayer(pieces, inputs, ("out",), frozenset(set(inputs) - {"h"}), saving)


@pytest.mark.parametrize("saving", [False, True], ids=["computing again", "saving"])
@pytest.mark.parametrize("tile", [None, 5])
def test_gradients_in_tiles_are_those_of_the_whole(tile, saving):
    layer = _layer(saving)
    whole, transfers = _whole(layer), new_transfers()
    for fates in every_fate(layer):
        ours = _step(scheduled(layer, fates, tile, transfers=transfers), layer)
        _assert_same(ours, whole, exact=tile is None)
    (graphs,) = layer.graphs.graphs
    # What the adapters have of the input's gradient is added where the product lies.
    assert str(graphs.backward.graph).count("rewriter.fold_columns_") == 1, graphs.backward.graph
    graphs = str(graphs.forward.graph), str(graphs.backward.graph)
    # The norm leaves gate's and up's room, which are made once more by what runs again in the backward. Of
    # down's it is the gradient that is given.
    assert [part.count("rewriter.fill_columns_") for part in graphs] == ([1, 0] if saving else [1, 1])
    assert [part.count("rewriter.extended") for part in graphs] == [0, 1]
