"""A config or a model to a copy for tracing: its modules and shapes, tensors without memory, few layers.

    config -> model on "meta" -> adapters, 4-bit weights -> bytes counted -> layers left out -> fake tensors

Whatever is given stays as it was: the copy shares no tensor with it.
"""

import copy
import importlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import FakeTensor

from rewriter.foresee.host_bytes import HostBytes, host_bytes
from rewriter.foresee.packed_linear import pack_linears, repack_linears
from rewriter.foresee.repetition import Repetition, layers_of, longest_list, shorten
from rewriter.host_weights import read_head_from_host
from rewriter.hostable import HEAD, checked
from rewriter.huggingface import is_prepared, prepare, restore, weights_in_host_memory
from rewriter.memory.unwrapped import UNWRAPPED


@dataclass(frozen=True, eq=False)
class Blueprint:
    """A model to trace.

    Attributes:
        name: of its class.
        model: of fake tensors, prepared, in training mode.
        mode: theirs.
        left_out: layers that are missing in it; None where all are there.
        weight_bytes: of all parameters and buffers on the device, those of layers left out included.
        trained_bytes: of the parameters that need a gradient.
        parameters, trained: how many numbers the model has as it was given, and how many are trained.
        host: of weights in host memory, and of those that could be there.
        notes: what will run otherwise than the model asks for.
    """

    name: str
    model: nn.Module
    mode: FakeTensorMode
    left_out: Repetition | None
    weight_bytes: int
    trained_bytes: int
    parameters: int
    trained: int
    host: HostBytes = field(default_factory=HostBytes)
    notes: tuple[str, ...] = ()


def blueprint(
    config_or_model: Any,
    lora_rank: int | None = None,
    quantise: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    host: Iterable[str] = (),
    *,
    whole: bool = False,
) -> Blueprint:
    """What to trace of ``config_or_model``, which is left as it was.

    Args:
        host: frozen weights in host memory, as ``prepare`` takes them; those of a prepared model are there.
        whole: leave no layer out.

    Raises:
        ValueError: of arguments that contradict each other or the model.
    """
    model = config_or_model
    if not isinstance(model, nn.Module):
        model = _from_config(config_or_model, dtype)
    elif (lora_rank or quantise) and any(not p.requires_grad for p in model.parameters()):
        raise ValueError(
            "plan: lora_rank and quantise say how a whole model will be adapted; this one has frozen weights "
            "already. Leave them out, and it is planned as it is."
        )
    host = {*checked(host), *weights_in_host_memory(model)}
    name, model = type(model).__name__, _on_meta(model).train()
    if is_prepared(model):
        restore(model)
    parameters = sum(map(_numbers, model.parameters()))
    path = None if whole else longest_list(model)
    left_out = shorten(model, path) if path else None
    if lora_rank or quantise:
        model.requires_grad_(False)
    if lora_rank:
        model = _adapted(model, lora_rank)
    if quantise:
        pack_linears(model, quantise, dtype)
    repack_linears(model)
    weights = _tensors_of_all(model, left_out)
    trained = [x for x in weights if x.requires_grad]
    if not trained:
        raise ValueError("plan: nothing is trained; give lora_rank, or a model with parameters to train.")
    hosted = host_bytes(model, left_out, host)
    weight_bytes, trained_bytes = sum(x.nbytes for x in weights), sum(x.nbytes for x in trained)
    numbers = sum(x.numel() for x in trained)
    # What to compute again is the plan's to decide.
    checkpointed = [m for m in model.modules() if vars(m).get("gradient_checkpointing")]
    for module in checkpointed:
        vars(module)["gradient_checkpointing"] = False
    notes = (UNWRAPPED,) if checkpointed else ()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    _make_fake(model, mode)
    prepare(model)
    if HEAD in host:
        read_head_from_host(model)
    weight_bytes -= sum(hosted.there.values())
    return Blueprint(
        name, model, mode, left_out, weight_bytes, trained_bytes, parameters, numbers, hosted, notes
    )


def _from_config(config: Any, dtype: torch.dtype) -> nn.Module:
    """The causal language model that the config's own package builds of it, without memory."""
    package = importlib.import_module(type(config).__module__.partition(".")[0])
    auto = getattr(package, "AutoModelForCausalLM", None)
    if auto is None:
        raise TypeError(
            f"plan: {type(config).__name__} is neither a torch.nn.Module nor the config of a package with "
            "AutoModelForCausalLM; of a model's name, AutoConfig.from_pretrained gives the config."
        )
    with torch.device("meta"):
        return auto.from_config(copy.deepcopy(config), dtype=dtype)


def _on_meta(model: nn.Module) -> nn.Module:
    """A copy of a model whose tensors have no memory; ties stay, and what hangs on tensors does too."""
    return copy.deepcopy(model, {id(t): _to_meta(t) for t in _tensors(model)})


def _numbers(parameter: nn.Parameter) -> int:
    packed = getattr(parameter, "quant_state", None)
    return parameter.numel() if packed is None else prod(packed.shape)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers, each once; weights in host memory are their modules' attributes."""
    attributes = [v for m in model.modules() for v in vars(m).values() if isinstance(v, nn.Parameter)]
    yield from dict.fromkeys([*model.parameters(), *model.buffers(), *attributes])


def _tensors_of_all(model: nn.Module, left_out: Repetition | None) -> list[Tensor]:
    """Parameters and buffers, and again those that stand for the ones of layers that were left out."""
    found = list(_tensors(model))
    if left_out is not None:
        layers = layers_of(model, left_out.path)
        for place in left_out.window:
            found += [*_tensors(layers[place])] * left_out.times
    return found


def _to_meta(x: Tensor) -> Tensor:
    made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    if not isinstance(x, nn.Parameter):
        return made
    made = nn.Parameter(made, x.requires_grad)
    if state := getattr(x, "quant_state", None):
        made.quant_state = state  # type: ignore[attr-defined]
    return made


def _make_fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """Give every parameter and buffer of ``model``, on "meta", to ``mode``, as on a CPU."""
    fakes: dict[Tensor, Tensor] = {}

    def fake(x: Tensor) -> Tensor:
        if x not in fakes:
            made = FakeTensor(mode, x.detach(), torch.device("cpu"))
            fakes[x] = nn.Parameter(made, x.requires_grad) if isinstance(x, nn.Parameter) else made
        return fakes[x]

    for module in model.modules():
        held: dict[str, Any]
        for held in (module._parameters, module._buffers):
            for key, value in held.items():
                held[key] = None if value is None else fake(value)
        for key, value in vars(module).items():
            if isinstance(value, Tensor):
                vars(module)[key] = fake(_to_meta(value)) if not value.is_meta else fake(value)


def _adapted(model: nn.Module, rank: int) -> nn.Module:
    """With LoRA on all linears but the head."""
    try:
        peft = importlib.import_module("peft")
    except ImportError as error:
        raise ValueError("plan: lora_rank needs PEFT, which is not installed: pip install peft.") from error
    settings = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear")
    with torch.device("meta"):
        return peft.get_peft_model(model, settings)
