"""``options={"verify": True}``: right graphs pass, wrong rewrites are named and not used."""

import pytest
import torch
import torch.nn.functional as F

import rewriter
from rewriter import registry

OPTIONS = {"verify": True, "lowering": "eager"}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    for pattern in registry.user_patterns():
        registry.remove(pattern)
    torch._dynamo.reset()


def llama_norm(x, weight):
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-2)
    return weight * h.to(x.dtype)


def block(x, weight, gate, up):
    h = llama_norm(x, weight)
    return (x + F.silu(F.linear(h, gate)) * F.linear(h, up)).float().pow(2).mean()


def operands(dtype=torch.float32, tokens=6):
    x, gate, up = (torch.randn(n, 16, dtype=dtype).mul_(0.3) for n in (tokens, 16, 16))
    weight = torch.randn(16, dtype=dtype)
    return [t.requires_grad_() for t in (x, weight, gate, up)]


def gradients(function, inputs):
    loss = function(*inputs)
    return loss.detach(), torch.autograd.grad(loss, inputs)


def verify(function, inputs, **kwargs):
    with rewriter.inspect() as report:
        result = gradients(torch.compile(function, backend="rewriter", options=OPTIONS, **kwargs), inputs)
    (graph,) = report.graphs
    return result, graph


def assert_equal_to_eager(result, function, inputs):
    torch.testing.assert_close(result, gradients(function, inputs))


def teach(to, name="wrong"):
    """Teach a replacement of ``relu(x) ** 2``, wrong in some way."""

    @rewriter.rewrite(to=to, name=name)
    def squared_relu(x):
        return F.relu(x).pow(2)

    return lambda x, w: (squared_relu(x) * w).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_right_graph_is_used_and_the_report_says_so(dtype):
    inputs = operands(dtype)
    result, graph = verify(block, inputs)
    assert {p.name: p.count for p in graph.passes if p.count} == {"norm": 1, "gated_mlp": 1}
    assert graph.notes == ["verified: 5 outputs and gradients agree with the unrewritten graph and fp64"]


def test_a_rewrite_with_a_wrong_factor_is_named_and_not_used(caplog):
    function = teach(lambda x: F.relu(x).pow(2) * 1.01)
    inputs = [torch.randn(8, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)]
    result, graph = verify(function, inputs)
    assert "pass wrong changes the result" in graph.notes[0]
    assert "pass wrong changes the result" in caplog.text
    assert_equal_to_eager(result, function, inputs)


def test_a_rewrite_that_forgets_eps_is_found_in_bf16():
    def forgetful(x, weight, eps):
        return F.rms_norm(x, x.shape[-1:], weight, 1e-12)

    @rewriter.rewrite(to=forgetful)
    def my_norm(x, weight, eps):
        h = x.float()
        return weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)

    inputs = operands(torch.bfloat16)
    result, graph = verify(block, inputs)
    assert graph.notes[0].startswith("pass my_norm changes the result")
    assert_equal_to_eager(result, block, inputs)


def test_the_pass_at_fault_is_named_among_right_ones_that_run_before_and_after():
    def twice(x):
        return F.relu(x) * 2

    @rewriter.rewrite(to=lambda x: torch.tanh(x), name="right")
    def tanh(x):
        return torch.sigmoid(2 * x) * 2 - 1

    @rewriter.rewrite(to=twice, name="guilty")
    def relu(x):
        return F.relu(x)

    def function(x, weight, gate, up):
        return block(torch.sigmoid(2 * x) * 2 - 1, weight, gate, F.relu(up))

    inputs = operands()
    result, graph = verify(function, inputs)
    assert [p.name for p in graph.passes if p.count] == ["right", "guilty", "norm", "gated_mlp"]
    assert graph.notes[0].startswith("pass guilty changes the result")
    assert_equal_to_eager(result, function, inputs)


