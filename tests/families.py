"""Tiny random decoder models, one builder a family, for tests of what Dynamo captures and of parity.

Every model has hidden size 64 and two layers (more where layer types alternate), random biases and
random norm weights: a rewrite that loses a bias, or a norm's weight, must show in the gradients.
Options put LoRA adapters (PEFT) on every linear layer and store the base weights as NF4 (bitsandbytes).
"""

import torch
import transformers
from torch import nn

from tests.catalogue import FAMILIES, VOCABULARY


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
