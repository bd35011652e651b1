"""Which operations treat tokens independently: a rule each.

An operation without a rule mixes tokens, or may do so: attention, convolutions, the routing of experts. Two
ask: the planner, which cuts a layer into tiles of tokens (``rewriter.memory.rows``), and the proof that more
tokens behind the last change nothing (``rewriter.replay``), which is so for whatever is row-wise.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch.fx import Node

from rewriter.quantised import packed_linear_inside
from rewriter.rowwise import shape_rules as shapes
from rewriter.rowwise.ruling import (
    Mixes,
    Rows,
    Rule,
    Ruling,
    aligned,
    argument,
    own_rows,
    rank,
    result_rank,
    tensors_in,
)
from rewriter.signatures import target_name


def ruling(node: Node, rows: Rows) -> Ruling:
    """How ``node``, of whose operands one at least has tokens, is row-wise.

    Raises:
        Mixes: it is not.
    """
    rule = _rule_of(node)
    if rule is None:
        raise Mixes(f"`{target_name(node)}` is not known to treat tokens apart")
    return rule(node, rows)


def has_rule(node: Node) -> bool:
    return _rule_of(node) is not None


def _rule_of(node: Node) -> Rule | None:
    rule = RULES.get(target_name(node))
    if rule is None and packed_linear_inside(node) is not None:
        return _quantised_linear
    return rule


def _pointwise(node: Node, rows: Rows) -> Ruling:
    return aligned(tensors_in(node.all_input_nodes), rows, result_rank(node))


def _of_two_tensors(node: Node, rows: Rows) -> Ruling:
    if not tensors_in([argument(node, 1, "other")]):
        raise Mixes(f"`{target_name(node)}` reduces")
    return _pointwise(node, rows)


def _where(node: Node, rows: Rows) -> Ruling:
    if len(node.args) + len(node.kwargs) == 1:
        raise Mixes("it picks tokens")
    return _pointwise(node, rows)


def _like_first(node: Node, rows: Rows) -> Ruling:
    """Of further tensors only the dtype or the device is read."""
    x = argument(node, 0, "input", "tensors")
    found = own_rows(x, rows)
    return Ruling(found, {x: found, **{t: rows(t) for t in tensors_in(node.all_input_nodes) if t is not x}})


def _along_last(*operands: int) -> Rule:
    """Mixes features: the last dimension of the ``operands``, which meet element by element."""

    def rule(node: Node, rows: Rows) -> Ruling:
        tensors = tensors_in(argument(node, i) for i in operands)
        found = aligned(tensors, rows, max(map(rank, tensors)))
        if any(place == rank(x) - 1 for x, place in found.takes.items()):
            raise Mixes("tokens lie along the dimension that it mixes")
        return found

    return rule


def _norm(node: Node, rows: Rows) -> Ruling:
    x, shape = argument(node, 0, "input", "tensors"), argument(node, 1, "normalized_shape")
    found = own_rows(x, rows)
    if found >= rank(x) - len(shape):
        raise Mixes("it normalises over tokens")
    return Ruling(found, {x: found})


def _linear(node: Node, rows: Rows) -> Ruling:
    return _features(node, argument(node, 0, "input", "tensors"), rows)


def _features(node: Node, x: Any, rows: Rows, beside: Sequence[Node] = ()) -> Ruling:
    """A product of ``x`` with weights; those ``beside`` it look as it does."""
    found = own_rows(x, rows)
    if found == rank(x) - 1:
        raise Mixes("it sums over tokens")
    return Ruling(found, dict.fromkeys((x, *beside), found))


def _quantised_linear(node: Node, rows: Rows) -> Ruling:
    operands = packed_linear_inside(node)
    assert operands is not None
    return _features(node, operands[0], rows)


def _lora(node: Node, rows: Rows) -> Ruling:
    dropped = argument(node, 6, "dropped")
    beside = dropped if isinstance(dropped, (tuple, list)) else [dropped]
    return _features(node, argument(node, 0, "input", "tensors"), rows, tensors_in(beside))


def _matmul(node: Node, rows: Rows) -> Ruling:
    a, b = argument(node, 0, "input", "tensors"), argument(node, 1, "other", "mat2")
    left, right = rows(a), rows(b)
    of_a = left == rank(a) - 2
    out = result_rank(node) - 2
    if left is not None and right is not None:
        raise Mixes("it multiplies tokens by tokens", out if of_a else None)
    if right is not None:
        if right != rank(b) - 1 or rank(a) < 2 or rank(b) < 2:
            raise Mixes("it sums over tokens")
        return Ruling(out + 1, {b: right})
    assert left is not None
    if rank(b) <= 2 and left < rank(a) - 1:
        return Ruling(left, {a: left})
    if rank(b) > 2 and of_a:
        return Ruling(out, {a: left})
    raise Mixes("it sums over tokens, or pairs them")


def _addmm(node: Node, rows: Rows) -> Ruling:
    bias, x = argument(node, 0), argument(node, 1)
    if rank(bias) > 1 or rows(x) != 0:
        raise Mixes("it sums over tokens")
    return Ruling(0, {x: 0})


def _rotary(node: Node, rows: Rows) -> Ruling:
    """Every tensor is rotated by the tables, which broadcast to it."""
    first = 1 if target_name(node).endswith("rotary_one") else 2
    turned = tensors_in([argument(node, 0, "input", "tensors"), argument(node, 1, "k")][:first])
    tables = tensors_in([argument(node, first, "cos"), argument(node, first + 1, "sin")])
    found = [aligned([x, *tables], rows, max(map(rank, (x, *tables)))) for x in turned]
    if any(r.gives != found[0].gives or r.gives == rank(x) - 1 for r, x in zip(found, turned, strict=True)):
        raise Mixes("q and k have their tokens in different places")
    return Ruling(found[0].gives, {x: place for r in found for x, place in r.takes.items()})


def _dropped(node: Node, rows: Rows) -> Ruling:
    """Its numbers are those of tokens: a tile of them draws what they drew."""
    x, numbers = argument(node, 0, "x"), argument(node, 1, "tokens")
    if own_rows(x, rows) != 1:
        raise Mixes("tokens are not where it counts them")
    return Ruling(1, {x: 1, numbers: 0})


def _attention(node: Node, rows: Rows) -> Ruling:
    q = argument(node, 0, "query", "q")
    raise Mixes("attention", rank(q) - 2 if rows(q) == rank(q) - 2 else None)


_POINTWISE = (
    "add", "sub", "mul", "div", "pow", "rsqrt", "sqrt", "neg", "abs", "exp", "expm1", "log", "log1p",
    "sin", "cos", "tanh", "sigmoid", "silu", "gelu", "relu", "relu6", "softplus", "leaky_relu", "elu",
    "selu", "mish", "hardtanh", "hardswish", "hardsigmoid", "logsigmoid", "softsign", "erf",
    "reciprocal", "square", "sign", "floor", "ceil", "round", "clamp", "clamp_min", "clamp_max",
    "masked_fill", "maximum", "minimum", "fmod", "remainder", "floordiv", "floor_divide", "lerp",
    "addcmul", "addcdiv", "and_", "or_", "xor", "not_", "invert", "__invert__", "bitwise_not",
    "bitwise_and", "bitwise_or", "logical_not", "logical_or", "logical_xor", "eq", "ne", "lt", "le",
    "gt", "ge", "isnan", "isinf", "isfinite", "nan_to_num", "dropout", "native_dropout", "add_", "sub_",
    "mul_", "div_", "clamp_", "masked_fill_", "relu_", "neg_", "float", "half", "bfloat16", "double",
    "bool", "int", "long", "contiguous", "clone", "detach", "alias", "zeros_like", "ones_like",
    "empty_like", "full_like", "expand_as", "rewriter.kernels.gated_activation.gated_activation",
)  # fmt: skip

_REDUCTIONS = ("mean", "sum", "amax", "amin", "prod", "all", "any", "argmax", "argmin", "logsumexp")

RULES: Mapping[str, Rule] = {
    **dict.fromkeys(_POINTWISE, _pointwise),
    "where": _where,
    **dict.fromkeys(("min", "max"), _of_two_tensors),
    **dict.fromkeys(("to", "type", "type_as"), _like_first),
    **dict.fromkeys(("linear", "gemm_4bit", "rewriter.kernels.lora_linear.linear_4bit"), _linear),
    **dict.fromkeys(
        ("rewriter.kernels.lora_linear.lora_linear", "rewriter.kernels.lora_linear.lora_linears"), _lora
    ),
    **dict.fromkeys(("matmul", "bmm", "mm"), _matmul),
    "addmm": _addmm,
    **dict.fromkeys(("layer_norm", "rms_norm"), _norm),
    "rewriter.passes.norm.torch_layer_norm_op": _norm,
    **dict.fromkeys(
        (
            "rewriter.kernels.rms_norm.rms_norm",
            "rewriter.kernels.layer_norm.layer_norm",
            "rewriter.kernels.gated_activation.gated_activation_packed",
            "rewriter.kernels.clamped_gate.clamped_gate",
            "rewriter.passes.gated_mlp.clamped_gate_op",
        ),
        _along_last(0),
    ),
    **dict.fromkeys(
        (
            "rewriter.kernels.rms_norm.add_rms_norm",
            "rewriter.kernels.layer_norm.add_layer_norm",
            "rewriter.passes.norm.add_torch_layer_norm_op",
        ),
        _along_last(0, 1),
    ),
    "rewriter.kernels.dropout.dropped": _dropped,
    **dict.fromkeys(("rewriter.kernels.rotary.rotary", "rewriter.kernels.rotary.rotary_one"), _rotary),
    **dict.fromkeys(
        (
            "scaled_dot_product_attention",
            "rewriter.kernels.attention.attention",
            "rewriter.kernels.attention.fused_attention",
            "rewriter.kernels.attention_unmasked.causal_attention",
            "rewriter.kernels.attention_unmasked.full_attention",
            "rewriter.kernels.attention_by_length.attention_by_length",
        ),
        _attention,
    ),
    **dict.fromkeys(("view", "reshape", "_unsafe_view"), shapes.viewed),
    **dict.fromkeys(("flatten", "unsqueeze"), shapes.reshaped),
    "unflatten": shapes.unflattened,
    "squeeze": shapes.squeezed,
    **dict.fromkeys(("expand", "broadcast_to"), shapes.expanded),
    "repeat": shapes.repeated,
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), shapes.moved(shapes.transposition)),
    "permute": shapes.moved(shapes.permutation),
    "t": shapes.moved(lambda _, ndim: range(ndim)[::-1]),
    "getattr": shapes.attribute,
    **dict.fromkeys(("cat", "stack"), shapes.concatenated),
    **dict.fromkeys(("chunk", "split", "tensor_split", "split_with_sizes"), shapes.along(2, 0)),
    **dict.fromkeys(_REDUCTIONS, shapes.along(1, keeps=2)),
    **dict.fromkeys(("var", "std"), shapes.along(1, keeps=3)),
    **dict.fromkeys(("softmax", "log_softmax", "cumsum", "cumprod"), shapes.along(1)),
    **dict.fromkeys(("sort", "argsort"), shapes.along(1, -1)),
    "topk": shapes.along(2, -1),
    "roll": shapes.along(2),
    "glu": shapes.along(1, -1),
    "normalize": shapes.along(2, 1),
    "narrow": shapes.along(1),
    **dict.fromkeys(("select", "unbind"), shapes.along(1, 0, drops=True)),
    "gather": shapes.gathered,
    **dict.fromkeys(("scatter", "scatter_"), shapes.scattered),
    "repeat_interleave": shapes.repeat_interleaved,
    "getitem": shapes.indexed,
}

# Products by weights: what a row-wise stage is worth making for.
PRODUCTS = frozenset(
    (
        "linear",
        "gemm_4bit",
        "matmul",
        "mm",
        "addmm",
        "autograd_function_apply",
        "rewriter.kernels.lora_linear.linear_4bit",
        "rewriter.kernels.lora_linear.lora_linear",
        "rewriter.kernels.lora_linear.lora_linears",
    )
)
