"""What operations do to tokens: the rule of ``tokens`` for an operation.

An operation that is row-wise needs none of its own; those here do more: they join batch and tokens, take a
prefix, see earlier tokens, make tokens, or ask what padding holds.
"""

from torch.fx import Node

from rewriter.replay import fused_rules, value_rules, view_rules
from rewriter.replay.row_wise import row_wise, sized
from rewriter.replay.tokens import Rule
from rewriter.rowwise.rules import has_rule
from rewriter.signatures import target_name

_RULES: dict[str, Rule] = {
    "view": view_rules.reshape,
    "reshape": view_rules.reshape,
    "flatten": view_rules.reshape,
    "unflatten": view_rules.reshape,
    "_unsafe_view": view_rules.reshape,
    "getitem": view_rules.getitem,
    "pad": view_rules.pad,
    "diff": view_rules.diff,
    "cumsum": value_rules.cumulative,
    "embedding": value_rules.embedding,
    **dict.fromkeys(("arange", "zeros", "ones", "full", "empty"), value_rules.created),
    **dict.fromkeys(("zeros_like", "ones_like", "full_like"), value_rules.created),
    **dict.fromkeys(("dropout", "native_dropout"), value_rules.dropout),
    **dict.fromkeys(("size", "dim", "sym_size"), sized),
    **dict.fromkeys(("_set_grad_enabled", "_enter_autocast", "_exit_autocast"), sized),
    "rewriter.kernels.dropout.dropout_seeds": value_rules.seeds,
    "scaled_dot_product_attention": fused_rules.attention,
    "rewriter.kernels.attention.attention": fused_rules.attention,
    "rewriter.kernels.attention_unmasked.causal_attention": fused_rules.attention,
    "rewriter.kernels.attention_unmasked.full_attention": fused_rules.attention,
    "rewriter.kernels.host_weight.host_weight": fused_rules.weight_from_host,
    "rewriter.kernels.linear_cross_entropy.linear_cross_entropy": fused_rules.head_and_loss,
}


def rule_of(node: Node) -> Rule | None:
    """None where nothing is known of what ``node`` calls."""
    rule = _RULES.get(target_name(node))
    return row_wise if rule is None and has_rule(node) else rule
