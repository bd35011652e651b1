"""Masked attention: every term of the mask alone and together, forward and gradients, against fp64."""

import math

import pytest
import torch

from rewriter.kernels import attention as attention_module
from rewriter.kernels import attention_triton
from rewriter.kernels.attention import (
    attention,
    attention_reference,
    attention_refusal,
    fused_attention,
)
from rewriter.kernels.attention_terms import Terms, span_sizes
from rewriter.kernels.attention_unmasked import causal_attention
from tests.accuracy import assert_as_accurate

device = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter multiplies bfloat16 by its bits; only a GPU can check that dtype.
dtypes = [torch.float32, torch.float16] + ([torch.bfloat16] if device == "cuda" else [])
tokens = 301 if device == "cuda" else 33
names = ("q", "k", "v", "sinks")


def tensors(
    batch=1, heads=2, kv_heads=1, queries=tokens, keys=None, dim=16, value_dim=None, dtype=torch.float32
):  # fmt: skip
    def transposed(count, length, size):
        x = torch.randn(batch, length, count, size, device=device, dtype=dtype).transpose(1, 2)
        return x.detach().requires_grad_()

    keys = queries if keys is None else keys
    return (
        transposed(heads, queries, dim),
        transposed(kv_heads, keys, dim),
        transposed(kv_heads, keys, value_dim or dim),
    )


def documents(batch=1, length=tokens):
    """Sorted ids: three documents, of 7, 15 and the remaining tokens."""
    position = torch.arange(length, device=device)
    return ((position >= 7).long() + (position >= 22).long()).expand(batch, -1)


def padding(batch=1, length=tokens):
    """The first row padded on the left, the others on the right."""
    mask = torch.ones(batch, length, dtype=torch.bool, device=device)
    mask[0, :5] = False
    mask[1:, -9:] = False
    return mask


def op(*inputs, scale=0.3, causal=False, **terms):
    return fused_attention(*inputs, scale=scale, causal=causal, **terms)


def with_gradients(function, inputs, sinks, grad, causal=False, **terms):
    out = function(*inputs, scale=0.3, causal=causal, sinks=sinks, **terms)
    wanted = [x for x in (*inputs, sinks) if x is not None]
    return out, *torch.autograd.grad(out, wanted, grad)


def compare(inputs, sinks=None, **terms):
    """ours and eager in the inputs' dtype against the reference in fp64."""
    grad = torch.randn(*inputs[0].shape[:3], inputs[2].shape[-1], device=device).to(inputs[0].dtype)
    ours = with_gradients(op, inputs, sinks, grad, **terms)
    eager = with_gradients(attention_reference, inputs, sinks, grad, **terms)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    exact_sinks = None if sinks is None else sinks.detach().double().requires_grad_()
    truth = with_gradients(attention_reference, exact, exact_sinks, grad.double(), **terms)
    # Probabilities recomputed from a log-sum-exp near 5 carry that number's fp32 rounding; eager's dense
    # path, which saves them, does not: at 5 queries, a median of 2.3 times eager's. 16-bit rounding hides it.
    is_fp32 = inputs[0].dtype == torch.float32
    # A gradient of the scores is a difference of two sums over the head's dimension.
    allowed = {"slack": 2.0, "worst": 4.0, "size": 4 * inputs[0].shape[-1] ** 0.5} if is_fp32 else {}
    for name, a, b, c in zip(("out", *names), ours, eager, truth, strict=False):
        assert_as_accurate(a, b, c, name=name, **allowed)
    return ours


masks = {
    "nothing": {},
    "causal": {"causal": True},
    "a narrow window": {"causal": True, "window": 5},
    "a wide window": {"causal": True, "window": 20},
    "chunks": {"causal": True, "chunk": 24},
    "chunks both ways": {"chunk": 20},
    "documents": {"causal": True, "segments": documents()},
    "documents both ways": {"segments": documents()},
    "unsorted segments": {"causal": True, "segments": documents() % 2},
    "padding": {"key_mask": padding()},
    "causal padding": {"causal": True, "key_mask": padding()},
    "all of them": {
        "causal": True,
        "window": 9,
        "chunk": 20,
        "segments": documents(),
        "key_mask": padding(),
        "softcap": 1.5,
    },
}


@pytest.mark.parametrize("terms", masks.values(), ids=masks.keys())
def test_each_mask_gives_the_values_and_gradients_of_its_dense_mask(terms):
    compare(tensors(), **terms)


@pytest.mark.parametrize("dtype", dtypes)
@pytest.mark.parametrize("dim,value_dim", [(24, 16), (16, 40)])
def test_odd_and_unequal_head_dimensions(dtype, dim, value_dim):
    compare(tensors(dim=dim, value_dim=value_dim, dtype=dtype), causal=True, window=11)


