"""The families of tiny models: what makes each of them itself, by the names of transformers."""

from dataclasses import dataclass

import transformers

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
