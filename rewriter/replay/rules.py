"""What operations do to tokens: the rules of ``tokens`` by the name of an operation.

A rule takes the node, its name, its arguments in order and the reader, and says what the node computes.
"""

from rewriter.replay import fused_rules, value_rules, view_rules
from rewriter.replay.arguments import REDUCTIONS
from rewriter.replay.tokens import Rule
from rewriter.replay.value_rules import SAME_VALUES

_NAMES: dict[str, Rule] = {
    "add sub mul div neg pow floordiv": value_rules.arithmetic,
    "square abs sqrt rsqrt reciprocal exp log cos sin tanh sigmoid silu relu gelu softplus erf eq ne le lt "
    "ge gt and_ or_ logical_not bitwise_not __invert__ invert where masked_fill clamp minimum maximum "
    "type_as relu6 leaky_relu elu mish": value_rules.pointwise,
    " ".join(SAME_VALUES): value_rules.pointwise,
    " ".join(REDUCTIONS): value_rules.reduction,
    "cumsum": value_rules.cumulative,
    "linear": value_rules.linear,
    "matmul bmm": value_rules.matmul,
    "embedding": value_rules.embedding,
    "view reshape flatten unflatten _unsafe_view": view_rules.reshape,
    "transpose permute swapaxes t": view_rules.permute,
    "getattr": view_rules.attribute,
    "unsqueeze": view_rules.unsqueeze,
    "squeeze": view_rules.squeeze,
    "expand broadcast_to expand_as": view_rules.expand,
    "getitem": view_rules.getitem,
    "pad": view_rules.pad,
    "diff": view_rules.diff,
    "cat stack": view_rules.cat,
    "split chunk unbind": view_rules.split,
    "repeat_interleave": view_rules.repeat_interleave,
    "arange zeros ones full empty zeros_like ones_like full_like": value_rules.created,
    "dropout": value_rules.dropout,
    "scaled_dot_product_attention": fused_rules.attention,
    "size dim _set_grad_enabled _enter_autocast _exit_autocast sym_size": value_rules.sized,
}
_OURS: dict[str, Rule] = {
    "attention.attention attention_unmasked.causal_attention "
    "attention_unmasked.full_attention": fused_rules.attention,
    "rms_norm.rms_norm rms_norm.add_rms_norm layer_norm.layer_norm layer_norm.add_layer_norm "
    "gated_activation.gated_activation gated_activation.gated_activation_packed clamped_gate.clamped_gate "
    "lora_linear.lora_linear lora_linear.lora_linears lora_linear.linear_4bit": fused_rules.rows,
    "rotary.rotary rotary.rotary_one": fused_rules.rotation,
    "linear_cross_entropy.linear_cross_entropy": fused_rules.head_and_loss,
}
RULES: dict[str, Rule] = {name: rule for names, rule in _NAMES.items() for name in names.split()}
RULES |= {f"rewriter.kernels.{name}": rule for names, rule in _OURS.items() for name in names.split()}
