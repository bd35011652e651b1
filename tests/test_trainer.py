"""Hugging Face's Trainer on a compiled model: its losses are eager's, however a run starts and stops."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

import rewriter
from tests.tiny_llama import tiny_llama, with_lora

ROOT = Path(__file__).parent.parent
# AOTAutograd alone compiles the tiny models in a second.
QUICK = {"lowering": "eager"}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def one_layer():
    """For what is not about layers: it compiles in half the time."""
    return tiny_llama(num_hidden_layers=1)


def adapted():
    return with_lora(one_layer())


def compiled(model, **options):
    rewriter.prepare(model)
    model.compile(backend="rewriter", options=options)
    return model


def rows(lengths):
    """Tokens that count up from somewhere, which a few steps can learn."""
    ids = [[(7 * index + step) % 64 for step in range(length)] for index, length in enumerate(lengths)]
    return [{"input_ids": row, "labels": row} for row in ids]


def padded(batch):
    """As long as the batch's longest row, as collators make it."""
    longest = max(len(row["input_ids"]) for row in batch)

    def filled(name, filler):
        return torch.tensor([row[name] + [filler] * (longest - len(row[name])) for row in batch])

    return {"input_ids": filled("input_ids", 0), "labels": filled("labels", -100)}


def trainer(model, folder, lengths=(12,) * 32, **settings):
    settings = {"max_steps": 4, "save_strategy": "no", **settings}
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **settings,
    )
    return Trainer(
        model=model,
        args=arguments,
        data_collator=padded,
        train_dataset=rows(lengths),
        eval_dataset=rows((10, 10, 10, 10)),
    )


def losses(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def everything(folder):
    """Accumulation, evaluation and saving, every second of six steps."""
    return {
        "folder": folder,
        "max_steps": 6,
        "gradient_accumulation_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
    }


@pytest.fixture(scope="module", params=[tiny_llama, adapted])
def runs(request, tmp_path_factory):
    """How to build the model, an eager run of six steps, and the same run compiled with its checkpoints."""
    torch._dynamo.reset()
    eager = trainer(request.param(), **everything(tmp_path_factory.mktemp("eager")))
    eager.train()
    whole = trainer(compiled(request.param(), **QUICK), **everything(tmp_path_factory.mktemp("compiled")))
    whole.train()
    return request.param, eager, whole


def test_losses_are_eagers_with_accumulation_evaluation_and_saving(runs):
    _, eager, whole = runs
    assert len(losses(whole)) == 6 and len(losses(whole, "eval_loss")) == 3
    assert losses(whole)[-1] < losses(whole)[0] - 0.01
    for name in ("loss", "eval_loss", "grad_norm"):
        assert losses(whole, name) == pytest.approx(losses(eager, name), rel=2e-5), name


def test_what_was_saved_has_eagers_names_and_values(runs):
    _, eager, whole = runs
    expected, found = eager.model.state_dict(), whole.model.state_dict()
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-2, atol=1e-4)


def assert_goes_on(whole, resumed):
    """A run from the second of six steps on is the ``whole`` run's."""
    with rewriter.inspect() as report:
        resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")
    assert all(graph.passes for graph in report.graphs)
    assert report.counts()["norm"] >= 3 and report.counts()["lm_head_loss"] >= 1
    assert resumed.state.global_step == 6
    for name in ("loss", "eval_loss"):
        assert losses(resumed, name) == pytest.approx(losses(whole, name), rel=2e-5), name


@pytest.mark.parametrize("runs", [adapted], indirect=True)
def test_a_resumed_run_goes_on_as_if_never_stopped(runs, tmp_path):
    build, _, whole = runs
    assert_goes_on(whole, trainer(compiled(build(), **QUICK), **everything(tmp_path)))


@pytest.mark.parametrize("runs", [tiny_llama], indirect=True)
def test_trainer_compiles_the_model_by_the_name_of_the_backend(runs, tmp_path):
    build, _, whole = runs
    by_name = {"torch_compile": True, "torch_compile_backend": "rewriter"}
    resumed = trainer(build(), **everything(tmp_path), **by_name)
    plugin = resumed.accelerator.state.dynamo_plugin
    assert plugin.to_kwargs()["backend"] == "rewriter"
    plugin.options = QUICK
    assert_goes_on(whole, resumed)


def test_lengths_that_vary_cost_one_more_compilation(tmp_path):
    lengths = [8 + 5 * index % 23 for index in range(16)]
    settings = {"folder": tmp_path, "lengths": lengths, "max_steps": 8}
    eager = trainer(one_layer(), **settings)
    eager.train()
    varying = trainer(compiled(one_layer(), **QUICK), **settings)
    with rewriter.inspect() as report:
        varying.train()
    assert len(report.graphs) == 2
    assert losses(varying) == pytest.approx(losses(eager), rel=1e-4)


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
