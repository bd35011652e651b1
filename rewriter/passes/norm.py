"""RMSNorm and LayerNorm as models write them, with the residual add before them, to one kernel each.

Pays because a norm is bound by memory: eager reads and writes the row about seven times forward, the kernel
reads it once and writes it once, and with the residual add in it the sum is not read again.

Refuses: a norm whose variance or normalised row is used elsewhere; a row that one program cannot hold.
Mirrors ``LlamaRMSNorm``, ``GemmaRMSNorm``, ``Olmo2RMSNorm``, ``Gemma3nRMSNorm`` and ``CohereLayerNorm`` of
transformers, ``torch.nn.RMSNorm`` and ``torch.nn.LayerNorm``.
"""

import torch
import torch.nn.functional as F

from rewriter.canonical import dtype_of, fixed, value_of
from rewriter.fusion import pattern_pass
from rewriter.kernels.layer_norm import add_layer_norm, layer_norm
from rewriter.kernels.rms_norm import add_rms_norm, rms_norm
from rewriter.kernels.rows import hidden_fits
from rewriter.match import Match
from rewriter.pattern import Unmet, require, rewrite

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def row_fits(match: Match, *shapes: tuple) -> None:
    """The kernels hold a row in one program, and work in fp32 on 16- and 32-bit floats.

    ``shapes``: what a parameter may be beside one row.
    """
    x = match.value("x")
    require(isinstance(x, torch.Tensor) and x.dim() > 0, "what is normalised is no row")
    require(x.dtype in _DTYPES, f"rows of {x.dtype}; the kernel takes 16- and 32-bit floats")
    hidden = fixed(x.shape[-1])
    if hidden is None:
        raise Unmet(f"the last dimension {x.shape[-1]} is not a constant")
    require(hidden_fits(hidden), f"last dimension {hidden} exceeds 65536, the most one program can hold")
    eps = match.bindings.get("eps")
    is_tensor = isinstance(value_of(eps), torch.Tensor)
    require(not is_tensor, f"eps is the tensor `{eps}`; the kernel takes a number")
    for name in ("weight", "bias"):
        parameter = match.value(name) if name in match.bindings else None
        shape = tuple(parameter.shape) if isinstance(parameter, torch.Tensor) else (hidden,)
        require(shape in shapes or shape == (hidden,), f"{name} of shape {shape} is not one row of {hidden}")


def row_of_heads_fits(match: Match) -> None:
    """Every head may have a weight of its own, as in Cohere's norm of q and k."""
    shape = getattr(match.value("x"), "shape", ())
    row_fits(match, tuple(map(fixed, shape[-2:])))


def summands_match(match: Match) -> None:
    """The residual add is fused where both summands are full rows."""
    x, residual = match.value("x"), match.value("residual")
    require(isinstance(residual, torch.Tensor) and isinstance(x, torch.Tensor), "a summand is no tensor")
    shapes = f"{tuple(residual.shape)} to {tuple(x.shape)}"
    require(str(x.shape) == str(residual.shape), f"the sum broadcasts {shapes}")
    require(x.dtype == residual.dtype, f"the sum is of {x.dtype} and {residual.dtype}")
    row_fits(match)


def one_dimension(match: Match) -> None:
    """``normalized_shape`` covers the last dimension alone."""
    shape = tuple(match["shape"])
    require(len(shape) == 1, f"normalised over {len(shape)} dimensions; the kernel takes the last one")
    row_fits(match)


def result_dtype(match: Match) -> torch.dtype | None:
    """The graph's own, which the operands' do not tell where autocast is on."""
    return dtype_of(match.root)


def default_eps(match: Match) -> float:
    """``F.rms_norm`` without eps takes the machine epsilon of its input."""
    return torch.finfo(value_of(match["x"]).dtype).eps if match["given_eps"] is None else match["given_eps"]


def _normalised(x, eps):
    h = x.to(torch.float32)
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)


def _centred(x, eps):
    h = x.to(torch.float32)
    mean = h.mean(-1, keepdim=True)
    variance = (h - mean).pow(2).mean(-1, keepdim=True)
    return (h - mean) * torch.rsqrt(variance + eps)


@rewrite(to=rms_norm, where=row_fits, out_dtype=result_dtype)
def llama_norm(x, weight, eps):
    return weight * _normalised(x, eps).to(x.dtype)


@rewrite(to=add_rms_norm, where=summands_match, out_dtype=result_dtype)
def add_llama_norm(x, residual, weight, eps):
    h = x + residual
    return weight * _normalised(h, eps).to(h.dtype), h


