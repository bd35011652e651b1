"""``lora_linear`` against PEFT's and bitsandbytes' own operations, and as part of a compiled graph."""

import operator

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.compile_fx import compile_fx
from torch._inductor.utils import run_and_get_code

from rewriter.kernels import lora_projection as module
from rewriter.kernels.dequantize import Packed4bit, dequantize_4bit_reference
from rewriter.kernels.lora_linear import adapter_is_narrow, linear_4bit, lora_linear, lora_linears
from tests.accuracy import assert_as_accurate

bitsandbytes = pytest.importorskip("bitsandbytes")

device = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS, K, R = (2, 19), 128, 8
SCALE = 2.0 / R**0.5


def randn(*shape, dtype=torch.float32, grad=True, scale=1.0):
    return (torch.randn(shape, device=device) * scale).to(dtype).requires_grad_(grad)


def quantise(weight, nested):
    data, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)
    second = (state.absmax, state.state2.code, state.offset) if nested else (None, None, None)
    absmax = state.state2.absmax if nested else state.absmax
    return Packed4bit(data, tuple(weight.shape), absmax, state.blocksize, "nf4", *second), data, state


class Projection:
    """One projection's operands, with the model's own operations and the truth on them."""

    def __init__(self, n=96, *, kind="dense", dtype=torch.bfloat16, adapter=torch.float32, bias=True,
                 train_weight=False, r=R):  # fmt: skip
        self.weight = randn(n, K, dtype=dtype, grad=train_weight, scale=K**-0.5)
        self.state = None
        if kind != "dense":
            self.weight, self.data, self.state = quantise(self.weight, nested=kind == "nested")
        self.dense = dequantize_4bit_reference(self.weight, dtype) if self.state else self.weight
        self.bias = randn(n, dtype=dtype) if bias else None
        self.a = randn(r, K, dtype=adapter, scale=K**-0.5) if r else None
        self.b = randn(n, r, dtype=adapter, scale=0.3) if r else None

    def base(self, x):
        if self.state is None:
            return F.linear(x, self.weight, self.bias)
        return bitsandbytes.matmul_4bit(x, self.data.t(), quant_state=self.state, bias=self.bias)

    def eager(self, x, dropped=None):
        y = self.base(x)
        if self.a is None:
            return y
        own = x if dropped is None else dropped
        update = F.linear(F.linear(own.to(self.a.dtype), self.a), self.b)
        return (y + update * SCALE).to(y.dtype)

    def exact(self, leaves, x, dropped=None):
        weight, bias, a, b = (None if t is None else leaves[id(t)] for t in self.tensors())
        y = F.linear(x, weight, bias)
        return y if a is None else y + F.linear(F.linear(x if dropped is None else dropped, a), b) * SCALE

    def tensors(self):
        return self.dense, self.bias, self.a, self.b

    def trained(self):
        return [t for t in self.tensors() if t is not None and t.requires_grad]


def fused(x, projections, dropped=None, **dtypes):
    columns = zip(*((p.weight, p.bias, p.a, p.b, SCALE) for p in projections), strict=True)
    return lora_linears(x, *columns, dropped, **dtypes)


