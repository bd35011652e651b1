"""The gate of a gated MLP, ``silu(gate) * up``, to one kernel that saves only gate and up.

The gate and up projections may be two linears or the halves of one packed linear (Phi3, GLM4), with adapters
or not; experts' gates are the same. GPT-OSS's gate, clamped and over pairs, is an op of its own. Pays because
eager also writes, saves and reads ``silu(gate)``: five passes over the widest activation of the model forward
and eight backward, the kernel three and five.

Refuses: a gate or activation that is used elsewhere, or operands that broadcast.
Mirrors ``LlamaMLP``, ``GemmaMLP``, ``Phi3MLP`` and ``GptOssExperts`` of transformers.
"""

import torch
import torch.nn.functional as F
from torch.fx import Graph

from rewriter.canonical import canonical, fixed
from rewriter.fusion import Applied, Pass, pattern_pass
from rewriter.kernels.clamped_gate import clamped_gate
from rewriter.kernels.gated_activation import gated_activation, gated_activation_packed
from rewriter.match import Match, Miss
from rewriter.pattern import require, rewrite

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def halves_match(match: Match) -> None:
    """The kernel reads two tensors of one shape and one dtype, and works in fp32 on 16- and 32-bit floats."""
    gate, up = match.value("gate"), match.value("up")
    require(isinstance(gate, torch.Tensor) and isinstance(up, torch.Tensor), "one factor is no tensor")
    require(gate.dtype in _DTYPES, f"a gate of {gate.dtype}; the kernel takes 16- and 32-bit floats")
    require(gate.dtype == up.dtype, f"gate is {gate.dtype} and up is {up.dtype}")
    require(str(gate.shape) == str(up.shape), f"up of {tuple(up.shape)} broadcasts to {tuple(gate.shape)}")


def packed_is_even(match: Match) -> None:
    """Where the halves meet is known while compiling."""
    packed = match.value("gate_up")
    require(packed.dtype in _DTYPES, f"a gate of {packed.dtype}; the kernel takes 16- and 32-bit floats")
    width = fixed(packed.shape[-1])
    require(width is not None and width % 2 == 0, f"a packed width of {packed.shape[-1]} has no equal halves")


def clamped_pairs(match: Match) -> None:
    """One limit for both, and pairs: the kernel reads gate and up in turns."""
    packed = match.value("gate_up")
    require(packed.dtype in _DTYPES, f"a gate of {packed.dtype}; the kernel takes 16- and 32-bit floats")
    width = fixed(packed.shape[-1])
    require(width is not None and width % 2 == 0, f"a width of {packed.shape[-1]} does not make pairs")
    for name in ("alpha", "limit", "lowest", "offset"):
        value = match[name]
        require(isinstance(value, (int, float)), f"{name} `{value}` is no number")
    limit, lowest = match["limit"], match["lowest"]
    require(lowest == -limit, f"up is clamped from {lowest} to {limit}, not to both sides alike")


def _halves(gate_up):
    halves = gate_up.chunk(2, -1)
    return halves[0], halves[1]


@rewrite(to=gated_activation_packed, where=packed_is_even, activation="silu", order="gate_up")
def packed_silu(gate_up):
    gate, up = _halves(gate_up)
    return up * F.silu(gate)


@rewrite(to=gated_activation_packed, where=packed_is_even, activation="silu", order="up_gate")
def packed_silu_up_first(gate_up):
    up, gate = _halves(gate_up)
    return up * F.silu(gate)


@rewrite(to=gated_activation_packed, where=packed_is_even, activation="gelu_tanh", order="gate_up")
def packed_gelu_tanh(gate_up):
    gate, up = _halves(gate_up)
    return up * F.gelu(gate, approximate="tanh")


@rewrite(to=gated_activation, where=halves_match, activation="silu")
def silu(gate, up):
    return F.silu(gate) * up


@rewrite(to=gated_activation, where=halves_match, activation="gelu_tanh")
def gelu_tanh(gate, up):
    return F.gelu(gate, approximate="tanh") * up


@rewrite(to=gated_activation, where=halves_match, activation="gelu")
def gelu(gate, up):
    return F.gelu(gate) * up


@rewrite(to=gated_activation, where=halves_match, activation="relu_squared")
def relu_squared(gate, up):
    return F.relu(gate).square() * up


def clamped_gate_op(gate_up, alpha, limit, lowest, offset):
    """``clamped_gate``; ``lowest`` is ``-limit``."""
    return clamped_gate(gate_up, float(alpha), float(limit), float(offset))


@rewrite(to=clamped_gate_op, where=clamped_pairs)
def clamped_swish(gate_up, alpha, limit, lowest, offset):
    gate = gate_up[..., ::2].clamp(None, limit)
    up = gate_up[..., 1::2].clamp(lowest, limit)
    return (up + offset) * (gate * torch.sigmoid(gate * alpha))


REWRITES = (
    packed_silu, packed_silu_up_first, packed_gelu_tanh, silu, gelu_tanh, gelu,
    relu_squared, clamped_swish,
)  # fmt: skip

_patterns = pattern_pass("gated_mlp", REWRITES, ("silu", "gelu", "relu", "sigmoid"))


def _run(graph: Graph) -> Applied:
    applied = _patterns.run(graph)
    applied.misses = [miss for miss in applied.misses if _worth_a_line(miss)]
    return applied


def _worth_a_line(miss: Miss) -> bool:
    """Sigmoids abound in routers and attention: one that is far from the clamped gate is no near miss."""
    calls = [canonical(node) for node in (*miss.matched, miss.node) if node is not None]
    names = {call.name for call in calls if call is not None}
    return "sigmoid" not in names or miss.rewrite is clamped_swish and 2 * miss.depth >= miss.rewrite.size


gated_mlp = Pass("gated_mlp", _run)
