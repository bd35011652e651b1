"""LoRA linears, on a 16-bit or 4-bit weight, to one call for all projections of an input.

``x Wᵀ + bias + scale · dropout(x) Aᵀ Bᵀ`` as PEFT writes it becomes ``lora_linears``: the update is added by
the product that makes it, projections of one input (q, k, v; gate and up) share the product with their
stacked A matrices and one gradient of the input, and a 4-bit weight is dequantised again in the backward
instead of kept. A bare 4-bit linear, without adapter, becomes ``linear_4bit`` for the same reason.

Pays because eager writes and reads the update, its scaled copy and their gradients, each as wide as the
result, reads the input once for every projection, and keeps 16-bit weights for the backward
(``kernels/lora_linear.py`` counts them).

Refuses: adapters that are wide beside their weight, where the model's own products are as good; scales that
are no constants; products of several dtypes outside of autocast. Mirrors ``peft.tuners.lora.Linear`` and
``peft.tuners.lora.bnb.Linear4bit``, rsLoRA too.
"""

from collections import defaultdict
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from rewriter.canonical import canonical, dtype_of, value_of
from rewriter.effects import Effects, mutated_argument
from rewriter.fusion import Applied, Pass
from rewriter.kernels.dequantize import Packed4bit
from rewriter.kernels.lora_linear import adapter_is_narrow, linear_4bit, lora_linear, lora_linears
from rewriter.match import Match, Miss
from rewriter.pattern import require, rewrite, source_line
from rewriter.quantised import PackedWeight
from rewriter.replace import find, put_call

# Three products, the scale and the sum: only a condition of the rewrite was missing.
_ADAPTER_DEPTH = 5

# The base's product and the adapter's two, as a pattern's trace names them.
_PRODUCTS = ("linear", "linear_1", "linear_2")

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def adapter_fits(match: Match) -> None:
    """Dtypes, shapes and a rank that the products take and that pay; a scale that is a number."""
    x, a, b = match.value("x"), match.value("a"), match.value("b")
    require(x.dtype in _DTYPES, f"an input of {x.dtype}; the products take 16- and 32-bit floats")
    require(isinstance(match["scale"], (int, float)), f"the scale {match['scale']} is not a constant")
    require(a.ndim == 2 and b.ndim == 2, f"adapters of {a.ndim} and {b.ndim} dimensions")
    rank, (n, k) = a.shape[0], _weight_shape(match["weight"])
    require(
        a.shape[1] == k and tuple(b.shape) == (n, rank),
        f"adapters {tuple(a.shape)}, {tuple(b.shape)} on ({n}, {k})",
    )
    require(adapter_is_narrow(rank, n, k), f"rank {rank} is wide beside a weight of ({n}, {k})")
    dropped = match.value("dropped")
    require(str(dropped.shape) == str(x.shape), "base and adapter read inputs of different shapes")


def bias_is_added(match: Match) -> None:
    """One number a feature, rounded with the product: what the product itself can add."""
    bias, product = match.value("bias"), value_of(match.inner["linear"])
    require(isinstance(bias, torch.Tensor) and bias.ndim == 1, "what is added to the product is no bias")
    require(bias.dtype == product.dtype, f"a bias of {bias.dtype} is added to a product of {product.dtype}")
    adapter_fits(match)


def is_quantised(match: Match) -> None:
    """A plain linear is as good as any product of ours."""
    require(isinstance(match["packed"], PackedWeight), "the weight is not quantised: a plain linear")
    require(match.value("x").dtype in _DTYPES, "the products take 16- and 32-bit floats")


@rewrite(to=lora_linear, where=adapter_fits)
def lora(x, weight, bias, a, b, scale, dropped):
    base = F.linear(x, weight, bias)
    return (base + F.linear(F.linear(dropped, a), b) * scale).to(base.dtype)


@rewrite(to=lora_linear, where=adapter_fits)
def lora_cast_before_sum(x, weight, bias, a, b, scale, dropped):
    base = F.linear(x, weight, bias)
    return base + (F.linear(F.linear(dropped, a), b) * scale).to(base.dtype)


@rewrite(to=lora_linear, where=bias_is_added)
def lora_bias_added(x, weight, bias, a, b, scale, dropped):
    base = F.linear(x, weight, None) + bias
    return (base + F.linear(F.linear(dropped, a), b) * scale).to(base.dtype)


@rewrite(to=linear_4bit, where=is_quantised)
def bare_4bit(x, packed, bias):
    return F.linear(x, packed, bias)


def _weight_shape(weight: Any) -> tuple[int, int]:
    return weight.shape if isinstance(weight, PackedWeight) else tuple(weight.meta["example_value"].shape)


def _weight(weight: Any) -> Any:
    return Packed4bit(*weight.flat()) if isinstance(weight, PackedWeight) else weight