def compare(projections, x, dropped=None, autocast=None, **dtypes):
    """Hold outputs and every gradient of the fused form to eager's distance from fp64."""
    dropped = dropped or [None] * len(projections)
    inputs = [x, *(d for d in dropped if d is not None)]
    wanted = [t for t in inputs if t.requires_grad] + [t for p in projections for t in p.trained()]
    operands = [*inputs, *(t for p in projections for t in p.tensors() if t is not None)]
    leaves = {id(t): t.detach().double().requires_grad_(t.requires_grad) for t in operands}
    with torch.autocast(device, autocast, enabled=autocast is not None):
        ours = fused(x, projections, dropped if any(d is not None for d in dropped) else None, **dtypes)
        eager = [p.eager(x, d) for p, d in zip(projections, dropped, strict=True)]
    exact = [p.exact(leaves, leaves[id(x)], None if d is None else leaves[id(d)])
             for p, d in zip(projections, dropped, strict=True)]  # fmt: skip
    upstream = [torch.randn_like(y, dtype=torch.float32) for y in ours]
    outcomes = []
    for ys, sources in ((ours, wanted), (eager, wanted), (exact, [leaves[id(t)] for t in wanted])):
        gradients = [g.to(eager[i].dtype).to(ys[i].dtype) for i, g in enumerate(upstream)]
        outcomes.append([*ys, *torch.autograd.grad(ys, sources, gradients)])
    for i, values in enumerate(zip(*outcomes, strict=True)):
        assert_as_accurate(*values, name=f"result {i}")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("adapter", [torch.float32, None], ids=["fp32-adapter", "adapter-as-base"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["dense", "nf4", "nested"])
def test_as_accurate_as_peft_on_every_kind_of_weight(kind, dtype, adapter, bias):
    projection = Projection(kind=kind, dtype=dtype, adapter=adapter or dtype, bias=bias)
    compare([projection], randn(*TOKENS, K, dtype=dtype))


@pytest.mark.parametrize("kind", ["dense", "nested"])
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
def test_dropout_has_a_gradient_of_its_own(kind, adapter):
    dropped = randn(*TOKENS, K, dtype=adapter)
    compare([Projection(kind=kind, adapter=adapter)], randn(*TOKENS, K, dtype=torch.bfloat16), [dropped])


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_all_products_take_its_dtype(base, x_dtype):
    projections = [Projection(dtype=base, bias=False), Projection(40, dtype=base, bias=True)]
    compare(projections, randn(*TOKENS, K, dtype=x_dtype), autocast=torch.bfloat16)


def test_a_4bit_weight_under_autocast_computes_in_the_inputs_dtype():
    compare([Projection(kind="nested")], randn(*TOKENS, K, dtype=torch.bfloat16), autocast=torch.bfloat16)


@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
def test_projections_of_one_input_share_their_products(kind, adapter):
    projections = [Projection(n, kind=kind, adapter=adapter, bias=n == 32, r=r)
                   for n, r in ((96, 8), (32, 4), (32, None))]  # fmt: skip
    compare(projections, randn(*TOKENS, K, dtype=torch.bfloat16))


def test_gradients_of_adapters_on_one_input_are_cast_and_kept_in_one_piece():
    projections = [Projection(n, kind="nested") for n in (96, 32, 48)]
    with torch.autocast(device, torch.bfloat16):
        ys = fused(randn(*TOKENS, K, dtype=torch.bfloat16), projections)
    found = torch.autograd.grad(ys, [p.a for p in projections], list(map(torch.ones_like, ys)))
    assert all(g.dtype == torch.float32 and g.is_contiguous() for g in found)
    assert {g.untyped_storage().data_ptr() for g in found} == {found[0].data_ptr()}
    assert found[0].untyped_storage().nbytes() == sum(g.nbytes for g in found)


def test_adapters_of_different_dtypes_keep_their_own():
    projections = [Projection(adapter=torch.bfloat16), Projection(adapter=torch.float32)]
    compare(projections, randn(*TOKENS, K, dtype=torch.bfloat16))


def test_projections_with_and_without_dropout_mix():
    dropped = [randn(*TOKENS, K), None, randn(*TOKENS, K)]
    compare([Projection() for _ in range(3)], randn(*TOKENS, K, dtype=torch.bfloat16), dropped)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_trainable_weight_gets_its_gradient(dtype):
    projection = Projection(dtype=dtype, train_weight=True)
    compare([projection], randn(*TOKENS, K, dtype=dtype))


def test_frozen_inputs_and_parameters_get_no_gradient():
    projection = Projection(kind="nested", bias=False)
    x = randn(*TOKENS, K, dtype=torch.bfloat16, grad=False)
    compare([projection], x)
    projection.a.requires_grad_(False)
    projection.b.requires_grad_(False)
    assert not fused(x, [projection])[0].requires_grad


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_the_bare_4bit_linear_saves_only_the_packed_weight(nested, grad):
    projection = Projection(kind="nested" if nested else "nf4", r=None)
    x = randn(*TOKENS, K, dtype=torch.bfloat16, grad=grad)
    compare([projection], x)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear_4bit(x, projection.weight, projection.bias)
    assert all(t.dtype != torch.bfloat16 for t in saved)
    assert bool(saved) == grad


def test_expanded_and_transposed_tensors_are_as_good():
    projection = Projection(dtype=torch.float32)
    wide = randn(K, 19, 2).permute(2, 1, 0)
    y = lora_linear(wide, projection.weight, projection.bias, projection.a, projection.b, SCALE)
    expected = projection.eager(wide)
    torch.testing.assert_close(y, expected)
    sources = [wide, *projection.trained()]
    ours, eager = (torch.autograd.grad(v.sum(), sources) for v in (y, expected))  # sum: an expanded gradient
    torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(0, K), (2, 0, K), (K,), (1, 1, K)])
