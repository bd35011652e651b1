"""LoRA layers as straight lines: PEFT's numbers and graph, and its own forward wherever that does more."""

import copy
import pickle
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from torch import nn

import rewriter
import rewriter.straight_lora
from rewriter.huggingface import prepare, restore
from tests.golden import trace
from tests.regions.outlined import assert_equal, numbers


class Pair(nn.Module):
    """Two linears, 16 to 24 to 16."""

    def __init__(self, kind: type[nn.Module], **settings) -> None:
        super().__init__()
        self.up, self.down = kind(16, 24, **settings), kind(24, 16, **settings)

    def forward(self, x):
        return self.down(self.up(x))


def adapted(*, four_bits: bool = False, dtype=torch.float32, **settings) -> Any:
    """``Pair`` with adapters whose B is not zero."""
    torch.manual_seed(0)
    if four_bits:
        library = pytest.importorskip("bitsandbytes")
        settings_4bit = {"bias": False, "compute_dtype": torch.bfloat16, "quant_type": "nf4"}
        inner: Any = Pair(library.nn.Linear4bit, **settings_4bit).to("cpu")
        inner.is_loaded_in_4bit = True
    else:
        inner = Pair(nn.Linear).to(dtype)
    wrapped: Any = get_peft_model(inner, LoraConfig(r=4, target_modules=["up", "down"], **settings))
    model = wrapped.base_model.model
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.train()


def x(dtype=torch.float32):
    return torch.randn(3, 16, generator=torch.Generator().manual_seed(1), dtype=dtype).requires_grad_()


def compiled(model):
    torch._dynamo.reset()
    return torch.compile(model, backend="aot_eager", fullgraph=True)


def graph(model, value, autocast=False) -> list[str]:
    """Operations, less the casts, whose absence where they do nothing is the one difference."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        module, _ = trace(lambda x: model(x) * 1, value)
    calls = [n for n in module.graph.nodes if n.op in ("call_function", "call_method")]
    return [getattr(n.target, "__name__", n.target) for n in calls if n.target != "to"]


MODELS = {
    "16 bit": {"dtype": torch.bfloat16},
    "32 bit": {},
    "4 bit": {"four_bits": True},
    "biased": {"lora_bias": True},
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS.keys())
def test_numbers_and_graph_are_those_of_peft(settings, autocast):
    model = adapted(**settings)
    values = (x(settings.get("dtype", torch.float32)),)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = numbers(compiled(model), values)
        theirs = graph(model, *values, autocast)
        assert len(prepare(model).straight) == 2
        assert_equal(numbers(compiled(model), values), expected)
    ours = graph(model, *values, autocast)
    if not settings.get("four_bits"):
        assert ours == theirs
    assert ours.count("linear") == 4 + (0 if settings.get("four_bits") else 2)


def test_dropout_is_in_the_line():
    model = adapted(lora_dropout=0.5)
    expected = graph(model, x())
    prepare(model)
    assert expected.count("dropout") == 2 and graph(model, x()) == expected


def replace_first(layer: Any) -> None:
    first = layer.lora_A["default"] = copy.deepcopy(layer.lora_A["default"])
    nn.init.ones_(first.weight)


CHANGES = {
    "disabled": lambda model: [layer.enable_adapters(False) for layer in layers(model)],
    "merged": lambda model: [layer.merge() for layer in layers(model)],
    "scaled": lambda model: [layer.set_scale("default", 3.0) for layer in layers(model)],
    "not cast": lambda model: [setattr(layer, "cast_input_dtype_enabled", False) for layer in layers(model)],
    "other weights": lambda model: [
        setattr(a := layer.lora_A["default"], "weight", nn.Parameter(a.weight.detach() + 1))
        for layer in layers(model)
    ],
    "a bias": lambda model: [
        setattr(b := layer.lora_B["default"], "bias", nn.Parameter(torch.ones(b.out_features)))
        for layer in layers(model)
    ],
    "another module": lambda model: [replace_first(layer) for layer in layers(model)],
    "a forward over the adapter's": lambda model: [
        setattr(layer.lora_B["default"], "forward", lambda x, size=layer.out_features: x.new_ones(size))
        for layer in layers(model)
    ],
    "a forward over the base's": lambda model: [
        setattr(layer.base_layer, "forward", lambda x, size=layer.out_features: x.new_ones(len(x), size))
        for layer in layers(model)
    ],
    "two at once": lambda model: [
        (
            layer.update_layer("other", r=2, lora_alpha=8, config=LoraConfig()),
            layer.set_adapter(["default", "other"]),
        )
        for layer in layers(model)
    ],
}


@pytest.mark.parametrize("four_bits", [False, True])
def test_a_line_calls_no_module_of_its_parts(four_bits):
    model = adapted(four_bits=four_bits)
    prepare(model)
    module, _ = trace(model, x())
    calls = [n for n in module.graph.nodes if n.op == "call_function"]
    assert calls and not any("nn/modules/linear.py" in n.meta["stack_trace"] for n in calls)


def test_a_line_is_where_the_model_called_it():
    model = adapted()
    prepare(model)
    model.compile(backend="rewriter", options={"lowering": "eager"})
    with rewriter.inspect() as report:
        model(x())
    (match,) = next(done for done in report.graphs[-1].passes if done.name == "lora").matches
    assert (match.place, match.count) == (f"{__file__}:{Pair.forward.__code__.co_firstlineno + 1}", 2)


def layers(model) -> list[Any]:
    return [layer for layer in model.modules() if isinstance(layer, Linear)]


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_change_of_the_adapters_is_seen_after_compilation(change):
    model, plain = adapted(), adapted()
    prepare(model)
    run = compiled(model)
    run(x())
    for each in (model, plain):
        change(each)
    torch.testing.assert_close(run(x()), plain(x()))


def test_an_adapter_of_another_kind_runs_as_written():
    model = adapted(use_dora=True)
    expected = model(x())
    prepare(model)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(x()), expected)


def test_hooks_of_every_part_run():
    model = adapted()
    prepare(model)
    layer, seen = model.up, []
    for part in (layer, layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]):
        part.register_forward_hook(lambda module, _, result: (seen.append(type(module)), result * 2)[1])
    expected = model(x())
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend="eager")(x()), expected)
    assert len(seen) == 8


def test_a_forward_that_reads_other_names_stays(monkeypatch):
    monkeypatch.setattr(rewriter.straight_lora, "_NAMES", rewriter.straight_lora._NAMES - {"scaling"})
    model = adapted()
    assert not prepare(model).straight


@pytest.mark.parametrize("four_bits", [False, True])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_restore_gives_the_forward_back_and_copies_run_on_their_own(duplicate, four_bits):
    model = adapted(four_bits=four_bits)
    prepare(model)
    twin = duplicate(model)
    with torch.no_grad():
        twin.up.lora_A["default"].weight.zero_()
    assert not torch.equal(compiled(twin)(x()), compiled(model)(x()))
    restore(model)
    assert not any("forward" in vars(layer) for layer in model.modules())
