"""Long attention has keys up to whole blocks where nobody sees them, in graphs of a GPU that is not there."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from rewriter.kernels.attention_key_blocks import missing_keys, with_keys
from rewriter.memory.long_attention import attend_to_whole_blocks

_aten = torch.ops.aten
PAD = _aten.constant_pad_nd.default


def _graph(tokens: int, keys: int | None = None, causal: bool = True, dropout: float = 0.0):
    def attention(q, k, v):
        return _aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, dropout, causal, False)[:2]

    with FakeTensorMode():
        shapes = [(1, 4, tokens, 64), *[(1, 2, keys or tokens, 64)] * 2]
        given = [torch.empty(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]
        module = make_fx(attention)(*given)
    attend_to_whole_blocks(module)
    return module


def test_keys_and_values_are_padded_to_whole_blocks_and_queries_are_not():
    module = _graph(16500)
    pads = module.graph.find_nodes(op="call_function", target=PAD)
    (attention,) = module.graph.find_nodes(
        op="call_function", target=_aten._scaled_dot_product_cudnn_attention.default
    )
    assert [n.meta["val"].shape[2] for n in attention.args[:3]] == [16500, 16512, 16512]
    assert list(attention.args[1:3]) == pads and [n.args[1] for n in pads] == [[0, 0, 0, 12]] * 2


@pytest.mark.parametrize(
    "given",
    [
        {"tokens": 16512},
        {"tokens": 300},
        {"tokens": 16500, "causal": False},
        {"tokens": 16500, "keys": 16600},
        {"tokens": 16500, "keys": 16400},
        {"tokens": 16500, "dropout": 0.1},
    ],
    ids=["whole blocks", "short", "every key is seen", "more keys", "fewer keys", "dropout"],
)
def test_attention_is_left_as_it_is_where_zeros_would_be_seen_or_gain_nothing(given):
    assert not _graph(**given).graph.find_nodes(op="call_function", target=PAD)


def test_keys_that_complete_a_block_change_no_causal_attention(monkeypatch):
    monkeypatch.setattr("rewriter.kernels.attention_key_blocks._LONG", 1)
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 150, 16, dtype=torch.float64)
    missing = missing_keys(q, k, True)
    assert missing == 106

    def attention(keys, values):
        seen = torch.ones(150, keys.shape[2], dtype=torch.bool).tril()
        return torch.nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=seen)

    torch.testing.assert_close(attention(with_keys(k, missing), with_keys(v, missing)), attention(k, v))
    assert with_keys(k, 0) is k
