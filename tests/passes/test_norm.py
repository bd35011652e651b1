"""The norm pass: every way of writing a norm, and every reason to keep one."""

import pytest
import torch
import torch.nn.functional as F

import rewriter
from rewriter import registry
from rewriter.passes.norm import norm
from tests.golden import rewrite_with

EPS = 1e-6


def normalised(x, eps=EPS):
    h = x.to(torch.float32)
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)


def llama(x, weight):
    return weight * normalised(x).to(x.dtype)


def gemma(x, weight):
    return (normalised(x) * (1.0 + weight.float())).type_as(x)


def olmo(x, weight):
    return (weight * normalised(x)).to(x.dtype)


def fp32_weight(x, weight):
    return (normalised(x) * weight.float()).type_as(x)


def cohere(x, weight):
    h = x.to(torch.float32)
    mean = h.mean(-1, keepdim=True)
    variance = (h - mean).pow(2).mean(-1, keepdim=True)
    h = (h - mean) * torch.rsqrt(variance + EPS)
    return (weight.to(torch.float32) * h).to(x.dtype)


def torch_rms(x, weight):
    return F.rms_norm(x, (x.shape[-1],), weight, EPS)


def torch_layer(x, weight):
    return F.layer_norm(x, (x.shape[-1],), weight, None, EPS)


def operands(count=2, shape=(2, 5, 16), dtype=torch.bfloat16):
    """``count - 1`` tensors of ``shape``, and a weight."""
    tensors = [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(count - 1)]
    return *tensors, torch.randn(shape[-1], dtype=dtype, requires_grad=True)


ROUNDED_LAST = "rms_norm(x, weight, 1e-06, round_before_weight=False, out_dtype=torch.bfloat16)"
VARIANTS = {
    llama: ("llama_norm", "rms_norm(x, weight, 1e-06, out_dtype=torch.bfloat16)"),
    gemma: ("gemma_norm", "rms_norm(x, weight, 1e-06, 1.0, False, torch.bfloat16)"),
    olmo: ("olmo_norm", ROUNDED_LAST),
    fp32_weight: ("fp32_weight_norm", ROUNDED_LAST),
    cohere: ("cohere_norm", "layer_norm(x, weight, None, 1e-06, out_dtype=torch.bfloat16)"),
}


@pytest.mark.parametrize("function", VARIANTS, ids=lambda f: f.__name__)
def test_each_variant_becomes_one_call(function):
    done = rewrite_with(norm, function, *operands())
    rewrite, call = VARIANTS[function]
    assert done.rewrites == {rewrite: 1}
    assert done.calls == [call]
    assert done.reasons == []
    done.assert_same_numbers()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("function", [*VARIANTS, torch_rms, torch_layer], ids=lambda f: f.__name__)
def test_each_variant_is_found_in_every_float(function, dtype):
    done = rewrite_with(norm, function, *operands(dtype=dtype))
    assert sum(done.rewrites.values()) == 1
    assert [c for c in done.calls if not c.startswith(("to(", "type_as("))][1:] == []
    done.assert_same_numbers()


@pytest.mark.parametrize("function", [*VARIANTS, torch_layer], ids=lambda f: f.__name__)
def test_the_residual_add_is_fused_and_its_sum_handed_on(function):
    def block(x, residual, weight):
        h = residual + x
        return function(h, weight), h * 2

    done = rewrite_with(norm, block, *operands(3))
    (rewrite,) = done.rewrites
    assert rewrite.startswith("add_")
    fused, *rest = done.calls
    assert fused.startswith(("add_rms_norm(", "add_layer_norm(", "add_torch_layer_norm_op("))
    assert [c.partition("(")[0] for c in rest] == ["getitem", "getitem", "mul"]
    done.assert_same_numbers()


@pytest.mark.parametrize("function", [*VARIANTS, torch_layer], ids=lambda f: f.__name__)
def test_the_sum_may_be_an_output_of_the_graph(function):
    def block(x, residual, weight):
        h = residual + x
        return function(h, weight), h

    done = rewrite_with(norm, block, *operands(3))
    assert next(iter(done.rewrites)).startswith("add_")
    done.assert_same_numbers()


def test_a_sum_that_two_norms_read_is_fused_with_one_of_them():
    def block(x, residual, weight):
        h = residual + x
        return llama(h, weight), llama(h, weight)

    done = rewrite_with(norm, block, *operands(3))
    assert done.rewrites == {"add_llama_norm": 1, "llama_norm": 1}
    done.assert_same_numbers()


