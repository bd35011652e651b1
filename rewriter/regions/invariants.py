"""Work that every layer repeats and none changes: done once, and shared.

A mask's slice, a cast of the cosines, a number made of sizes: where two layers compute the same from the same
inputs, the second reads the first's result. Only what depends on no waist of the program is looked at, so
that nothing is kept alive from layer to layer but what all of them need. A boolean mask that several
attentions read becomes the sum's mask that each would make of it, and would save for its backward.
"""

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.fx import Graph, Node

from rewriter.canonical import value_of
from rewriter.effects import Effects, is_impure
from rewriter.regions.signature import argument
from rewriter.regions.waists import crosses, is_operation


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """``mask`` (..., queries, keys), boolean, as what is added to the scores: 0 where True, else -inf."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask.logical_not(), float("-inf"))


def varying(graph: Graph, beginning: Node) -> set[Node]:
    """``beginning`` and all that depends on it."""
    found = {beginning}
    for node in graph.nodes:
        if any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def share_invariants(graph: Graph, moving: set[Node], piece: Mapping[Node, int], effects: Effects) -> None:
    """Merge equal operations of different pieces that are outside ``moving``, in place.

    Left alone: what is read before it is written in place, which may be another value at each reading; what
    has a gradient, which would then be summed earlier, perhaps in a narrower dtype; and what a layer reads
    and cannot be parted from, as a ``torch.Size``: shared, it would hold the layers together.
    """
    written = _last_writes(effects)

    def may_be_shared(node: Node) -> bool:
        if not is_operation(node) or node in moving or is_impure(node) or is_random(node):
            return False
        if getattr(value_of(node), "requires_grad", False):
            return False
        if not crosses(node) and any(user in moving for user in node.users):
            return False
        return all(written.get(n, -1) <= effects.position[node] for n in (node, *node.all_input_nodes))

    while _merge_once([n for n in graph.nodes if may_be_shared(n)], piece, effects):
        pass


def _merge_once(nodes: Sequence[Node], piece: Mapping[Node, int], effects: Effects) -> bool:
    """Merge those of ``nodes`` that are equal now, wherever two pieces hold one; whether there were any.

    What reads two of them may be equal after that.
    """
    equal: dict[Any, list[Node]] = {}
    for node in nodes:
        operands = (argument(a, attrgetter("name")) for a in (node.args, node.kwargs))
        key = (node.op, node.target, effects.mode[node], *operands)
        equal.setdefault(key, []).append(node)
    repeated = [group for group in equal.values() if len({piece[n] for n in group}) > 1]
    for first, *others in repeated:
        for node in others:
            node.replace_all_uses_with(first)
            node.graph.erase_node(node)
    return bool(repeated)


def _last_writes(effects: Effects) -> dict[Node, float]:
    """The place of the last write into each tensor that any is made into."""
    return {
        node: max(effects.position[write] for write in writes)
        for storage, writes in effects.writes.items()
        for node in effects.sharing[storage]
    }


def is_random(node: Node) -> bool:
    """Whether two equal calls of ``node`` may give two values."""
    if isinstance(node.target, HigherOrderOperator):
        return True
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name in _RANDOM or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


_RANDOM = frozenset(
    {"alpha_dropout", "bernoulli", "dropout", "dropout1d", "dropout2d", "dropout3d", "feature_alpha_dropout"}
    | {"feature_dropout", "gumbel_softmax", "multinomial", "normal", "poisson", "rrelu"}
    | {"rand", "rand_like", "randint", "randint_like", "randn", "randn_like", "randperm"}
    | {"empty", "empty_like", "empty_strided", "new_empty", "dropout_seeds"}
)


def share_masks(graph: Graph, moving: set[Node], effects: Effects) -> None:
    """Give attentions that read one boolean mask its additive form, made once, in place."""
    readers: dict[tuple[Node, torch.dtype], list[Node]] = {}
    written = _last_writes(effects)
    for node in graph.nodes:
        mask = _boolean_mask(node)
        if mask is not None and mask not in moving and mask not in written:
            readers.setdefault((mask, value_of(node.args[0]).dtype), []).append(node)
    for (mask, dtype), attentions in readers.items():
        if len(attentions) < 2:
            continue
        made = _call_after(graph, mask, additive_mask, (mask, dtype), effects)
        for node in attentions:
            node.kwargs = {**node.kwargs, "attn_mask": made}


def _boolean_mask(node: Node) -> Node | None:
    if node.op != "call_function" or node.target is not F.scaled_dot_product_attention or not node.args:
        return None
    mask = node.kwargs.get("attn_mask")
    if not isinstance(mask, Node) or not isinstance(value_of(node.args[0]), Tensor):
        return None
    value = value_of(mask)
    return mask if isinstance(value, Tensor) and value.dtype == torch.bool else None


def _call_after(graph: Graph, node: Node, function: Callable, args: tuple, effects: Effects) -> Node:
    place = node.next
    while place.op == "placeholder":
        place = place.next
    with graph.inserting_before(place):
        call = graph.call_function(function, args)
    value = value_of(node)
    with value.fake_mode, torch.no_grad():
        call.meta["example_value"] = function(value, *args[1:])
    effects.put(call, place)
    return call
