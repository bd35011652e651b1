"""``lora_linear`` at the sizes of real models: gradients against eager's, and the memory that it keeps."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import fx
from torch._inductor.compile_fx import compile_fx

from rewriter.kernels.dequantize import Packed4bit, dequantize_4bit
from rewriter.kernels.lora_linear import lora_linears
from tests.accuracy import assert_as_accurate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

TOKENS, HIDDEN, R, SCALE = 2048, 4096, 32, 0.5


def randn(*shape, dtype=torch.bfloat16, scale=1.0, grad=True):
    return (torch.randn(shape, device="cuda") * scale).to(dtype).requires_grad_(grad)


def packed_weight(n):
    bitsandbytes = pytest.importorskip("bitsandbytes.functional")
    weight = randn(n, HIDDEN, scale=HIDDEN**-0.5, grad=False)
    data, state = bitsandbytes.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    second = (state.absmax, state.state2.code, state.offset)
    return Packed4bit(data, (n, HIDDEN), state.state2.absmax, 64, "nf4", *second)


def operands(sizes, adapter):
    weights = [packed_weight(n) for n in sizes]
    a = [randn(R, HIDDEN, dtype=adapter, scale=HIDDEN**-0.5) for _ in sizes]
    b = [randn(n, R, dtype=adapter, scale=0.2) for n in sizes]
    return weights, a, b


def eager(x, dense, a_list, b_list):
    return [F.linear(x, w) + F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype)) * SCALE
            for w, a, b in zip(dense, a_list, b_list, strict=True)]  # fmt: skip


def compiled(x, weights, a_list, b_list):
    """``lora_linears`` as the one node of a graph, through Inductor; and the graph's inputs."""
    graph, values = fx.Graph(), []

    def placed(value):
        if isinstance(value, torch.Tensor):
            values.append(value)
            return graph.placeholder(f"p{len(values)}")
        return Packed4bit(*map(placed, value)) if isinstance(value, Packed4bit) else value

    nothing, scales = [None] * len(weights), [SCALE] * len(weights)
    lists = [[placed(v) for v in column] for column in (weights, a_list, b_list)]
    args = (placed(x), lists[0], nothing, *lists[1:], scales, None, torch.bfloat16, torch.bfloat16)
    outputs = graph.call_function(lora_linears, args)
    graph.output(tuple(graph.call_function(operator.getitem, (outputs, i)) for i in range(len(weights))))
    return compile_fx(fx.GraphModule({}, graph), values), values


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(4096, 1024, 1024), (14336, 14336)], ids=["q-k-v", "gate-up"])
def test_a_layers_projections_are_as_accurate_as_eager(sizes, adapter):
    weights, a, b = operands(sizes, adapter)
    x = randn(TOKENS, HIDDEN)
    dense = [dequantize_4bit(w, torch.bfloat16) for w in weights]
    sources = [x, *a, *b]
    leaves = [t.detach().double().requires_grad_() for t in sources]
    count = len(sizes)
    function, values = compiled(x, weights, a, b)
    outcomes = [
        (function(*values), sources),
        (eager(x, dense, a, b), sources),
        (eager(leaves[0], [w.double() for w in dense], leaves[1 : 1 + count], leaves[1 + count :]), leaves),
    ]
    upstream = [torch.randn(TOKENS, n, device="cuda", dtype=torch.bfloat16) for n in sizes]
    results = [
        [*ys, *torch.autograd.grad(ys, leaf, [g.to(y.dtype) for g, y in zip(upstream, ys, strict=True)])]
        for ys, leaf in outcomes
    ]
    for i, trio in enumerate(zip(*results, strict=True)):
        assert_as_accurate(*trio, name=f"result {i}")


def test_the_weight_in_16_bits_does_not_live_until_the_backward():
    weights, a, b = operands((14336, 14336), torch.float32)
    x = randn(TOKENS, HIDDEN)
    function, values = compiled(x, weights, a, b)
    ys = function(*values)
    del ys
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    ys = function(*values)
    kept = torch.cuda.memory_allocated() - before - sum(y.numel() * y.element_size() for y in ys)
    assert kept < 14336 * HIDDEN * 2 / 4
