"""A frozen head in host memory: on the device for its loss alone, and the same numbers as if it stayed."""

# Models are known by what they are at run time.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportArgumentType=false

import weakref
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

import rewriter
from rewriter import backend
from rewriter.huggingface import prepare, restore
from rewriter.kernels import host_weight
from rewriter.memory import head_ahead
from tests.families import batch, build
from tests.memory.budgeted import staged, steps

BOTH = ("embedding", "head")
# In which four layers do not keep all that their backward reads.
BUDGET = "3100KB"


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch):
    """The weight is copied where it is read, from the CPU to the CPU."""
    monkeypatch.setattr(host_weight, "_is_copied", lambda x: True)
    monkeypatch.setattr(head_ahead, "_is_away", lambda weight, device: True)
    torch._dynamo.reset()


def model_of(tied: bool = False, layers: int = 1) -> nn.Module:
    model = build("llama", layers=layers).requires_grad_(False)
    model.model.layers.requires_grad_(True)
    if tied:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    return model


def compiled(model: nn.Module, **options) -> nn.Module:
    model.compile(backend="rewriter", options={"lowering": "eager", **options})
    return model


def trained(model: nn.Module, given: list[dict]) -> list[torch.Tensor]:
    """Losses and gradients, of a loss that reads the logits too, and the logits."""
    losses, gradients = steps(model, given)
    out = model(**given[0])
    (out.loss + out.logits.square().mean()).backward()
    assert gradients
    return [x.detach().clone() for x in (*losses, *gradients.values(), out.logits)]


def test_losses_gradients_and_logits_are_those_of_a_tied_head_that_stays():
    given, found = [batch(length=24), batch(length=24, seed=2)], []
    for host in (BOTH, ()):
        torch._dynamo.reset()
        model = model_of(tied=True)
        prepare(model, host=host)
        found.append(trained(compiled(model), given))
        if host:
            assert [p.count for p in rewriter.report().graphs[-1].passes if p.name == "lm_head_loss"] == [1]
            _nothing_holds_the_copy_behind_the_loss(model, given[0])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


def _nothing_holds_the_copy_behind_the_loss(model, given):
    weight = model.get_output_embeddings().weight
    copy, waits = weight.detach().clone(), []
    host_weight.COMING[weight.data_ptr()] = copy, lambda: waits.append(1)
    copy_lives = weakref.ref(copy)
    del copy
    out = model(**given)
    assert waits and copy_lives() is None
    out.loss.backward()
    model.zero_grad()


def test_under_a_plan_the_copy_begins_a_layer_ahead_and_the_numbers_are_the_same():
    model, given, asked = model_of(layers=4), [batch(length=24)], []
    expected = trained(model, given)
    model.zero_grad()
    prepare(model, host="head")

    class Watched(dict):
        def pop(self, key, default=None):
            asked.append(key in self)
            return super().pop(key, default)

    with (
        patch.object(host_weight, "COMING", Watched()) as coming,
        patch.object(head_ahead, "COMING", coming),
    ):
        found = trained(compiled(model, memory_budget=BUDGET), given)
    graph = rewriter.report().graphs[-1]
    assert staged() and any("while the last layer" in note for note in graph.notes)
    lines = [line.split("(")[0].strip() for line in str(graph.program and graph.program.code).splitlines()]
    assert lines.index("head_ahead") == len(lines) - 4
    # Of two steps; the logits, which are read later, have theirs copied when they are.
    assert asked.count(True) == 2 and not coming
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_report_says_how_the_head_comes_under_the_last_plan_alone():
    record: Any = SimpleNamespace(notes=["head: it waits", "one graph"])
    plan: Any = SimpleNamespace(notes=("head: ahead",), staged={}, program=None, plan=None)
    with patch("rewriter.memory.under_budget.memory_record"), patch.object(backend, "describe"):
        backend.record_plan(plan, record)
    assert record.notes == ["one graph", "head: ahead"]


@pytest.mark.parametrize("compile", [False, True])
def test_logits_without_labels_are_the_models_own(compile):
    ids, model = batch()["input_ids"], model_of().eval()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        prepare(model, host="head")
        logits = (compiled(model) if compile else model)(input_ids=ids).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5 if compile else 0, atol=1e-5 if compile else 0)


@pytest.mark.parametrize("tied", [False, True])
def test_the_state_dict_is_the_models_own_and_restore_brings_the_weight_back(tied, tmp_path):
    model = model_of(tied)
    model.config.tie_word_embeddings = tied
    given = {name: value.clone() for name, value in model.state_dict().items()}
    before = list(model.named_parameters())
    moved = prepare(model, host=BOTH).hosted
    assert len(moved) == (1 if tied else 2)
    assert not any("embed" in n or "lm_head" in n for n, _ in model.named_parameters())
    assert list(model.state_dict()) == list(given)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in given.items())
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in given.items())
    restore(model)
    after = list(model.named_parameters())
    assert [(n, id(p)) for n, p in after] == [(n, id(p)) for n, p in before]
    assert type(model.get_output_embeddings()) is nn.Linear


def test_weights_that_are_tied_or_given_again_stay_there_until_restore():
    model = model_of(tied=True)
    model.config.tie_word_embeddings = True
    state = {name: value + 1 for name, value in model.state_dict().items()}
    prepare(model, host=BOTH)
    model.tie_weights()
    assert not any("embed" in n or "lm_head" in n for n, _ in model.named_parameters())
    model.load_state_dict(state, assign=True)
    assert torch.equal(model.get_output_embeddings().weight, state["lm_head.weight"])
    assert not any("embed" in n or "lm_head" in n for n, _ in model.named_parameters())
    restore(model)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_head_that_cannot_leave_the_device_is_refused_and_says_why():
    with pytest.raises(ValueError, match="a Linear, is trained"):
        prepare(build("llama", layers=1), host="head")
    with pytest.raises(ValueError, match=r"give both: host=\('embedding', 'head'\)"):
        prepare(model_of(tied=True), host="head")
    with pytest.raises(ValueError, match=r"get_output_embeddings"):
        prepare(nn.Linear(2, 2), host="head")
    model = model_of()
    head = model.get_output_embeddings()
    for wrong, reason in ((nn.Sequential(head), "Sequential, no torch.nn.Linear"), (Reads(2, 2), "Reads")):
        model.get_output_embeddings = lambda wrong=wrong: wrong.requires_grad_(False)
        with pytest.raises(ValueError, match=reason):
            prepare(model, host="head")
    assert isinstance(head.weight, nn.Parameter) and "weight" in head._parameters


def test_a_head_under_an_adapter_is_refused():
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(target_modules=["lm_head"])
    model = get_peft_model(build("llama", layers=1), settings)
    with pytest.raises(ValueError, match="has an adapter"):
        prepare(model, host="head")


class Reads(nn.Linear):
    def forward(self, input):
        return input @ self.weight.t()
