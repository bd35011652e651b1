"""Rotary position embedding of q and k, as models write it, to one kernel for both.

One tensor's rotation is matched by itself, in each of the layouts of ``rewriter.kernels.rotary``, over the
whole head or its first features, at the input's precision or in fp32; two that share cosine and sine, q's and
k's of a layer, become one call. Pays because eager moves 20 bytes per bf16 element forward (negate,
concatenate, two products, a sum) and the kernel 4.

Refuses: a rotated half that is used elsewhere; trained cosines, or ones that differ between heads; a result
that is viewed as only eager's memory order allows. Mirrors ``apply_rotary_pos_emb`` of Llama, Phi, GPT-NeoX,
GPT-OSS, GPT-J, Cohere, GLM, OLMo2 and DeepSeek in transformers.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from rewriter.canonical import canonical, value_of
from rewriter.effects import Effects
from rewriter.fake import fake_call
from rewriter.fusion import Applied, Pass
from rewriter.kernels.rotary import DTYPES, LARGEST_HEAD, rotary, rotary_one
from rewriter.match import Match, Miss
from rewriter.memory_order import broken_view
from rewriter.pattern import Rewrite, declare, require, same, source_line
from rewriter.replace import find, put_call
from rewriter.rotations import FORMS, as_it_is, in_fp32


def cosines_fit(match: Match) -> None:
    """The kernel takes 16- and 32-bit floats, and constant cosines that all heads share."""
    x, cos, sin = (match.value(hole) for hole in ("x", "cos", "sin"))
    for name, value in (("x", x), ("cos", cos), ("sin", sin)):
        require(isinstance(value, torch.Tensor), f"{name} is no tensor")
        require(value.dtype in DTYPES, f"{name} of {value.dtype}; the kernel takes 16- and 32-bit floats")
        require(value is x or not value.requires_grad, f"{name} is trained; the kernel gives it no gradient")
    shapes = tuple(cos.shape), tuple(sin.shape)
    require(same(*shapes), f"cos {shapes[0]} and sin {shapes[1]} differ in shape")
    require(x.ndim in (2, 3, 4), f"x of {x.ndim} dimensions; the kernel takes 2 to 4")
    require(cos.ndim <= x.ndim, f"cos of {cos.ndim} dimensions for x of {x.ndim}")
    _features_fit(match, x.shape[-1], cos.shape[-1])
    shared = _shared_dimensions(x, cos)
    for d in range(x.ndim - 1):
        fits = d in shared or same(cos.shape[d - x.ndim], x.shape[d])
        require(fits, f"cos {tuple(cos.shape)} does not broadcast to x {tuple(x.shape)}")
    require(bool(shared) or x.ndim < 4, f"cos {tuple(cos.shape)} differs between heads")


def _features_fit(match: Match, head: int | torch.SymInt, factors: int | torch.SymInt) -> None:
    require(isinstance(head, int) and isinstance(factors, int), "the last dimension is not a constant")
    require(head <= LARGEST_HEAD, f"heads of {head} features exceed {LARGEST_HEAD}, the most that fit")
    turned = 2 * factors if _layout(match).endswith("_half_cos") else factors
    expected = match.bindings.get("rotary_dim", head)
    require(same(turned, expected), f"cos turns {turned} features, the model {expected}")
    require(turned % 2 == 0 and turned <= head, f"{turned} features of {head} do not make pairs")


def _shared_dimensions(x: torch.Tensor, cos: torch.Tensor) -> set[int]:
    """The dimensions of ``x`` but for the last along which the cosines do not change."""
    missing = x.ndim - cos.ndim
    return {d for d in range(x.ndim - 1) if d < missing or same(cos.shape[d - missing], 1)}


def _layout(match: Match) -> str:
    return match.rewrite.constants["layout"]


def _compute_dtype(turn: Callable, precision: Callable) -> Callable[[Match], torch.dtype | None]:
    """What the model computes in before it rounds to the input's dtype; None where it does not round."""
    late = turn.__name__.endswith("_cast_late")

    def compute_dtype(match: Match) -> torch.dtype | None:
        x, cos, sin = (match.value(hole).dtype for hole in ("x", "cos", "sin"))
        turned = torch.float32 if late or precision is in_fp32 else x
        computed = torch.promote_types(turned, torch.promote_types(cos, sin))
        return None if precision is as_it_is or computed == x else computed

    return compute_dtype


def _rewrites(turn: Callable, precision: Callable) -> Iterator[Rewrite]:
    """One turn of a whole head, and of its first ``rotary_dim`` features."""

    def whole(x, cos, sin):
        return precision(turn, x, cos, sin)

    def partial(x, cos, sin, rotary_dim):
        return torch.cat((precision(turn, x[..., :rotary_dim], cos, sin), x[..., rotary_dim:]), -1)

    layout = turn.__name__.removesuffix("_sliced").removesuffix("_cast_late")
    constants = {"layout": layout, "compute_dtype": _compute_dtype(turn, precision)}
    for form in (partial, whole):
        yield declare(form, to=rotary_one, where=cosines_fit, name=layout, **constants)


REWRITES = tuple(r for turn, precision in FORMS for r in _rewrites(turn, precision))


@dataclass(frozen=True, eq=False)
class _Rotation:
    """One rotated tensor: its match, and the call's arguments other than the tensor."""

    found: Match
    factors: tuple

    @classmethod
    def of(cls, found: Match, effects: Effects) -> "_Rotation":
        layout, cos, sin = _layout(found), found["cos"], found["sin"]
        inner = _not_repeated(cos, effects), _not_repeated(sin, effects)
        if layout == "interleaved" and None not in inner:
            layout, (cos, sin) = "interleaved_half_cos", inner
        compute_dtype = found.rewrite.constants["compute_dtype"](found)
        return cls(found, (cos, sin, layout, found.bindings.get("rotary_dim"), compute_dtype))

    @property
    def layout(self) -> str:
        return self.factors[2]


