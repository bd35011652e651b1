"""Passes over one graph: what they share, what they leave alone, and what is left where one fails."""

import pytest
import torch
import torch.nn.functional as F
from torch import fx
from torch.utils.checkpoint import checkpoint

from rewriter import fusion
from rewriter.fusion import Applied, CrossingPass, Pass, apply_all, pattern_pass
from rewriter.nested import duplicate, graphs_of
from rewriter.pattern import declare
from rewriter.replace import drop_dead
from tests.doubled import Doubled
from tests.golden import calls, trace

X = torch.randn(4, 8)


def fused_square(x):
    return F.relu(x) * F.relu(x)


def fused_tanh(x):
    return torch.tanh(x)


SQUARES = pattern_pass("squares", [declare(lambda x: F.relu(x).pow(2), to=fused_square, name="squares")], ())
TANHS = pattern_pass("tanhs", [declare(lambda x: torch.tanh(x), to=fused_tanh, name="tanhs")], ())
NOTHING = pattern_pass("nothing", [declare(lambda x: torch.erf(x), to=fused_tanh, name="nothing")], ())


def breaks(graph):
    for node in graph.find_nodes(op="output"):
        node.args = (None,)
    raise RuntimeError("half way")


BROKEN = Pass("broken", breaks)


def function(x):
    return torch.tanh(F.relu(x).pow(2))


def with_bodies(x):
    return Doubled.apply(checkpoint(function, x, use_reentrant=False))


@pytest.fixture
def module():
    return trace(with_bodies, X.clone().requires_grad_())[0]


def bodies(module, kind):
    """The nested graphs of a kind, by name."""
    return {n: m for n, m in module.named_children() if isinstance(m, fx.GraphModule) and n.startswith(kind)}


def count(monkeypatch, owner, name):
    """The first argument of each call of ``owner.name``."""
    seen, original = [], getattr(owner, name)
    monkeypatch.setattr(
        owner, name, lambda *args, **kwargs: seen.append(args[0]) or original(*args, **kwargs)
    )
    return seen


def test_all_passes_share_one_copy(monkeypatch, module):
    copied = count(monkeypatch, fusion, "duplicate")
    assert [r.count for r in apply_all([SQUARES, NOTHING, TANHS], module).records] == [1, 0, 1]
    assert copied == [module]


def test_nodes_are_copied_once_and_those_of_autograd_functions_never(monkeypatch, module):
    copied = count(monkeypatch, fx.Graph, "node_copy")
    apply_all([SQUARES, NOTHING, TANHS], module)
    assert len(copied) == sum(len(part.graph.nodes) - 1 for part in graphs_of(module))


def test_no_code_is_made_for_a_graph_that_nobody_runs(monkeypatch, module):
    made = count(monkeypatch, fx.Graph, "python_code")
    after = apply_all([SQUARES, TANHS], module).module
    assert not made
    torch.testing.assert_close(after(X)[0], with_bodies(X))


def test_bodies_of_checkpoints_are_copied_and_those_of_autograd_functions_shared(module):
    copied = duplicate(module)
    assert bodies(module, "fwd") and bodies(copied, "fwd") == bodies(module, "fwd")
    assert bodies(module, "wrap") and not set(bodies(copied, "wrap").values()) & set(module.children())


def test_a_whole_copy_shares_no_graph(module):
    copied = duplicate(module, whole=True)
    assert bodies(copied, "fwd").keys() == bodies(module, "fwd").keys()
    assert not set(copied.modules()) & set(module.modules())


def test_a_graph_that_no_node_names_any_more_is_let_go(module):
    def run(part):
        (call,) = [n for n in part.graph.nodes if "autograd_function_apply" in str(n.target)]
        (item,) = call.users
        item.replace_all_uses_with(call.args[2])
        drop_dead(part.graph)
        return Applied([("bypassed", "here")])

    after = apply_all([CrossingPass("bypass", run)], module).module
    assert not bodies(after, "fwd") and bodies(after, "wrap")
    assert bodies(module, "fwd")


@pytest.mark.parametrize(
    "passes", [[BROKEN, SQUARES, TANHS], [SQUARES, BROKEN, TANHS], [SQUARES, TANHS, BROKEN]]
)
def test_a_pass_that_fails_half_way_leaves_what_the_others_make(passes):
    module, _ = trace(function, X)
    before = calls(module)
    done = apply_all(passes, module)
    assert calls(module) == before
    assert calls(done.module) == calls(apply_all([SQUARES, TANHS], module).module)
    assert [r.name for r in done.records] == [p.name for p in passes]
    assert [r.error for r in done.records if r.error] == ["RuntimeError: half way"]


def test_where_all_passes_fail_the_graph_is_returned_itself():
    module, _ = trace(function, X)
    done = apply_all([BROKEN, BROKEN], module)
    assert done.module is module and not done.stages
    assert [r.error for r in done.records] == ["RuntimeError: half way"] * 2


def test_stages_are_the_graph_after_each_pass_that_rewrote_it():
    module, _ = trace(function, X)
    done = apply_all([SQUARES, NOTHING, TANHS], module, keep_stages=True)
    assert [(name, calls(stage)) for name, stage in done.stages] == [
        ("squares", ["fused_square(x)", "tanh(fused_square)"]),
        ("tanhs", ["fused_square(x)", "fused_tanh(fused_square)"]),
    ]
    assert done.stages[-1][1] is done.module
    for _, stage in done.stages:
        torch.testing.assert_close(stage(X)[0], function(X))
