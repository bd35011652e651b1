"""The gated activation: kernels against fp64, of two tensors and of one packed tensor."""

import pytest
import torch

from rewriter.kernels.gated_activation import (
    ACTIVATIONS,
    ORDERS,
    gated_activation,
    gated_activation_packed,
    gated_activation_packed_reference,
    gated_activation_reference,
)
from tests.accuracy import assert_as_accurate

device = "cuda" if torch.cuda.is_available() else "cpu"
op, packed_op = torch.ops.rewriter.gated_activation, torch.ops.rewriter.gated_activation_packed


def leaf(x, dtype=None):
    """A leaf of the same memory, unless the dtype is another."""
    return x.detach().to(dtype or x.dtype).requires_grad_()


def with_gradients(function, inputs, grad, dtype=None):
    inputs = [leaf(x, dtype) for x in inputs]
    out = function(*inputs)
    return out, *torch.autograd.grad(out, inputs, grad.to(out.dtype))


def compare(ours, reference, inputs, grad):
    ours = with_gradients(ours, inputs, grad)
    eager = with_gradients(reference, inputs, grad)
    truth = with_gradients(reference, inputs, grad, torch.float64)
    for index, values in enumerate(zip(ours, eager, truth, strict=True)):
        # The GPU's exponential is good to two units of fp32, eager's to one; narrower dtypes do not show it.
        slack = 2.0 if values[0].dtype == torch.float32 else 1.0
        name = ("out", "d_gate", "d_up")[index]
        assert_as_accurate(*values, name=name, slack=slack)


def compare_two(gate, up, activation, grad=None):
    grad = torch.randn(gate.shape, device=device).to(gate.dtype) if grad is None else grad
    compare(
        lambda gate, up: op(gate, up, activation),
        lambda gate, up: gated_activation_reference(gate, up, activation),
        (gate, up),
        grad,
    )


def compare_packed(gate_up, activation, order):
    compare(
        lambda gate_up: packed_op(gate_up, activation, order),
        lambda gate_up: gated_activation_packed_reference(gate_up, activation, order),
        (gate_up,),
        torch.randn(*gate_up.shape[:-1], gate_up.shape[-1] // 2, device=device).to(gate_up.dtype),
    )


def spread(*shape, dtype=torch.float32):
    """Values from the middle and from both tails of every activation."""
    return (3.0 * torch.randn(shape, device=device)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_is_as_accurate_as_eager(activation, dtype):
    compare_two(spread(3, 7, 301, dtype=dtype), spread(3, 7, 301, dtype=dtype), activation)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_halves_of_a_packed_tensor(activation, order, dtype):
    compare_packed(spread(2, 5, 2 * 67, dtype=dtype), activation, order)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_near_zero_the_relative_error_is_of_the_last_place(activation):
    lowest = -15 if activation == "relu_squared" else -30  # whose square fp32 has
    gate = torch.logspace(lowest, 0, 301, device=device)
    gate = torch.cat((gate, -gate))
    ours = op(gate, torch.ones_like(gate), activation)
    truth = gated_activation_reference(gate.double(), torch.ones_like(gate).double(), activation)
    assert ((ours - truth).abs() <= 4 * torch.finfo(torch.float32).eps * truth.abs()).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_far_from_zero_nothing_overflows(activation):
    gate = torch.tensor([-1e4, -300.0, -90.0, 90.0, 300.0, 1e4], device=device)
    compare_two(gate, torch.ones_like(gate), activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_not_a_number_comes_through(activation):
    gate, up = (spread(4).requires_grad_() for _ in range(2))
    with torch.no_grad():
        gate[1] = up[2] = float("nan")
    out = op(gate, up, activation)
    assert out.isnan().tolist() == [False, True, True, False]
    out.sum().backward()
    assert up.grad.isnan().tolist() == [False, True, False, False]


def test_more_than_one_block():
    compare_two(spread(3, 2049), spread(3, 2049), "silu")
    compare_packed(spread(2, 2 * 2051), "silu", "gate_up")


def assert_strides_do_not_matter(function, *inputs, grad=None):
    grad = torch.randn_like(function(*inputs)) if grad is None else grad
    ours = with_gradients(function, inputs, grad)
    dense = with_gradients(function, [x.contiguous() for x in inputs], grad.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(ours, dense, strict=True))


def test_inputs_and_gradient_of_any_strides():
    def two(gate, up):
        return op(gate, up, "silu")

    gate, up = spread(2, 3, 5, 2 * 6).chunk(2, dim=-1)
    assert_strides_do_not_matter(two, gate, up)
    assert_strides_do_not_matter(two, gate.transpose(0, 2), up.transpose(0, 2))
    assert_strides_do_not_matter(two, spread(5, 4).t(), spread(4, 5))
    assert_strides_do_not_matter(two, spread(4, 1).expand(4, 5), spread(4, 5))
    assert_strides_do_not_matter(two, spread(3, 1), spread(3, 2)[:, :1])
    ones = torch.ones((), device=device).expand(4, 5)
    assert_strides_do_not_matter(two, spread(4, 5), spread(4, 5), grad=ones)
    assert_strides_do_not_matter(two, spread(4, 5), spread(4, 10)[:, ::2], grad=spread(5, 4).t())


@pytest.mark.parametrize("order", ORDERS)
def test_packed_tensors_of_any_strides(order):
    def packed(gate_up):
        return packed_op(gate_up, "gelu_tanh", order)

    assert_strides_do_not_matter(packed, spread(3, 2, 10).transpose(0, 1))
    assert_strides_do_not_matter(packed, spread(10, 3).t())
    assert_strides_do_not_matter(packed, spread(3, 14)[:, 2:12], grad=spread(5, 3).t())


def test_gate_and_up_of_different_dtypes_promote():
    gate, up = spread(4, 5, dtype=torch.bfloat16), spread(4, 5)
    assert op(gate, up, "silu").dtype == torch.float32
    compare_two(gate, up, "silu", grad=spread(4, 5))


@pytest.mark.parametrize("wanted", [0, 1])
def test_only_the_gradient_that_is_asked_for_is_computed(wanted):
    inputs = [spread(4, 5), spread(4, 5)]
    inputs[wanted].requires_grad_()
    ours = torch.autograd.grad(op(*inputs, "gelu").sum(), inputs[wanted])
    eager = torch.autograd.grad(gated_activation_reference(*inputs, "gelu").sum(), inputs[wanted])
    torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), (2, 0, 6)])
