"""Short calls compute, save and refuse what AOTAutograd's own do."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._functorch._aot_autograd import runtime_wrappers
from torch.fx import symbolic_trace

from rewriter.lower import lower
from rewriter.options import Options
from rewriter.short_calls import ShortCall, is_plain, shortened
from tests.families import batch, build


class Layer(nn.Module):
    def forward(self, x: Tensor, weight: Tensor, frozen: Tensor):
        y = torch.sigmoid(x @ weight) * frozen
        return y, y > 0.5


def inputs(x_needs: bool = True) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, weight, frozen = (torch.randn(4, 4, generator=generator) for _ in range(3))
    return [x.requires_grad_(x_needs), weight.requires_grad_(), frozen]


def lowered(module: nn.Module, given: list[Tensor]) -> Callable:
    return lower(symbolic_trace(module), given, Options(lowering="eager"))


def settled(module: nn.Module, given: list[Tensor]) -> tuple[ShortCall, Callable]:
    """A call after two steps, and what it calls."""
    whole = lowered(module, given)
    call = ShortCall(whole)
    for _ in range(2):
        results = call(*given)
        results[0].sum().backward()
    return call, whole


def is_short(call: ShortCall, given: list[Tensor]) -> bool:
    (result, *_) = call(*given)
    return type(result.grad_fn).__name__.startswith("ShortFunction")


def test_calls_are_short_once_the_backward_is_compiled():
    given = inputs()
    call = ShortCall(lowered(Layer(), given))
    assert not is_short(call, given)
    assert not is_short(call, given)
    call(*given)[0].sum().backward()
    call(*given)
    assert is_short(call, given)


def test_results_and_gradients_are_the_same_bit_for_bit():
    given = inputs()
    call, whole = settled(Layer(), given)
    assert is_short(call, given)
    # A gradient that does not lie in memory as the result does.
    gradient = torch.randn(4, 4, 2)[..., 0]
    for a, b in zip(call(*given), whole(*given), strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride() and a.requires_grad == b.requires_grad
    ours, theirs = (torch.autograd.grad(f(*given)[0], given[:2], gradient) for f in (call, whole))
    assert all(map(torch.equal, ours, theirs))


def test_calls_without_gradients_are_whole():
    given = inputs()
    call, _ = settled(Layer(), given)
    with torch.no_grad():
        result, _ = call(*given)
    # As AOTAutograd has it: a graph for training is one under ``no_grad`` too.
    assert not type(result.grad_fn).__name__.startswith("ShortFunction")


def test_a_saved_tensor_that_was_written_is_found():
    given = inputs()
    call, _ = settled(Layer(), given)
    result = call(*given)[0].sum()
    with torch.no_grad():
        given[1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.backward()


def test_hooks_of_saved_tensors_see_them():
    given = inputs()
    call, whole = settled(Layer(), given)
    seen: list[list[int]] = []
    for function in (call, whole):
        packed: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, to=packed: to.append(x.numel()) or x, lambda x: x
        ):
            function(*given)[0].sum().backward()
        seen.append(packed)
    assert seen[0] == seen[1] != []


@pytest.mark.parametrize(
    "asked", ({"retain_graph": True}, {"create_graph": True}), ids=lambda a: next(iter(a))
)
def test_graphs_are_kept_and_differentiated_where_they_were(asked):
    given = inputs()
    call, whole = settled(Layer(), given)

    def told(function: Callable) -> str:
        result = function(*given)[0].square().sum()
        with pytest.raises(RuntimeError) as refusal:
            (gradient,) = torch.autograd.grad(result, given[1], **asked)
            (gradient.sum() if gradient.requires_grad else result).backward()
            raise RuntimeError(f"it is {gradient}")
        return str(refusal.value)

    assert told(call) == told(whole)


def test_a_backward_under_autocast_computes_without_it():
    given = inputs()
    call, whole = settled(Layer(), given)
    with torch.autocast("cpu", torch.bfloat16):
        ours = torch.autograd.grad(call(*given)[0].sum(), given[:2])
    theirs = torch.autograd.grad(whole(*given)[0].sum(), given[:2])
    assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize(
    "layer",
    {
        "it writes an input": lambda x, weight, frozen: (frozen.add_(1), x @ weight)[1:],
        "it returns an input": lambda x, weight, frozen: (x @ weight, x),
        "it returns a view of an input": lambda x, weight, frozen: (x @ weight, x.view(-1)),
    }.items(),
    ids=lambda case: case[0],
)
def test_calls_stay_whole_where(layer):
    class Given(nn.Module):
        def forward(self, x: Tensor, weight: Tensor, frozen: Tensor):
            return layer[1](x, weight, frozen)

    given = inputs()
    call = ShortCall(lowered(Given(), given))
    for _ in range(3):
        results = call(*given)
        results[0].sum().backward()
    assert not is_short(call, given)


class Seen:
    """An object of AOTAutograd's, without some of its attributes; those that are read are told."""

    def __init__(self, whole: Any, read: set[str], missing: str | None = None):
        self.whole, self.read, self.missing = whole, read, missing

    def __getattr__(self, name: str) -> Any:
        self.read.add(name)
        if name == self.missing:
            raise AttributeError(name)
        return getattr(self.whole, name)