@pytest.mark.parametrize("dtype", dtypes)
def test_batches_and_groups_of_heads_with_a_mask_of_each_row(dtype):
    terms = {"segments": documents(2) + torch.tensor([[0], [1]], device=device), "key_mask": padding(2)}
    compare(tensors(batch=2, heads=4, kv_heads=2, dtype=dtype), causal=True, **terms)


@pytest.mark.parametrize("dtype", dtypes)
def test_sinks_take_probability_and_get_a_gradient(dtype):
    sinks = torch.randn(4, device=device, dtype=dtype).requires_grad_()
    compare(tensors(heads=4, kv_heads=2, dtype=dtype), sinks, causal=True, window=7)


@pytest.mark.parametrize("dtype", dtypes)
def test_capped_logits(dtype):
    compare(tensors(dtype=dtype), causal=True, softcap=2.0)


def test_as_many_keys_as_one_likes_without_positions():
    compare(tensors(batch=2, queries=5, keys=tokens), key_mask=padding(2))


def test_rows_without_keys_give_zeros_and_zero_gradients_as_eager_does():
    inputs = tensors(batch=2)
    ours = compare(inputs, causal=True, key_mask=padding(2))
    assert ours[0][0, :, :5].eq(0).all()
    assert ours[1][0, :, :5].eq(0).all()
    sinks = torch.randn(2, device=device).requires_grad_()
    ours = compare(inputs, sinks, causal=True, key_mask=padding(2))
    assert ours[0][0, :, :5].eq(0).all()


def test_nan_reaches_every_row_that_may_see_it():
    q, k, v = (x.detach() for x in tensors(queries=20))
    v[0, 0, 12, 3] = math.nan
    k[0, 0, 18] = math.nan
    out = op(q, k, v, causal=True)
    assert out[:, :, 12:, 3].isnan().all()
    assert out[:, :, 18:].isnan().all()


def packed(*lengths):
    """Ids of documents of these lengths, in order; an empty one leaves a gap in the ids."""
    numbers = torch.arange(len(lengths), device=device)
    return torch.repeat_interleave(numbers, torch.tensor(lengths, device=device))[None]


line, cell = span_sizes(torch.device(device))
block = 128 if device == "cuda" else 16  # every tile of the kernels divides it
interrupted = packed(block, 3 * block, 5).remainder(2)
packings = {
    "odd lengths": packed(7, 1, block + 3, 2 * block - 1, 5),
    "empty documents": packed(0, 11, 0, 0, block + 9, 0),
    "one document": packed(3 * block + 1),
    "a document a token": torch.arange(block + 3, device=device)[None],
    "falling ids": packed(block + 5, 9, block).neg(),
    "a document in two parts": interrupted,
    "shuffled ids": packed(9, block, 2 * block)[:, torch.randperm(3 * block + 9).to(device)],
    "ids past 32 bits": packed(block, 9) * 2**32,
    "two rows": torch.cat([packed(5, 2 * block), packed(block + 3, block + 2)]),
}