def test_a_norm_without_weight_is_found():
    done = rewrite_with(norm, lambda x: normalised(x).to(x.dtype), operands()[0])
    assert done.rewrites == {"unweighted_norm": 1}
    assert done.calls == ["rms_norm(x, None, 1e-06, out_dtype=torch.bfloat16)"]
    done.assert_same_numbers()


@pytest.mark.parametrize(
    "root",
    [
        lambda h: torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS),
        lambda h: torch.pow(h.pow(2).mean(-1, keepdim=True) + EPS, -0.5),
        lambda h: (h.pow(2).mean(-1, keepdim=True) + EPS) ** -0.5,
        lambda h: torch.rsqrt(torch.square(h).mean(-1, keepdim=True) + EPS),
        lambda h: torch.rsqrt((h * h).mean(-1, True) + EPS),
        lambda h: torch.rsqrt(EPS + (h**2).mean(dim=(-1,), keepdim=True)),
        lambda h: torch.rsqrt(torch.mean(h.pow(2), dim=2, keepdim=True).add(EPS)),
    ],
    ids=["rsqrt", "torch.pow(-0.5)", "**-0.5", "torch.square", "h*h", "eps first", "positive dim"],
)
@pytest.mark.parametrize(
    "cast",
    [
        lambda x: x.float(),
        lambda x: x.to(dtype=torch.float32),
        lambda x: x.type(torch.float32),
        lambda x: x.to(torch.float32, copy=False),
    ],
    ids=["float", "to(dtype=)", "type", "to(copy=)"],
)
def test_the_ways_of_writing_squares_roots_and_casts_are_one(root, cast):
    def function(x, weight):
        h = cast(x)
        return weight * (root(h) * h).to(x.dtype)

    done = rewrite_with(norm, function, *operands())
    assert done.calls == [VARIANTS[llama][1]]


def test_torch_rms_norm_takes_eps_from_its_dtype_where_none_is_given():
    done = rewrite_with(norm, lambda x, weight: F.rms_norm(x, (16,), weight), *operands())
    assert done.calls == ["torch_rms_norm_op(x, weight, None, 0.0078125, (16,), torch.bfloat16)"]
    done.assert_same_numbers()


def test_layer_norm_with_and_without_weight_and_bias():
    x, bias, weight = operands(3, (4, 16))[0], *operands(3, (16,))[:2]
    for args in ((None, None), (weight, None), (weight, bias)):
        done = rewrite_with(norm, lambda x, args=args: F.layer_norm(x, (16,), *args), x)
        assert done.rewrites == {"torch_layer_norm": 1}
        done.assert_same_numbers()


def test_layer_norm_with_one_added_to_its_weight_is_found():
    done = rewrite_with(norm, lambda x, weight: F.layer_norm(x, (16,), weight + 1, None, EPS), *operands())
    assert done.rewrites == {"torch_layer_norm": 1}
    done.assert_same_numbers()


def test_a_weight_of_fp32_keeps_the_dtype_that_promotion_gives():
    x, _ = operands()
    done = rewrite_with(norm, llama, x, torch.randn(16, requires_grad=True))
    assert done.calls == ["rms_norm(x, weight, 1e-06, out_dtype=torch.float32)"]
    done.assert_same_numbers()


def test_norms_in_the_body_of_a_checkpoint_are_rewritten():
    def function(x, weight):
        return torch.utils.checkpoint.checkpoint(llama, x, weight, use_reentrant=False)

    done = rewrite_with(norm, function, *operands())
    assert done.rewrites == {"llama_norm": 1}
    done.assert_same_numbers()


# What is kept, and why.


def test_a_norm_is_kept_when_its_variance_is_also_returned():
    def function(x, weight):
        h = x.float()
        variance = h.pow(2).mean(-1, keepdim=True)
        return weight * (h * torch.rsqrt(variance + EPS)).to(x.dtype), variance

    done = rewrite_with(norm, function, *operands())
    assert done.rewrites == {}
    assert done.after is done.before
    assert done.reasons == ["`variance` is also returned"]


def test_a_norm_is_kept_when_its_reciprocal_root_is_used_again():
    def function(x, weight):
        h = x.float()
        root = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
        return weight * (h * root).to(x.dtype), root * 2

    done = rewrite_with(norm, function, *operands())
    assert done.rewrites == {}
    assert "`root` is also used by" in done.reasons[0]