def _own_input(found: Match) -> Node | None:
    """What the adapter reads, where it is not the base's input or a cast of it: its dropout."""
    node = found["dropped"]
    while node is not found["x"]:
        call = canonical(node)
        if call is None or call.name not in ("cast", "alias"):
            return found["dropped"]
        node = call.args[0]
    return None


def _dtypes(found: Match) -> tuple[torch.dtype | None, ...]:
    """Of the product with the weight, of the adapter's, and of the result, as the graph has them."""
    base, down = found.inner["linear"], found.inner["linear_1"]
    return dtype_of(base), dtype_of(down), dtype_of(found.root)


def _groups(matches: list[Match], effects: Effects) -> list[list[Match]]:
    """The projections of one input, in order, which compute in the same dtypes and modes."""
    groups = defaultdict(list)
    for found in matches:
        groups[found["x"], _dtypes(found), effects.mode[found.root]].append(found)
    return list(groups.values())


def _together(group: list[Match]) -> Match:
    """One match that stands for all of a group."""
    outputs = tuple(found.root for found in group)
    return Match(group[0].rewrite, group[0].bindings, outputs, frozenset().union(*(m.nodes for m in group)))


def _hoist(nodes: list[Node], whole: Match, place: Node, effects: Effects) -> None:
    """Move what a group reads, dropouts and views of packed weights, in front of ``place``.

    Their order among themselves stays, and with it the random numbers that each dropout draws. What depends
    on the group itself, or writes in place, stays where it is; the group is then not put in.
    """
    late: set[Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if effects.position[node] < effects.position[place] or node in late:
            continue
        if node in whole.nodes or mutated_argument(node) is not None:
            return
        late.add(node)
        stack += node.all_input_nodes
    for node in sorted(late, key=effects.position.__getitem__):
        place.prepend(node)
        effects.put(node, place)


def _put_group(graph: Graph, group: list[Match], effects: Effects) -> Node | Miss:
    whole = _together(group)
    last = max(whole.outputs, key=effects.position.__getitem__)
    mixed = (effects.mixed_dtypes(found.inner[name]) for found in group for name in _PRODUCTS)
    reason = effects.overwritten(set(whole.nodes), {group[0]["x"]}, last) or next(filter(None, mixed), None)
    if reason is not None:
        return Miss(whole.rewrite, reason, whole.nodes, whole.root, None)
    own = [_own_input(found) for found in group]
    args = (
        group[0]["x"],
        tuple(_weight(found["weight"]) for found in group),
        tuple(found["bias"] for found in group),
        tuple(found["a"] for found in group),
        tuple(found["b"] for found in group),
        tuple(float(found["scale"]) for found in group),
        tuple(own) if any(node is not None for node in own) else None,
        *_dtypes(group[0]),
    )
    args = effects.current(args)
    read: list[Node] = []
    map_arg(args, read.append)
    users = [u for root in whole.outputs for u in root.users if u not in whole.nodes]
    place = min([*whole.outputs, *users], key=effects.position.__getitem__)
    _hoist(read, whole, place, effects)
    return put_call(graph, whole, lora_linears, args, {}, effects)


def _put_adapters(graph: Graph, group: list[Match], effects: Effects) -> list[tuple[Match, Node | Miss]]:
    """Put a group in as one call, or, where its members cannot stand in one place, each alone."""
    outcome = _put_group(graph, group, effects)
    if not isinstance(outcome, Miss) or len(group) == 1:
        return [(member, outcome) for member in group]
    return [(member, _put_group(graph, [member], effects)) for member in group]


def _run(graph: Graph) -> Applied:
    effects = Effects.of(graph)
    found = find(graph, (lora, lora_cast_before_sum, lora_bias_added), ("linear",), effects)
    claimed = frozenset().union(*(match.nodes for match in found.matches))
    bare = [m for m in find(graph, (bare_4bit,), (), effects).matches if not m.nodes & claimed]
    # Every linear is looked at; one without an adapter is no near miss.
    applied = Applied(misses=[miss for miss in found.misses if miss.depth >= _ADAPTER_DEPTH])
    places = {m: source_line(m.root) for m in (*found.matches, *bare)}
    outcomes = [
        pair for group in _groups(found.matches, effects) for pair in _put_adapters(graph, group, effects)
    ]
    for match in bare:
        dtype = dtype_of(match.root)
        args = (match["x"], _weight(match["packed"]), match["bias"], dtype, dtype)
        outcomes.append((match, put_call(graph, match, linear_4bit, args, {}, effects)))
    for member, outcome in outcomes:
        if isinstance(outcome, Miss):
            applied.misses.append(outcome)
        else:
            applied.add(member, places[member])
    return applied


lora_pass = Pass("lora", _run)
