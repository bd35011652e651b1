"""The fusion passes in the order in which they run."""

from rewriter.fusion import Pass, pattern_pass
from rewriter.passes.attention import attention_pass
from rewriter.passes.dropout import dropout_pass
from rewriter.passes.gated_mlp import gated_mlp
from rewriter.passes.lm_head_loss import lm_head_loss
from rewriter.passes.lora import lora_pass
from rewriter.passes.norm import norm
from rewriter.passes.rotary import rotary_pass
from rewriter.registry import user_patterns

_PASSES: tuple[Pass, ...] = (
    dropout_pass, lora_pass, rotary_pass, norm, attention_pass, gated_mlp, lm_head_loss,
)  # fmt: skip


def ordered_passes() -> tuple[Pass, ...]:
    """A user's patterns first, each a pass of its own name, then the package's passes."""
    own = tuple(pattern_pass(p.name, [p], ()) for p in user_patterns())
    return (*own, *_PASSES)


def package_passes() -> list[str]:
    """The names of the package's own passes."""
    return [p.name for p in _PASSES]


def pass_names() -> list[str]:
    """Of all passes, in the order in which they run: what the option ``passes`` takes."""
    return [p.name for p in ordered_passes()]