class _DetachedSquare(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return F.relu(x).pow(2)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * F.relu(x)  # the factor 2 is missing


def test_a_fault_in_the_gradient_alone_is_found():
    function = teach(lambda x: _DetachedSquare.apply(x))
    inputs = [torch.randn(8, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)]
    result, graph = verify(function, inputs)
    assert "gradient of `l_x_` has a relative error of 5.0e-01" in graph.notes[0]
    assert_equal_to_eager(result, function, inputs)


def test_a_gradient_that_is_lost_is_found():
    function = teach(lambda x: F.relu(x.detach()).pow(2))
    inputs = [torch.randn(8, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)]
    result, graph = verify(function, inputs)
    assert "gradient of `l_x_` has a relative error of 1.0e+00" in graph.notes[0]
    assert_equal_to_eager(result, function, inputs)


def test_a_replacement_that_raises_on_real_inputs_is_named():
    def brittle(x):
        return torch.linalg.cholesky(x)

    function = teach(brittle)
    inputs = [-torch.rand(8, 8), torch.randn(8, 8, requires_grad=True)]
    with rewriter.inspect() as report:
        loss = torch.compile(function, backend="rewriter", options=OPTIONS)(*inputs)
    assert "pass wrong changes the result: it raises" in report.graphs[0].notes[0]
    torch.testing.assert_close(loss, function(*inputs))


def test_values_that_become_infinite_are_a_fault():
    function = teach(lambda x: F.relu(x).pow(2) / (x != 0.25))
    inputs = [torch.full((4, 4), 0.25), torch.ones(4, 4)]
    with rewriter.inspect() as report:
        loss = torch.compile(function, backend="rewriter", options=OPTIONS)(*inputs)
    assert "not finite" in report.graphs[0].notes[0]
    torch.testing.assert_close(loss, function(*inputs))


def test_values_that_are_not_finite_in_eager_either_are_no_fault():
    inputs = operands()
    with torch.no_grad():
        inputs[1][3] = float("nan")
    (loss, _), graph = verify(block, inputs)
    assert loss.isnan()
    assert graph.notes[0].startswith("verified")


def test_verification_draws_no_random_numbers():
    def function(x, weight, gate, up):
        return block(F.dropout(x, 0.5), weight, gate, up)

    inputs = operands()
    torch.manual_seed(3)
    torch._dynamo.reset()
    plain = gradients(torch.compile(function, backend="rewriter", options={"lowering": "eager"}), inputs)
    after = torch.rand(3)
    torch._dynamo.reset()
    torch.manual_seed(3)
    result, graph = verify(function, inputs)
    assert graph.notes[0].startswith("verified")
    torch.testing.assert_close(result, plain)
    torch.testing.assert_close(torch.rand(3), after)


def test_a_graph_with_dropout_by_position_is_compared_with_one_that_drops_the_same():
    def function(x, weight, gate, up):
        return block(F.dropout(x[None], 0.5), weight, gate, up)

    torch.manual_seed(3)
    result, graph = verify(function, operands())
    assert [p.count for p in graph.passes if p.name == "dropout"] == [1]
    assert graph.notes[0].startswith("verified"), graph.notes


def test_inputs_written_in_place_are_written_once():
    def function(x, weight, total):
        total.add_(1.0)
        return (llama_norm(x, weight) * total).sum()

    x, weight, _, _ = operands()
    total = torch.zeros(16)
    with rewriter.inspect() as report:
        loss = torch.compile(function, backend="rewriter", options=OPTIONS)(x, weight, total)
    assert report.graphs[0].notes[0].startswith("verified")
    torch.testing.assert_close(total, torch.ones(16))
    torch.testing.assert_close(loss, llama_norm(x, weight).sum())


def test_a_model_under_autocast_is_verified():
    def function(x, weight, gate, up):
        return block(x, weight, gate, up)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, graph = verify(function, operands())
    assert graph.notes[0].startswith("verified")


def test_without_gradients_the_outputs_are_compared():
    function = teach(lambda x: F.relu(x).pow(2) * 1.01)
    inputs = [torch.randn(8, 8), torch.randn(8, 8)]
    with rewriter.inspect() as report, torch.no_grad():
        loss = torch.compile(function, backend="rewriter", options=OPTIONS)(*inputs)
    assert "output 0 has a relative error" in report.graphs[0].notes[0]
    torch.testing.assert_close(loss, function(*inputs))


def test_bodies_of_checkpoints_are_verified():
    def function(x, weight, gate, up):
        return torch.utils.checkpoint.checkpoint(block, x, weight, gate, up, use_reentrant=False)

    _, graph = verify(function, operands(torch.bfloat16))
    assert {p.name for p in graph.passes if p.count} == {"norm", "gated_mlp"}
    assert graph.notes[0].startswith("verified: 5 outputs")


def test_a_wrong_graph_stays_right_for_other_lengths():
    function = teach(lambda x: F.relu(x).pow(2) * 1.01)
    compiled = torch.compile(function, backend="rewriter", options=OPTIONS, dynamic=True)
    with rewriter.inspect() as report:
        for length in (5, 7, 9):
            x, w = torch.randn(length, 8, requires_grad=True), torch.randn(length, 8)
            torch.testing.assert_close(compiled(x, w), function(x, w))
    assert len(report.graphs) == 1
    assert len(report.graphs[0].notes) == 1


def test_inductor_gets_both_graphs():
    function = teach(lambda x: F.relu(x).pow(2) * 1.01)
    inputs = [torch.randn(8, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)]
    result = gradients(torch.compile(function, backend="rewriter", options={"verify": True}), inputs)
    assert_equal_to_eager(result, function, inputs)


def test_an_operation_that_refuses_fp64_is_compared_with_eager():
    library = torch.library.Library("rewriter_test", "FRAGMENT")
    library.define("narrow(Tensor x) -> Tensor")

    def narrow(x):
        if x.dtype == torch.float64:
            raise RuntimeError("narrow: no fp64")
        return x * 1

    library.impl("narrow", narrow, "CompositeExplicitAutograd")
    torch.library.register_fake("rewriter_test::narrow", lambda x: torch.empty_like(x), lib=library)

    def function(x, weight):
        return torch.ops.rewriter_test.narrow(llama_norm(x, weight)).sum()

    x, weight, _, _ = operands()
    with rewriter.inspect() as report, torch.no_grad():
        torch.compile(function, backend="rewriter", options=OPTIONS)(x, weight)
    assert "unrewritten graph (an operation refuses fp64: narrow: no fp64)" in report.graphs[0].notes[0]


@pytest.mark.parametrize("double_quantisation", [False, True])
@pytest.mark.parametrize("input_needs_gradient", [False, True])
def test_four_bit_products_have_an_fp64_truth(double_quantisation, input_needs_gradient):
    bnb = pytest.importorskip("bitsandbytes")
    torch._dynamo.reset()
    linear = bnb.nn.Linear4bit(64, 32, compute_dtype=torch.bfloat16, compress_statistics=double_quantisation)
    linear = linear.to(torch.bfloat16).to("cpu")
    weight = torch.randn(32, dtype=torch.bfloat16, requires_grad=True)

    def function(x, weight):
        return llama_norm(linear(x), weight).float().pow(2).mean()

    x = torch.randn(8, 64, dtype=torch.bfloat16, requires_grad=input_needs_gradient)
    with rewriter.inspect() as report:
        torch.compile(function, backend="rewriter", options=OPTIONS)(x, weight)
    assert report.graphs[0].notes[-1].endswith("agree with the unrewritten graph and fp64")
