"""Masked attention at sizes and strides of real models, and what CUDA's own attention does beside it."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from rewriter.kernels.attention import attention, attention_reference
from rewriter.kernels.attention_terms import span_sizes
from rewriter.kernels.attention_unmasked import causal_attention
from tests.accuracy import assert_as_accurate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

PACKED = [1500, 300, 2200, 700, 900, 1100, 392, 1100]  # 8192 tokens


def tensors(batch, heads, kv_heads, tokens, dim, value_dim=None, dtype=torch.bfloat16):
    sizes = ((heads, dim), (kv_heads, dim), (kv_heads, value_dim or dim))
    made = (torch.randn(batch, tokens, count, size, device="cuda", dtype=dtype) for count, size in sizes)
    return [x.transpose(1, 2).detach().requires_grad_() for x in made]


def documents(tokens, lengths):
    edges = torch.tensor(lengths, device="cuda").cumsum(0)
    return torch.searchsorted(edges, torch.arange(tokens, device="cuda"), right=True)[None]


def with_gradients(function, inputs, grad, **terms):
    out = function(*inputs, **terms)
    return out, *torch.autograd.grad(out, inputs, grad)


def compare(inputs, **terms):
    terms = {"scale": None, "causal": True} | terms
    grad = torch.randn_like(inputs[2][:, :1].expand(-1, inputs[0].shape[1], -1, -1))
    ours = with_gradients(attention, inputs, grad, **terms)
    eager = with_gradients(attention_reference, inputs, grad, **terms)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    truth = with_gradients(attention_reference, exact, grad.double(), **terms)
    # In fp32 the rounding of the log-sum-exp shows.
    slack = 2.0 if inputs[0].dtype == torch.float32 else 1.0
    for name, a, b, c in zip(("out", "q", "k", "v"), ours, eager, truth, strict=True):
        assert_as_accurate(a, b, c, name=name, slack=slack)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dim", [16, 64, 80, 96, 128, 192, 256])
def test_every_head_dimension(dtype, dim):
    compare(tensors(1, 4, 2, 515, dim, 128 if dim == 192 else dim, dtype), window=200)


@pytest.mark.parametrize(
    "terms",
    [
        {},
        {"window": 100},
        {"window": 1024},
        {"chunk": 300},
        {"causal": False},
        {"softcap": 5.0},
        {"segments": ...},
        {"segments": ..., "window": 130},
        {"key_mask": ...},
        {"key_mask": ..., "segments": ..., "softcap": 3.0},
    ],
    ids=str,
)
def test_every_mask_over_many_blocks(terms):
    tokens = 1333
    padding = torch.ones(2, tokens, dtype=torch.bool, device="cuda")
    padding[0, :300] = False
    padding[1, -200:] = False
    given = {"segments": documents(tokens, [5, 700, 1, 400, 227]), "key_mask": padding}
    compare(tensors(2, 8, 2, tokens, 128), **terms | {name: given[name] for name in terms if name in given})


def test_sinks_match_eager():
    q, k, v = tensors(1, 8, 2, 900, 64)
    sinks = torch.randn(8, device="cuda", dtype=torch.bfloat16).requires_grad_()
    grad = torch.randn_like(q)

    def both(function, inputs, grad):
        out = function(*inputs[:3], scale=None, causal=True, window=128, sinks=inputs[3])
        return out, *torch.autograd.grad(out, inputs, grad)

    inputs = [q, k, v, sinks]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    rows = (both(attention, inputs, grad), both(attention_reference, inputs, grad))
    for name, a, b, c in zip("oqkvs", *rows, both(attention_reference, exact, grad.double()), strict=True):
        assert_as_accurate(a, b, c, name=name)


def test_rows_without_keys_are_zeros_as_in_eager():
    q, k, v = tensors(2, 4, 2, 256, 64)
    mask = torch.ones(2, 256, dtype=torch.bool, device="cuda")
    mask[:, :70] = False
    out = attention(q, k, v, scale=None, causal=True, key_mask=mask)
    assert out[:, :, :70].eq(0).all()
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        eager = attention_reference(q, k, v, scale=None, causal=True, key_mask=mask)
    assert eager[:, :, :70].eq(0).all()


def test_eight_packed_documents_in_8192_tokens():
    compare(tensors(1, 4, 2, 8192, 128), segments=documents(8192, PACKED))


def test_a_window_of_4096_in_8192_tokens():
    compare(tensors(1, 4, 2, 8192, 128), window=4096)


@pytest.mark.parametrize("window", [0, 1024])
def test_capped_logits_of_the_widest_heads(window):
    compare(tensors(1, 4, 2, 2048, 256), window=window, softcap=50.0)


@pytest.mark.parametrize(
    "masked_by,dim", [("window", 64), ("segments", 128), ("key_mask", 128), ("softcap", 256)]
)
def test_it_repeats_bit_for_bit(masked_by, dim):
    tokens = 8192
    padding = torch.ones(2, tokens, dtype=torch.bool, device="cuda")
    padding[0, -3000:] = False
    given = {"window": 1000, "segments": documents(tokens, PACKED), "key_mask": padding, "softcap": 30.0}
    terms = {"scale": None, "causal": True, masked_by: given[masked_by]}
    inputs = tensors(2, 8, 2, tokens, dim)
    grad = torch.randn_like(inputs[0])
    first = with_gradients(attention, inputs, grad, **terms)
    for _ in range(3):
        again = with_gradients(attention, inputs, grad, **terms)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("order", [1, -1])
def test_the_spans_of_300000_tokens(order):
    tokens = 300_000
    line, cell = span_sizes(torch.device("cuda"))
    lengths = [*PACKED, 1, 1, 31, 32, 33, 100_000, 64, 63, 65]
    ids = documents(tokens, [*lengths, tokens - sum(lengths)]) * order
    spans = torch.ops.rewriter.attention_spans(ids, False)[0].long()
    # Documents lie as runs in either order: where each token's begins and ends.
    numbers = ids[0] * order
    first = torch.searchsorted(numbers, numbers)
    last = torch.searchsorted(numbers, numbers, right=True)
    starts = torch.arange(0, tokens, line, device="cuda")
    ends = (starts + line).clamp(max=tokens) - 1
    assert torch.equal(spans[:, 0], first[starts] // cell * cell)
    assert torch.equal(spans[:, 1], ((last[ends] + cell - 1) // cell * cell).clamp(max=tokens))
    full = spans[:, 2] < spans[:, 3]
    assert torch.equal(full & (numbers[starts] != numbers[ends]), torch.zeros_like(full))
    assert (spans[full, 2] >= first[starts][full]).all()
    assert (spans[full, 3] <= last[starts][full]).all()
    assert full.float().mean() > 0.9


def test_strides_of_a_packed_projection():
    packed = torch.randn(2, 700, 12, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    inputs = [packed[:, :8], packed[:, 8:10], packed[:, 10:]]
    compare([x.detach().requires_grad_() for x in inputs], window=256)


def test_no_tensor_of_tokens_squared():
    tokens = 65_536
    inputs = tensors(1, 2, 1, tokens, 64)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ids = documents(tokens, [tokens // 4] * 4)
    attention(*inputs, scale=None, causal=True, segments=ids).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 12 * inputs[0].nbytes < tokens * tokens


@pytest.mark.parametrize("masked_by", ["window", "segments"])
@pytest.mark.parametrize("batch,tokens", [(1, 300_000), (3, 100_000)])
def test_past_two_to_the_31_elements(batch, tokens, masked_by):
    heads, dim = 64, 128
    assert batch * tokens * heads * dim > 2**31
    if torch.cuda.mem_get_info()[0] < 70 * 2**30:
        pytest.skip("q, k, v, the output and all gradients take 45 GB")
    ids = torch.arange(tokens, device="cuda")[None] // 100
    inputs = tensors(batch, heads, heads, tokens, dim)
    terms = {"window": 64} if masked_by == "window" else {"segments": ids}
    out = attention(*inputs, scale=None, causal=True, **terms)
    grad = torch.zeros_like(out)
    grad[:, :, -100:] = 1
    grads = torch.autograd.grad(out, inputs, grad)
    last = slice(batch - 1, batch), slice(-4, None)
    tail = [x[last][:, :, -300:].detach().requires_grad_() for x in inputs]
    terms = {"window": 64} if masked_by == "window" else {"segments": ids[:, -300:]}
    expected = attention_reference(*tail, scale=None, causal=True, **terms)
    expected_grads = torch.autograd.grad(expected, tail, grad[last][:, :, -300:])
    for ours, theirs in zip((out, *grads), (expected, *expected_grads), strict=True):
        torch.testing.assert_close(ours[last][:, :, -200:], theirs[:, :, -200:], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_grouped_causal_attention_stays_off_the_math_path(dim):
    fused = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    for dtype in (torch.bfloat16, torch.float32):
        q, k, v = tensors(1, 8, 2, 512, dim, dtype=dtype)
        with sdpa_kernel(fused):
            out = causal_attention(q, k, v)
            out.sum().backward()
        repeated = (x.repeat_interleave(4, dim=1) for x in (k, v))
        expected = F.scaled_dot_product_attention(q, *repeated, is_causal=True)
        torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
