"""Flash and cuDNN behind one op: against fp64, and in graphs whose lengths vary."""

import pytest
import torch

from rewriter.kernels import attention_by_length as module
from rewriter.kernels import attention_key_blocks
from rewriter.kernels.attention_by_length import attention_by_length
from rewriter.kernels.attention_groups import at_once, by_groups
from rewriter.kernels.attention_unmasked import causal_attention
from tests.accuracy import assert_as_accurate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernels are PyTorch's for CUDA")


def operands(batch, heads, groups, tokens, dim, dtype=torch.bfloat16):
    torch.manual_seed(0)
    shapes = [(batch, tokens, h, dim) for h in (heads, groups, groups, heads)]
    made = [torch.randn(s, device="cuda", dtype=dtype).transpose(1, 2) for s in shapes]
    return [x.requires_grad_() for x in made[:3]], made[3]


def results(function, inputs, upstream):
    out = function(*inputs)
    return [out, *torch.autograd.grad(out, inputs, upstream.to(out.dtype))]


def reference(q, k, v, causal):
    repeats = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(repeats, 1) for x in (k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)


def check_against_eager(attention, inputs, upstream, causal):
    """The result of ``attention`` and its gradients, both they and eager's against fp64."""
    wide = [x.detach().double().requires_grad_() for x in inputs]
    ours = results(attention, inputs, upstream)
    eager, truth = (
        results(lambda q, k, v: reference(q, k, v, causal), given, upstream) for given in (inputs, wide)
    )
    for name, *values in zip(("out", "dq", "dk", "dv"), ours, eager, truth, strict=True):
        assert_as_accurate(*values, name=name)


# cuDNN refuses a single token, which the op never gives it.
@pytest.mark.parametrize(("longest", "tokens"), [(0, 127), (0, 300), (4096, 1), (4096, 127), (4096, 300)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("groups", "dim"), [(4, 64), (2, 128)])
def test_both_kernels_are_as_accurate_as_eager(longest, causal, tokens, groups, dim, monkeypatch):
    monkeypatch.setattr(module, "LONGEST_FLASH", longest)
    check_against_eager(
        lambda q, k, v: attention_by_length(q, k, v, dim**-0.5, causal),
        *operands(2, 4, groups, tokens, dim),
        causal,
    )


@pytest.mark.parametrize("tokens", [129, 300, 384])
@pytest.mark.parametrize(("groups", "dim"), [(4, 64), (2, 128)])
def test_keys_up_to_whole_blocks_are_as_accurate_as_eager(tokens, groups, dim, monkeypatch):
    monkeypatch.setattr(module, "LONGEST_FLASH", 0)
    monkeypatch.setattr(attention_key_blocks, "_LONG", 1)
    check_against_eager(
        lambda q, k, v: attention_by_length(q, k, v, dim**-0.5, True),
        *operands(2, 4, groups, tokens, dim),
        True,
    )


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("tokens", [300, 384])
@pytest.mark.parametrize("manner", ["by groups", "at once"])
def test_a_backward_with_whole_blocks_is_the_plain_one(manner, tokens, rows, monkeypatch):
    inputs, grad = operands(rows, 4, 2, tokens, 64)
    q, k, v = (x.detach() for x in inputs)
    out, logsumexp, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, True, False, scale=0.125
    )
    unused = torch.empty(2, dtype=torch.int64, device="cuda")
    given = grad, q, k, v, out, logsumexp, unused[0], unused[1], None, None, None, tokens, tokens, 0.0, True
    backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default
    plain = backward(*given, scale=0.125)
    monkeypatch.setattr(attention_key_blocks, "_LONG", 1)
    op = by_groups[backward]
    op = op if manner == "by groups" else at_once[op]
    for name, ours, expected in zip("qkv", op(*given, scale=0.125), plain, strict=True):
        assert ours.shape == expected.shape and (rows == 1 or ours.stride() == expected.stride())
        # Sums over keys may come in another order.
        assert (ours.double() - expected.double()).norm() < 4e-3 * expected.double().norm(), name


def test_one_graph_serves_lengths_on_both_sides_of_the_limit(monkeypatch):
    monkeypatch.setattr(module, "LONGEST_FLASH", 256)
    torch._dynamo.reset()
    # As passes put it into a graph: traced by AOTAutograd, not by Dynamo.
    attention = torch._dynamo.allow_in_graph(causal_attention)
    compiled = torch.compile(lambda q, k, v: attention(q, k, v), dynamic=True, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (72, 200, 256, 257, 640):  # none equal to another size, which would be taken for it
            check_against_eager(compiled, *operands(2, 4, 2, tokens, 64), True)


def test_past_two_to_the_31_bytes_the_last_rows_are_right():
    """Of the longest contexts: cuDNN's offsets past 2^31, in its forward and in a group's backward."""
    tokens, heads, groups, dim, last = 430_000, 32, 8, 128, 128
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("q, k, v, the result and its gradient take 13 GB")
    aten, scale = torch.ops.aten, dim**-0.5
    inputs, grad = operands(1, heads, groups, tokens, dim)
    q, k, v = (x.detach() for x in inputs)
    assert q.nbytes > 2**31
    # Other rows' gradients are zero, so that those of keys and values come from the last ones alone.
    grad[:, :, :-last] = 0
    out, logsumexp, *_ = aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, True, False, scale=scale
    )
    share = heads // groups
    own, shared = slice(heads - share, heads), slice(groups - 1, groups)
    unused = torch.empty(2, dtype=torch.int64, device="cuda")
    states = unused[0], unused[1], None, None, None
    dq, dk, dv = by_groups[aten._scaled_dot_product_cudnn_attention_backward.default](
        grad[:, own], q[:, own], k[:, shared], v[:, shared], out[:, own], logsumexp[:, own],
        *states, tokens, tokens, 0.0, True, scale=scale,
    )  # fmt: skip
    exact = [x.float().requires_grad_() for x in (q[0, own, -last:], k[0, shared][0], v[0, shared][0])]
    logits = exact[0] @ exact[1].t() * scale
    seen = torch.arange(tokens, device="cuda") <= torch.arange(tokens - last, tokens, device="cuda")[:, None]
    expected = logits.masked_fill(~seen, float("-inf")).softmax(-1) @ exact[2]
    gradients = torch.autograd.grad(expected, exact, grad[0, own, -last:].float())
    found = out[0, own, -last:], dq[0, :, -last:], dk[0, 0], dv[0, 0]
    for name, ours, truth in zip(("out", "dq", "dk", "dv"), found, (expected, *gradients), strict=True):
        for rows in (slice(None, 1000), slice(-1000, None)):
            near, exactly = ours[..., rows, :].double(), truth.detach()[..., rows, :].double()
            assert (near - exactly).norm() < 2e-2 * exactly.norm(), (name, rows)
