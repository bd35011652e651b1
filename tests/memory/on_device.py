"""Steps of a small Llama under a memory budget on a device, with what they took: for tests on a GPU.

On a CPU the same code runs in a dry run, without figures of memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest.mock import patch

import torch
from torch import Tensor, nn

import rewriter
from examples.benchmarks.models import LINEARS, quantise, with_random_adapters
from rewriter.memory.arena import HostArena
from rewriter.memory.machine import H200
from rewriter.memory.transfer import Transfers
from tests.memory.late_copies import late_transfers

VOCABULARY = 4096
MiB = 1 << 20
# Of bf16 products that are summed in another order: four times what was seen on a CPU.
NEAR = 1e-2
# What the driver takes of a card, and no allocator has.
CONTEXT = int(0.6 * 2**30)


@dataclass(frozen=True)
class Sizes:
    """Of the model; tokens are said at each step."""

    layers: int = 4
    hidden: int = 512
    inner: int = 1408
    heads: int = 8
    groups: int = 4


@dataclass(frozen=True)
class Outcome:
    """Of one step: loss, gradients by name, and on a GPU what was allocated before and at most."""

    loss: Tensor
    gradients: dict[str, Tensor]
    before: int
    peak: int


def small_llama(device: str, sizes: Sizes, nf4: bool, dropout: float = 0.0) -> nn.Module:
    """In bf16 or NF4, frozen, under adapters in fp32 on all seven linears."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.inner,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.groups,
        num_hidden_layers=sizes.layers,
        max_position_embeddings=1 << 17,
        use_cache=False,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.requires_grad_(False)
    if nf4:
        quantise(model)
    adapters = LoraConfig(r=8, lora_alpha=8, lora_dropout=dropout, target_modules=list(LINEARS))
    return with_random_adapters(get_peft_model(model, adapters))


def compiled(model: nn.Module, budget: int | str, dynamic: bool | None = False, **options) -> nn.Module:
    """``model`` compiled anew, without Inductor, which these tests have no time for."""
    torch._dynamo.reset()
    given = {"memory_budget": budget, "lowering": "eager", "cuda_graphs": False, **options}
    model.compile(backend="rewriter", options=given, dynamic=dynamic)
    return model


def tokens(length: int, device: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (1, length), generator=generator).to(device)


def step(model: nn.Module, ids: Tensor) -> Outcome:
    """Forward and backward; gradients are taken off the model."""
    before = torch.cuda.memory_allocated() if ids.is_cuda else 0
    if ids.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    with torch.autocast(ids.device.type, torch.bfloat16):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    peak = torch.cuda.max_memory_allocated() if ids.is_cuda else 0
    return Outcome(loss.detach(), gradients, before, peak)


def distance(ours: Outcome, other: Outcome) -> float:
    """The largest relative distance of the loss and of any gradient."""
    assert ours.gradients.keys() == other.gradients.keys()
    pairs = [(ours.loss, other.loss), *((g, other.gradients[n]) for n, g in ours.gradients.items())]
    return max(((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in pairs)


@contextmanager
def free_bus() -> Iterator[None]:
    """Plans are made for a bus that costs nothing: they offload rather than compute again."""
    machine = replace(H200, to_host=1e18, to_device=1e18)
    with patch("rewriter.memory.under_budget.machine_for", lambda device: machine):
        yield


@contextmanager
def poisoned(device: str) -> Iterator[Transfers]:
    """Plans made inside fill what they give up with NaN, in host memory of their own."""
    arena = HostArena(2048 * MiB, growth=64 * MiB)
    made = late_transfers(arena) if device == "cpu" else Transfers(arena, device, poison=True)
    with patch("rewriter.memory.planned.transfers_of", lambda *_: made):
        yield made


def plan():
    """The last one."""
    return [graph.memory for graph in rewriter.report().graphs if graph.memory][-1]