def test_the_add_is_left_out_when_its_residual_broadcasts():
    def function(x, residual, weight):
        h = x + residual
        return llama(h, weight), h

    x, weight = operands()
    done = rewrite_with(norm, function, x, torch.randn(1, 5, 16, dtype=x.dtype), weight)
    assert done.rewrites == {"llama_norm": 1}
    done.assert_same_numbers()


def test_the_add_is_left_out_when_its_summands_differ_in_dtype():
    def function(x, residual, weight):
        h = x + residual
        return llama(h, weight), h

    x, weight = operands()
    done = rewrite_with(norm, function, x, torch.randn(2, 5, 16), weight)
    assert done.rewrites == {"llama_norm": 1}
    done.assert_same_numbers()


def test_the_add_of_a_number_is_left_out():
    done = rewrite_with(norm, lambda x, weight: llama(x + 1.0, weight), *operands())
    assert done.rewrites == {"llama_norm": 1}
    done.assert_same_numbers()


def test_a_row_too_long_for_one_program_is_kept():
    x, weight = (torch.empty(s, dtype=torch.bfloat16) for s in ((1, 65537), (65537,)))
    done = rewrite_with(norm, llama, x, weight)
    assert done.reasons == ["last dimension 65537 exceeds 65536, the most one program can hold"]


def test_a_row_that_just_fits_is_rewritten():
    x, weight = (torch.empty(s, dtype=torch.bfloat16) for s in ((1, 65536), (65536,)))
    assert rewrite_with(norm, llama, x, weight).rewrites == {"llama_norm": 1}


def test_a_weight_for_each_head_is_one_call():
    x, weight = torch.randn(2, 5, 4, 16, requires_grad=True), torch.randn(4, 16, requires_grad=True)
    done = rewrite_with(norm, cohere, x, weight)
    assert done.rewrites == {"cohere_norm": 1}
    done.assert_same_numbers()


@pytest.mark.parametrize("shape", [(1, 16), (5, 1, 16)])
def test_a_weight_that_is_neither_a_row_nor_one_a_head_is_kept(shape):
    done = rewrite_with(norm, cohere, torch.randn(2, 5, 3, 16), torch.randn(shape))
    assert done.rewrites == {}


def test_a_weight_for_each_head_of_an_rms_norm_is_left_to_multiply_its_result():
    done = rewrite_with(norm, llama, torch.randn(2, 4, 16), torch.randn(4, 16))
    assert done.rewrites == {"unweighted_norm": 1}
    done.assert_same_numbers()


def test_a_norm_over_two_dimensions_is_kept():
    done = rewrite_with(norm, lambda x: F.layer_norm(x, (5, 16)), operands()[0])
    assert done.reasons == ["normalised over 2 dimensions; the kernel takes the last one"]


def test_a_norm_over_another_dimension_is_kept():
    def function(x):
        h = x.float()
        return (h * torch.rsqrt(h.pow(2).mean(1, keepdim=True) + EPS)).to(x.dtype)

    done = rewrite_with(norm, function, operands()[0])
    assert done.rewrites == {}
    assert "expected the constant -1, found -2" in done.reasons[0]


def test_an_eps_that_is_a_tensor_is_kept():
    def function(x, weight, eps):
        return weight * normalised(x, eps).to(x.dtype)

    done = rewrite_with(norm, function, *operands(), torch.ones(1))
    assert done.reasons == ["eps is the tensor `eps`; the kernel takes a number"]


def test_fp64_is_kept():
    def function(x, weight):
        return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS))

    done = rewrite_with(norm, function, *operands(dtype=torch.float64))
    assert done.rewrites == {}
    assert len(done.reasons) == 1


def test_a_row_written_in_place_in_the_middle_is_kept():
    def function(x, weight):
        h = x.float()
        scale = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
        h.add_(1.0)
        return weight * (h * scale).to(x.dtype)

    x, weight = operands()
    done = rewrite_with(norm, function, x.detach(), weight)
    assert done.rewrites == {}
    assert done.reasons == ["`h` is also used by `add_`"]


def test_a_norm_whose_input_is_written_in_place_before_its_end_is_kept():
    def function(x, weight):
        h = x.float()
        scale = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
        x[..., :2].zero_()
        return weight * (h * scale).to(x.dtype)

    x, weight = operands(dtype=torch.float32)
    done = rewrite_with(norm, function, x.detach(), weight)
    assert done.rewrites == {}
    assert all("is written in place by `zero_`" in reason for reason in done.reasons)
    # In bf16, the cast is a copy, and what follows it a norm of the copy.
    done = rewrite_with(norm, function, x.detach().bfloat16(), weight.bfloat16())
    assert done.rewrites == {"unweighted_norm": 1}
    done.assert_same_numbers()


