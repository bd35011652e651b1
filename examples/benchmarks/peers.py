"""Every system's model for ``end_to_end.py``, set up as its own documentation says, with the same weights.

Unsloth loads a checkpoint, so that one with random weights and a tokenizer of a few words is written first,
by a process of its own (``python peers.py <folder> <case>``): Unsloth must be imported before transformers.
"""

import fcntl
import os
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path

import torch
from models import LINEARS, RANK, Case, base_model, model_of, with_random_adapters
from torch import nn

SYSTEMS = {
    "rewriter": "`rewriter`",
    "hf": "eager",
    "inductor": "`torch.compile`",
    "liger": "Liger-Kernel",
    "liger_compiled": "Liger-Kernel and `torch.compile`",
    "unsloth": "Unsloth",
    "hf_gc": "eager, checkpointing",
    "inductor_gc": "`torch.compile`, checkpointing",
    "liger_gc": "Liger-Kernel, checkpointing",
    "unsloth_gc": "Unsloth, its checkpointing",
}
IMPORTS = {
    "rewriter": ("rewriter",),
    "liger": ("liger_kernel.transformers",),
    "liger_compiled": ("liger_kernel.transformers",),
}


def imports(system: str) -> None:
    """What its process imports, before it takes memory of the GPU."""
    name = system.removesuffix("_gc")
    if name == "unsloth":
        os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", UNSLOTH_DISABLE_STATISTICS="1")
        import_module("unsloth")
        return
    for module in ("transformers.models.llama.modeling_llama", "peft", *IMPORTS.get(name, ())):
        import_module(module)


def prepared(system: str, case: Case, device: str, tiny: bool, options: dict) -> nn.Module:
    """The case's model as ``system`` runs it, after its ``imports``; ``options`` are the rewriter's."""
    name, checkpointed = system.removesuffix("_gc"), system.endswith("_gc")
    if name == "unsloth":
        return unsloth(case, checkpointed)
    if name.startswith("liger"):
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    model = model_of(case, device, tiny)
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if name == "rewriter":
        import rewriter

        rewriter.prepare(model)
        model.compile(backend="rewriter", options=options)
    elif name in ("inductor", "liger_compiled"):
        model.compile()
    return model


def unsloth(case: Case, checkpointing: bool) -> nn.Module:
    """``FastLanguageModel`` with adapters; ``checkpointing`` is its own offloading one."""
    if case.weights == "full":
        raise ValueError(f"unsloth is measured with adapters alone, not on the case {case.name}")
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        model_name=str(checkpoint(case)),
        max_seq_length=131072,
        dtype=torch.bfloat16,
        load_in_4bit=case.weights == "nf4",
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=RANK,
        target_modules=list(LINEARS),
        lora_alpha=RANK,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing="unsloth" if checkpointing else False,
    )
    return with_random_adapters(model)


def checkpoint(case: Case) -> Path:
    """The folder of the case's base model, written where it is not there yet, by one process alone."""
    folder = Path(tempfile.gettempdir()) / f"rewriter_peers_{case.layers}_{case.shape}"
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            subprocess.run([sys.executable, __file__, str(folder), case.name], check=True)
    return folder


def save(folder: Path, case: Case) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    model = base_model(case, "cuda" if torch.cuda.is_available() else "cpu")
    model.save_pretrained(folder, max_shard_size="4GB")
    words = Tokenizer(WordLevel({"<s>": 0, "</s>": 1, "<pad>": 2, "<unk>": 3}, unk_token="<unk>"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    (folder / "done").touch()


if __name__ == "__main__":
    save(Path(sys.argv[1]), Case.parse(sys.argv[2]))