def test_empty_tensors(shape):
    compare_two(spread(*shape), spread(*shape), "silu")
    compare_packed(spread(*shape), "silu", "gate_up")


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_as_one_graph(dynamic):
    def both(gate, up, packed):
        return op(gate, up, "silu") + packed_op(packed, "gelu_tanh", "gate_up")

    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (3, 5):
        inputs, grad = (
            (spread(2, tokens, 6), spread(2, tokens, 6), spread(2, tokens, 12)),
            spread(2, tokens, 6),
        )
        ours, plain = with_gradients(compiled, inputs, grad), with_gradients(both, inputs, grad)
        assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(ours, plain, strict=True))


def test_operator_contract():
    gate, up = leaf(spread(3, 5)), leaf(spread(3, 5))
    torch.library.opcheck(op.default, (gate, up, "silu"))
    torch.library.opcheck(op.default, (*(leaf(x) for x in spread(3, 4, 10).chunk(2, dim=-1)), "gelu"))
    torch.library.opcheck(packed_op.default, (leaf(spread(3, 10)), "silu", "gate_up"))


def test_other_dtypes_and_shapes_take_the_reference():
    gate, up = spread(3, 4).double(), spread(3, 4).double()
    assert torch.equal(gated_activation(gate, up, "silu"), gated_activation_reference(gate, up, "silu"))
    assert gated_activation(gate, up[:, :1], "silu").shape == (3, 4)
    expected = gated_activation_packed_reference(gate, "silu", "up_gate")
    assert torch.equal(gated_activation_packed(gate, "silu", "up_gate"), expected)


def test_errors_name_the_value_and_the_way_out():
    x = spread(3, 5)
    with pytest.raises(ValueError, match="unknown activation 'swish'; known are silu, gelu_tanh"):
        gated_activation(x, x, "swish")
    with pytest.raises(ValueError, match="unknown order 'up'; known are gate_up and up_gate"):
        gated_activation_packed(x, "silu", "up")
    with pytest.raises(ValueError, match=r"\(3, 5\) has no two equal halves"):
        gated_activation_packed(x, "silu")
    with pytest.raises(ValueError, match="differ in shape; use gated_activation_reference"):
        op(x, x[:, :1], "silu")


def assert_same(ours, apart):
    assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(ours, apart, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_and_result_in_one_pass_are_the_same_bits(activation, dtype):
    ops = torch.ops.rewriter
    gate, up, grad = (spread(2, 5, 301, dtype=dtype) for _ in range(3))
    apart = *ops.gated_activation_backward(grad, gate, up, activation, True, True), op(gate, up, activation)
    result = grad.clone()
    gradients = ops.gated_activation_backward_with_result_(result, gate, up, activation)
    assert_same((*gradients, result), apart)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("order", ORDERS)
def test_the_same_of_halves(order, dtype):
    ops = torch.ops.rewriter
    gate_up, grad = spread(2, 5, 2 * 67, dtype=dtype), spread(2, 5, 67, dtype=dtype)
    for given in (gate_up, gate_up.expand(3, 2, 5, 134)[1], torch.cat((gate_up, gate_up), -1)[..., :134]):
        d_packed = ops.gated_activation_packed_backward(grad, given, "silu", order)
        apart = d_packed, packed_op(given, "silu", order)
        result = grad.clone()
        gradient = ops.gated_activation_packed_backward_with_result_(result, given, "silu", order)
        assert_same((gradient, result), apart)


def test_gradients_and_result_of_more_than_one_block_and_of_any_strides():
    ops = torch.ops.rewriter
    gate, up, odd = spread(3, 2 * 2051)[:, ::2], spread(3, 2100)[:, :2051], spread(2051, 3).t()
    for grad in (odd.contiguous(), odd):
        apart = *ops.gated_activation_backward(grad, gate, up, "silu", True, True), op(gate, up, "silu")
        result = grad.clone()
        assert result.stride() == grad.stride()
        gradients = ops.gated_activation_backward_with_result_(result, gate, up, "silu")
        assert all(map(torch.equal, (*gradients, result), apart))


def test_operator_contract_of_the_gradients_with_the_result():
    ops, x, packed = torch.ops.rewriter, spread(3, 5), spread(3, 10)
    tests = "test_schema", "test_faketensor"
    two = ops.gated_activation_backward_with_result_.default
    torch.library.opcheck(two, (x.clone(), x, spread(3, 5), "silu"), test_utils=tests)
    one = ops.gated_activation_packed_backward_with_result_.default
    torch.library.opcheck(one, (x.clone(), packed, "silu", "gate_up"), test_utils=tests)
    empty = spread(0, 6)
    assert two(empty, empty, empty, "silu")[0].shape == (0, 6)
