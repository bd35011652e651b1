"""The gated MLP pass: every gate, from two tensors or the halves of one, and every reason to keep one."""

import pytest
import torch
import torch.nn.functional as F

import rewriter
from rewriter.passes.gated_mlp import gated_mlp
from tests.golden import rewrite_with

ACTIVATIONS = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu_squared": lambda x: torch.square(F.relu(x)),
}


def operands(count=2, shape=(2, 5, 16), dtype=torch.bfloat16):
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(count)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_each_gate_becomes_one_call(name, dtype):
    done = rewrite_with(gated_mlp, lambda gate, up: ACTIVATIONS[name](gate) * up, *operands(dtype=dtype))
    assert done.rewrites == {name: 1}
    assert done.calls == [f"gated_activation(gate, up, {name})"]
    assert done.reasons == []
    done.assert_same_numbers()


def test_the_factors_may_stand_in_either_order():
    done = rewrite_with(gated_mlp, lambda gate, up: up * F.silu(gate), *operands())
    assert done.calls == ["gated_activation(gate, up, silu)"]


def test_modules_and_methods_are_one_with_functions():
    activation = torch.nn.SiLU()
    done = rewrite_with(gated_mlp, lambda gate, up: activation(gate).mul(up), *operands())
    assert done.calls == ["gated_activation(gate, up, silu)"]


def test_a_gated_mlp_keeps_its_linears_as_they_are():
    def mlp(x, gate, up, down):
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

    weights = [torch.randn(s, requires_grad=True) for s in ((32, 16), (32, 16), (16, 32))]
    done = rewrite_with(gated_mlp, mlp, torch.randn(3, 16, requires_grad=True), *weights)
    assert [c.partition("(")[0] for c in done.calls] == ["linear", "linear", "gated_activation", "linear"]
    done.assert_same_numbers()


PACKED = {
    "packed_silu": (lambda gate, up: up * F.silu(gate), "gate_up"),
    "packed_silu_up_first": (lambda up, gate: up * F.silu(gate), "up_gate"),
    "packed_gelu_tanh": (lambda gate, up: up * F.gelu(gate, approximate="tanh"), "gate_up"),
}


@pytest.mark.parametrize(
    "halves",
    [lambda x: x.chunk(2, dim=-1), lambda x: torch.chunk(x, 2, 2)],
    ids=["method", "function"],
)
@pytest.mark.parametrize("name", PACKED)
def test_the_halves_of_one_tensor_are_read_in_place(name, halves):
    product, order = PACKED[name]
    done = rewrite_with(gated_mlp, lambda gate_up: product(*halves(gate_up)), *operands(1, (2, 5, 32)))
    assert done.rewrites == {name: 1}
    activation = "gelu_tanh" if "gelu" in name else "silu"
    assert done.calls == [f"gated_activation_packed(gate_up, {activation}, {order})"]
    done.assert_same_numbers()


