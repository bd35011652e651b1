"""Sets a Hugging Face model up to be one whole graph, with nothing in it that training never reads.

Two settings cost a model that trains its one graph, or memory:

- ``config.use_cache``, true by default, makes every layer's keys and values outputs of the graph: they are
  kept to the end of the step, and a concatenation with an empty cache stands before each attention.
- ``enable_input_require_grads`` hooks the embedding to call ``requires_grad_`` on its output, which breaks
  the graph into embedding, layers, and head with loss. The hook exists for reentrant gradient checkpointing,
  which drops the gradients of a layer whose inputs need none. Without checkpointing, and with the
  non-reentrant kind (the default of transformers), autograd reaches the adapters of every layer by itself:
  removing the hook changes no parameter's gradient. Under reentrant checkpointing it stays.

One costs it its gradients: on CPUs with bfloat16 instructions, bitsandbytes packs 4-bit weights anew
when they are first used in evaluation, for a product that has no backward. An evaluation before training, or
between steps, would then stop the gradient at every such layer; so packing is turned off.

And some cost it time at the first step: Dynamo traces into the product of every 4-bit layer, over and over
(``opaque_linear.py``), it steps through PEFT's choices in every LoRA layer (``straight_lora.py``), and Python
looks for garbage meanwhile (``full_collections.py``). At every later step it would check all that it read in
those layers; one guard does so for all of them (``seal.py``), where they are traced together.

And on request it moves frozen weights to host memory (``host_weights.py``), for a card that is small.

A model is known by its structure alone, so that neither transformers nor PEFT is imported here.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import nn

from rewriter.full_collections import defer_full_collections
from rewriter.host_weights import HostedWeight, hosted_weights
from rewriter.hostable import checked
from rewriter.opaque_linear import make_opaque, make_transparent, products
from rewriter.seal import Seal
from rewriter.size_text import size_text
from rewriter.straight_lora import adapters, make_as_written, make_straight

_STATE = "_rewriter_preparation"
_SWITCH = "enable_input_require_grads"
_PACKS = "support_avx512bf16_for_cpu"


@dataclass(frozen=True)
class Preparation:
    """What ``prepare`` changed, and what ``restore`` needs to undo it; prints as a list of the changes."""

    changes: tuple[str, ...]
    configs: tuple[Any, ...] = field(repr=False)
    hooks: tuple[tuple[nn.Module, tuple[tuple[int, Callable], ...]], ...] = field(repr=False)
    switches: tuple[nn.Module, ...] = field(repr=False)
    packing: tuple[nn.Module, ...] = field(repr=False)
    opaque: tuple[nn.Module, ...] = field(repr=False)
    straight: tuple[nn.Module, ...] = field(repr=False)
    seal: Seal | None = field(repr=False)
    host: tuple[str, ...] = ()
    hosted: tuple[HostedWeight, ...] = field(default=(), repr=False)

    def __str__(self) -> str:
        if not self.changes:
            return "prepare: nothing to change, the model traces to one graph as it is."
        return "\n".join(["prepare: changed, until restore(model):", *(f"  - {c}" for c in self.changes)])


def prepare(model: nn.Module, *, host: str | Iterable[str] = ()) -> Preparation:
    """Set ``model`` up to be one graph without cache outputs; ``restore`` undoes it.

    Call it before the model's first compiled step: Dynamo does not look at hooks again later. A model that is
    prepared already is restored first, so that a second call covers what was changed in between.

    Args:
        model: a transformers model, a PEFT model around one, or any module that holds one.
        host: frozen weights to keep in host memory instead of on the device, so that more of it is left for
            activations: "embedding", of which a batch reads as many rows as it has tokens; "head", which is
            copied to the device for the loss, and gone when layers run backward; and "layers", the packed
            weights of 4-bit linears, which are read over the bus in each forward and each backward (an 8B
            model's 3.5 GB in 65 ms, 55 GB/s): within a memory budget, while the layer before runs. A head
            that is tied to the embedding goes with it: name both. Once the model is on its device. Such
            weights are in the state dict as before, and no longer among ``model.parameters()``.

    Returns:
        What was changed; ``print`` it. The model keeps it for ``restore``.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
        ValueError: 4-bit weights are packed for inference already, and cannot be trained through; or what
            ``host`` names is not there, is trained, has an adapter, or is tied to a weight that stays.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"prepare: expected a torch.nn.Module, got {type(model).__name__}.")
    if is_prepared(model):
        restore(model)
    _refuse_packed_weights(model)
    host = checked(host)
    changes = []
    configs = tuple(_caching_configs(model))
    for config in configs:
        config.use_cache = False
    if configs:
        changes.append("config.use_cache = False: keys and values are no longer outputs of the graph")
    hooks, switches = (), ()
    if not _checkpoints_reentrantly(model):
        hooks = tuple(_remove_gradient_hooks(model))
        switches = tuple(_disarm_switches(model))
    elif any(map(_gradient_hooks, model.modules())):
        changes.append(
            "the requires_grad hook stays and breaks the graph: reentrant checkpointing needs it; "
            "enable checkpointing with gradient_checkpointing_kwargs={'use_reentrant': False}"
        )
    if hooks:
        changes.append(
            f"removed the requires_grad hook of {len(hooks)} embedding: it broke the graph in three"
        )
    if switches:
        changes.append(f"{_SWITCH}() adds no such hook, unless checkpointing is reentrant")
    packing = tuple(module for module in model.modules() if getattr(module, _PACKS, False))
    for module in packing:
        setattr(module, _PACKS, False)
    if packing:
        changes.append(f"evaluation leaves the 4-bit weights of {len(packing)} layers as training needs them")
    opaque = tuple(make_opaque(model))
    if opaque:
        changes.append(f"the products of {len(opaque)} 4-bit layers are not traced into: a faster first step")
    straight = tuple(make_straight(model))
    if straight:
        changes.append(f"{len(straight)} LoRA layers are traced as straight lines: a faster first step")
    seal = None
    if opaque or straight:
        seal = Seal([(opaque, products), (straight, adapters)], model.parameters())
        changes.append("one guard for all that these layers are traced by: less to check at each call")
    defer_full_collections()
    preparation = Preparation(tuple(changes), configs, hooks, switches, packing, opaque, straight, seal)
    setattr(model, _STATE, preparation)
    return _with_weights_in_host_memory(model, preparation, host) if host else preparation