def test_inputs_without_or_with_single_rows(shape):
    projection = Projection(dtype=torch.float32)
    x = randn(*shape)
    y = fused(x, [projection])[0]
    torch.testing.assert_close(y, projection.eager(x))
    sources = [x, *projection.trained()]
    ours, eager = (torch.autograd.grad(v.sum(), sources) for v in (y, projection.eager(x)))
    torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)


def test_an_adapter_of_rank_0_adds_nothing():
    projection = Projection(dtype=torch.float32, bias=False)
    a, b = randn(0, K), randn(96, 0)
    x = randn(*TOKENS, K)
    y = lora_linear(x, projection.weight, None, a, b, SCALE)
    torch.testing.assert_close(y, F.linear(x, projection.weight))
    found = torch.autograd.grad(y.sum(), (a, b))
    assert [g.shape for g in found] == [a.shape, b.shape]


def test_an_output_that_nobody_uses_costs_no_gradient():
    projections = [Projection(dtype=torch.float32), Projection(dtype=torch.float32)]
    x = randn(*TOKENS, K)
    y = fused(x, projections)[0]
    a, other = torch.autograd.grad(y.sum(), [projections[0].a, projections[1].a], allow_unused=True)
    assert a is not None and other is None


def test_a_result_wider_than_its_products_is_not_rounded_between():
    projection = Projection(adapter=torch.bfloat16, bias=False)
    x = randn(*TOKENS, K, dtype=torch.bfloat16)
    y = fused(x, [projection], out_dtype=torch.float32)[0]
    base, update = projection.base(x), F.linear(F.linear(x, projection.a), projection.b)
    torch.testing.assert_close(y, base.float() + update.float() * SCALE, rtol=0, atol=0)


def test_double_precision_gradients_match_finite_differences():
    operands = [
        randn(*shape, dtype=torch.float64) for shape in ((3, 5), (4, 5), (4,), (2, 5), (4, 2), (3, 5))
    ]
    assert torch.autograd.gradcheck(lambda x, w, c, a, b, d: lora_linear(x, w, c, a, b, 1.5, d), operands)
    assert torch.autograd.gradcheck(lambda x, w, c, a, b, d: lora_linear(x, w, c, a, b, 1.5), operands)


def test_misfit_operands_are_named():
    x, p = randn(3, K), Projection(dtype=torch.float32)
    with pytest.raises(ValueError, match="does not end in 128"):
        lora_linear(randn(3, 64), p.weight, None, p.a, p.b)
    with pytest.raises(ValueError, match="matrices is missing"):
        lora_linear(x, p.weight, None, p.a, None)
    with pytest.raises(ValueError, match="does not fit weight"):
        lora_linear(x, p.weight, None, p.a, p.b[:-1])
    with pytest.raises(ValueError, match="bias"):
        lora_linear(x, p.weight, p.bias[:-1], p.a, p.b)
    with pytest.raises(ValueError, match="dropped input"):
        lora_linear(x, p.weight, None, p.a, p.b, dropped=x[:2])


def test_narrow_adapters_are_told_from_wide_ones():
    assert adapter_is_narrow(32, 4096, 1024)
    assert not adapter_is_narrow(64, 4096, 128)


