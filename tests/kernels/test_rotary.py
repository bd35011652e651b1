"""The rotary op: its reference against the models' own functions, its kernel against fp64."""

from importlib import import_module

import pytest
import torch

from rewriter.kernels.rotary import rotary, rotary_one
from rewriter.kernels.rotary_layouts import LAYOUTS, rotary_one_reference, rotary_reference
from tests.accuracy import assert_as_accurate

device = "cuda" if torch.cuda.is_available() else "cpu"
op, op_one = torch.ops.rewriter.rotary, torch.ops.rewriter.rotary_one


def heads_first(batch, heads, tokens, head, dtype=torch.float32):
    """(batch, heads, tokens, head) as a projection's view gives it: the tokens outside in memory."""
    return torch.randn(batch, tokens, heads, head, device=device, dtype=dtype).transpose(1, 2)


def angles(batch, tokens, factors, dtype=torch.float32, heads_at=1):
    """Cosines and sines that differ in every place, so that a wrong place shows."""
    table = torch.randn(2, batch, tokens, factors, device=device).unsqueeze(heads_at + 1).to(dtype)
    return table[0], table[1]


def factors(layout, rotary_dim):
    return rotary_dim // 2 if layout.endswith("_half_cos") else rotary_dim


def leaf(x, dtype=None):
    """A leaf of the same memory, unless the dtype is another."""
    return x.detach().to(dtype or x.dtype).requires_grad_()


def with_gradients(function, q, k, grads, dtype=None):
    q, k = leaf(q, dtype), leaf(k, dtype)
    outs = function(q, k)
    return *outs, *torch.autograd.grad(
        outs, (q, k), [g.to(o.dtype) for g, o in zip(grads, outs, strict=True)]
    )


def compare(q, k, cos, sin, layout, compute_dtype=None, grads=None):
    """Results and both gradients of the kernel, of eager and in fp64."""
    grads = grads or (torch.randn_like(q), torch.randn_like(k))
    ours = with_gradients(lambda q, k: op(q, k, cos, sin, layout, compute_dtype), q, k, grads)
    eager = with_gradients(
        lambda q, k: rotary_reference(q, k, cos, sin, layout, compute_dtype=compute_dtype), q, k, grads
    )
    exact = cos.double(), sin.double()
    truth = with_gradients(lambda q, k: rotary_reference(q, k, *exact, layout), q, k, grads, torch.float64)
    for name, *values in zip(("q", "k", "dq", "dk"), ours, eager, truth, strict=True):
        assert_as_accurate(*values, name=name)