def _not_repeated(cos: Node, effects: Effects) -> Node | None:
    """The cosines, one a pair, which ``cos`` repeats for both features of a pair; None where it does not."""
    call = canonical(cos)
    if call is None or call.name != "repeat_interleave" or not same(call.args[1:3], (2, -1)):
        return None
    return None if effects.is_written(call.args[0]) else call.args[0]


# What models do to cosines once for q and once for k, as GPT-J.
_VIEWS = ("getitem", "unsqueeze", "repeat_interleave")


def _same_value(first: Any, second: Any, effects: Effects) -> bool:
    """Whether two arguments are equal: the same, or the same views of one tensor that is never written."""
    if not isinstance(first, Node) or not isinstance(second, Node) or first is second:
        return first is second if isinstance(first, Node) else same(first, second)
    ours, theirs = canonical(first), canonical(second)
    if ours is None or theirs is None or ours.name != theirs.name or ours.name not in _VIEWS:
        return False
    if effects.is_written(first) or effects.is_written(second) or len(ours.args) != len(theirs.args):
        return False
    return all(_same_value(a, b, effects) for a, b in zip(ours.args, theirs.args, strict=True))


def _may_share(first: _Rotation, second: _Rotation, effects: Effects) -> bool:
    """Whether one call can turn both: the same factors, and shapes that differ along the heads alone."""
    factors = zip(first.factors, second.factors, strict=True)
    if not all(_same_value(a, b, effects) for a, b in factors):
        return False
    if effects.mode_border({first.found.root, second.found.root}):
        return False
    q, k, cos = first.found.value("x"), second.found.value("x"), first.found.value("cos")
    if q.ndim != k.ndim or not same(q.shape[-1], k.shape[-1]):
        return False
    differing = {d for d in range(q.ndim - 1) if not same(q.shape[d], k.shape[d])}
    return not differing or len(differing) == 1 and differing <= _shared_dimensions(q, cos)


def _both(graph: Graph, first: _Rotation, second: _Rotation, effects: Effects) -> bool:
    """Turn two tensors by one call; False, and nothing done, where one is not known in time for the other."""
    nodes = first.found.nodes | second.found.nodes
    last = max(first.found.root, second.found.root, key=effects.position.__getitem__)
    read = {first.found["x"], second.found["x"], *first.factors[:2]}
    if effects.overwritten(set(nodes), read, last):
        return False
    # A call stands before its first result: where q is used before k is known, the other order may do.
    for q, k in ((first, second), (second, first)):
        whole = Match(q.found.rewrite, q.found.bindings, (q.found.root, k.found.root), nodes)
        args = (q.found["x"], k.found["x"], *q.factors)
        if not isinstance(put_call(graph, whole, rotary, args, {}, effects), Miss):
            return True
    return False


def _order_needed(rotation: _Rotation, effects: Effects) -> Miss | None:
    """The miss of a result that is viewed in eager's memory order, where the kernel's is another."""
    found = rotation.found
    cos, sin, layout, _, compute_dtype = rotation.factors
    op = torch.ops.rewriter.rotary_one.default
    args = effects.current((found["x"], cos, sin, layout, compute_dtype))
    ours, eager = fake_call(op, args, {}, found.root, effects), value_of(found.root)
    if same(ours.stride(), eager.stride()):
        return None
    broken = broken_view(found.root, ours)
    if broken is None:
        return None
    reason = f"`{broken.name}` views the result in a memory order that the kernel does not give"
    return Miss(found.rewrite, reason, found.nodes, broken, None)


def _put(graph: Graph, rotation: _Rotation, effects: Effects) -> Node | Miss:
    return put_call(graph, rotation.found, rotary_one, (rotation.found["x"], *rotation.factors), {}, effects)


def _run(graph: Graph) -> Applied:
    effects = Effects.of(graph)
    found = find(graph, REWRITES, ("neg", "sub", "cat", "view_as_complex"), effects)
    applied = Applied(misses=_worth_a_line(found.misses))
    rotations = [_Rotation.of(match, effects) for match in found.matches]
    refused = {rotation: miss for rotation in rotations if (miss := _order_needed(rotation, effects))}
    applied.misses += refused.values()
    waiting = [rotation for rotation in rotations if rotation not in refused]
    while waiting:
        rotation = waiting.pop(0)
        place = source_line(rotation.found.root)
        paired = bool(waiting) and _may_share(rotation, waiting[0], effects)
        if paired and _both(graph, rotation, waiting[0], effects):
            del waiting[0]
            applied.sites.append((rotation.layout, place))
            continue
        outcome = _put(graph, rotation, effects)
        if isinstance(outcome, Miss):
            applied.misses.append(outcome)
        else:
            applied.sites.append((rotation.layout, place))
    return applied


def _worth_a_line(misses: list[Miss]) -> list[Miss]:
    """Each place once, and only rotations half matched or complex: negations and joins abound elsewhere."""
    once = {id(miss): miss for miss in misses}.values()
    return [m for m in once if 2 * m.depth >= m.rewrite.size or _is_complex(m.node)]


def _is_complex(node: Node | None) -> bool:
    return node is not None and node.target is torch.view_as_complex


rotary_pass = Pass("rotary", _run)