def test_an_input_written_in_place_after_the_norm_does_not_matter():
    def function(x, weight):
        y = llama(x, weight)
        x.mul_(2.0)
        return y

    x, weight = operands()
    done = rewrite_with(norm, function, x.detach(), weight)
    assert done.rewrites == {"llama_norm": 1}
    done.assert_same_numbers()


def test_a_norm_with_a_border_of_grad_mode_in_it_is_kept():
    def function(x, weight):
        h = x.float()
        with torch.no_grad():
            scale = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
        return weight * (h * scale).to(x.dtype)

    done = rewrite_with(norm, function, *operands())
    assert done.rewrites == {}
    assert done.reasons == ["a border of grad mode runs through it"]


def test_a_norm_with_a_border_of_autocast_in_it_is_kept():
    def function(x, weight):
        h = x.float()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            scale = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
        return weight * (h * scale).to(x.dtype)

    done = rewrite_with(norm, function, *operands())
    assert done.rewrites == {}
    assert done.reasons == ["a border of autocast runs through it"]


def test_a_norm_wholly_inside_no_grad_is_rewritten():
    def function(x, weight):
        with torch.no_grad():
            return llama(x, weight)

    done = rewrite_with(norm, function, *operands())
    assert done.rewrites == {"llama_norm": 1}
    done.assert_same_numbers()


def test_a_mean_without_keepdim_is_no_norm():
    def function(x, weight):
        h = x.float()
        return weight * (h * torch.rsqrt(h.pow(2).mean(-1) + EPS)[..., None]).to(x.dtype)

    assert rewrite_with(norm, function, *operands()).rewrites == {}


def test_a_difference_from_another_mean_is_no_layer_norm():
    def function(x, y, weight):
        h = x.to(torch.float32)
        mean = y.to(torch.float32).mean(-1, keepdim=True)
        variance = (h - mean).pow(2).mean(-1, keepdim=True)
        return (weight.to(torch.float32) * ((h - mean) * torch.rsqrt(variance + EPS))).to(x.dtype)

    done = rewrite_with(norm, function, *operands(3))
    assert "cohere_norm" not in done.rewrites
    done.assert_same_numbers()


# Symbolic shapes.


@pytest.mark.parametrize("function", [*VARIANTS, torch_rms, torch_layer], ids=lambda f: f.__name__)
def test_norms_of_symbolic_lengths_are_rewritten(function):
    x, weight = operands()
    torch._dynamo.mark_dynamic(x, 1)
    done = rewrite_with(norm, function, x, weight)
    assert sum(done.rewrites.values()) == 1


def test_a_symbolic_row_is_kept():
    done = rewrite_with(norm, llama, *operands(), dynamic=True)
    assert done.rewrites == {}
    assert "is not a constant" in done.reasons[0]


def test_a_module_is_rewritten_under_dynamic_shapes():
    module = torch.nn.RMSNorm(16)
    done = rewrite_with(norm, module, torch.randn(2, 5, 16), dynamic=True)
    assert done.rewrites == {"torch_rms_norm": 1}


def test_a_second_length_costs_one_more_graph_and_a_third_none():
    torch._dynamo.reset()
    module = torch.nn.LayerNorm(16)
    compiled = torch.compile(module, backend="rewriter", options={"lowering": "eager"})
    with rewriter.inspect() as report:
        for length in (5, 7, 9, 11):
            x = torch.randn(2, length, 16)
            torch.testing.assert_close(compiled(x), module(x))
    assert len(report.graphs) == 2
    assert report.counts()["norm"] == 2


# Beside a user's own patterns.


def test_a_users_pattern_goes_first():
    torch._dynamo.reset()

    @rewriter.rewrite(to=lambda x, weight, eps: F.rms_norm(x, x.shape[-1:], weight, eps), name="my_norm")
    def my_norm(x, weight, eps):
        return weight * normalised(x, eps).to(x.dtype)

    try:
        with rewriter.inspect() as report:
            torch.compile(llama, backend="rewriter", options={"lowering": "eager"})(*operands())
    finally:
        registry.remove(my_norm)
    assert {name: n for name, n in report.counts().items() if n} == {"my_norm": 1}
