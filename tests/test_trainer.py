"""Hugging Face's Trainer on a compiled model: its losses are eager's, however a run starts and stops."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import rewriter

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tiny_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


def rows(count, length=12):
    """Token rows of one length, each another."""
    ids = torch.randint(0, 64, (count, length), generator=torch.Generator().manual_seed(1)).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer(model, folder, **settings):
    settings = {"max_steps": 4, "save_strategy": "no", **settings}
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **settings,
    )
    return Trainer(model=model, args=arguments, train_dataset=rows(32), eval_dataset=rows(4))


def losses(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_trainer_compiles_the_model_by_the_name_of_the_backend(tmp_path):
    eager = trainer(tiny_model(), tmp_path)
    eager.train()
    named = trainer(tiny_model(), tmp_path, torch_compile=True, torch_compile_backend="rewriter")
    with rewriter.inspect() as report:
        named.train()
    assert report.counts()["lm_head_loss"] == 1
    assert losses(named) == pytest.approx(losses(eager), rel=1e-4)


@pytest.mark.parametrize("order", ["import accelerate, rewriter", "import rewriter, accelerate"])
def test_accelerate_takes_the_name_whichever_is_imported_first(order):
    program = f"""
import copy, pickle, sys
{order}
from accelerate.utils import DynamoBackend, TorchDynamoPlugin
assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("rewriter")]
plugin = TorchDynamoPlugin(backend="rewriter", mode="max-autotune")
assert plugin.to_kwargs() == {{"backend": "rewriter", "mode": "max-autotune"}}
assert plugin.backend != DynamoBackend.NO and str(plugin.backend) == "REWRITER"
assert copy.deepcopy(plugin.backend) is pickle.loads(pickle.dumps(plugin.backend)) is plugin.backend
assert TorchDynamoPlugin(backend="inductor").backend is DynamoBackend.INDUCTOR
try:
    TorchDynamoPlugin(backend="rewritten")
except ValueError as error:
    assert "REWRITTEN" in str(error)
else:
    raise AssertionError("a name that nobody knows was taken")
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