def transformers_function(model, name="apply_rotary_pos_emb"):
    pytest.importorskip("transformers")
    return getattr(import_module(f"transformers.models.{model}.modeling_{model}"), name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("model", "layout", "rotary_dim", "compute_dtype"),
    [
        ("llama", "halves", 8, None),
        ("gpt_neox", "halves", 4, None),
        ("olmo2", "halves", 8, torch.float32),
        ("cohere", "interleaved", 8, torch.float32),
        ("gpt_oss", "halves_half_cos", 8, None),
        ("glm", "interleaved_half_cos", 4, None),
    ],
)
def test_reference_is_what_the_model_computes(model, layout, rotary_dim, compute_dtype, dtype):
    q, k = heads_first(2, 4, 5, 8, dtype), heads_first(2, 2, 5, 8, dtype)
    cos, sin = angles(2, 5, factors(layout, rotary_dim), torch.float32 if model == "olmo2" else dtype)
    given = cos[:, 0], sin[:, 0]
    if model == "glm":
        given = [torch.cat((x, x), dim=-1) for x in given]
    theirs = transformers_function(model)(q, k, *given)
    ours = rotary_reference(q, k, cos, sin, layout, rotary_dim, compute_dtype)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_reference_is_what_deepseek_computes():
    q, k = heads_first(2, 4, 5, 8), heads_first(2, 1, 5, 8)
    half_cos, half_sin = angles(2, 5, 4)
    cos, sin = torch.cat((half_cos, half_cos), dim=-1), torch.cat((half_sin, half_sin), dim=-1)
    function = transformers_function("deepseek_v3", "apply_rotary_pos_emb_interleave")
    theirs = function(q, k, cos[:, 0], sin[:, 0])
    for layout, table in (
        ("pairs_to_halves", (cos, sin)),
        ("pairs_to_halves_half_cos", (half_cos, half_sin)),
    ):
        ours = rotary_reference(q, k, *table, layout)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_as_accurate_as_eager(layout, dtype):
    q, k = heads_first(2, 6, 5, 16, dtype), heads_first(2, 2, 5, 16, dtype)
    compare(q, k, *angles(2, 5, factors(layout, 16), dtype), layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_features_beyond_the_rotary_dimension_pass_through(layout):
    q, k = heads_first(2, 3, 5, 22, torch.bfloat16), heads_first(2, 1, 5, 22, torch.bfloat16)
    compare(q, k, *angles(1, 5, factors(layout, 12), torch.bfloat16), layout)


@pytest.mark.parametrize("layout", ["halves", "interleaved"])
def test_model_that_computes_in_fp32_gets_its_own_dtype_back(layout):
    q, k = heads_first(2, 3, 5, 10, torch.bfloat16), heads_first(2, 1, 5, 10, torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float32):
        compare(q, k, *angles(2, 5, 10, dtype), layout, torch.float32)


def test_fp32_cosines_promote_the_result_where_nothing_casts_it_back():
    q, k = heads_first(1, 3, 5, 12, torch.bfloat16), heads_first(1, 1, 5, 12, torch.bfloat16)
    cos, sin = angles(1, 5, 8)
    assert op(q, k, cos, sin, "halves")[0].dtype == torch.float32
    compare(q, k, cos, sin, "halves")


@pytest.mark.parametrize(("tokens", "heads"), [(1, 1), (3, 5), (70, 2), (2, 70)])
def test_odd_numbers_of_tokens_and_heads(tokens, heads):
    q, k = heads_first(2, heads, tokens, 32), heads_first(2, 1, tokens, 32)
    compare(q, k, *angles(1, tokens, 32), "halves")


def test_tokens_before_heads():
    q, k = torch.randn(2, 5, 6, 8, device=device), torch.randn(2, 5, 2, 8, device=device)
    for batch in (1, 2):
        compare(q, k, *angles(batch, 5, 8, heads_at=2), "halves")


def test_heads_apart_in_memory():
    q, k = torch.randn(2, 6, 37, 64, device=device), torch.randn(2, 2, 37, 64, device=device)
    compare(q, k, *angles(2, 37, 64), "halves")


def test_slices_of_a_packed_projection_and_expanded_cosines():
    packed = torch.randn(2, 5, 6 * 8 + 3, device=device)[..., 3:]
    q, k = (x.unflatten(-1, (-1, 8)).transpose(1, 2) for x in packed.split((4 * 8, 2 * 8), dim=-1))
    cos, sin = angles(1, 5, 8)
    shape = 2, -1, -1, -1
    compare(q, k, cos.expand(shape), sin.expand(shape), "halves")
    compare(q, k, cos.expand(shape), sin.expand(shape).contiguous(), "halves")
    compare(q, k, cos.squeeze((0, 1)), sin.squeeze((0, 1)), "interleaved")


def test_inputs_and_gradients_without_a_dense_last_dimension():
    q, k = torch.randn(2, 3, 8, 5, device=device).mT, torch.randn(2, 3, 8, 5, device=device).mT
    cos, sin = torch.randn(2, 1, 1, 8, 5, device=device).mT
    compare(q, k, cos, sin, "halves")
    ones = torch.ones((), device=device)
    compare(q, k, cos, sin, "interleaved", grads=(ones.expand(q.shape), ones.expand(k.shape)))


def test_tensors_of_three_dimensions():
    q, k = torch.randn(5, 4, 8, device=device), torch.randn(5, 4, 8, device=device)
    compare(q, k, torch.randn(5, 1, 8, device=device), torch.randn(5, 1, 8, device=device), "halves")


def test_results_and_gradients_keep_the_memory_order():
    q, k = leaf(heads_first(2, 4, 5, 8)), leaf(torch.randn(2, 2, 5, 8, device=device))
    outs = op(q, k, *angles(2, 5, 8), "halves")
    grads = torch.autograd.grad(outs, (q, k), [torch.randn(x.shape, device=device) for x in outs])
    for x, out, grad in zip((q, k), outs, grads, strict=True):
        assert x.stride() == out.stride() == grad.stride()


def test_one_tensor_alone():
    x, (cos, sin) = heads_first(2, 3, 5, 8, torch.bfloat16), angles(2, 5, 8, torch.bfloat16)
    for layout in ("halves", "pairs_to_halves"):
        alone = leaf(x)
        out = op_one(alone, cos, sin, layout)
        both = with_gradients(lambda q, k, layout=layout: op(q, k, cos, sin, layout), x, x, (x, x))
        assert torch.equal(out, both[0])
        assert torch.equal(torch.autograd.grad(out, alone, x)[0], both[2])


@pytest.mark.parametrize("wanted", [0, 1])
def test_only_the_gradient_that_is_asked_for_is_computed(wanted):
    inputs = [heads_first(2, 4, 5, 8), heads_first(2, 2, 5, 8)]
    cos, sin = angles(2, 5, 8)
    inputs[wanted] = leaf(inputs[wanted])
    outs = op(*inputs, cos, sin, "halves")
    sum(out.sum() for out in outs).backward()
    eager = leaf(inputs[wanted].detach())
    rotary_one_reference(eager, cos, sin, "halves").sum().backward()
    torch.testing.assert_close(inputs[wanted].grad, eager.grad)


def test_gradient_of_a_result_that_nobody_uses_is_zero():
    q, k = leaf(heads_first(2, 4, 5, 8)), leaf(heads_first(2, 2, 5, 8))
    op(q, k, *angles(2, 5, 8), "halves")[0].sum().backward()
    assert q.grad is not None and k.grad is None


@pytest.mark.parametrize("shape", [(0, 2, 5, 8), (2, 2, 0, 8), (2, 0, 5, 8)])
def test_empty_tensors(shape):
    x = torch.randn(shape, device=device)
    compare(x, x, *angles(1, shape[2], 8), "halves")


def test_not_a_number_comes_through():
    q, k = heads_first(1, 2, 3, 8), heads_first(1, 2, 3, 8)
    q[0, 1, 2, 5] = float("nan")
    out = op(q, k, *angles(1, 3, 8), "halves")[0]
    assert out.isnan().nonzero().tolist() == [[0, 1, 2, 1], [0, 1, 2, 5]]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("layout", ["halves", "interleaved", "pairs_to_halves_half_cos"])
def test_compiled_as_one_graph(layout, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, k, cos, sin: op(q, k, cos, sin, layout),
        fullgraph=True,
        backend="aot_eager",
        dynamic=dynamic,
    )
    for tokens in (5, 7):
        q, k = heads_first(2, 4, tokens, 8), heads_first(2, 2, tokens, 8)
        cos, sin = angles(2, tokens, factors(layout, 8))
        grads = torch.randn_like(q), torch.randn_like(k)
        ours = with_gradients(lambda q, k, cos=cos, sin=sin: compiled(q, k, cos, sin), q, k, grads)
        plain = with_gradients(lambda q, k, cos=cos, sin=sin: op(q, k, cos, sin, layout), q, k, grads)
        assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(ours, plain, strict=True))


