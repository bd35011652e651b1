"""Tiny random decoder models, one builder a family, for tests of what Dynamo captures and of parity.

Every model has hidden size 64 and two layers (more where layer types alternate), random biases and
random norm weights: a rewrite that loses a bias, or a norm's weight, must show in the gradients.
Options put LoRA adapters (PEFT) on every linear layer and store the base weights as NF4 (bitsandbytes).
"""

from dataclasses import dataclass

import torch
import transformers
from torch import nn

VOCABULARY = 128
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEAD = {"head_dim": 16}
NO_DROPOUT = {
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "embedding_dropout": 0.0,
    "residual_dropout": 0.0,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 48}
# "all-linear" would have PEFT adapt the experts' stacked weights, which breaks the graph and refuses dropout.
ATTENTION_ONLY = r".*self_attn\.\w*proj\w*"


@dataclass(frozen=True)
class Family:
    """A configuration and a model class of transformers, by name, with what makes this family itself."""

    config: str
    model: str
    settings: dict
    attention: str = "sdpa"
    adapters: str = "all-linear"

    def configuration(self, **overrides) -> transformers.PretrainedConfig:
        cls = getattr(transformers, self.config)
        return cls(**{**SHAPE, **NO_DROPOUT, **self.settings, **overrides})

    def every_expert(self) -> dict:
        counts = ("num_local_experts", "num_experts", "n_routed_experts")
        total = next((self.settings[c] for c in counts if c in self.settings), None)
        if total is None:
            return {}
        groups = {"topk_group": self.settings["n_group"]} if "n_group" in self.settings else {}
        return {"num_experts_per_tok": total, **groups}


def _causal(prefix: str, /, *, attention: str = "sdpa", adapters: str = "all-linear", **settings) -> Family:
    return Family(f"{prefix}Config", f"{prefix}ForCausalLM", settings, attention, adapters)


def _rope(**parameters) -> dict:
    return {"rope_theta": 10000.0, **parameters}


