"""prepare and restore: one graph, the same gradients, and every setting back as it was.

What a model is without them, tests/test_advice.py has.
"""

import copy

import pytest
import torch
from peft import prepare_model_for_kbit_training
from torch import nn
from transformers import Trainer, TrainingArguments

from rewriter.advice import advice
from rewriter.huggingface import prepare, restore
from tests.tiny_llama import tiny_llama, with_lora


def hooked(model):
    model.enable_input_require_grads()
    return model


def checkpointed(model, reentrant=False):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    return model.train()


MODELS = {
    "plain": tiny_llama,
    "with LoRA": lambda: with_lora(tiny_llama()),
    "with LoRA and the hook": lambda: hooked(with_lora(tiny_llama())),
    "with LoRA, prepared by PEFT for few bits": lambda: with_lora(
        prepare_model_for_kbit_training(
            tiny_llama(), gradient_checkpointing_kwargs={"use_reentrant": False}
        ).train()
    ),
    "with LoRA and checkpointing": lambda: checkpointed(with_lora(tiny_llama())),
}


def ids():
    return torch.arange(24).view(2, 12) % 64


def gradients(model):
    model.zero_grad()
    model(input_ids=ids(), labels=ids()).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def graphs(model):
    """Of each graph that Dynamo makes of one step, how many tensors it returns and what is advised."""
    seen = []

    def count(graph, example_inputs):
        seen.append((len(graph.graph.find_nodes(op="output")[0].args[0]), advice(graph)))
        return graph

    torch._dynamo.reset()
    torch.compile(model, backend=count)(input_ids=ids(), labels=ids())
    return seen


def settings(model):
    """All that prepare may touch, by identity."""
    return [
        (name, list(vars(module)), tuple(module._forward_hooks.items()), module._forward_hooks)
        for name, module in model.named_modules()
    ], [vars(module)["config"].use_cache for module in model.modules() if "config" in vars(module)]


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS.keys())
def test_a_prepared_model_is_one_graph_with_loss_and_logits_and_needs_no_advice(build):
    model = build()
    prepare(model)
    assert graphs(model) == [(2, [])]


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS.keys())
def test_gradients_are_the_same_after_prepare(build):
    model = build()
    expected = gradients(model)
    prepare(model)
    found = gradients(model)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        assert gradient is not None, name
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=0)


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS.keys())
def test_restore_gives_everything_back(build):
    model = build()
    before = settings(model)
    assert str(prepare(model))
    restore(model)
    assert settings(model) == before


def test_restore_of_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match="restore: expected a torch.nn.Module, got NoneType"):
        restore(None)  # pyright: ignore[reportArgumentType]


def test_restore_keeps_the_order_of_hooks_and_those_added_since():
    model = tiny_llama()
    embedding = model.get_input_embeddings()
    first = embedding.register_forward_hook(lambda *_: None)
    hooked(model)
    last = embedding.register_forward_hook(lambda *_: None)
    order = list(embedding._forward_hooks)
    prepare(model)
    assert list(embedding._forward_hooks) == [first.id, last.id]
    new = embedding.register_forward_hook(lambda *_: None)
    last.remove()
    restore(model)
    assert list(embedding._forward_hooks) == [*order[:2], new.id]
    model.disable_input_require_grads()
    assert list(embedding._forward_hooks) == [first.id, new.id]


def test_a_second_prepare_covers_what_came_between():
    model = hooked(tiny_llama())
    before = settings(model)
    prepare(model)
    model.config.use_cache = True
    prepare(model)
    assert not model.config.use_cache
    restore(model)
    assert settings(model) == before
    with pytest.raises(ValueError, match="not prepared"):
        restore(model)


def test_a_copy_of_a_prepared_model_is_restored_by_itself():
    model = hooked(tiny_llama())
    prepare(model)
    other = copy.deepcopy(model)
    restore(other)
    assert other.config.use_cache and other.get_input_embeddings()._forward_hooks
    assert not model.config.use_cache and not model.get_input_embeddings()._forward_hooks


def test_under_reentrant_checkpointing_the_hook_stays_and_adapters_get_gradients():
    model = checkpointed(with_lora(tiny_llama()), reentrant=True)
    expected = gradients(model)
    assert "use_reentrant" in str(prepare(model))
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name])


@pytest.mark.parametrize("reentrant", [False, True])
def test_trainer_may_enable_checkpointing_after_prepare(tmp_path, reentrant):
    model = with_lora(tiny_llama())
    prepare(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=0.1,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    rows = [{"input_ids": row, "labels": row} for row in ids().tolist()]
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    assert bool(model.get_input_embeddings()._forward_hooks) == reentrant
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert not torch.equal(parameter, before[name]), name


def four_bit(layer):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    packed = bitsandbytes.nn.Linear4bit(64, 128, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    packed.weight = bitsandbytes.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
    return packed.to("cpu")


def test_4bit_weights_keep_their_gradient_after_an_evaluation():
    model = nn.Sequential(four_bit(nn.Linear(64, 128, bias=False)))
    x = torch.randn(4, 64, requires_grad=True)
    (expected,) = torch.autograd.grad(model(x).sum(), x)
    prepare(model)
    with torch.no_grad():
        model.eval()(x.detach())
    (found,) = torch.autograd.grad(model.train()(x).sum(), x)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_4bit_weights_that_an_evaluation_packed_are_refused():
    model = nn.Sequential(four_bit(nn.Linear(64, 128, bias=False)))
    if not model[0].support_avx512bf16_for_cpu:
        pytest.skip("bitsandbytes packs no weights on this CPU")
    with torch.no_grad():
        model.eval()(torch.randn(4, 64))
    with pytest.raises(ValueError, match="1 4-bit weights were packed"):
        prepare(model)


def test_packing_is_allowed_again_after_restore():
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].support_avx512bf16_for_cpu = True
    assert "1 layers" in str(prepare(model)) and not model[0].support_avx512bf16_for_cpu
    restore(model)
    assert model[0].support_avx512bf16_for_cpu


def test_what_prepare_says():
    said = str(prepare(hooked(tiny_llama())))
    assert "use_cache" in said and "hook" in said
    assert "nothing to change" in str(prepare(nn.Linear(2, 2)))
    with pytest.raises(TypeError, match="torch.nn.Module, got str"):
        prepare("model")
