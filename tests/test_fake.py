"""Fake calls: equal ones run once, and the answer is what a run would give."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx import Graph
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from rewriter.effects import Effects
from rewriter.fake import fake_call, remembering

MODE = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)


def fake(*shape, dtype=torch.float32, grad=False):
    with MODE:
        return torch.empty(*shape, dtype=dtype, requires_grad=grad)


class Counted:
    """``function``, and how often it ran."""

    def __init__(self, function):
        self.function, self.runs = function, 0

    def __call__(self, *args):
        self.runs += 1
        return self.function(*args)


def call(to, *values, grad=True):
    """``to`` on a graph's values; what is no tensor is a constant."""
    graph = Graph()
    nodes = []
    known = {}
    for value in values:
        if isinstance(value, torch.Tensor):
            node = known.get(id(value)) or graph.placeholder("x")
            known[id(value)] = node
            node.meta["example_value"] = value
            value = node
        nodes.append(value)
    return fake_call(to, tuple(nodes), {}, graph.output(None), Effects.of(graph, grad))


def test_equal_calls_run_once():
    to = Counted(lambda x, y: (x @ y, x.sum(-1)))
    with remembering():
        results = [call(to, fake(2, 3, grad=True), fake(3, 4)) for _ in range(3)]
    assert to.runs == 1
    fresh = to(fake(2, 3, grad=True), fake(3, 4))
    for result in results:
        for ours, theirs in zip(result, fresh, strict=True):
            for of in ("shape", "dtype", "device", "requires_grad", "is_leaf"):
                assert getattr(ours, of) == getattr(theirs, of)
            assert ours.stride() == theirs.stride()
    memory = {t.untyped_storage()._cdata for result in results for t in result}
    assert len(memory) == 6


def test_outside_of_it_every_call_runs():
    to = Counted(lambda x: x + 1)
    call(to, fake(2)), call(to, fake(2))
    assert to.runs == 2
    with remembering():
        call(to, fake(2))
    with remembering():
        call(to, fake(2))
    assert to.runs == 4


X = fake(2, 2)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((fake(2), 1), (fake(3), 1)),
        ((fake(2), 1), (fake(2, dtype=torch.float16), 1)),
        ((fake(2), 1), (fake(2, grad=True), 1)),
        ((fake(2, 3), 1), (fake(3, 2).t(), 1)),
        ((fake(2), 1), (fake(2), 1.0)),
        ((fake(2), 1), (fake(2), True)),
        ((fake(2), 0.0), (fake(2), -0.0)),
        ((X, X), (X, fake(2, 2))),
        ((X, X.t()), (X, fake(2, 2).t())),
    ],
)
def test_calls_that_differ_in_anything_a_function_can_see_both_run(first, second):
    to = Counted(lambda x, y: x * y)
    with remembering():
        call(to, *first), call(to, *second)
    assert to.runs == 2


def test_the_grad_mode_is_seen():
    to = Counted(lambda x: x * 2)
    with remembering():
        results = [call(to, fake(2, grad=True), grad=grad) for grad in (True, False)]
    assert [r.requires_grad for r in results] == [True, False]


def test_results_that_share_memory_are_made_anew():
    for function in (lambda x: x.t(), lambda x: (y := x + 1, y[0])):
        to = Counted(function)
        with remembering():
            first, second = call(to, fake(2, 2)), call(to, fake(2, 2))
        assert to.runs == 2 and type(first) is type(second)


def test_symbolic_sizes_are_compared_by_their_expressions():
    env = MODE.shape_env
    n, m = (env.create_unbacked_symint() for _ in range(2))
    to = Counted(lambda x: x.sum(0))
    with remembering():
        for size in (n, n, m):
            call(to, fake(size, 4))
    assert to.runs == 2


def test_sizes_that_depend_on_data_are_not_remembered():
    to = Counted(torch.nonzero)
    with remembering():
        first, second = call(to, fake(4)), call(to, fake(4))
    assert to.runs == 2
    assert str(first.shape[0]) != str(second.shape[0])
