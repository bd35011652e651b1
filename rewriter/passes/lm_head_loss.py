"""The head and the cross-entropy of its logits to one op that never holds the logits.

``cross_entropy(softcap(scale * linear(x)).float().view(-1, vocabulary), target)`` becomes
``linear_cross_entropy``, with ``/ num_items`` after a sum taken in. Pays because the logits are
``(tokens, vocabulary)``: at 8192 tokens and 128256 words 2.1 GB in bf16, as much of gradient, and twice that
in fp32 copies, where the op holds 256 MiB. A model also returns its logits; what is returned (raw, scaled,
capped, cast once more by autocast's caller) is put behind ``deferred`` and computed when read.

A shift by slicing the logits becomes a slice of the hidden states. Refuses: logits that the graph reads
elsewhere (a second loss, an argmax), class weights, targets that are probabilities, reduction "none", a
head in 4 bits, with an adapter or, outside of autocast, of another dtype than the hidden states, a scale that
is not a constant, and values written in place.

Mirrors ``ForCausalLMLoss`` of transformers, and the heads of Gemma 2 (softcap), Granite and Cohere (scale).
"""

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, GraphModule, Node

from rewriter.canonical import Call, canonical, dtype_of, number, value_of
from rewriter.deferred_logits import defer
from rewriter.effects import Effects
from rewriter.fake import fake_call
from rewriter.fusion import Applied, CrossingPass
from rewriter.kernels.linear_cross_entropy import linear_cross_entropy
from rewriter.match import Match, Miss
from rewriter.nested import graphs_of
from rewriter.pattern import Unmet, require, rewrite, same, source_line
from rewriter.quantised import PackedWeight
from rewriter.replace import erase, insert, put_call, sweep

_RESHAPES = ("view", "reshape", "flatten")


@rewrite(to=linear_cross_entropy)
def head_and_loss(x, weight, bias, target):
    logits = F.linear(x, weight, bias)
    return F.cross_entropy(logits.view(-1, logits.shape[-1]), target)


@dataclass
class _Walk:
    """The way from a loss up to its head.

    ``nodes`` are all calls on it; ``logits`` those that have the head's own shape, which the model may also
    return; ``shifts`` the slices of the rows, the last first.
    """

    nodes: list[Node] = field(default_factory=list)
    logits: list[Node] = field(default_factory=list)
    shifts: list[Node] = field(default_factory=list)
    scale: float = 1.0
    softcap: float = 0.0


def _run(module: GraphModule) -> Applied:
    effects = Effects.of(module.graph)
    applied = Applied()
    for node, call in _losses(module):
        place, walk = source_line(node), _Walk()
        try:
            _fuse(module, node, call.args, walk, effects)
        except Unmet as unmet:
            applied.misses.append(Miss(head_and_loss, str(unmet), frozenset(walk.nodes), node, None))
        else:
            applied.sites.append((head_and_loss.name, place))
    for body in graphs_of(module)[1:]:
        for node, _ in _losses(body):
            reason = "the loss is inside an activation checkpoint"
            applied.misses.append(Miss(head_and_loss, reason, frozenset(), node, None))
    sweep(module)
    return applied


def _losses(module: GraphModule) -> list[tuple[Node, Call]]:
    calls = [(node, canonical(node)) for node in module.graph.nodes]
    return [(node, call) for node, call in calls if call is not None and call.name == "cross_entropy"]


def _call(node: Any) -> Call:
    call = canonical(node) if isinstance(node, Node) else None
    if call is None:
        raise Unmet(f"the logits are `{node}`, not a linear's result")
    return call


def _fuse(module: GraphModule, loss: Node, args: tuple, walk: _Walk, effects: Effects) -> None:
    """Replace one loss; raises ``Unmet`` before any use is changed."""
    logits, target, class_weight, size_average, ignore_index, reduce, reduction, smoothing = args
    require(class_weight is None, "the classes are weighted")
    require(size_average is None and reduce is None, "`size_average` or `reduce` is given")
    require(reduction in ("mean", "sum"), f"reduction {reduction!r} is neither 'mean' nor 'sum'")
    require(type(ignore_index) is int, f"ignore_index {ignore_index!r} is not a constant")
    smoothing = number(smoothing)
    require(type(smoothing) in (int, float), f"label_smoothing {smoothing!r} is not a constant")
    require(dtype_of(target) == torch.int64, f"the targets are {dtype_of(target)}, not int64 labels")
    root, divisor = _division(loss, reduction)
    walk.nodes += dict.fromkeys((root, loss))
    head = _walk_up(logits, walk)
    x, weight, bias = _call(head).args
    require(not isinstance(weight, PackedWeight), "the head's weight is in 4 bits")
    require(value_of(x).ndim >= 2, "the head's input is one row")
    returned = _returned(walk, root)
    output = next(iter(module.graph.find_nodes(op="output")))
    operands = {n for n in (x, weight, bias, target, divisor) if isinstance(n, Node)}
    inside = set(walk.nodes)
    reason = effects.mode_border(inside) or effects.overwritten(inside, operands, output)
    if reason := reason or effects.mixed_dtypes(head):
        raise Unmet(reason)
    rows = _shifted(module.graph, x, walk.shifts, root, effects)
    settings = {
        "scale": walk.scale,
        "softcap": walk.softcap,
        "ignore_index": ignore_index,
        "label_smoothing": float(smoothing),
        "reduction": reduction,
        "divisor": divisor,
        "compute_dtype": dtype_of(head),
        "loss_dtype": dtype_of(logits),
    }
    found = Match(head_and_loss, {}, (root,), frozenset(walk.nodes))
    given = (rows, weight, bias, target)
    outcome = put_call(module.graph, found, linear_cross_entropy, given, settings, effects)
    if isinstance(outcome, Miss):
        raise Unmet(outcome.reason)
    for value in returned:
        defer(module, value, head, output)
    erase(module.graph, {*walk.nodes, *returned})


