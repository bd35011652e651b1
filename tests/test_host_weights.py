"""Frozen weights in host memory: the same steps, the same state dict, and a way back."""

# Models are known by what they are at run time.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportArgumentType=false

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

import rewriter
from rewriter.huggingface import prepare, restore
from tests.families import batch, build
from tests.memory.budgeted import steps

pytest.importorskip("bitsandbytes")
BOTH = ("embedding", "layers")


def model_of(name: str = "llama", **settings) -> nn.Module:
    settings = {"lora": True, "nf4": True, "double_quant": True, "layers": 2, **settings}
    return build(name, **settings)


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


def prepared(name: str = "llama", host=BOTH, **settings) -> nn.Module:
    model = model_of(name, **settings)
    prepare(model, host=host)
    return model


def test_steps_and_rewrites_are_the_same():
    batches, found = [batch(length=12)], []
    for host in (BOTH, ()):
        torch._dynamo.reset()
        model = prepared(host=host, layers=1)
        model.compile(backend="rewriter", options={"lowering": "eager"})
        with rewriter.inspect() as report:
            found.append((steps(model, batches), {(p.name, str(p.count)) for p in report.graphs[-1].passes}))
    (ours, counts), (theirs, expected) = found
    assert counts == expected
    assert all(torch.equal(a, b) for a, b in zip(ours[0], theirs[0], strict=True))
    assert ours[1] and ours[1].keys() == theirs[1].keys()
    assert all(torch.equal(ours[1][name], gradient) for name, gradient in theirs[1].items())


class Scaled(nn.Embedding):
    def forward(self, input):
        return super().forward(input) * 8.0


@pytest.mark.parametrize("kind", [nn.Embedding, Scaled])
def test_what_an_embedding_does_after_it_stays(kind):
    model, ids = nn.Sequential(kind(9, 4, padding_idx=0), nn.Linear(4, 2)), torch.arange(9).view(3, 3)
    model[0].requires_grad_(False)
    expected = model(ids)
    prepare(model, host="embedding")
    assert isinstance(model[0], kind)
    assert torch.equal(model(ids), expected)
    graph = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(graph(ids), model(ids))
    assert torch.equal(graph(ids[:2]), expected[:2])


def test_the_state_dict_is_the_models_own():
    given, held = model_of().state_dict(), prepared().state_dict()
    assert list(given) == list(held)
    for name, value in given.items():
        torch.testing.assert_close(held[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_is_loaded_into_it(assign):
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2)).requires_grad_(False)
    given = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    prepare(model, host="embedding")
    model.load_state_dict(given, assign=assign)
    assert torch.equal(model[0].weight, given["0.weight"]) and "weight" not in model[0]._parameters
    assert all(torch.equal(value, given[name]) for name, value in model.state_dict().items())


def test_what_walks_over_parameters_does_not_meet_it():
    model = prepared()
    names = [name for name, _ in model.named_parameters()]
    assert names and all("lora_" in n or "norm" in n or "bias" in n or "lm_head" in n for n in names)
    weight = model.get_input_embeddings().weight
    model.to("meta")
    assert model.get_input_embeddings().weight is weight and not weight.is_meta


def test_restore_brings_back_modules_and_parameters():
    model = model_of()
    before, kinds = list(model.named_parameters()), [type(m) for m in model.modules()]
    prepare(model, host=BOTH)
    prepare(model, host="embedding")
    restore(model)
    after = list(model.named_parameters())
    assert [name for name, _ in before] == [name for name, _ in after]
    assert all(a is b for (_, a), (_, b) in zip(before, after, strict=True))
    assert [type(m) for m in model.modules()] == kinds


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_computes_with_its_own_weights(duplicate):
    model, given = prepared().eval(), batch()
    twin = duplicate(model)
    assert torch.equal(twin(**given).loss, model(**given).loss)
    twin.get_input_embeddings().weight.data.zero_()
    assert not torch.equal(twin(**given).loss, model(**given).loss)
    restore(twin)
    assert any("embed_tokens" in name for name, _ in twin.named_parameters())


def test_the_trainer_trains_saves_and_loads_a_model_that_has_it(tmp_path):
    model = prepared()
    rows = [{key: value[0] for key, value in batch(rows=1, seed=i).items()} for i in range(4)]
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=2, max_steps=2, report_to=[], use_cpu=True, save_steps=2
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    assert torch.isfinite(torch.tensor(trainer.train().training_loss))
    assert model.device == torch.device("cpu")
    assert model.generate(input_ids=batch()["input_ids"], max_new_tokens=2).shape[1] == 18
    assert any("adapter_model" in file.name for file in (tmp_path / "checkpoint-2").iterdir())


def test_a_whole_model_saved_while_it_is_there_loads_as_it_was(tmp_path):
    model = model_of(lora=False, nf4=False).requires_grad_(False)
    given = {name: value.clone() for name, value in model.state_dict().items()}
    prepare(model, host="embedding")
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).state_dict()
    assert given.keys() == loaded.keys()
    assert all(torch.equal(loaded[name], value) for name, value in given.items())


def test_what_cannot_live_there_is_refused_and_says_why():
    with pytest.raises(ValueError, match=r"'layer'; did you mean 'layers'\? .* embedding, head and layers"):
        prepare(model_of(), host="layer")
    with pytest.raises(ValueError, match="embedding is trained"):
        prepare(model_of(lora=False, nf4=False), host="embedding")
    with pytest.raises(ValueError, match="4 bits"):
        prepare(model_of(nf4=False), host="layers")
    with pytest.raises(ValueError, match="2 embeddings"):
        prepare(nn.Sequential(nn.Embedding(2, 2), nn.Embedding(2, 2)).requires_grad_(False), host="embedding")
    with pytest.raises(ValueError, match="max_norm=1.0"):
        prepare(nn.Embedding(2, 2, max_norm=1.0).requires_grad_(False), host="embedding")
    tied = nn.ModuleDict({"first": nn.Embedding(4, 4), "head": nn.Linear(4, 4)}).requires_grad_(False)
    tied["head"].weight = tied["first"].weight
    with pytest.raises(ValueError, match="of head too"):
        prepare(tied, host="embedding")
    assert "weight" in tied["first"]._parameters


class Reads(nn.Embedding):
    def forward(self, input):
        return self.weight[input]


def test_an_embedding_with_a_forward_of_its_own_is_refused():
    with pytest.raises(ValueError, match="Reads.forward"):
        prepare(Reads(2, 2).requires_grad_(False), host="embedding")
