"""The demo end to end, on a tiny model saved to a folder: every way to train that it offers."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import training  # noqa: E402
from conversations import InputError  # noqa: E402
from finetune import main, parse  # noqa: E402

TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of a model with one layer, whose tokenizer knows bytes, and four conversations."""
    path = tmp_path_factory.mktemp("checkpoint")
    alphabet = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    config = LlamaConfig(
        vocab_size=len(alphabet),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    talk = [{"role": "user", "content": "one two"}, {"role": "assistant", "content": "three four"}]
    (path / "talks.jsonl").write_text((json.dumps({"messages": talk}) + "\n") * 8)
    return path


def finetune(*options):
    training.run(parse([str(option) for option in options]))


@pytest.mark.parametrize(
    "options",
    [("--gradient-accumulation", 2, "--beside", "eager"), ("--full", "--bf16"), ("--load-in-4bit", "--bf16")],
    ids=["LoRA, with another backend beside", "all weights in bf16", "4-bit LoRA in bf16"],
)
def test_it_trains_compares_and_saves(folder, tmp_path, capsys, monkeypatch, options):
    torch._dynamo.reset()
    monkeypatch.setattr(training.console, "width", 160)
    paths = ("--model", folder, "--data", folder / "talks.jsonl", "--output", tmp_path)
    size = ("--steps", 3, "--compare", 2, "--held-out", 2, "--max-length", 48, "--batch-size", 2)
    finetune(*paths, *size, "--backend", "aot_eager", *options)
    shown = capsys.readouterr().out
    for part in ("aot_eager loss", "held-out loss", "before:", "after:"):
        assert part in shown
    # Of the run in eager PyTorch first, and of the one beside.
    assert shown.count("eager s") == (3 if "--beside" in options else 2) and "typical" in shown
    name = "model.safetensors" if "--full" in options else "adapter_model.safetensors"
    with safe_open(tmp_path / name, "pt") as saved:
        assert len(saved.keys()) > 0


def test_flat_is_the_rewriter_without_regions():
    asked: dict = {}
    training.compile_by(SimpleNamespace(compile=lambda **settings: asked.update(settings)), "flat")
    assert asked == {"backend": "rewriter", "options": {"regions": False}}


def test_a_saved_model_can_be_trained_on(folder, tmp_path, capsys):
    size = ("--steps", 1, "--held-out", 1, "--max-length", 48, "--backend", "none")
    data = ("--data", folder / "talks.jsonl")
    finetune("--model", folder, *data, *size, "--full", "--output", tmp_path)
    finetune("--model", tmp_path, *data, *size)
    assert capsys.readouterr().out.count("held-out loss") == 2


def test_a_folder_that_holds_no_model_is_named(folder, tmp_path):
    cases = {
        Path("/nowhere"): "--model: no such folder: /nowhere",
        tmp_path: "holds neither a config.json nor a .gguf file",
    }
    for path, message in cases.items():
        with pytest.raises(InputError, match=message):
            finetune("--model", path, "--data", folder / "talks.jsonl")


def test_bad_input_ends_in_one_line(monkeypatch):
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    monkeypatch.setattr(sys, "argv", ["finetune.py", "--data", "/nowhere.jsonl"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == "finetune: --data: no such file: /nowhere.jsonl"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--full", "--load-in-4bit"), "4-bit weights cannot be trained"),
        (("--steps", 0), "0 is less than 1"),
        (("--steps", "many"), "invalid"),
        (("--beside", "inductor", "--compare", 0), "--beside runs the first steps"),
    ],
)
def test_options_that_make_no_sense_are_refused(capsys, options, message):
    with pytest.raises(SystemExit):
        finetune(*options)
    assert message in capsys.readouterr().err