def graph_of(projections):
    """A graph with one ``lora_linears`` node, its placeholders' values, and the tensors it trains."""
    graph, values = fx.Graph(), [randn(*TOKENS, K, dtype=torch.bfloat16)]
    x = graph.placeholder("x")

    def placed(value):
        if isinstance(value, Packed4bit):
            return Packed4bit(*(placed(v) for v in value))
        if not isinstance(value, torch.Tensor):
            return value
        values.append(value)
        return graph.placeholder(f"p{len(values)}")

    columns = zip(
        *([placed(v) for v in (p.weight, p.bias, p.a, p.b, SCALE)] for p in projections), strict=True
    )
    outputs = graph.call_function(lora_linears, (x, *map(list, columns)))
    graph.output(tuple(graph.call_function(operator.getitem, (outputs, i)) for i in range(len(projections))))
    return fx.GraphModule({}, graph), values


def test_packed_weights_survive_in_a_graph():
    projection = Projection(kind="nested")
    module_, values = graph_of([projection])
    torch.testing.assert_close(module_(*values)[0], fused(values[0], [projection])[0], rtol=0, atol=0)


def through(compiler, projections):
    """Outputs and gradients of a graph of one ``lora_linears``, compiled and as it is."""
    gm, values = graph_of(projections)
    wanted = [v for v in values if v.requires_grad]
    plain = gm(*values)
    upstream = [torch.randn_like(y) for y in plain]
    expected = [*plain, *torch.autograd.grad(plain, wanted, upstream)]
    compiled = compiler(gm, values)(*values)
    return [*compiled, *torch.autograd.grad(compiled, wanted, upstream)], expected


class Recorder:
    """A compiler for AOTAutograd that keeps the graphs."""

    def __init__(self):
        self.graphs = []

    def __call__(self, gm, example_inputs):
        self.graphs.append(gm)
        return make_boxed_func(gm.forward)

    def count(self, target):
        return [sum(n.target == target for n in g.graph.nodes) for g in self.graphs]


def dequantised_by_ops(monkeypatch):
    """As on a GPU; their kernels run in the interpreter."""
    for name in ("dequantize_4bit", "dequantize_4bit_extended"):
        op = getattr(torch.ops.rewriter, name)
        monkeypatch.setattr(module, name, lambda packed, *rest, op=op: op(*packed, *rest))


@pytest.mark.parametrize("kind", ["dense", "nested"])
def test_aot_autograd_traces_every_product_and_dequantises_twice(kind, monkeypatch):
    """With the op itself in the graph, as on a GPU: the 16-bit weight is not kept for the backward."""
    dequantised_by_ops(monkeypatch)
    # On a GPU these are ops that write in place, which AOTAutograd wraps; here they are to be counted.
    monkeypatch.setattr(module, "add_product", lambda y, a, b, alpha=1.0: torch.addmm(y, a, b, alpha=alpha))
    # Three results are wide enough together to have what their B gives beside the gradient of x.
    count, n = (2, 96) if kind == "dense" else (3, 192)
    projections = [Projection(n, kind=kind, adapter=torch.bfloat16, bias=False) for _ in range(count)]
    recorder = Recorder()
    compiler = aot_autograd(fw_compiler=recorder, partition_fn=min_cut_rematerialization_partition)
    torch.testing.assert_close(*through(compiler, projections))
    forward, backward = recorder.count(torch.ops.aten.mm.default)
    added = recorder.count(torch.ops.aten.addmm.default)
    ops = torch.ops.rewriter
    # Forward: one product with the stacked A; each update, scaled as it is made; each base adds to one.
    assert (forward, added[0]) == (1, 2 * count)
    if kind == "nested":
        assert recorder.count(ops.dequantize_4bit.default) == [3, 0]
        assert recorder.count(ops.dequantize_4bit_extended.default) == [0, 3]
        # Backward: the first gradient of x with what its B gives, the others' added to both; the gradients of
        # each B, and of all A at once. The adapters' part is added in place.
        assert (backward, added[1]) == (1, 2 + 3 + 1)
    else:
        # Backward: the adapters' part of the gradient of x, and that of both A at once; added to the former
        # both weights'; each B has a product for its gradient and one for its input's, scaled as they are
        # made.
        assert (backward, added[1]) == (2, 2 + 4)
    if kind == "nested":
        outputs = next(n for n in recorder.graphs[0].graph.nodes if n.op == "output").args[0]
        assert all(n.meta["val"].shape != (192, K) for n in outputs if isinstance(n, fx.Node))


