"""Attention's keys up to whole blocks change nothing that a query sees."""

import pytest
import torch

from rewriter.kernels.attention_key_blocks import missing_keys, with_keys


@pytest.mark.parametrize(
    ("queries", "keys", "causal", "missing"),
    [(16500, 16500, True, 12), (16512, 16512, True, 0), (300, 300, True, 0), (16500, 16500, False, 0),
     (16500, 16600, True, 0), (16500, 16400, True, 0)],
    ids=["long", "whole blocks", "short", "every key is seen", "more keys", "fewer keys"],
)  # fmt: skip
def test_keys_are_missing_only_where_zeros_are_seen_by_none_and_gain_something(
    queries, keys, causal, missing
):
    q, k = (torch.empty(1, heads, n, 64, device="meta") for heads, n in ((4, queries), (2, keys)))
    assert missing_keys(q, k, causal) == missing


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