def test_calls_stay_whole_where_a_later_pytorch_lacks_what_is_read_of_its_metadata():
    given = inputs()
    call, _ = settled(Layer(), given)
    results = call(*given)
    function = results[0].grad_fn._forward_cls
    metadata, read = function.metadata, set()

    def plain(missing: str | None = None) -> bool:
        function.metadata = Seen(metadata, read, missing)
        return is_plain(function, len(results))

    assert plain()
    shortened(function)(*given)[0].sum().backward()
    assert {"num_forward_returns", "num_outputs_aliased", "output_info", "deterministic"} <= read
    assert [name for name in sorted(read) if plain(name)] == []


def test_calls_stay_whole_where_a_later_pytorch_has_no_such_result_tangent_or_function():
    given = inputs()
    call, _ = settled(Layer(), given)
    results = call(*given)
    function = results[0].grad_fn._forward_cls
    metadata = function.metadata
    for name, of_each in (("output_info", "raw_type"), ("subclass_tangent_meta", "memory_format")):
        seen = Seen(metadata, set())
        setattr(seen, name, [Seen(each, set(), of_each) for each in getattr(metadata, name)])
        function.metadata = seen
        assert not is_plain(function, len(results)), name
    function.metadata = metadata
    assert is_plain(function, len(results))
    function.metadata = None
    assert not is_plain(function, len(results))


@pytest.mark.parametrize("name", ["coerce_to_expected_memory_format", "_should_disable_saved_tensors_hooks"])
def test_calls_stay_whole_where_a_later_pytorch_has_no_function_of_that_name(name, monkeypatch):
    given = inputs()
    whole = lowered(Layer(), given)
    for _ in range(2):
        whole(*given)[0].sum().backward()

    def becomes_short() -> bool:
        call = ShortCall(whole)
        call(*given)
        return is_short(call, given)

    assert becomes_short()
    monkeypatch.delattr(runtime_wrappers, name)
    assert not becomes_short()


def test_a_tensor_may_come_twice_and_another_may_not_be_read():
    class Odd(nn.Module):
        def forward(self, x: Tensor, weight: Tensor, again: Tensor):
            return (weight.sin() * again,)

    x, weight, _ = inputs()
    call, whole = settled(Odd(), [x, weight, weight])
    ours, theirs = (
        torch.autograd.grad(f(x, weight, weight)[0].sum(), [x, weight], allow_unused=True)
        for f in (call, whole)
    )
    assert ours[0] is theirs[0] is None
    assert torch.equal(ours[1], theirs[1])


def test_a_layer_whose_results_the_program_returns_is_whole_and_others_are_short():
    model = build("llama", layers=4)
    model.compile(backend="rewriter", options={"lowering": "eager"})
    names: set[str] = set()

    def walk(node):
        if node is not None and node not in seen:
            seen.add(node)
            names.add(type(node).__name__)
            for behind, _ in node.next_functions:
                walk(behind)

    for _ in range(3):
        seen: set = set()
        names.clear()
        model.zero_grad()
        loss = model(**batch()).loss
        walk(loss.grad_fn)
        loss.backward()
    assert {"ShortFunctionBackward", "CompiledFunctionBackward"} <= names