def test_inductor_compiles_it_over_4_bit_weights_with_static_sizes():
    projections = [Projection(kind="nested", bias=False), Projection(32, kind="nested")]
    ours, expected = through(compile_fx, projections)
    torch.testing.assert_close(ours, expected)


def written_in_place(total, left, right, alpha=1.0):
    """``add_product`` as on a GPU."""
    torch.ops.rewriter.add_product_(total, left, right, alpha)
    return total


# The base's products in the forward. In the backward the weights' gradients of x, to the adapters' part where
# there is one by itself.
@pytest.mark.parametrize(
    ("kind", "widths", "added", "folded"),
    [("dense", (96, 96), 2 + 2, 0), ("nested", (192, 192, 192), 3 + 2, 1)],
    ids=["dense", "4 bits"],
)
def test_updates_and_gradients_are_added_in_place_without_a_copy(kind, widths, added, folded, monkeypatch):
    dequantised_by_ops(monkeypatch)
    monkeypatch.setattr(module, "add_product", written_in_place)
    projections = [Projection(n, kind=kind, adapter=torch.bfloat16, bias=False) for n in widths]
    results = {}

    def compile_and_see(gm, values):
        compiled, codes = run_and_get_code(compile_fx, gm, values)
        results["forward"] = codes
        return compiled

    (ours, expected), codes = run_and_get_code(through, compile_and_see, projections)
    torch.testing.assert_close(ours, expected)
    code = "\n".join([*results["forward"], *codes])
    assert code.count("torch.ops.rewriter.add_product_.default(") == added
    assert code.count("torch.ops.rewriter.fold_columns_.default(") == folded
    assert "auto_functionalized" not in code and "clone" not in code


@pytest.mark.parametrize("symbolic_scale", [False, True])
@torch._dynamo.config.patch(error_on_recompile=True)
def test_one_compilation_serves_all_lengths(symbolic_scale):
    projection = Projection(kind="nested", dtype=torch.float32)
    packed = projection.weight
    torch._dynamo.reset()

    def stands_for_it(x, data, absmax, quantised, code, offset, bias, a, b, scale):
        rest = sum(t.sum() for t in (data, absmax, quantised, code, offset))
        return (F.linear(F.linear(x, a), b, bias) * scale + rest).to(x.dtype)

    def backend(gm, example_inputs):
        graph, named = fx.Graph(), {}
        for node in gm.graph.find_nodes(op="placeholder"):
            named[node.name.lower().strip("_").removeprefix("l_")] = graph.node_copy(node)
        names = ("data", "absmax", "quantised", "code", "offset")
        data, absmax, *second = (named[n] for n in names)
        weight = Packed4bit(data, packed.shape, absmax, packed.blocksize, packed.quant_type, *second)
        scale = SCALE
        if symbolic_scale:
            scale = graph.call_method("item", (named["scale"],))
        args = (named["x"], weight, named["bias"], named["a"], named["b"], scale)
        graph.output((graph.call_function(lora_linear, args),))
        return compile_fx(fx.GraphModule({}, graph), example_inputs)

    compiled = torch.compile(stands_for_it, backend=backend, dynamic=True)
    scale = torch.tensor(SCALE, dtype=torch.float64) if symbolic_scale else SCALE
    for length in (19, 33, 8):
        x = randn(2, length, K)
        operands = (
            packed.data,
            packed.absmax,
            *packed[5:],
            projection.bias,
            projection.a,
            projection.b,
            scale,
        )
        y, expected = compiled(x, *operands), projection.eager(x)
        sources = [x, *projection.trained()]
        upstream = torch.randn_like(y)
        ours, eager = (torch.autograd.grad(v, sources, upstream) for v in (y, expected))
        torch.testing.assert_close([y, *ours], [expected, *eager], rtol=1e-4, atol=1e-4)
