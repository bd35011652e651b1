"""Rules of operations: a row-wise one gives tile by tile what it gives at once; the others say why not."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rewriter.kernels.clamped_gate import clamped_gate
from rewriter.kernels.dropout import dropped
from rewriter.kernels.gated_activation import gated_activation, gated_activation_packed
from rewriter.kernels.layer_norm import add_layer_norm, layer_norm
from rewriter.kernels.lora_linear import lora_linear, lora_linears
from rewriter.kernels.rms_norm import add_rms_norm, rms_norm
from rewriter.kernels.rotary import rotary, rotary_one
from rewriter.memory.rows import tokens_of
from rewriter.memory.stages import stages
from tests.memory.staged import called, in_tiles, traced

# As many tokens as features and heads: equal sizes must tell nothing.
TOKENS = HIDDEN = 8
BATCH = 2


def heads(x):
    return x.view(BATCH, TOKENS, 2, 4).transpose(1, 2)


# What happens to x of (batch, tokens, hidden), and the dimension of the result that counts tokens.
ROW_WISE: dict[str, tuple[Callable, int]] = {
    "sums": (lambda x, w, c, s: x * 2 + w[0], 1),
    "casts": (lambda x, w, c, s: x.to(torch.float64).float().type_as(w), 1),
    "comparisons": (lambda x, w, c, s: torch.where(x > 0, x, -x).clamp(max=0.5), 1),
    "in place": (lambda x, w, c, s: (x * 2).add_(w[0]).mul_(x), 1),
    "a linear": (lambda x, w, c, s: F.linear(x, w, w[0]), 1),
    "a product": (lambda x, w, c, s: x @ w.T, 1),
    "a product per head": (lambda x, w, c, s: heads(x) @ torch.ones(2, 4, 3), 2),
    "a product from the left": (lambda x, w, c, s: w @ x.transpose(1, 2), 2),
    "norms": (lambda x, w, c, s: F.layer_norm(F.rms_norm(x, (HIDDEN,)), (HIDDEN,), w[0], w[1]), 1),
    "heads": (lambda x, w, c, s: heads(x), 2),
    "heads and back": (lambda x, w, c, s: heads(x).transpose(1, 2).reshape(BATCH, TOKENS, -1), 1),
    "sizes all told": (lambda x, w, c, s: x.view((BATCH, TOKENS, 4, 2)).flatten(2), 1),
    "more dimensions": (lambda x, w, c, s: x.unsqueeze(1).unflatten(-1, (2, 4)).squeeze(1), 1),
    "expansion": (lambda x, w, c, s: x[:, :, None].expand(BATCH, TOKENS, 3, HIDDEN), 1),
    "repetition": (lambda x, w, c, s: x.repeat(2, 1, 3).repeat_interleave(2, dim=-1), 1),
    "permutation": (lambda x, w, c, s: x.permute(2, 0, 1), 2),
    "negative dimensions": (lambda x, w, c, s: x.unsqueeze(-1).transpose(-3, -1), 3),
    "parts of features": (lambda x, w, c, s: torch.cat(x.chunk(2, -1)[::-1], dim=-1) + x[..., :1], 1),
    "one feature": (lambda x, w, c, s: x[:, :, 0], 1),
    "one of the batch": (lambda x, w, c, s: x[0], 0),
    "features by number": (lambda x, w, c, s: x[:, :, [-2]], 1),
    "stacks": (lambda x, w, c, s: torch.stack((x, -x), dim=0), 2),
    "stacks after": (lambda x, w, c, s: torch.stack((x, -x), dim=-1), 1),
    "splits": (lambda x, w, c, s: x.split((3, 5), dim=-1)[1], 1),
    "one of a dimension": (lambda x, w, c, s: x.unbind(0)[1] + x.select(0, 0), 0),
    "sums of features": (lambda x, w, c, s: x.pow(2).mean(-1, keepdim=True) + x.sum(dim=2, keepdim=True), 1),
    "sums of the batch": (lambda x, w, c, s: x.sum(0), 0),
    "softmax": (lambda x, w, c, s: F.softmax(x, dim=-1).cumsum(2), 1),
    "the largest": (lambda x, w, c, s: x.topk(2, dim=-1)[0], 1),
    "gathering": (lambda x, w, c, s: x.gather(-1, x.argsort(dim=-1)), 1),
    "tables": (lambda x, w, c, s: heads(x) * c + s, 2),
}


FUSED: dict[str, tuple[Callable, int]] = {
    "fused norms": (lambda x, w, c, s: add_rms_norm(x, rms_norm(x, w[0], 1e-6), w[1], 1e-6)[0], 1),
    "fused layer norms": (
        lambda x, w, c, s: add_layer_norm(x, layer_norm(x, w[0], None, 1e-6), w[1], None, 1e-6)[1],
        1,
    ),
    "rotary": (lambda x, w, c, s: rotary(heads(x), heads(x)[:, :1], c, s, "halves")[1], 2),
    "rotary of one": (lambda x, w, c, s: rotary_one(heads(x), c, s, "halves"), 2),
    "gates": (lambda x, w, c, s: gated_activation(x, x * 2, "silu"), 1),
    "packed gates": (lambda x, w, c, s: clamped_gate(gated_activation_packed(x, "silu"), 1.0, 7.0, 1.0), 1),
    "adapters": (lambda x, w, c, s: lora_linear(x, w, None, w[:2], w[:, :2], 2.0), 1),
    "adapters with dropout": (
        lambda x, w, c, s: lora_linears(x, [w], [None], [w[:2]], [w[:, :2]], [2.0], [x * 2])[0],
        1,
    ),
}
KERNELS = (
    add_layer_norm, add_rms_norm, clamped_gate, dropped, gated_activation, gated_activation_packed,
    layer_norm, lora_linear, lora_linears, rms_norm, rotary, rotary_one,
)  # fmt: skip


def _operands():
    weight = nn.Parameter(torch.randn(HIDDEN, HIDDEN))
    return torch.randn(BATCH, TOKENS, HIDDEN), weight, *torch.randn(2, 1, 1, TOKENS, 4)


@pytest.mark.parametrize("name", [*ROW_WISE, *FUSED])
@pytest.mark.parametrize("tile", [3, 7])
def test_a_row_wise_operation_gives_tile_by_tile_what_it_gives_at_once(name, tile):
    function, rows = (ROW_WISE | FUSED)[name]
    operands = _operands()
    region, values = traced(function, *operands) if name in ROW_WISE else called(KERNELS, function, *operands)
    (stage,) = stages(region)
    assert stage.row_wise and stage.rows_out == (rows,), stage.reason
    (tiled,) = in_tiles(stage, [values[n] for n in stage.inputs], tile)
    torch.testing.assert_close(tiled, function(*operands))


def test_a_tile_with_the_numbers_of_its_tokens_drops_what_all_drop():
    x, _, _, _ = _operands()
    operands = x, torch.arange(TOKENS), torch.tensor([3, 4])
    region, values = called(KERNELS, lambda x, numbers, seed: dropped(x, numbers, seed, 0.5), *operands)
    (stage,) = stages(region)
    assert stage.rows_in == (1, 0, None) and stage.rows_out == (1,)
    (tiled,) = in_tiles(stage, [values[n] for n in stage.inputs], 3)
    assert torch.equal(tiled, dropped(*operands, 0.5))


MIXING: dict[str, tuple[Callable, str]] = {
    "an unknown operation": (lambda x, w: torch.fft.fft(x).real, "is not known to treat tokens apart"),
    "a convolution": (lambda x, w: F.conv1d(x, w[:, :, None]), "is not known to treat tokens apart"),
    "attention": (lambda x, w: F.scaled_dot_product_attention(x, x, x), "attention"),
    "some tokens": (lambda x, w: x[:, 1:], "it takes some of the tokens"),
    "one token": (lambda x, w: x[:, 0], "it takes some of the tokens"),
    "tokens by number": (lambda x, w: x[:, [0, 2]], "it takes some of the tokens"),
    "a sum over tokens": (lambda x, w: x.sum(1), "it works along the sequence"),
    "a sum of all": (lambda x, w: x.sum(), "it works along all dimensions"),
    "a softmax over tokens": (lambda x, w: x.softmax(1), "it works along the sequence"),
    "a running sum": (lambda x, w: x.cumsum(-2), "it works along the sequence"),
    "the largest of all": (lambda x, w: x.max(), "reduces"),
    "a norm over tokens": (lambda x, w: F.layer_norm(x, (TOKENS, HIDDEN)), "it normalises over tokens"),
    "tokens merged with the batch": (
        lambda x, w: x.view(-1, HIDDEN),
        "it merges tokens with another dimension",
    ),
    "tokens split": (lambda x, w: x.unflatten(1, (2, 4)), "it splits the sequence"),
    "tokens times tokens": (lambda x, w: x @ x.transpose(1, 2), "it multiplies tokens by tokens"),
    "a product over tokens": (lambda x, w: F.linear(x.transpose(1, 2), w), "it sums over tokens"),
    "a product over tokens from the left": (lambda x, w: w @ x, "it sums over tokens"),
    "sequences joined": (lambda x, w: torch.cat((x, x), dim=1), "it joins sequences"),
    "an empty tensor before a sequence": (
        lambda x, w: torch.cat((torch.empty(0), x), dim=-2),
        "it joins sequences",
    ),
    "an empty tensor of no length": (
        lambda x, w: torch.cat((torch.empty(0), x), dim=-1),
        "an operand has another length",
    ),
    "a sequence repeated": (lambda x, w: x.repeat(1, 2, 1), "it repeats the sequence"),
    "tokens crosswise": (lambda x, w: x + x.transpose(1, 2), "tokens meet in it"),
    "tokens picked": (lambda x, w: x.gather(1, x.argsort(dim=-1)), "it picks tokens"),
    "a weight as long as the sequence": (lambda x, w: x + w, "it slices what is read whole elsewhere"),
    "a tile of one token dropped": (lambda x, w: x.squeeze(), "it would drop a tile of one token"),
    "memory of another dtype": (lambda x, w: x.view(torch.int32), "it reads memory as another dtype"),
}


@pytest.mark.parametrize("name", MIXING)
def test_an_operation_that_mixes_tokens_is_whole_for_a_reason(name):
    function, reason = MIXING[name]
    x, w, *_ = _operands()
    said = _said(traced(function, x, w)[0])
    assert len(said) == 1 and reason in said[0], said


FUSED_MIXING: dict[str, tuple[Callable, str]] = {
    "a norm": (
        lambda x, w, c, s: rms_norm(x.transpose(1, 2), w[0], 1e-6),
        "tokens lie along the dimension that it mixes",
    ),
    "an adapter": (
        lambda x, w, c, s: lora_linear(x.transpose(1, 2), w, None, None, None),
        "it sums over tokens",
    ),
    "dropout of features": (
        lambda x, w, c, s: dropped(x.transpose(1, 2), c[0, 0, :, 0].long(), w[0, :2].long(), 0.5),
        "tokens are not where it counts them",
    ),
    "a rotation": (
        lambda x, w, c, s: rotary(heads(x), x.view(2, 8, 2, 4), c[:, :, :1], s[:, :, :1], "halves")[0],
        "different places",
    ),
}


@pytest.mark.parametrize("name", FUSED_MIXING)
def test_a_fused_operation_over_tokens_is_whole_for_a_reason(name):
    function, reason = FUSED_MIXING[name]
    (said,) = _said(called(KERNELS, function, *_operands())[0])
    assert reason in said


def _said(region):
    return [why for why in tokens_of(region.module.graph).mixing.values() if why]


def test_only_activations_of_the_length_that_most_have_are_sliced():
    x, y = torch.randn(2, 8, 4), torch.randn(2, 5, 4)
    region, values = traced(lambda x, z, y: (x + z + y[:, :1], y * 2), x, x.clone(), y)
    found = tokens_of(region.module.graph)
    assert found.length == 8 and [n.name for n in found.rows if n in values] == ["x", "z"]


def test_what_is_read_whole_in_one_place_is_not_sliced_in_another():
    x, table = torch.randn(BATCH, TOKENS, HIDDEN), torch.randn(TOKENS, HIDDEN)
    region, _ = traced(lambda x, table: F.linear(x, table) + table, x, table)
    assert _said(region) == ["it slices what is read whole elsewhere"]


def test_one_token_is_no_sequence():
    region, _ = traced(lambda x: x * 2, torch.randn(BATCH, 1, HIDDEN))
    assert not tokens_of(region.module.graph).rows


def test_a_symbolic_length_is_followed_as_a_number_is():
    def heads_of(x, w):
        batch, tokens, _ = x.shape
        return F.linear(x, w).view(batch, tokens, 2, -1).transpose(1, 2).reshape(batch, 2, tokens, -1)

    x, w, *_ = _operands()
    region, values = traced(heads_of, x, w, dynamic=True)
    (stage,) = stages(region)
    assert stage.row_wise and stage.rows_out == (2,), stage.reason
    (tiled,) = in_tiles(stage, [values[n] for n in stage.inputs], 3)
    torch.testing.assert_close(tiled, heads_of(x, w))
