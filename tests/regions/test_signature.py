"""The hash that tells regions apart: what changes it and what does not. (Processes agree: ``test_cache``.)"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rewriter.regions.signature import compilation_key, signature
from tests.golden import trace


def hashed(function: Callable, *inputs, dynamic: bool = False) -> str:
    return signature(trace(function, *inputs, dynamic=dynamic)[0])


def _body(x: Tensor, y: Tensor) -> Tensor:
    return F.softmax(torch.sub(x, y) * 2.0, dim=-1) + x


def _other_names(left: Tensor, right: Tensor) -> Tensor:
    difference = torch.sub(left, right)
    scaled = difference * 2.0
    result = F.softmax(scaled, dim=-1)
    return result + left


def _another_constant(x: Tensor, y: Tensor) -> Tensor:
    return F.softmax(torch.sub(x, y) * 2.5, dim=-1) + x


def _an_integer(x: Tensor, y: Tensor) -> Tensor:
    return F.softmax(torch.sub(x, y) * 2, dim=-1) + x


def _another_keyword(x: Tensor, y: Tensor) -> Tensor:
    return F.softmax(torch.sub(x, y) * 2.0, dim=0) + x


def _other_operands(x: Tensor, y: Tensor) -> Tensor:
    return F.softmax(torch.sub(y, x) * 2.0, dim=-1) + x


def _another_reader(x: Tensor, y: Tensor) -> Tensor:
    return F.softmax(torch.sub(x, y) * 2.0, dim=-1) + y


def _another_operation(x: Tensor, y: Tensor) -> Tensor:
    return F.log_softmax(torch.sub(x, y) * 2.0, dim=-1) + x


def _another_result(x: Tensor, y: Tensor) -> Tensor:
    return F.softmax(torch.sub(x, y) * 2.0, dim=-1)


def _under_no_grad(x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        scaled = torch.sub(x, y) * 2.0
    return F.softmax(scaled, dim=-1) + x


def _under_autocast(x: Tensor, y: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return F.softmax(torch.sub(x, y) * 2.0, dim=-1) + x


def test_names_do_not_matter():
    x = torch.randn(4, 4)
    assert hashed(_body, x, x + 1) == hashed(_other_names, x, x + 1)


@pytest.mark.parametrize(
    "other",
    [
        _another_constant,
        _an_integer,
        _another_keyword,
        _other_operands,
        _another_reader,
        _another_operation,
        _another_result,
        _under_no_grad,
        _under_autocast,
    ],
    ids=lambda function: function.__name__.strip("_"),
)
def test_what_is_computed_matters(other):
    x, y = torch.randn(4, 4), torch.randn(4, 4)
    assert hashed(_body, x, y) != hashed(other, x, y)


@pytest.mark.parametrize(
    "other",
    [
        torch.randn(4, 4, dtype=torch.float64),
        torch.randn(5, 4, 4)[3].mT,
        torch.randn(4, 4).mT,
        torch.randn(20)[4:].view(4, 4),
        torch.randn(4, 8)[:, :4],
        torch.randn(4, 4, requires_grad=True),
        nn.Parameter(torch.randn(4, 4)),
        nn.Parameter(torch.randn(4, 4), requires_grad=False),
        torch.randn(1, 4),
    ],
    ids=[
        "dtype",
        "stride of a slice",
        "stride",
        "offset",
        "gap",
        "gradient",
        "parameter",
        "frozen",
        "broadcast",
    ],
)
def test_what_an_input_is_matters(other):
    x, y = torch.randn(4, 4), torch.randn(4, 4)
    assert hashed(_body, x, y) != hashed(_body, x, other)


def test_a_gradient_need_is_told_from_another():
    grads = [torch.randn(4, 4, requires_grad=True), torch.randn(4, 4)]
    assert hashed(_body, *grads) != hashed(_body, *reversed(grads))


def test_the_body_of_a_checkpoint_matters():
    def first(x: Tensor, w: Tensor) -> Tensor:
        return checkpoint(lambda h: torch.tanh(h @ w), x, use_reentrant=False)

    def second(x: Tensor, w: Tensor) -> Tensor:
        return checkpoint(lambda h: torch.sigmoid(h @ w), x, use_reentrant=False)

    def third(x: Tensor, w: Tensor) -> Tensor:
        return checkpoint(lambda h: torch.tanh(w @ h), x, use_reentrant=False)

    x, w = torch.randn(4, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    assert len({hashed(f, x, w) for f in (first, second, third)}) == 3
    assert hashed(first, x, w) == hashed(first, x, w)


def test_sizes_that_vary_are_told_from_fixed_ones():
    x = torch.randn(4, 4)
    assert hashed(_body, x, x + 1) != hashed(_body, x, x + 1, dynamic=True)


def test_one_compiled_function_stands_for_graphs_that_are_equal_but_in_names_and_for_no_others():
    def key(function, *sizes):
        x = torch.randn(*sizes)
        module, _ = trace(function, x)
        return compilation_key(module, [x])

    assert key(lambda x: x.sin() + 1, 2, 3) == key(lambda other: other.sin() + 1, 2, 3)
    assert key(lambda x: x.sin() + 1, 2, 3) != key(lambda x: x.sin() + 1, 3, 2)
    assert key(lambda x: x.sin() + 1, 2, 3) != key(lambda x: x.sin() + 2, 2, 3)


def test_what_sizes_that_vary_are_expected_to_be_is_told_apart():
    from torch.fx.experimental.proxy_tensor import make_fx

    from rewriter.memory.fakes import StageFakes

    def key(tokens):
        fakes = StageFakes(tokens)
        x = fakes.like(torch.randn(7, 3), rows=0)
        return compilation_key(make_fx(torch.sin)(x), [x])

    assert key(64) == key(64) != key(128)


def test_a_graph_with_a_tensor_of_its_own_is_compiled_for_itself():
    class Own(torch.nn.Module):
        def forward(self, x):
            return x + self.own

    def key(value):
        module = Own()
        module.own = torch.full((3,), value)
        return compilation_key(torch.fx.symbolic_trace(module), [torch.ones(3)])

    assert key(1.0) != key(2.0)
