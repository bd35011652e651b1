"""The smallest Llama that trains, for tests of what surrounds a model: two layers, 64 words."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


def tiny_llama(**settings) -> LlamaForCausalLM:
    """The same weights at every call."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return LlamaForCausalLM(
        LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **{**sizes, **settings})
    )


def with_lora(model: nn.Module) -> nn.Module:
    """Adapters on every linear layer but the head, none of them zero."""
    lora = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0))
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return lora