def test_halves_that_are_used_elsewhere_too_are_a_gate_of_two_tensors():
    def function(gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up, gate

    done = rewrite_with(gated_mlp, function, *operands(1, (2, 5, 32)))
    assert done.rewrites == {"silu": 1}
    done.assert_same_numbers()


def test_a_width_without_equal_halves_is_a_gate_of_two_tensors_at_most():
    def function(gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up[..., :1]

    done = rewrite_with(gated_mlp, function, *operands(1, (2, 5, 33)))
    assert done.rewrites == {}


def test_gates_in_the_body_of_a_checkpoint_are_rewritten():
    def gated(gate, up):
        return F.silu(gate) * up

    def function(gate, up):
        return torch.utils.checkpoint.checkpoint(gated, gate, up, use_reentrant=False)

    done = rewrite_with(gated_mlp, function, *operands())
    assert done.rewrites == {"silu": 1}
    done.assert_same_numbers()


def clamped(gate_up, alpha=1.702, limit=1.5, lowest=-1.5):
    gate, up = gate_up[..., ::2], gate_up[..., 1::2]
    gate, up = gate.clamp(min=None, max=limit), up.clamp(min=lowest, max=limit)
    return (up + 1) * (gate * torch.sigmoid(gate * alpha))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_clamped_gate_over_pairs_becomes_one_call(dtype):
    done = rewrite_with(gated_mlp, clamped, *operands(1, (2, 5, 32), dtype))
    assert done.rewrites == {"clamped_swish": 1}
    assert done.calls == ["clamped_gate_op(gate_up, 1.702, 1.5, -1.5, 1)"]
    assert done.reasons == []
    done.assert_same_numbers()


def test_a_clamped_gate_of_symbolic_length_and_numbers_is_rewritten():
    (gate_up,) = operands(1, (2, 5, 32))
    torch._dynamo.mark_static(gate_up, 2)
    done = rewrite_with(gated_mlp, clamped, gate_up, dynamic=True)
    assert done.rewrites == {"clamped_swish": 1}
    assert done.calls == ["clamped_gate_op(gate_up, 1.702, 1.5, -1.5, 1)"]


# What is kept, and why.


def test_a_clamp_to_unlike_sides_is_kept():
    done = rewrite_with(gated_mlp, lambda x: clamped(x, lowest=-2.0), *operands(1, (2, 5, 32)))
    assert done.rewrites == {}
    assert done.reasons == ["up is clamped from -2.0 to 1.5, not to both sides alike"]


def test_a_clamped_gate_with_a_scale_that_is_trained_is_kept():
    alpha = torch.ones(16, requires_grad=True)
    done = rewrite_with(gated_mlp, lambda x: clamped(x, alpha=alpha), *operands(1, (2, 5, 32)))
    assert done.rewrites == {}
    assert done.reasons == ["alpha `alpha` is no number"]


def test_a_sigmoid_far_from_any_gate_is_not_reported():
    done = rewrite_with(gated_mlp, lambda x: torch.sigmoid(x) * 2, *operands(1))
    assert done.rewrites == {} and done.reasons == []


def test_a_gate_is_kept_when_its_activation_is_also_returned():
    def function(gate, up):
        activated = F.silu(gate)
        return activated * up, activated

    done = rewrite_with(gated_mlp, function, *operands())
    assert done.rewrites == {}
    assert done.reasons == ["`activated` is also returned"]


def test_a_gate_that_broadcasts_is_kept():
    gate, up = *operands(1), *operands(1, (16,))
    done = rewrite_with(gated_mlp, lambda gate, up: F.silu(gate) * up, gate, up)
    assert done.rewrites == {}
    assert done.reasons == ["up of (16,) broadcasts to (2, 5, 16)"]


def test_a_gate_times_a_number_is_kept():
    done = rewrite_with(gated_mlp, lambda gate: F.silu(gate) * 2.0, *operands(1))
    assert done.reasons == ["one factor is no tensor"]


def test_factors_of_two_dtypes_are_kept():
    (gate,) = operands(1)
    done = rewrite_with(gated_mlp, lambda gate, up: F.silu(gate) * up, gate, torch.randn(2, 5, 16))
    assert done.reasons == ["gate is torch.bfloat16 and up is torch.float32"]


def test_fp64_is_kept():
    done = rewrite_with(gated_mlp, lambda gate, up: F.silu(gate) * up, *operands(dtype=torch.float64))
    assert done.reasons == ["a gate of torch.float64; the kernel takes 16- and 32-bit floats"]


def test_an_activation_without_a_product_is_reported():
    done = rewrite_with(gated_mlp, lambda x: F.silu(x) + 1, *operands(1))
    assert done.rewrites == {}
    assert len(done.reasons) == 1


def test_an_activation_of_its_own_product_is_found_with_both_factors_one():
    done = rewrite_with(gated_mlp, lambda x: F.silu(x) * x, *operands(1))
    assert done.calls == ["gated_activation(x, x, silu)"]
    done.assert_same_numbers()


def test_a_gate_written_in_place_before_the_product_is_kept():
    def function(gate, up):
        activated = F.silu(gate)
        gate.add_(1.0)
        return activated * up

    gate, up = operands()
    done = rewrite_with(gated_mlp, function, gate.detach(), up)
    assert done.rewrites == {}
    assert done.reasons == ["`gate` is written in place by `add_`"]


def test_an_activation_in_place_that_nothing_else_reads_is_rewritten():
    def function(x, weight, up):
        return F.silu(F.linear(x, weight), inplace=True) * up

    x, up = operands()
    weight = torch.randn(16, 16, dtype=x.dtype, requires_grad=True)
    done = rewrite_with(gated_mlp, function, x, weight, up)
    done.assert_same_numbers()


def test_a_product_in_place_into_what_is_read_later_is_kept():
    def function(gate, up):
        up *= F.silu(gate)
        return up + 1

    gate, up = operands()
    done = rewrite_with(gated_mlp, function, gate, up.detach())
    assert done.rewrites == {}
    done.assert_same_numbers()


@pytest.mark.parametrize("mode", ["grad mode", "autocast"])
def test_a_gate_with_a_border_of_modes_in_it_is_kept(mode):
    def function(gate, up):
        with torch.no_grad() if mode == "grad mode" else torch.autocast("cpu", dtype=torch.bfloat16):
            activated = F.silu(gate)
        return activated * up

    done = rewrite_with(gated_mlp, function, *operands())
    assert done.rewrites == {}
    assert done.reasons == [f"a border of {mode} runs through it"]


def test_a_gate_under_autocast_that_is_entered_outside_is_rewritten():
    def mlp(x, gate, up):
        return F.silu(F.linear(x, gate)) * F.linear(x, up)

    operands = [torch.randn(s, requires_grad=True) for s in ((3, 16), (32, 16), (32, 16))]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        done = rewrite_with(gated_mlp, mlp, *operands)
        assert done.rewrites == {"silu": 1}
        done.assert_same_numbers()


# Symbolic shapes.


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gates_of_symbolic_shapes_are_rewritten(name):
    done = rewrite_with(gated_mlp, lambda gate, up: ACTIVATIONS[name](gate) * up, *operands(), dynamic=True)
    assert done.rewrites == {name: 1}


def test_packed_gates_of_symbolic_lengths_are_rewritten():
    (packed,) = operands(1, (2, 5, 32))
    torch._dynamo.mark_dynamic(packed, 1)
    done = rewrite_with(gated_mlp, lambda x: PACKED["packed_silu"][0](*x.chunk(2, -1)), packed)
    assert done.rewrites == {"packed_silu": 1}


def test_a_second_length_costs_one_more_graph_and_a_third_none():
    torch._dynamo.reset()
    linear = torch.nn.Linear(16, 64)

    def mlp(x):
        gate, up = linear(x).chunk(2, dim=-1)
        return F.silu(gate) * up

    compiled = torch.compile(mlp, backend="rewriter", options={"lowering": "eager"})
    with rewriter.inspect() as report:
        for length in (5, 7, 9, 11):
            x = torch.randn(2, length, 16)
            torch.testing.assert_close(compiled(x), mlp(x))
    assert len(report.graphs) == 2
    assert report.counts()["gated_mlp"] == 2
