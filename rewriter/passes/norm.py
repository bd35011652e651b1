"""RMSNorm and LayerNorm as models write them, with the residual add before them, to one kernel each.

Pays because a norm is bound by memory: eager reads and writes the row about seven times forward, the kernel
reads it once and writes it once, and with the residual add in it the sum is not read again.

Refuses: a norm whose variance or normalised row is used elsewhere; a row that one program cannot hold.
Mirrors ``LlamaRMSNorm``, ``GemmaRMSNorm``, ``Olmo2RMSNorm``, ``Gemma3nRMSNorm`` and ``CohereLayerNorm`` of
transformers, ``torch.nn.RMSNorm`` and ``torch.nn.LayerNorm``.
"""

import torch
import torch.nn.functional as F

from rewriter.canonical import dtype_of
from rewriter.fusion import pattern_pass
from rewriter.kernels.rms_norm import add_rms_norm, hidden_fits, rms_norm
from rewriter.match import Match
from rewriter.pattern import require, rewrite


def row_fits(match: Match) -> None:
    """The kernels hold a row in one program, and work in fp32 on 16- and 32-bit floats."""
    x = match.value("x")
    require(x.dtype in (torch.bfloat16, torch.float16, torch.float32), f"rows of {x.dtype}; the kernel takes 16 and 32 bit")
    hidden = x.shape[-1]
    require(isinstance(hidden, int), f"the last dimension {hidden} is not a constant")
    require(hidden_fits(hidden), f"last dimension {hidden} exceeds 65536, the most one program can hold")


def result_dtype(match: Match) -> torch.dtype:
    return dtype_of(match.root)


@rewrite(to=rms_norm, where=row_fits, out_dtype=result_dtype)
def llama_norm(x, weight, eps):
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return weight * h.to(x.dtype)


norm = pattern_pass("norm", [llama_norm], ["rsqrt", "layer_norm", "rms_norm"])
