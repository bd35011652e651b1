"""The models that ``end_to_end.py`` trains: Llama's structure, random weights, the same for every system.

A case is ``<layers>x<rows>x<tokens>[_1b|_70b][_16bit|_full]``: layers of the shape of Llama-3.1-8B,
Llama-3.2-1B or Llama-3.3-70B, and a batch; ``tokens`` may be a range, ``128-255``. The base is NF4 with
double quantisation under LoRA on all seven linears, or 16-bit under LoRA, or all of it is trained.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

RANK = 32
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Hidden and inner width, heads, and heads of keys and values.
SHAPES = {"8b": (4096, 14336, 32, 8), "1b": (2048, 8192, 32, 8), "70b": (8192, 28672, 64, 8)}
TINY = (128, 256, 4, 2)
NAME = re.compile(r"(\d+)x(\d+)x(\d+)(?:-(\d+))?(?:_(1b|70b))?(?:_(16bit|full))?")


@dataclass(frozen=True)
class Case:
    """A model, a batch and what is trained.

    Attributes:
        tokens: the fewest and the most of a row.
        shape: of ``SHAPES``.
        weights: "nf4" and "16bit" under adapters, or "full", where all of them are trained.
    """

    layers: int
    rows: int
    tokens: tuple[int, int]
    shape: str = "8b"
    weights: str = "nf4"

    @classmethod
    def parse(cls, name: str) -> "Case":
        """
        Raises:
            ValueError: ``name`` is none of a case.
        """
        found = NAME.fullmatch(name)
        if not found:
            raise ValueError(
                f"case {name!r} is not <layers>x<rows>x<tokens>[_1b|_70b][_16bit|_full], as in 8x2x2048_16bit"
            )
        layers, rows, least, most, shape, weights = found.groups()
        tokens = (int(least), int(most or least))
        return cls(int(layers), int(rows), tokens, shape or "8b", weights or "nf4")

    @property
    def batch(self) -> str:
        return "x".join((str(self.layers), str(self.rows), "-".join(map(str, dict.fromkeys(self.tokens)))))

    @property
    def name(self) -> str:
        parts = [
            self.batch,
            "" if self.shape == "8b" else self.shape,
            "" if self.weights == "nf4" else self.weights,
        ]
        return "_".join(filter(None, parts))

    def shrunk(self) -> "Case":
        """The same kind of case at the size of a dry run."""
        tokens = (32, 32) if self.tokens[0] == self.tokens[1] else (16, 32)
        return replace(self, layers=2, rows=min(self.rows, 2), tokens=tokens)

    def lengths(self, count: int) -> list[int]:
        """Of each batch of ``count``, in order."""
        generator = torch.Generator().manual_seed(0)
        least, most = self.tokens
        return torch.randint(least, most + 1, (count,), generator=generator).tolist()


def configuration(case: Case, tiny: bool = False):
    """The shape of the model, in transformers' words."""
    from transformers import LlamaConfig

    hidden, inner, heads, groups = TINY if tiny else SHAPES[case.shape]
    return LlamaConfig(
        vocab_size=1024 if tiny else 128256,
        hidden_size=hidden,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        num_hidden_layers=case.layers,
        max_position_embeddings=131072,
        tie_word_embeddings=case.shape == "1b",
        use_cache=False,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )


def left_in_16_bits(layer: nn.Module) -> None:
    """What becomes of a layer that nothing becomes of."""


def base_model(
    case: Case, device: str, tiny: bool = False, made: Callable[[nn.Module], None] = left_in_16_bits
) -> nn.Module:
    """In bf16, made on ``device``: equal on equal devices.

    Args:
        made: called with each layer as soon as it has its weights, before the next one has any: in 16 bits,
            those of 70B's shape would not fit a card.
    """
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(configuration(case, tiny), dtype=torch.bfloat16)
    torch.manual_seed(0)
    for layer in model.model.layers:
        fill(model, layer, device)
        made(layer)
    fill(model, model, device)
    model.tie_weights()
    return model


def fill(model: nn.Module, part: nn.Module, device: str) -> None:
    """Random weights, as the model's own code draws them, to what in ``part`` has no memory yet."""
    for module in part.modules():
        tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        if any(tensor.is_meta for tensor in tensors):
            module.to_empty(device=device, recurse=False)
            model._init_weights(module)  # pyright: ignore[reportCallIssue]


def model_of(case: Case, device: str, tiny: bool = False) -> nn.Module:
    """The case's model, ready to be trained."""
    from peft import LoraConfig, get_peft_model

    model = base_model(case, device, tiny, quantise if case.weights == "nf4" else left_in_16_bits)
    if case.weights == "full":
        return model.train()
    model.requires_grad_(False)
    rank = 8 if tiny else RANK
    adapters = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=list(LINEARS))
    return with_random_adapters(get_peft_model(model, adapters))


def build(layers: int, quantised: bool, device: str, tiny: bool) -> nn.Module:
    """The 8B shape under adapters."""
    case = Case(layers, 1, (1, 1), weights="nf4" if quantised else "16bit")
    return model_of(case, device, tiny)


def with_random_adapters(model: nn.Module) -> nn.Module:
    """Adapters that are alike in every system, drawn by name on the CPU.

    B starts at zero otherwise, which would leave half of the gradients zero.
    """
    generator = torch.Generator().manual_seed(1)
    adapters = {name: p for name, p in model.named_parameters() if "lora_" in name}
    with torch.no_grad():
        for name in sorted(adapters):
            values = torch.empty(adapters[name].shape)
            std = 0.01 if "lora_B" in name else (3 * values.shape[-1]) ** -0.5
            adapters[name].copy_(values.normal_(std=std, generator=generator))
    return model.train()


def quantise(layer: nn.Module) -> None:
    """Its linears to NF4 with double quantisation."""
    import bitsandbytes as bnb

    for parent in list(layer.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and name in LINEARS:
                linear = bnb.nn.Linear4bit(
                    child.in_features, child.out_features, bias=False, compute_dtype=torch.bfloat16,
                    compress_statistics=True, quant_type="nf4", device="meta",
                )  # fmt: skip
                device = child.weight.device
                linear.weight = bnb.nn.Params4bit(
                    child.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
                ).to(device)
                setattr(parent, name, linear)
