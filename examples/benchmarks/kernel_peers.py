"""The peers' own kernels for the operations of ``cases.py``, called as their modules call them.

Each takes the operands of the case. Some write over what they are given, which is how they save memory: here
the same buffers are used again, so that their values mean nothing, which the clock does not see.
"""

from collections.abc import Callable
from importlib.util import find_spec

from cases import EPS, Case

PEERS = {"liger": "liger_kernel", "unsloth": "unsloth"}


def installed() -> list[str]:
    return [peer for peer, module in PEERS.items() if find_spec(module)]


def of(peer: str, case: Case) -> Callable | None:
    """The peer's function for the case; None where it has none."""
    return {"liger": liger, "unsloth": unsloth}[peer](case)


def liger(case: Case) -> Callable | None:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.rope import LigerRopeFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return {
        "rms_norm": lambda x, w: LigerRMSNormFunction.apply(x, w, EPS, 0.0, "llama", True),
        "add_rms_norm": lambda x, r, w: LigerFusedAddRMSNormFunction.apply(x, r, w, EPS, 0.0, "llama", True),
        "layer_norm": lambda x, w: LigerLayerNormFunction.apply(x, w, w.detach(), EPS),
        "rotary": lambda q, k, cos, sin: LigerRopeFunction.apply(q, k, cos[0], sin[0]),
        "gated_activation": lambda gate, up: LigerSiLUMulFunction.apply(gate, up),
        "linear_cross_entropy": lambda x, w, t: LigerFusedLinearCrossEntropyFunction.apply(x, w, t),
    }.get(case.op)


def unsloth(case: Case) -> Callable | None:
    import unsloth  # noqa: F401  (it sets itself up for the device before its kernels can be imported)
    from unsloth.kernels import fast_dequantize, fast_rope_embedding, swiglu_fg_kernel
    from unsloth.kernels.rms_layernorm import Fast_RMS_Layernorm

    if case.op == "gated_activation" and case.backward:
        return None  # its backward computes the product again, too
    return {
        "rms_norm": lambda x, w: Fast_RMS_Layernorm.apply(x, w, EPS, False),
        "rotary": fast_rope_embedding,
        "gated_activation": lambda gate, up: swiglu_fg_kernel(gate[None], up[None]),
        "dequantize": lambda data, *scales: fast_dequantize(data, case.state(data, *scales)),
    }.get(case.op)
