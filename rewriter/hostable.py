"""Which frozen weights of a model can live in host memory, by their kind, and why others cannot.

``prepare`` asks before it moves any (``host_weights.py``), and so does a plan made ahead
(``foresee/host_bytes.py``).
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from torch import nn

from rewriter.memory.plan import Infeasible
from rewriter.size_text import size_text

EMBEDDING, HEAD, LAYERS = KINDS = ("embedding", "head", "layers")
_POSSIBLE = "What can live in host memory is embedding, head and layers."


def checked(kinds: Iterable[str]) -> tuple[str, ...]:
    """``kinds``, of which a single one may be given by itself.

    Raises:
        ValueError: for what is no name of one, with those that are.
    """
    if not isinstance(kinds, Iterable):
        raise ValueError(f"host is {kinds!r}; give a name, or several. {_POSSIBLE}")
    kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    for kind in kinds:
        if kind not in KINDS:
            near = get_close_matches(str(kind), KINDS, 1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ValueError(f"host is {kind!r}{hint} {_POSSIBLE}")
    return kinds


def embedding_of(model: nn.Module) -> nn.Embedding:
    """The embedding of the tokens, if it can live in host memory.

    Raises:
        ValueError: there is not one and only one, or it is trained, or does more than to give rows.
    """
    found = [m for m in _input(model).modules() if isinstance(m, nn.Embedding)]
    if len(found) != 1:
        raise ValueError(
            f"host='embedding': {len(found)} embeddings in {type(model).__name__}; which one reads tokens "
            "is known of a model with get_input_embeddings(), or of one embedding."
        )
    (embedding,) = found
    if embedding.weight.requires_grad:
        raise ValueError(
            "host='embedding': the embedding is trained, its gradient and its update belong on the device; "
            "freeze it, or leave it there."
        )
    if embedding.max_norm is not None:
        raise ValueError(
            f"host='embedding': max_norm={embedding.max_norm} writes to the weight at each step; leave it on "
            "the device."
        )
    _refuse_other_forward(EMBEDDING, embedding, nn.Embedding)
    return embedding


def head_of(model: nn.Module) -> nn.Linear:
    """The linear that makes logits, if its weight can live in host memory.

    Raises:
        ValueError: there is none, or it is trained, has an adapter or is in 4 bits.
    """
    given = getattr(model, "get_output_embeddings", None)
    head = None if given is None else given()
    if head is None:
        raise ValueError(
            f"host='head': which module of {type(model).__name__} makes logits is known of a model with "
            "get_output_embeddings()."
        )
    if any(p.requires_grad for p in head.parameters()):
        raise ValueError(
            f"host='head': the head, a {type(head).__name__}, is trained, or has an adapter that is; its "
            "gradient and its update belong on the device: freeze it, or leave it there."
        )
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"host='head': the head is a {type(head).__name__}, no torch.nn.Linear, as where an adapter is "
            "around it; leave it on the device."
        )
    if not head.weight.is_floating_point():
        raise ValueError(
            f"host='head': the head's weight is {head.weight.dtype}, packed; host='layers' has 4-bit weights "
            "in host memory, the head's too."
        )
    _refuse_other_forward(HEAD, head, nn.Linear)
    return head


def tied(model: nn.Module) -> bool:
    """Whether the embedding's weight is the head's, where both can live in host memory."""
    try:
        return embedding_of(model).weight is head_of(model).weight
    except ValueError:
        return False


def _refuse_other_forward(kind: str, module: nn.Module, known: type[nn.Module]) -> None:
    own: Any = type(module).forward
    if own is not known.forward and "super" not in own.__code__.co_names:
        raise ValueError(
            f"host={kind!r}: {type(module).__name__}.forward does not call that of "
            f"torch.nn.{known.__name__}, and may read its weight in other ways; leave it on the device."
        )


def could_live_in_host_memory(
    sizes: Mapping[str, int], there: Collection[str], error: Infeasible, card: Callable[[int], int]
) -> str:
    """What to add to an ``error`` for want of memory, of bytes by kind; "" for none.

    Args:
        sizes: of weights on the device; 0 for a head that is tied to the embedding.
        there: kinds that are in host memory, which ``prepare`` is told again: it begins anew.
        card: the memory_budget within which so many bytes are for tensors.
    """
    if not sizes:
        return ""
    parts = [f"the frozen {_whose(kind, sizes)} {size_text(size)}" for kind, size in sizes.items() if size]
    named = [kind for kind in KINDS if kind in sizes or kind in there]
    kinds = repr(tuple(named)) if len(named) > 1 else repr(named[0])
    total = sum(sizes.values())
    # The loss needs the head, which is the embedding too where they are tied.
    back = sizes.get(HEAD, 0) or (sizes[EMBEDDING] if HEAD in sizes else 0)
    return (
        f" Of the weights, {' and '.join(parts)} can live in host memory{' too' if there else ''}: after "
        f"prepare(model, host={kinds}), memory_budget={card(error.least_with(total, back))} would do."
    )


def _whose(kind: str, sizes: Mapping[str, int]) -> str:
    if kind == EMBEDDING and sizes.get(HEAD) == 0:
        return "embedding's and head's"
    return f"{kind}'" if kind.endswith("s") else f"{kind}'s"


def _input(model: nn.Module) -> nn.Module:
    given = getattr(model, "get_input_embeddings", None)
    return model if given is None else given()


def quantised_of(layers: Sequence[nn.Module]) -> list[nn.Module]:
    found = [m for m in layers if getattr(m.weight, "quant_state", None) is not None]
    if not found:
        raise ValueError(
            "host='layers': no frozen 4-bit linear of bitsandbytes is there; 16-bit weights, which no kernel "
            "reads over the bus, stay on the device. Load the model in 4 bits, on its device."
        )
    return found


def refuse_shared(model: nn.Module, moved: Collection[nn.Module]) -> None:
    """Refuse to move weights that another module reads.

    Raises:
        ValueError: with the name of that module.
    """
    for module, other in read_elsewhere(model, moved):
        raise ValueError(
            f"host: the weight of {type(module).__name__} is that of {other} too, which needs it on the "
            "device: nothing would be freed; leave it there, untie them, or, of an embedding that is tied to "
            f"the head, give both: host={(EMBEDDING, HEAD)}."
        )


def read_elsewhere(model: nn.Module, moved: Collection[nn.Module]) -> Iterator[tuple[nn.Module, str]]:
    """Those of ``moved`` whose weight is that of a module beside them, with its name."""
    owners = {module.weight: module for module in moved}
    for name, other in model.named_modules():
        for weight in other._parameters.values():
            if other not in moved and weight is not None and weight in owners:
                yield owners[weight], name