FAMILIES: dict[str, Family] = {
    "llama": _causal("Llama", **HEAD),
    "llama_bias": _causal("Llama", **HEAD, attention_bias=True, mlp_bias=True),
    "llama_rope_llama3": _causal(
        "Llama",
        **HEAD,
        rope_parameters=_rope(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),
    "llama_rope_linear": _causal("Llama", **HEAD, rope_parameters=_rope(rope_type="linear", factor=2.0)),
    "llama_rope_yarn": _causal(
        "Llama",
        **HEAD,
        rope_parameters=_rope(rope_type="yarn", factor=2.0, original_max_position_embeddings=32),
    ),
    "mistral": _causal("Mistral", **HEAD, sliding_window=8),
    "qwen2": _causal("Qwen2"),
    "qwen3": _causal("Qwen3", **HEAD),
    "phi3": _causal("Phi3"),
    "gemma": _causal("Gemma", **HEAD),
    "gemma2": _causal("Gemma2", **HEAD, sliding_window=8, query_pre_attn_scalar=16, attention="eager"),
    "gemma2_sdpa": _causal("Gemma2", **HEAD, sliding_window=8, query_pre_attn_scalar=16),
    "gemma3": Family(
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {
            **HEAD,
            "sliding_window": 8,
            "query_pre_attn_scalar": 16,
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
    ),
    "mixtral": _causal(
        "Mixtral", **HEAD, adapters=ATTENTION_ONLY, num_local_experts=4, num_experts_per_tok=2
    ),
    "smollm3": _causal("SmolLM3", no_rope_layers=[1, 0]),
    "olmo2": _causal("Olmo2"),
    "granite": _causal(
        "Granite",
        embedding_multiplier=2.0,
        logits_scaling=4.0,
        residual_multiplier=0.5,
        attention_multiplier=0.25,
    ),
    "cohere": _causal("Cohere", logit_scale=0.25),
    "cohere_qk_norm": _causal("Cohere", logit_scale=0.25, use_qk_norm=True),
    "cohere2": _causal(
        "Cohere2",
        **HEAD,
        logit_scale=0.25,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "glm4": _causal("Glm4", **HEAD),
    "phi": _causal("Phi"),
    "gpt_neox": _causal("GPTNeoX"),
    "stablelm": _causal("StableLm", use_qkv_bias=True),
    "starcoder2": _causal("Starcoder2", sliding_window=8),
    "falcon": _causal("Falcon", new_decoder_architecture=True, num_kv_heads=2, bias=True, alibi=False),
    "gpt_oss": _causal(
        "GptOss",
        **HEAD,
        attention="eager",
        sliding_window=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters=_rope(
            rope_type="yarn", factor=2.0, original_max_position_embeddings=32, truncate=False
        ),
    ),
    "deepseek_v3": _causal(
        "DeepseekV3",
        adapters=ATTENTION_ONLY,
        num_key_value_heads=4,
        n_routed_experts=4,
        n_shared_experts=1,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        **EXPERTS,
    ),
    "qwen3_moe": _causal("Qwen3Moe", **HEAD, adapters=ATTENTION_ONLY, num_experts=4, **EXPERTS),
    "granitemoe": _causal(
        "GraniteMoe",
        adapters=ATTENTION_ONLY,
        num_local_experts=4,
        num_experts_per_tok=2,
        logits_scaling=4.0,
    ),
    "ernie4_5": _causal("Ernie4_5", **HEAD),
    "hunyuan": _causal("HunYuanDenseV1", **HEAD),
    "exaone4": _causal("Exaone4", sliding_window=8, layer_types=["sliding_attention", "full_attention"]),
    "nemotron": _causal("Nemotron", **HEAD),
    "bitnet": _causal("BitNet"),
    "apertus": _causal("Apertus"),
    "diffllama": _causal("DiffLlama", **HEAD),
    "lfm2": _causal("Lfm2", layer_types=["conv", "full_attention"], block_multiple_of=16),
    "gptj": _causal("GPTJ", attention="eager", n_embd=64, n_head=4, n_layer=2, n_positions=64, rotary_dim=8),
    "gemma3n": Family(
        "Gemma3nTextConfig",
        "Gemma3nForCausalLM",
        {
            **HEAD,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "num_kv_shared_layers": 0,
            "intermediate_size": [128, 128],
            "activation_sparsity_pattern": [0.5, 0.0],
            "laurel_rank": 16,
            "altup_num_inputs": 2,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": VOCABULARY,
        },
    ),
}


def build(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    lora: bool = False,
    lora_dropout: float = 0.0,
    lora_dtype: torch.dtype = torch.float32,
    rslora: bool = False,
    nf4: bool = False,
    double_quant: bool = False,
    use_cache: bool = False,
    layers: int | None = None,
    all_experts: bool = False,
    device: str = "cpu",
    seed: int = 0,
) -> nn.Module:
    """A model in training mode, the same for the same arguments.

    Args:
        name: a key of ``FAMILIES``.
        dtype: of the base weights; what NF4 weights are dequantised to.
        lora: rank-4 adapters on every linear layer but the head, with a ``lora_B`` that is not zero.
        lora_dtype: of the adapters; PEFT's default is float32 whatever the base is.
        nf4: store every linear layer's weight but the head's in 4 bits; the base is then frozen.
        all_experts: send every token to every expert. In 16 bit a near tie between experts may be decided
            differently by two equally good computations, which no bound on rounding errors can allow for.
        layers: in place of the family's own number; layer types are repeated as needed.
    """
    family = FAMILIES[name]
    overrides: dict = {"use_cache": use_cache}
    if layers is not None:
        overrides["num_hidden_layers"] = layers
    for setting in ("layer_types", "no_rope_layers"):
        if layers is not None and (kinds := family.settings.get(setting)):
            overrides[setting] = [kinds[i % len(kinds)] for i in range(layers)]
    if all_experts:
        overrides.update(family.every_expert())
    config = family.configuration(**overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # As from_pretrained does, and unlike Module.to, this leaves rotary frequencies in float32.
        model = getattr(transformers, family.model)._from_config(
            config, dtype=dtype, attn_implementation=family.attention
        )
        if dtype == torch.float32 and model._can_set_experts_implementation():
            # The default, grouped_mm, falls back to loops of data-dependent sizes, which AOTAutograd refuses.
            model.set_experts_implementation("batched_mm")
        _randomise(model)
        if nf4:
            model.requires_grad_(False)
            _quantise(model, dtype, double_quant)
        if lora:
            model = _adapt(model, family.adapters, lora_dropout, lora_dtype, rslora)
    return model.to(device).train()


def batch(
    *, rows: int = 2, length: int = 16, ignored: int = 3, seed: int = 1, device: str = "cpu"
) -> dict[str, torch.Tensor]:
    """Token ids and labels, both ``(rows, length)`` int64; each row's first ``ignored`` labels are -100."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    labels = ids.clone()
    labels[:, :ignored] = -100
    return {"input_ids": ids.to(device), "labels": labels.to(device)}


def _randomise(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or name.endswith("sinks"):
                parameter.normal_(0.0, 0.2)
            elif parameter.dim() == 1 or "norm" in name:
                parameter.add_(torch.empty_like(parameter).uniform_(-0.3, 0.3))
            else:
                # transformers' 0.02 leaves attention flat and logits tiny; tests want both to matter.
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)


def _linears(model: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    head = model.get_output_embeddings()
    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear) and child is not head
    ]


def _quantise(model: nn.Module, compute: torch.dtype, double_quant: bool) -> None:
    import bitsandbytes as bnb

    for parent, name, linear in _linears(model):
        quantised = bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=compute,
            compress_statistics=double_quant,
            quant_type="nf4",
        )
        quantised.weight = bnb.nn.Params4bit(
            linear.weight.data, requires_grad=False, compress_statistics=double_quant, quant_type="nf4"
        )
        quantised.bias = linear.bias
        setattr(parent, name, quantised.to("cpu"))
    model.is_loaded_in_4bit = True


def _adapt(model: nn.Module, targets: str, dropout: float, dtype: torch.dtype, rslora: bool) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=targets,
        lora_dropout=dropout,
        use_rslora=rslora,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_A" in name:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
            if "lora_B" in name:
                # An update larger than the base sharpens attention until 16 bit gives 10% errors.
                parameter.normal_(0.0, 0.1)
            if "lora_" in name:
                parameter.data = parameter.data.to(dtype)
    return adapted
