"""The canonical view: the ways of writing an operation are one."""

import operator

import pytest
import torch
import torch.nn.functional as F

from rewriter.canonical import Call, canonical, fixed, is_metadata
from rewriter.pattern import declare
from rewriter.quantised import PackedWeight
from tests.golden import trace


def view(function, *inputs):
    """Name and constants of the canonical call of the last operation of ``function``'s graph."""
    module, _ = trace(function, *inputs)
    *_, last, _ = module.graph.nodes
    call = canonical(last)
    return call.name, tuple("·" if isinstance(a, torch.fx.Node) else a for a in call.args)


X = torch.ones(2, 4)
HALF = torch.ones(2, 4, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "cast",
    [
        lambda x: x.float(),
        lambda x: x.to(torch.float32),
        lambda x: x.to(dtype=torch.float32),
        lambda x: x.type(torch.float32),
        lambda x: x.type_as(torch.ones(1)),
        lambda x: x.to(torch.float32, non_blocking=True),
    ],
)
def test_casts_are_one(cast):
    assert view(cast, HALF) == ("cast", ("·", torch.float32))


def test_a_cast_to_the_same_dtype_is_the_value_itself():
    assert view(lambda x: x.float(), X) == ("alias", ("·",))


@pytest.mark.parametrize(
    "product",
    [lambda x: x * 3, lambda x: torch.mul(x, 3), lambda x: x.mul(3), lambda x: torch.multiply(x, 3)],
)
def test_products_are_one(product):
    assert view(product, X) == ("mul", ("·", 3))


def test_a_product_in_place_is_a_product():
    def function(x):
        y = x + 1
        y *= 3
        return y

    assert view(function, X) == ("mul", ("·", 3))


@pytest.mark.parametrize(
    "square",
    [lambda x: x**2, lambda x: x.pow(2), lambda x: torch.square(x), lambda x: x.square(), lambda x: x * x],
)
def test_squares_are_one(square):
    assert view(square, X) == ("pow", ("·", 2))


@pytest.mark.parametrize(
    "product",
    [lambda x: x @ X.T, lambda x: torch.matmul(x, X.t()), lambda x: x.matmul(X.T), lambda x: F.linear(x, X)],
)
def test_products_with_a_transposed_matrix_are_linears(product):
    assert view(product, X) == ("linear", ("·", "·", None))


@pytest.mark.parametrize("product", [lambda x: x @ X.mT, lambda x: x[0] @ torch.ones(2, 4, 4).mT])
def test_other_products_are_products(product):
    assert view(product, X) == ("matmul", ("·", "·"))


@pytest.mark.parametrize("root", [torch.rsqrt, lambda x: x.pow(-0.5), lambda x: x**-0.5])
def test_reciprocal_roots_are_one(root):
    assert view(root, X) == ("rsqrt", ("·",))


@pytest.mark.parametrize(
    "mean",
    [
        lambda x: x.mean(-1, keepdim=True),
        lambda x: x.mean(1, True),
        lambda x: torch.mean(x, dim=(-1,), keepdim=True),
        lambda x: x.mean(dim=[1], keepdim=True, dtype=None),
    ],
)
def test_means_over_the_last_dimension_are_one(mean):
    assert view(mean, X) == ("mean", ("·", -1, True, None))


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x.chunk(2, dim=1), ("chunk", ("·", 2, -1))),
        (lambda x: torch.split(x, 2), ("split", ("·", 2, -2))),
        (lambda x: F.softmax(x, dim=1), ("softmax", ("·", -1, 3, None))),
        (lambda x: F.silu(x), ("silu", ("·", False))),
        (lambda x: F.gelu(x, approximate="tanh"), ("gelu", ("·", "tanh"))),
        (lambda x: F.dropout(x, training=True), ("dropout", ("·", 0.5, True, False))),
        (lambda x: F.layer_norm(x, (4,)), ("layer_norm", ("·", (4,), None, None, 1e-5))),
        (lambda x: x.flatten(1), ("flatten", ("·", 1, -1))),
        (lambda x: torch.true_divide(x, 2), ("div", ("·", 2))),
        (lambda x: -x, ("neg", ("·",))),
    ],
)
def test_arguments_left_out_are_those_given_by_keyword(function, expected):
    module, _ = trace(function, X)
    call = next(c for n in module.graph.nodes if (c := canonical(n)) is not None)
    assert (call.name, tuple("·" if isinstance(a, torch.fx.Node) else a for a in call.args)) == expected


def test_an_add_with_alpha_is_no_plain_sum():
    assert view(lambda x: torch.add(x, x, alpha=2), X) == ("add_scaled", ("·", "·", 2))


def test_a_function_that_is_not_pytorchs_keeps_its_module():
    graph = torch.fx.Graph()
    node = graph.call_function(trace, (graph.placeholder("x"),))
    assert canonical(node).name == "tests.golden.trace"


def test_placeholders_and_outputs_compute_nothing():
    module, _ = trace(lambda x: x + 1, X)
    first, _, last = module.graph.nodes
    assert canonical(first) is None and canonical(last) is None


@pytest.mark.parametrize("double_quantisation", [False, True])
@pytest.mark.parametrize("input_needs_gradient", [False, True])
def test_a_quantised_linear_is_a_linear_of_a_packed_weight(double_quantisation, input_needs_gradient):
    bnb = pytest.importorskip("bitsandbytes")
    linear = bnb.nn.Linear4bit(64, 32, compute_dtype=torch.bfloat16, compress_statistics=double_quantisation)
    linear = linear.to(torch.bfloat16).to("cpu")
    x = torch.ones(2, 3, 64, dtype=torch.bfloat16, requires_grad=input_needs_gradient)
    module, _ = trace(lambda x: linear(x) * 1, x)
    found = [c for n in module.graph.nodes if (c := canonical(n)) is not None and c.name == "linear"]
    (call,) = found
    source, weight, bias = call.args
    assert isinstance(weight, PackedWeight)
    assert (weight.shape, weight.quant_type, bias is None) == ((32, 64), "fp4", False)
    assert (weight.absmax_8bit is None) is not double_quantisation


def test_expressions_over_shapes_and_dtypes_are_metadata():
    def pattern(x):
        return x.reshape(x.shape[-1] // 2, -1).to(x.dtype)

    rewrite = declare(pattern, to=lambda x: x)
    names = [
        n.name for n in rewrite.graph.nodes if n.op != "placeholder" and is_metadata(n) and n.op != "output"
    ]
    assert {"getattr_1", "getitem", "floordiv", "getattr_2"} <= set(names)
    assert not is_metadata(rewrite.root)
    assert is_metadata(3)


def test_a_size_is_fixed_where_it_is_a_number():
    assert fixed(4) == 4
    module, _ = trace(lambda x: x * 2, torch.ones(3, 4), dynamic=True)
    product = module.graph.find_nodes(op="call_function", target=operator.mul)[0]
    assert fixed(product.meta["example_value"].shape[0]) is None


def test_a_call_is_a_value():
    assert Call("mul", (1, 2)) == Call("mul", (1, 2))
