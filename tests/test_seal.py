"""The one guard of prepared layers: every change that a layer's own guards would see is seen, once each."""

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.guards import CheckFunctionManager

from rewriter.huggingface import prepare, restore
from tests.test_straight_lora import adapted, layers, x


class Counted:
    """A backend that counts the graphs it is given."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, module, example_inputs) -> Callable:
        self.count += 1
        return module.forward


def compiled(model: nn.Module) -> tuple[Any, Counted]:
    torch._dynamo.reset()
    counted = Counted()
    return torch.compile(model, backend=counted, fullgraph=True), counted


def requantised(weight: Any) -> Any:
    """Another weight of that size, in 4 bits."""
    shape = weight.quant_state.shape
    values = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    kind: Any = type(weight)
    return kind(values, requires_grad=False, quant_type="nf4").to("cpu")


def each(change: Callable[[Any], Any]) -> Callable[[Any], None]:
    def change_both(model: Any) -> None:
        for layer in (model.up, model.down):
            change(layer)

    return change_both


def replace_state(layer: Any) -> None:
    layer.base_layer.weight.quant_state = copy.deepcopy(layer.base_layer.weight.quant_state)
    layer.base_layer.weight.quant_state.absmax = layer.base_layer.weight.quant_state.absmax // 2


def replace_second(layer: Any) -> None:
    state = layer.base_layer.weight.quant_state
    state.state2 = copy.deepcopy(state.state2)
    state.state2.absmax = state.state2.absmax * 2


SEEN_BY_THE_SEAL = {
    "merged": each(lambda layer: layer.merge()),
    "disabled": each(lambda layer: layer.enable_adapters(False)),
    "weight replaced": each(
        lambda layer: setattr(layer.base_layer, "weight", requantised(layer.base_layer.weight))
    ),
    "weight replaced behind its module": each(
        lambda layer: layer.base_layer._parameters.update(weight=requantised(layer.base_layer.weight))
    ),
    "state replaced": each(replace_state),
    "second state replaced": each(replace_second),
    "computed in another dtype": each(
        lambda layer: setattr(layer.base_layer, "compute_dtype", torch.float32)
    ),
    "adapter frozen": each(lambda layer: layer.lora_A["default"].weight.requires_grad_(False)),
}


@pytest.mark.parametrize("change", SEEN_BY_THE_SEAL.values(), ids=SEEN_BY_THE_SEAL.keys())
def test_a_change_is_seen_and_traced_anew_once(change):
    model, plain = adapted(four_bits=True), adapted(four_bits=True)
    prepare(model)
    run, graphs = compiled(model)
    for _ in range(3):
        run(x())
    assert graphs.count == 1
    for one in (model, plain):
        change(one)
    for _ in range(3):
        torch.testing.assert_close(run(x()), plain(x()))
    assert graphs.count == 2


def test_parts_of_a_weight_replaced_in_place_are_read_where_they_are():
    model, plain = adapted(four_bits=True), adapted(four_bits=True)
    prepare(model)
    run, graphs = compiled(model)
    run(x())
    for one in (model, plain):
        state = one.up.base_layer.weight.quant_state
        state.absmax, state.offset = state.absmax // 2, state.offset * 2
    torch.testing.assert_close(run(x()), plain(x()))
    assert graphs.count == 1


def test_a_frozen_adapter_has_no_gradient_and_one_that_thaws_has_one():
    model = adapted()
    prepare(model)
    run, graphs = compiled(model)
    weight = model.up.lora_A["default"].weight
    for needed in (True, False, True):
        weight.grad = None
        weight.requires_grad_(needed)
        run(x()).sum().backward()
        assert (weight.grad is not None) == needed
    assert graphs.count == 2


def test_adapters_that_are_switched_off_in_between_are_two_graphs():
    model, plain = adapted(four_bits=True), adapted(four_bits=True)
    prepare(model)
    run, graphs = compiled(model)
    for enabled in (True, False, True, False):
        for one in (model, plain):
            for layer in (one.up, one.down):
                layer.enable_adapters(enabled)
        torch.testing.assert_close(run(x()), plain(x()))
    assert graphs.count == 2


def test_a_graph_keeps_no_weight_that_was_replaced():
    model: Any = adapted(four_bits=True)
    prepare(model)
    run, _ = compiled(model)
    run(x())
    base = model.up.base_layer
    gone = weakref.ref(base.weight)
    base.weight = requantised(base.weight)
    run(x())
    gc.collect()
    assert gone() is None


def test_restore_and_a_second_preparation_are_traced_anew():
    model = adapted(four_bits=True)
    prepare(model)
    run, graphs = compiled(model)
    expected = run(x())
    restore(model)
    assert not {"_quant_state", "_quant_state2"} & set(vars(model.up.base_layer))
    torch.testing.assert_close(run(x()), expected)
    prepare(model)
    torch.testing.assert_close(run(x()), expected)
    assert graphs.count == 3


def test_a_copy_is_traced_by_what_it_is_itself():
    model = adapted()
    prepare(model)
    run, _ = compiled(model)
    run(x())
    twin, plain = copy.deepcopy(model), adapted()
    run, _ = compiled(twin)
    run(x())
    for one in (twin, plain):
        for layer in layers(one):
            layer.merge()
    torch.testing.assert_close(run(x()), plain(x()))


def guard_trees(monkeypatch) -> list[Any]:
    """Filled with the tree of each compilation from here on."""
    made, original = [], CheckFunctionManager.__init__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        made.append(self.guard_manager)

    monkeypatch.setattr(CheckFunctionManager, "__init__", init)
    return made


def nodes_of(node: Any) -> list[Any]:
    return [node, *(found for child in node.get_child_managers() for found in nodes_of(child))]


@pytest.mark.parametrize("four_bits", [False, True])
def test_no_guard_keeps_a_layer_from_being_passed_over(four_bits, monkeypatch):
    model, made = adapted(four_bits=four_bits), guard_trees(monkeypatch)
    prepare(model)
    run, _ = compiled(model)
    with torch._dynamo.config.patch(use_recursive_dict_tags_for_guards=True):
        run(x())
    (tree,) = made
    found = [n for n in nodes_of(tree.root) if n.get_source().endswith(("['up']", "['down']"))]
    assert len(found) == 2 and all(node.is_tag_safe() for node in found)
    texts = [part for guard in tree.root.get_leaf_guards() for part in guard.verbose_code_parts()]
    assert sum("prepared model" in text for text in texts) == 1


def test_guards_do_not_keep_a_model_alive():
    model = adapted(four_bits=True)
    prepare(model)
    run, _ = compiled(model)
    run(x())
    gone = weakref.ref(model.up)
    del model, run
    gc.collect()
    assert gone() is None


class Block(nn.Module):
    def __init__(self, breaks: bool) -> None:
        super().__init__()
        self.up, self.down, self.breaks = nn.Linear(16, 16), nn.Linear(16, 16), breaks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.up(x))
        if self.breaks:
            torch._dynamo.graph_break()
        return x + self.down(x)


class Stack(nn.Module):
    def __init__(self, breaks: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(breaks) for _ in range(10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("breaks", [False, True], ids=["one by one", "in pieces"])
def test_layers_that_are_traced_apart_share_what_is_compiled(breaks):
    from peft import LoraConfig, get_peft_model

    counts = []
    for prepares in (False, True):
        torch._dynamo.reset()
        model = get_peft_model(Stack(breaks), LoraConfig(r=2, target_modules=["up", "down"]))
        if prepares:
            prepare(model)
        counted = Counted()
        for block in model.base_model.model.blocks if not breaks else [model]:
            block.compile(backend=counted)
        for _ in range(2):
            model(torch.randn(3, 16))
        counts.append(counted.count)
    # A graph a piece: the first block's, whose input needs no gradient, and the others'.
    assert counts[1] <= counts[0] <= 4