def _division(loss: Node, reduction: str) -> tuple[Node, Node | None]:
    """The division of a sum by a number of items in a tensor, and the number; the loss itself without one."""
    user = next(iter(loss.users), loss)
    call = canonical(user) if len(loss.users) == 1 else None
    if reduction != "sum" or call is None or call.name != "div" or len(call.args) != 2:
        return loss, None
    items = value_of(call.args[1])
    if call.args[0] is not loss or not isinstance(items, torch.Tensor) or items.ndim or items.requires_grad:
        return loss, None
    return user, call.args[1]


def _walk_up(logits: Any, walk: _Walk) -> Node:
    """From the loss's input to the linear, through casts, the reshape to rows, shifts, softcap and scale."""
    _call(logits)
    value = value_of(logits)
    require(value.ndim == 2, f"logits of {value.ndim} dimensions; expected (tokens, vocabulary)")
    node = logits
    while (call := _call(node)).name != "linear":
        walk.nodes.append(node)
        require(same(value_of(node).shape[-1], value.shape[-1]),
                "a reshape divides the vocabulary")  # fmt: skip
        if call.name in _RESHAPES:
            require(not walk.shifts, "the logits are shifted after a reshape")
            walk.logits.clear()
            node = call.args[0]
        elif call.name == "getitem":
            require(_is_shift(call.args[1], node), f"`{node.name}` is no slice of the rows")
            walk.shifts.append(node)
            walk.logits.clear()
            node = call.args[0]
        else:
            walk.logits.append(node)
            node = _before(node, call, walk)
    require(same(value_of(node).shape[-1], value.shape[-1]), "a reshape divides the vocabulary")
    walk.nodes.append(node)
    walk.nodes += call.through
    walk.logits.append(node)
    return node


def _before(node: Node, call: Call, walk: _Walk) -> Node:
    """What a cast, a softcap or a scale is applied to."""
    if call.name == "alias":
        return call.args[0]
    if call.name == "cast":
        before, after = value_of(call.args[0]).dtype, value_of(node).dtype
        require(after == torch.promote_types(before, after), f"logits of {before} are narrowed to {after}")
        return call.args[0]
    require(call.name in ("mul", "div"), f"the logits come from {call.name}, not from a linear")
    factor, operand = _number_and_operand(call)
    capped = canonical(operand)
    if call.name == "mul" and capped is not None and capped.name == "tanh":
        return _uncapped(capped.args[0], operand, factor, walk)
    walk.scale *= factor if call.name == "mul" else 1.0 / factor
    return operand


def _number_and_operand(call: Call) -> tuple[float, Node]:
    first, second = call.args[:2]
    if call.name == "mul" and isinstance(value_of(second), torch.Tensor):
        first, second = second, first
    second = number(second)
    require(len(call.args) == 2 and isinstance(first, Node) and type(second) in (int, float) and second != 0,
            f"the logits' factor in {call.name} is not a constant")  # fmt: skip
    return second, first


def _uncapped(inner: Node, tanh: Node, cap: float, walk: _Walk) -> Node:
    require(walk.softcap == 0.0 and walk.scale == 1.0, "the logits are scaled after their softcap")
    call = _call(inner)
    require(call.name == "div", "a softcap's tanh is of no quotient")
    divisor, operand = _number_and_operand(call)
    require(divisor == cap, f"a softcap divides by {divisor} and multiplies by {cap}")
    walk.softcap = float(cap)
    walk.nodes += [tanh, inner]
    return operand


def _is_shift(index: Any, node: Node) -> bool:
    """Whether an index slices rows alone: not the vocabulary, not by a mask."""
    items = index if isinstance(index, tuple) else (index,)
    if not all(isinstance(i, slice) or i is Ellipsis for i in items):
        return False
    reaches_last = len(items) == value_of(node).ndim or Ellipsis in items[:-1]
    return items[-1] == slice(None) if reaches_last else True


def _returned(walk: _Walk, root: Node) -> list[Node]:
    """The values that only the graph's output reads beside the loss."""
    inside = set(walk.nodes)
    found = []
    for node in inside - {root}:
        for user in node.users:
            if user in inside:
                continue
            require(node in walk.logits, _elsewhere(node, user))
            found += _read_by_output(node, user)
    return sorted(set(found))


def _read_by_output(node: Node, user: Node) -> list[Node]:
    """``node``, or the casts of it that are what is returned."""
    if user.op == "output":
        return [node]
    call = canonical(user)
    require(
        call is not None and call.name in ("cast", "alias") and len(user.users) > 0, _elsewhere(node, user)
    )
    return [value for reader in user.users for value in _read_by_output(user, reader)]


def _elsewhere(node: Node, user: Node) -> str:
    return f"`{node.name}` is also " + ("returned" if user.op == "output" else f"used by `{user.name}`")


def _shifted(graph: Graph, x: Node, shifts: list[Node], root: Node, effects: Effects) -> Node:
    """The rows of ``x`` that the sliced logits have."""
    for shift in reversed(shifts):
        args = (x, shift.args[1])
        value = fake_call(operator.getitem, args, {}, shift, effects)
        x = insert(graph, root, operator.getitem, args, {}, value, shift)
        effects.put(x, root)
    return x


lm_head_loss = CrossingPass("lm_head_loss", _run)
