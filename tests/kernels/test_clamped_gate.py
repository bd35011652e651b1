"""GPT-OSS's clamped gate: kernels against fp64."""

import pytest
import torch

from rewriter.kernels.clamped_gate import clamped_gate, clamped_gate_reference
from tests.accuracy import assert_as_accurate

device = "cuda" if torch.cuda.is_available() else "cpu"
op = torch.ops.rewriter.clamped_gate
NUMBERS = (1.702, 2.5, 1.0)


def spread(*shape, dtype=torch.float32):
    """Values on both sides of the limits."""
    return (3.0 * torch.randn(shape, device=device)).to(dtype)


def with_gradient(function, gate_up, grad, dtype=None):
    gate_up = gate_up.detach().to(dtype or gate_up.dtype).requires_grad_()
    out = function(gate_up, *NUMBERS)
    return out, *torch.autograd.grad(out, gate_up, grad.to(out.dtype))


def compare(gate_up, grad=None):
    grad = spread(*gate_up.shape[:-1], gate_up.shape[-1] // 2, dtype=gate_up.dtype) if grad is None else grad
    ours, eager = (with_gradient(f, gate_up, grad) for f in (op, clamped_gate_reference))
    truth = with_gradient(clamped_gate_reference, gate_up, grad, torch.float64)
    for name, *values in zip(("out", "d_gate_up"), ours, eager, truth, strict=True):
        # The GPU's exponential is good to two units of fp32, eager's to one; narrower dtypes do not show it.
        assert_as_accurate(*values, name=name, slack=2.0 if gate_up.dtype == torch.float32 else 1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(3, 7, 2 * 301), (60, 2), (5, 2 * 1025)])
def test_it_is_as_accurate_as_eager(shape, dtype):
    compare(spread(*shape, dtype=dtype))


def test_pairs_and_gradients_of_any_strides():
    compare(spread(4, 3, 10).transpose(0, 1))
    compare(spread(10, 3).t(), grad=spread(5, 3).t())
    compare(spread(3, 10), grad=torch.ones((), device=device).expand(3, 5))


def test_values_at_the_limits_pass_the_gradient_as_clamp_does():
    limit = NUMBERS[1]
    gate_up = torch.tensor([[limit, limit, limit, -limit, 9.0, 9.0, -9.0, -9.0]], device=device)
    grad = torch.ones(1, 4, device=device)
    ours, eager = (with_gradient(f, gate_up, grad)[1] for f in (op, clamped_gate_reference))
    assert torch.equal(ours == 0, eager == 0)


def test_not_a_number_comes_through():
    gate_up = torch.ones(1, 6, device=device)
    gate_up[0, 0] = gate_up[0, 3] = float("nan")
    assert op(gate_up, *NUMBERS).isnan().tolist() == [[True, True, False]]


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (2, 0, 6)])
def test_empty_tensors(shape):
    compare(spread(*shape))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_as_one_graph(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (3, 5):
        gate_up, grad = spread(2, tokens, 6), spread(2, tokens, 3)
        ours, plain = (with_gradient(f, gate_up, grad) for f in (compiled, op))
        assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def test_operator_contract():
    torch.library.opcheck(op.default, (spread(3, 10).requires_grad_(), *NUMBERS))


def test_other_dtypes_take_the_reference():
    gate_up = spread(3, 4).double()
    expected = clamped_gate_reference(gate_up, *NUMBERS)
    assert torch.equal(clamped_gate(gate_up, *NUMBERS), expected)


def test_an_odd_width_is_an_error_that_names_it():
    with pytest.raises(ValueError, match=r"\(3, 5\) does not make pairs"):
        clamped_gate(spread(3, 5), *NUMBERS)