@pytest.mark.parametrize("ids", packings.values(), ids=packings.keys())
def test_the_spans_of_documents_miss_no_pair_and_are_exact_to_a_cell_where_ids_are_sorted(ids):
    spans = torch.ops.rewriter.attention_spans(ids, False)
    assert spans.shape == (ids.shape[0], -(-ids.shape[1] // line), 4)
    for row, lines in zip(ids.tolist(), spans.tolist(), strict=True):
        is_sorted = row == sorted(row) or row == sorted(row, reverse=True)
        for number, (first, last, full_first, full_last) in enumerate(lines):
            own = set(row[number * line : (number + 1) * line])
            seen = [i for i, x in enumerate(row) if x in own]
            assert first <= seen[0] and seen[-1] < last <= len(row)
            assert set(row[full_first:full_last]) <= own
            assert full_first == full_last or len(own) == 1
            if is_sorted:
                assert (first, last) == (
                    seen[0] // cell * cell,
                    min(-(-(seen[-1] + 1) // cell) * cell, len(row)),
                )
                whole = (full_first - seen[0], seen[-1] + 1 - full_last)
                assert len(own) > 1 or max(whole) < cell or len(seen) < 3 * cell


@pytest.mark.parametrize("ids", packings.values(), ids=packings.keys())
def test_packed_documents_of_every_kind(ids):
    compare(tensors(batch=ids.shape[0], queries=ids.shape[1]), causal=True, segments=ids)


@pytest.mark.parametrize("lines", [1, 2])
def test_lines_of_the_table_as_long_as_the_kernels_blocks_or_longer(monkeypatch, lines):
    monkeypatch.setattr(attention_module, "span_sizes", lambda device: (lines * block, cell))
    monkeypatch.setattr(attention_triton, "span_sizes", lambda device: (lines * block, cell))
    compare(tensors(queries=3 * block + 9), causal=True, segments=packed(block + 3, 7, 2 * block - 1))


@pytest.mark.parametrize("causal", [True, False])
def test_blocks_of_other_documents_are_not_read(causal):
    q, k, v = tensors(queries=3 * block)
    ids = packed(block, block, block)
    alone = slice(block, 2 * block)
    poisoned = [x.detach().clone() for x in (q, k, v)]
    for x in poisoned:
        x[:, :, alone] = math.nan
    grad = torch.randn_like(q)
    ours = with_gradients(op, (q, k, v), None, grad, causal=causal, segments=ids)
    poisoned = [x.requires_grad_() for x in poisoned]
    for a, b in zip(with_gradients(op, poisoned, None, grad, causal=causal, segments=ids), ours, strict=True):
        assert a[:, :, alone].isnan().all()
        others = [torch.cat([x[:, :, :block], x[:, :, 2 * block :]], dim=2) for x in (a, b)]
        assert torch.equal(*others)


@pytest.mark.parametrize("causal", [True, False])
def test_blocks_of_padding_alone_are_not_read(causal):
    q, k, v = tensors(queries=4 * block)
    valid = torch.ones(1, 4 * block, dtype=torch.bool, device=device)
    valid[:, :block] = valid[:, 3 * block :] = False
    poisoned = [q.detach().requires_grad_(), *(x.detach().clone() for x in (k, v))]
    for x in poisoned[1:]:
        x[:, :, :block] = x[:, :, 3 * block :] = math.nan
        x.requires_grad_()
    grad = torch.randn_like(q)
    ours = with_gradients(op, (q, k, v), None, grad, causal=causal, key_mask=valid)
    theirs = with_gradients(op, poisoned, None, grad, causal=causal, key_mask=valid)
    assert all(torch.equal(a, b) for a, b in zip(theirs, ours, strict=True))
    assert all(x[:, :, :block].eq(0).all() for x in ours[2:])


def test_padding_with_holes_and_rows_of_nothing_else():
    valid = torch.ones(3, 3 * block + 5, dtype=torch.bool, device=device)
    valid[0, 2 * cell : block + 3] = False
    valid[1] = False
    valid[2, 1:] = False
    ours = compare(tensors(batch=3, queries=3 * block + 5), causal=True, key_mask=valid)
    assert all(x[1].eq(0).all() for x in ours)


def test_one_token():
    q, k, v = tensors(queries=1)
    grad = torch.randn(1, 2, 1, 16, device=device)
    out, dq, dk, dv = with_gradients(op, (q, k, v), None, grad, causal=True, window=3)
    assert torch.equal(out, v.expand_as(out))
    torch.testing.assert_close(dv, grad.sum(1, keepdim=True))
    # The softmax of one logit does not move: its gradient is the difference of two equal sums, and what
    # is left of it their rounding.
    logit_gradient = 4 * torch.finfo(torch.float32).eps * (grad.abs() * v.abs()).sum(-1, keepdim=True)
    assert (dq.abs() <= 0.3 * logit_gradient * k.abs()).all()
    assert (dk.abs() <= 0.3 * (logit_gradient * q.abs()).sum(1, keepdim=True)).all()


def test_strided_inputs_and_an_expanded_gradient():
    q, k, v = tensors(queries=20, dim=32)
    inputs = [x[..., ::2].detach().requires_grad_() for x in (q, k, v)]
    ours = with_gradients(op, inputs, None, torch.ones((), device=device).expand(1, 2, 20, 16), causal=True)
    plain = [x.detach().contiguous().requires_grad_() for x in inputs]
    again = with_gradients(op, plain, None, torch.ones(1, 2, 20, 16, device=device), causal=True)
    for a, b in zip(ours, again, strict=True):
        assert torch.equal(a, b)


def test_gradients_come_only_where_they_are_wanted():
    q, k, v = tensors(queries=5)
    k.requires_grad_(False)
    out = op(q, k, v, causal=True)
    out.sum().backward()
    assert k.grad is None
    assert q.grad.shape == q.shape
    assert v.grad.shape == v.shape


@pytest.mark.parametrize("shape", [{"batch": 0}, {"queries": 0}, {"queries": 3, "keys": 0}])
def test_empty_inputs(shape):
    inputs = tensors(**shape)
    out = op(*inputs)
    assert out.shape == inputs[0].shape
    assert out.eq(0).all()
    grads = torch.autograd.grad(out, inputs, torch.ones_like(out))
    assert all(g.shape == x.shape and g.eq(0).all() for g, x in zip(grads, inputs, strict=True))


def test_the_output_lies_in_memory_as_the_model_transposes_it():
    out = op(*tensors(batch=2, queries=5), causal=True)
    assert out.transpose(1, 2).is_contiguous()


def test_the_op_keeps_pytorchs_rules():
    q, k, v = tensors(batch=2, heads=4, kv_heads=2, queries=5)
    sinks = torch.randn(4, device=device).requires_grad_()
    ids, mask = documents(2, 5), padding(2, 5)
    spans = torch.ops.rewriter.attention_spans.default
    masked = (ids, spans(ids, False), mask, spans(mask, True), sinks, 0.3, True, 3, 0, 0.0)
    capped = (None, None, None, None, None, 0.3, True, 0, 0, 2.0)
    for of_mask, x in ((False, ids), (True, mask)):
        torch.library.opcheck(spans, (x, of_mask))
    for terms in (masked, capped):
        torch.library.opcheck(torch.ops.rewriter.attention.default, (q, k, v, *terms))


def test_a_compiled_graph_of_dynamic_length_gives_the_same():
    compiled = torch.compile(
        lambda q, k, v, ids: op(q, k, v, causal=True, window=4, segments=ids).transpose(1, 2).flatten(2),
        fullgraph=True, backend="aot_eager", dynamic=True,
    )  # fmt: skip
    for length in (10, 19):
        inputs, ids = tensors(queries=length), documents(1, length)
        out = compiled(*inputs, ids)
        grad = torch.randn_like(out)
        eager = op(*inputs, causal=True, window=4, segments=ids).transpose(1, 2).flatten(2)
        assert torch.equal(out, eager)
        ours, theirs = (torch.autograd.grad(x, inputs, grad) for x in (out, eager))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_the_public_function_runs_on_any_device_and_defaults_the_scale():
    inputs = tensors(heads=4, kv_heads=2)
    ours = attention(*inputs, scale=None, causal=True, window=6)
    theirs = attention_reference(*inputs, scale=0.25, causal=True, window=6)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_under_autocast_it_computes_in_its_dtype():
    with torch.autocast(device, torch.bfloat16):
        assert attention(*tensors(), scale=None, causal=True, window=6).dtype == torch.bfloat16


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_causal_attention_reads_grouped_heads(kv_heads):
    q, k, v = tensors(heads=4, kv_heads=kv_heads, dtype=torch.float64)
    truth = attention_reference(q, k, v, scale=0.3, causal=True)
    torch.testing.assert_close(causal_attention(q, k, v, 0.3), truth)


@pytest.mark.skipif(device != "cpu", reason="what CPU's dispatch chooses")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_heads_stay_on_the_cpus_flash_kernel(dtype):
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        causal_attention(*tensors(heads=4, kv_heads=2, dtype=dtype)).sum().backward()


def test_the_dense_mask_is_the_and_of_its_terms():
    ids, valid = documents(1, 33), padding(1, 33)
    terms = Terms(ids, None, valid, None, None, 1.0, causal=True, window=9, chunk=20, softcap=0.0)
    mask = terms.dense_mask(33, 33, ids.device)[0, 0]
    for i in range(33):
        for j in range(33):
            expected = i - 9 < j <= i and i // 20 == j // 20 and bool(ids[0, i] == ids[0, j])
            assert mask[i, j].item() == (expected and valid[0, j].item())


def test_it_says_what_it_refuses():
    q, k, v = tensors(heads=4, kv_heads=2)
    assert attention_refusal(q, k, v) is None
    assert "float64" in attention_refusal(q.double(), k.double(), v.double())
    assert "not one dtype" in attention_refusal(q, k.half(), v)
    assert "512 exceeds 256" in attention_refusal(q, k, v.repeat(1, 1, 1, 32))
    assert "4 query heads over 3" in attention_refusal(q, k[:, :1].repeat(1, 3, 1, 1), v)
    with pytest.raises(ValueError, match="float64"):
        op(q.double(), k.double(), v.double())
    with pytest.raises(ValueError, match="window 4 without causal"):
        op(q, k, v, window=4)
    with pytest.raises(ValueError, match="no common positions"):
        op(q[:, :, :5], k, v, causal=True)
    with pytest.raises(ValueError, match="scale -0.5 is negative"):
        op(q, k, v, scale=-0.5)
