"""``rewriter.check``: a right rewrite prints its exactness; a wrong one says where it differs."""

import pytest
import torch
import torch.nn.functional as F

import rewriter
from rewriter import CheckError, PatternError
from rewriter.kernels.rms_norm import rms_norm
from rewriter.pattern import maybe, rewrite


def llama_norm(x, weight, eps):
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return weight * h.to(x.dtype)


def squared_relu(x):
    return F.relu(x).pow(2)


def declared(function, to, **options):
    return rewrite(to=to, **options)(function)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_right_rewrite_passes_in_every_dtype(dtype):
    checked = rewriter.check(
        declared(llama_norm, rms_norm), torch.randn(4, 8, dtype=dtype), torch.randn(8, dtype=dtype), 1e-6
    )
    assert [r.name for r in checked.results] == ["output 0", "gradient of `x`", "gradient of `weight`"]
    assert all(r.error <= r.limit for r in checked.results)
    assert checked.operations >= 6


def test_the_result_prints_what_was_replaced_and_how_exact_it_is():
    pattern = declared(squared_relu, lambda x: x.clamp(min=0) * F.relu(x))
    text = str(rewriter.check(pattern, torch.randn(4, 8)))
    first, *rest = text.splitlines()
    assert first == "squared_relu: 2 operations become one call of <lambda>"
    assert rest[1].startswith("  gradient of `x`  error ")


def test_the_package_knows_nothing_of_a_pattern_that_was_only_checked():
    from rewriter.passes import pass_names

    rewriter.check(declared(squared_relu, lambda x: F.relu(x) ** 2), torch.randn(4, 8))
    assert "squared_relu" not in pass_names()


def test_a_wrong_value_is_said_with_its_size():
    with pytest.raises(CheckError, match=r"twice changes the result: .* has a relative error of 1.0e\+00"):

        def twice(x):
            return F.relu(x).pow(2) * 2

        rewriter.check(declared(squared_relu, twice), torch.randn(4, 8))


def test_a_wrong_gradient_is_said_with_the_parameter():
    with pytest.raises(CheckError, match="gradient of `x` has a relative error"):
        rewriter.check(declared(squared_relu, lambda x: F.relu(x.detach()) * F.relu(x)), torch.randn(4, 8))


def test_only_the_gradients_asked_for_are_compared():
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(8)
    checked = rewriter.check(declared(llama_norm, rms_norm), x, weight, 1e-6)
    assert [r.name for r in checked.results] == ["output 0", "gradient of `x`"]
    assert weight.requires_grad is False


def test_another_dtype_is_said():
    with pytest.raises(CheckError, match="gives torch.float32, the graph has torch.bfloat16"):
        pattern = declared(squared_relu, lambda x: F.relu(x.float()) ** 2)
        rewriter.check(pattern, torch.randn(2, dtype=torch.bfloat16))


def test_another_shape_is_said():
    with pytest.raises(CheckError, match=r"gives shape \(8,\), the graph has \(4, 8\)"):
        rewriter.check(declared(squared_relu, lambda x: F.relu(x)[0] ** 2), torch.randn(4, 8))


def test_a_guard_that_refuses_the_examples_is_said():
    def narrow(match):
        rewriter.require(match.value("x").shape[-1] <= 4, "wider than 4")

    with pytest.raises(CheckError, match="does not match its own function: wider than 4"):
        rewriter.check(declared(squared_relu, squared_relu, where=narrow), torch.randn(4, 8))


def test_a_guard_that_answers_instead_of_requiring_is_said():
    def narrow(match):
        return False

    with pytest.raises(
        PatternError, match=r"its guard returned False, .* rewriter.require\(condition, reason\)"
    ):
        rewriter.check(declared(squared_relu, lambda x: F.relu(x) ** 2, where=narrow), torch.randn(4, 8))


def test_a_pattern_that_cannot_match_itself_is_said_with_the_nearest_miss():
    def mixed(x, y):
        return torch.where(y > 0, x, y) * (x if isinstance(x, torch.fx.Proxy) else x + 1)

    with pytest.raises(CheckError, match="does not match its own function"):
        rewriter.check(declared(mixed, mixed), torch.randn(4), torch.randn(4))


def test_a_guard_that_raises_is_said():
    def positive(match):
        rewriter.require(match.x > 0, "positive")

    guarded = declared(squared_relu, lambda x: F.relu(x) ** 2, where=positive)
    with pytest.raises(CheckError, match="squared_relu: its guard raises: TypeError"):
        rewriter.check(guarded, torch.randn(4, 8))


def test_examples_that_the_pattern_itself_does_not_take_are_said_in_pytorchs_own_words():
    with pytest.raises(
        CheckError, match="its own function raises on the example inputs: .*The size of tensor"
    ):
        rewriter.check(declared(llama_norm, rms_norm), torch.randn(4, 8), torch.randn(3), 1e-6)


def test_examples_on_meta_are_refused():
    with pytest.raises(PatternError, match="squared_relu is given tensors on meta, which have no values"):
        rewriter.check(declared(squared_relu, lambda x: F.relu(x) ** 2), torch.randn(4, device="meta"))


def test_a_replacement_that_raises_is_said():
    def broken(x):
        raise ValueError("no such kernel")

    with pytest.raises(CheckError, match="broken raises on fake tensors: ValueError: no such kernel"):
        rewriter.check(declared(squared_relu, broken), torch.randn(4, 8))


def test_a_replacement_that_cannot_be_traced_is_said():
    def by_hand(x):
        return x * (x > 0) * x if x.sum().item() > 0 else F.relu(x).pow(2)

    with pytest.raises(CheckError, match="by_hand"):
        rewriter.check(declared(squared_relu, by_hand), torch.randn(4, 8))


def test_an_argument_that_may_be_absent_is_checked_as_none_and_as_a_tensor():
    def scaled(x, scale):
        return F.relu(maybe(torch.mul, x, scale)).pow(2)

    def fused(x, scale):
        return F.relu(x if scale is None else x * scale).pow(2)

    pattern = declared(scaled, fused)
    assert len(rewriter.check(pattern, torch.randn(4, 8), None).results) == 2
    assert len(rewriter.check(pattern, torch.randn(4, 8), torch.randn(8)).results) == 3


def test_two_results_are_both_compared():
    def residual(x, y, weight, eps):
        h = x + y
        return llama_norm(h, weight, eps), h

    def fused(x, y, weight, eps):
        return llama_norm(x + y, weight, eps), x - y

    examples = torch.randn(4, 8), torch.randn(4, 8), torch.randn(8), 1e-6
    with pytest.raises(CheckError, match="(output 1|gradient of `y`) has a relative error"):
        rewriter.check(declared(residual, fused), *examples)


def test_what_is_no_rewrite_is_refused():
    with pytest.raises(PatternError, match="takes what @rewrite returns, got function"):
        rewriter.check(squared_relu, torch.randn(4))


def test_the_number_of_examples_is_that_of_the_parameters():
    with pytest.raises(PatternError, match=r"llama_norm takes 3 inputs \(x, weight, eps\), got 1"):
        rewriter.check(declared(llama_norm, rms_norm), torch.randn(4))


def test_examples_without_a_tensor_are_refused():
    with pytest.raises(CheckError, match="give at least one tensor"):
        rewriter.check(declared(lambda x: x * 2 + 1, lambda x: x * 2 + 1, name="line"), 3)
