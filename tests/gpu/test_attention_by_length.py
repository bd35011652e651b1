"""Flash and cuDNN behind one op: against fp64, and in graphs whose lengths vary."""

import pytest
import torch

from rewriter.kernels import attention_by_length as module
from rewriter.kernels.attention_by_length import attention_by_length
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


# cuDNN refuses a single token, which the op never gives it.
@pytest.mark.parametrize(("longest", "tokens"), [(0, 127), (0, 300), (4096, 1), (4096, 127), (4096, 300)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("groups", "dim"), [(4, 64), (2, 128)])
def test_both_kernels_are_as_accurate_as_eager(longest, causal, tokens, groups, dim, monkeypatch):
    monkeypatch.setattr(module, "LONGEST_FLASH", longest)
    inputs, upstream = operands(2, 4, groups, tokens, dim)
    ours = results(lambda q, k, v: attention_by_length(q, k, v, dim**-0.5, causal), inputs, upstream)
    eager = results(lambda q, k, v: reference(q, k, v, causal), inputs, upstream)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    truth = results(lambda q, k, v: reference(q, k, v, causal), wide, upstream)
    for name, *values in zip(("out", "dq", "dk", "dv"), ours, eager, truth, strict=True):
        assert_as_accurate(*values, name=name)


def test_one_graph_serves_lengths_on_both_sides_of_the_limit(monkeypatch):
    monkeypatch.setattr(module, "LONGEST_FLASH", 256)
    torch._dynamo.reset()
    # As passes put it into a graph: traced by AOTAutograd, not by Dynamo.
    attention = torch._dynamo.allow_in_graph(causal_attention)
    compiled = torch.compile(lambda q, k, v: attention(q, k, v), dynamic=True, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (72, 200, 256, 257, 640):  # none equal to another size, which would be taken for it
            inputs, upstream = operands(2, 4, 2, tokens, 64)
            ours = results(compiled, inputs, upstream)
            wide = [x.detach().double().requires_grad_() for x in inputs]
            truth = results(lambda q, k, v: reference(q, k, v, True), wide, upstream)
            eager = results(lambda q, k, v: reference(q, k, v, True), inputs, upstream)
            for values in zip(ours, eager, truth, strict=True):
                assert_as_accurate(*values)