def is_prepared(model: nn.Module) -> bool:
    """Whether ``restore`` has something to undo."""
    return _STATE in vars(model)


def weights_in_host_memory(model: nn.Module) -> tuple[str, ...]:
    """What ``prepare`` moved there: of "embedding", "head" and "layers"."""
    return vars(model)[_STATE].host if is_prepared(model) else ()


def restore(model: nn.Module) -> None:
    """Undo ``prepare(model)``: settings and hooks are as they were, in their old order.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
        ValueError: the model is not prepared.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"restore: expected a torch.nn.Module, got {type(model).__name__}.")
    preparation = vars(model).get(_STATE)
    if preparation is None:
        raise ValueError("restore: this model is not prepared; nothing to undo.")
    for weight in preparation.hosted:
        weight.bring_back()
    for config in preparation.configs:
        config.use_cache = True
    for module, before in preparation.hooks:
        _put_back(module._forward_hooks, before)
    for module in preparation.switches:
        delattr(module, _SWITCH)
    for module in preparation.packing:
        setattr(module, _PACKS, True)
    for layer in preparation.opaque:
        make_transparent(layer)
    for layer in preparation.straight:
        make_as_written(layer)
    delattr(model, _STATE)


def _with_weights_in_host_memory(
    model: nn.Module, preparation: Preparation, host: tuple[str, ...]
) -> Preparation:
    hosted = tuple(hosted_weights(model, host, preparation.opaque))
    size = sum(weight.nbytes for weight in hosted)
    change = f"{size_text(size)} of frozen weights ({', '.join(host)}) are in host memory"
    preparation = replace(preparation, changes=(*preparation.changes, change), host=host, hosted=hosted)
    setattr(model, _STATE, preparation)
    if torch.cuda.is_available():
        # Where the weights were is a hole that activations of other sizes may not fill.
        torch.cuda.empty_cache()
    return preparation


def _refuse_packed_weights(model: nn.Module) -> None:
    states = (getattr(parameter, "quant_state", None) for parameter in model.parameters())
    packed = sum(getattr(state, "packing_format_for_cpu", False) for state in states)
    if packed:
        raise ValueError(
            f"prepare: {packed} 4-bit weights were packed for inference when the model was evaluated; no "
            "gradient passes through them. Load the model again, and prepare it before its first evaluation."
        )


def _caching_configs(model: nn.Module) -> Iterator[Any]:
    """Every config object in the model, nested ones too, whose ``use_cache`` is on; each once."""
    seen = set()
    waiting = [config for module in model.modules() if (config := vars(module).get("config")) is not None]
    while waiting:
        config = waiting.pop()
        if id(config) in seen or not hasattr(config, "use_cache"):
            continue
        seen.add(id(config))
        waiting += [value for value in vars(config).values() if hasattr(value, "use_cache")]
        if config.use_cache is True:
            yield config


def _gradient_hooks(module: nn.Module) -> dict[int, Callable]:
    """The forward hooks of a module that do nothing but call ``requires_grad_``."""
    return {key: hook for key, hook in module._forward_hooks.items() if _is_gradient_hook(hook)}


def _is_gradient_hook(hook: Callable) -> bool:
    return isinstance(hook, FunctionType) and hook.__code__.co_names == ("requires_grad_",)


def _remove_gradient_hooks(model: nn.Module) -> Iterator[tuple[nn.Module, tuple[tuple[int, Callable], ...]]]:
    for module in model.modules():
        if found := _gradient_hooks(module):
            yield module, tuple(module._forward_hooks.items())
            for key in found:
                del module._forward_hooks[key]


def _put_back(hooks: OrderedDict[int, Callable], before: tuple[tuple[int, Callable], ...]) -> None:
    """Bring removed hooks back to their places. The dictionary stays the same object: handles refer to it."""
    added_since = [(key, hook) for key, hook in hooks.items() if key not in dict(before)]
    still_wanted = [(key, hook) for key, hook in before if key in hooks or _is_gradient_hook(hook)]
    hooks.clear()
    hooks.update(still_wanted + added_since)


def _disarm_switches(model: nn.Module) -> Iterator[nn.Module]:
    """Shadow ``enable_input_require_grads``: Trainer calls it by way of ``gradient_checkpointing_enable``."""
    for module in model.modules():
        if hasattr(type(module), _SWITCH) and _SWITCH not in vars(module):
            setattr(module, _SWITCH, partial(_enable_where_needed, module))
            yield module


def _enable_where_needed(module: nn.Module) -> None:
    if _checkpoints_reentrantly(module):
        getattr(type(module), _SWITCH)(module)


def _checkpoints_reentrantly(model: nn.Module) -> bool:
    functions = (getattr(module, "_gradient_checkpointing_func", None) for module in model.modules())
    return any(getattr(function, "keywords", {}).get("use_reentrant") for function in functions)
