"""The peers' models for ``end_to_end.py``: each as its own documentation sets it up, with the same shapes.

Unsloth loads a checkpoint, so that one with random weights and a tokenizer of one word is written first, by a
process of its own (``python peers.py <folder> <layers>``), as Unsloth must be imported before transformers.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn


def liger(build, compiled: bool) -> nn.Module:
    """Liger-Kernel's modules, patched in before ``build`` makes the model."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama()
    model = build()
    if compiled:
        model.compile()
    return model


def unsloth(shape: dict, rank: int, targets: list[str], quantised: bool, checkpointing: bool) -> nn.Module:
    """``FastLanguageModel`` with adapters; ``checkpointing`` is its own offloading one."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", UNSLOTH_DISABLE_STATISTICS="1")
    from unsloth import FastLanguageModel

    layers = shape["num_hidden_layers"]
    folder = Path(tempfile.gettempdir()) / f"rewriter_peers_{layers}_{shape['hidden_size']}"
    if not (folder / "done").exists():
        subprocess.run([sys.executable, __file__, str(folder), str(layers)], check=True)
    model, _ = FastLanguageModel.from_pretrained(
        model_name=str(folder),
        max_seq_length=shape["max_position_embeddings"],
        dtype=torch.bfloat16,
        load_in_4bit=quantised,
    )
    return FastLanguageModel.get_peft_model(
        model,
        r=rank,
        target_modules=targets,
        lora_alpha=rank,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing="unsloth" if checkpointing else False,
    )


def save(folder: Path, layers: int) -> None:
    from end_to_end import configuration
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    config = configuration(layers, tiny=False)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="4GB")
    words = Tokenizer(WordLevel({"<s>": 0, "</s>": 1, "<pad>": 2, "<unk>": 3}, unk_token="<unk>"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    (folder / "done").touch()


if __name__ == "__main__":
    save(Path(sys.argv[1]), int(sys.argv[2]))