@rewrite(to=rms_norm, where=row_fits, offset=1.0, round_before_weight=False, out_dtype=result_dtype)
def gemma_norm(x, weight, eps):
    return (_normalised(x, eps) * (1.0 + weight.float())).type_as(x)


@rewrite(to=add_rms_norm, where=summands_match, offset=1.0, round_before_weight=False, out_dtype=result_dtype)
def add_gemma_norm(x, residual, weight, eps):
    h = x + residual
    return (_normalised(h, eps) * (1.0 + weight.float())).type_as(h), h


@rewrite(to=rms_norm, where=row_fits, round_before_weight=False, out_dtype=result_dtype)
def olmo_norm(x, weight, eps):
    return (weight * _normalised(x, eps)).to(x.dtype)


@rewrite(to=add_rms_norm, where=summands_match, round_before_weight=False, out_dtype=result_dtype)
def add_olmo_norm(x, residual, weight, eps):
    h = x + residual
    return (weight * _normalised(h, eps)).to(h.dtype), h


@rewrite(to=rms_norm, where=row_fits, round_before_weight=False, out_dtype=result_dtype)
def fp32_weight_norm(x, weight, eps):
    return (_normalised(x, eps) * weight.float()).type_as(x)


@rewrite(to=add_rms_norm, where=summands_match, round_before_weight=False, out_dtype=result_dtype)
def add_fp32_weight_norm(x, residual, weight, eps):
    h = x + residual
    return (_normalised(h, eps) * weight.float()).type_as(h), h


@rewrite(to=rms_norm, where=row_fits, weight=None, out_dtype=result_dtype)
def unweighted_norm(x, eps):
    return _normalised(x, eps).to(x.dtype)


def torch_rms_norm_op(x, weight, given_eps, eps, shape, out_dtype):
    """``F.rms_norm`` over the last dimension, ``shape``; ``eps`` is what ``given_eps`` stands for."""
    return rms_norm(x, weight, eps, 0.0, False, out_dtype)


@rewrite(to=torch_rms_norm_op, where=one_dimension, eps=default_eps, out_dtype=result_dtype)
def torch_rms_norm(x, shape, weight, given_eps):
    return F.rms_norm(x, shape, weight, given_eps)


def torch_layer_norm_op(x, shape, weight, bias, eps, out_dtype):
    """``F.layer_norm`` over the last dimension."""
    return layer_norm(x, weight, bias, eps, 0.0, out_dtype)


def add_torch_layer_norm_op(x, residual, shape, weight, bias, eps, out_dtype):
    """``F.layer_norm`` of a sum, and the sum."""
    return add_layer_norm(x, residual, weight, bias, eps, 0.0, out_dtype)


def one_dimension_of_sum(match: Match) -> None:
    """``one_dimension``, of a sum that can be fused."""
    one_dimension(match)
    summands_match(match)


@rewrite(to=torch_layer_norm_op, where=one_dimension, out_dtype=result_dtype)
def torch_layer_norm(x, shape, weight, bias, eps):
    return F.layer_norm(x, shape, weight, bias, eps)


@rewrite(to=add_torch_layer_norm_op, where=one_dimension_of_sum, out_dtype=result_dtype)
def add_torch_layer_norm(x, residual, shape, weight, bias, eps):
    h = x + residual
    return F.layer_norm(h, shape, weight, bias, eps), h


@rewrite(to=layer_norm, where=row_of_heads_fits, bias=None, out_dtype=result_dtype)
def cohere_norm(x, weight, eps):
    return (weight.to(torch.float32) * _centred(x, eps)).to(x.dtype)


@rewrite(to=add_layer_norm, where=summands_match, bias=None, out_dtype=result_dtype)
def add_cohere_norm(x, residual, weight, eps):
    h = x + residual
    return (weight.to(torch.float32) * _centred(h, eps)).to(h.dtype), h


# A sum before a norm is tried first, and norms with a weight before the bare one, which they contain; where
# casts vanish in fp32, the more particular form first.
REWRITES = (
    add_gemma_norm, add_cohere_norm, add_llama_norm, add_fp32_weight_norm, add_olmo_norm,
    add_torch_layer_norm,
    gemma_norm, cohere_norm, llama_norm, fp32_weight_norm, olmo_norm, torch_rms_norm, torch_layer_norm,
    unweighted_norm,
)  # fmt: skip

norm = pattern_pass("norm", REWRITES, ("rsqrt", "layer_norm", "rms_norm"))