def test_operator_contract():
    q, k = leaf(heads_first(2, 4, 5, 8)), leaf(heads_first(2, 2, 5, 8))
    cos, sin = angles(2, 5, 8)
    torch.library.opcheck(op.default, (q, k, cos, sin, "halves"))
    torch.library.opcheck(op.default, (q, k, cos, sin, "interleaved", torch.float32))
    torch.library.opcheck(op_one.default, (q, cos, sin, "halves"))


def test_other_devices_and_dtypes_take_the_reference():
    q, k = heads_first(2, 4, 5, 8).double(), heads_first(2, 2, 5, 8).double()
    cos, sin = angles(2, 5, 8)
    expected = rotary_reference(q, k, cos, sin, "halves")
    assert all(torch.equal(a, b) for a, b in zip(rotary(q, k, cos, sin, "halves"), expected, strict=True))
    assert torch.equal(rotary_one(q, cos, sin, "halves"), expected[0])
    assert rotary(q, None, cos, sin, "halves")[1] is None


def test_cosines_that_want_a_gradient_get_one():
    q, k = heads_first(2, 4, 5, 8), heads_first(2, 2, 5, 8)
    cos, sin = angles(2, 5, 8)
    cos.requires_grad_()
    sum(x.sum() for x in rotary(q, k, cos, sin, "halves")).backward()
    assert cos.grad is not None


def test_cosines_of_each_head_take_the_reference():
    q = heads_first(2, 4, 5, 8)
    cos, sin = torch.randn(2, 2, 4, 5, 8, device=device)
    expected = rotary_reference(q, q, cos, sin, "halves")
    assert all(torch.equal(a, b) for a, b in zip(rotary(q, q, cos, sin, "halves"), expected, strict=True))


def test_errors_name_the_value_and_the_way_out():
    q = torch.randn(1, 2, 3, 8, device=device)
    cos, sin = angles(1, 3, 8)
    with pytest.raises(ValueError, match=r"unknown layout 'half'; known are halves, halves_half_cos"):
        rotary(q, q, cos, sin, "half")
    with pytest.raises(ValueError, match="turns 16 features, but q .* has 8"):
        rotary(q, q, cos, sin, "halves_half_cos")
    with pytest.raises(ValueError, match="rotary_dim 4, but cos .* turns 8 features"):
        rotary(q, q, cos, sin, "halves", rotary_dim=4)
    with pytest.raises(ValueError, match="7 features do not make pairs"):
        rotary(q, q, cos[..., :7], sin[..., :7], "halves")
    with pytest.raises(ValueError, match="differ in shape"):
        rotary(q, q, cos, sin[..., :4], "halves")
    with pytest.raises(ValueError, match="may differ only in their heads"):
        op(q, q[:, :, :2], cos, sin, "halves")
    with pytest.raises(ValueError, match="does not broadcast"):
        op(q, q, *angles(1, 4, 8), "halves")
