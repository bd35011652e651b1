"""The kernels' cases: what each moves or computes, what it runs, and what runs beside it.

Forward and backward are timed apart: a backward is the whole of ``torch.autograd.grad`` on a kept graph.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from rewriter.kernels import attention as attention_module
from rewriter.kernels import gated_activation as gated_module
from rewriter.kernels import layer_norm as layer_module
from rewriter.kernels import linear_cross_entropy as head_module
from rewriter.kernels import rms_norm as rms_module
from rewriter.kernels import rotary as rotary_module
from rewriter.kernels import rotary_layouts
from rewriter.kernels.dequantize import Packed4bit, dequantize_4bit, dequantize_4bit_reference
from rewriter.kernels.lora_linear import lora_linear

EPS = 1e-5
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        make: new operands; ``ours``, ``reference`` and ``other`` take them. Those that require a gradient get
            one where ``backward``.
        work: fewest bytes (``unit`` "B") or operations ("FLOP"), or 0 where the bound is ``other``'s time.
        target: least share of the bound; of a ratio to ``other``, the most.
        compiled: whether the reference through Inductor stands beside it.
        other, other_name: a further system.
        variant: the operation, where the kernel has several.
        state: of operands, what bitsandbytes keeps beside a 4-bit weight.
    """

    kernel: str
    name: str
    make: Callable[[], Sequence[Tensor]]
    ours: Callable
    work: float
    reference: Callable | None = None
    unit: str = "B"
    target: float | None = None
    backward: bool = False
    together: bool = False
    compiled: bool = True
    other: Callable | None = None
    other_name: str = ""
    variant: str = ""
    state: Callable | None = None

    @property
    def op(self) -> str:
        return self.variant or self.kernel


def bf16(device, *shape, grad=False, scale=1.0) -> Tensor:
    return (torch.randn(shape, device=device, dtype=BF16) * scale).requires_grad_(grad)


def norms(norm: str, device, tiny) -> Iterator[Case]:
    module, more = (rms_module, (EPS,)) if norm == "rms" else (layer_module, (None, EPS))
    sizes = [(8, 64)] if tiny else [(8192, 4096), (4096, 8192)]
    for (rows, hidden), added in itertools.product(sizes, (False, True)):
        kind = f"{'add_' if added else ''}{norm}_norm"

        def make(trained, rows=rows, hidden=hidden, added=added):
            xs = [bf16(device, rows, hidden, grad=True) for _ in range(1 + added)]
            return [*xs, bf16(device, hidden, grad=trained)]

        def call(function, *operands):
            return function(*operands, *more)

        tensor, size = rows * hidden * 2, f"{kind} {rows}x{hidden}"
        # Backward: dy and h are read and dx written; with the sum, h's own gradient is read too.
        forward, backward = (4 if added else 2) * tensor, (4 if added else 3) * tensor
        shared = {
            "kernel": f"{norm}_norm",
            "variant": kind,
            "ours": partial(call, getattr(module, kind)),
            "reference": partial(call, getattr(module, f"{kind}_reference")),
            "compiled": (rows, hidden) == sizes[0],  # Inductor compiles for longer than all else takes
        }
        frozen, trained = partial(make, False), partial(make, True)
        yield Case(name=f"{size} forward", make=frozen, work=forward, target=0.92, **shared)
        shared |= {"work": backward, "backward": True}
        yield Case(name=f"{size} backward", make=frozen, target=0.88, **shared)
        yield Case(name=f"{size} backward, weight", make=trained, target=0.80, **shared)


def rotary(device, tiny) -> Iterator[Case]:
    heads, kv, dim = (4, 2, 16) if tiny else (32, 8, 128)
    for tokens in (16,) if tiny else (8192, 4096):
        yield from _rotary(device, tokens, heads, kv, dim)


def _rotary(device, tokens, heads, kv, dim) -> Iterator[Case]:
    def make():
        q, k = (bf16(device, 1, tokens, n, dim).transpose(1, 2).requires_grad_() for n in (heads, kv))
        return q, k, bf16(device, 1, 1, tokens, dim), bf16(device, 1, 1, tokens, dim)

    work = 2 * tokens * dim * 2 * (heads + kv + 1)
    shared = {
        "kernel": "rotary",
        "make": make,
        "work": work,
        "target": 0.90,
        "ours": lambda *xs: rotary_module.rotary(*xs, "halves"),
        "reference": lambda *xs: rotary_layouts.rotary_reference(*xs, "halves"),
    }
    yield Case(name=f"rotary q, k {tokens} tokens forward", **shared)
    yield Case(name=f"rotary q, k {tokens} tokens backward", backward=True, **shared)


def gated(device, tiny) -> Iterator[Case]:
    rows, width = (8, 64) if tiny else (8192, 14336)
    shared = {
        "kernel": "gated_activation",
        "make": lambda: [bf16(device, rows, width, grad=True) for _ in range(2)],
        "ours": lambda *xs: gated_module.gated_activation(*xs, "silu"),
        "reference": lambda *xs: gated_module.gated_activation_reference(*xs, "silu"),
    }
    yield Case(
        name=f"silu(gate) * up {rows}x{width} forward", work=3 * rows * width * 2, target=0.92, **shared
    )
    yield Case(name=f"silu(gate) * up {rows}x{width} backward", work=5 * rows * width * 2, target=0.88,
               backward=True, **shared)  # fmt: skip


def nf4(device, n, k) -> Packed4bit:
    """Random codes and scales in bitsandbytes' format with double quantisation."""
    blocks = n * k // 64
    return Packed4bit(
        torch.randint(256, (n * k // 2, 1), dtype=torch.uint8, device=device),
        (n, k),
        torch.rand(-(-blocks // 256), device=device) * 0.1,
        64,
        "nf4",
        torch.randint(256, (blocks,), dtype=torch.uint8, device=device),
        torch.linspace(-1, 1, 256, device=device),
        torch.tensor(0.7, device=device),
    )


def dequantize(device, tiny) -> Iterator[Case]:
    n, k = (128, 128) if tiny else (14336, 4096)
    shape, like = (n, k), nf4(device, n, k)

    def make():
        fresh = nf4(device, n, k)
        return fresh.data, fresh.absmax, fresh.absmax_8bit

    def packed(data, absmax, octets):
        return like._replace(data=data, absmax=absmax, absmax_8bit=octets)

    @cache
    def code():
        import bitsandbytes.functional as bnb

        return bnb.get_4bit_type("nf4", device=device)

    def state(_, absmax, octets):
        from bitsandbytes.functional import QuantState

        second = QuantState(absmax=absmax, code=like.absmax_code, blocksize=256, dtype=torch.float32)
        return QuantState(absmax=octets, shape=torch.Size(shape), blocksize=64, quant_type="nf4", dtype=BF16,
                          offset=like.absmax_offset, state2=second, code=code())  # fmt: skip

    def bitsandbytes(data, absmax, octets):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(data, state(data, absmax, octets))

    yield Case("dequantize", f"NF4, double quantisation {n}x{k}", make,
               lambda *xs: dequantize_4bit(packed(*xs), BF16), n * k * 2.5 + n * k / 64,
               reference=lambda *xs: dequantize_4bit_reference(packed(*xs), BF16), target=0.85,
               other=bitsandbytes, other_name="bitsandbytes", compiled=False, state=state)  # fmt: skip


def lora(device, tiny) -> Iterator[Case]:
    tokens, r = (32, 4) if tiny else (4096, 32)
    for n, k in [(64, 48)] if tiny else [(14336, 4096), (4096, 4096)]:

        def make(n=n, k=k):
            return (bf16(device, tokens, k, grad=True), bf16(device, n, k, scale=k**-0.5),
                    bf16(device, r, k, grad=True, scale=k**-0.5), bf16(device, n, r, grad=True))  # fmt: skip

        yield Case("lora_linear", f"r={r}, {tokens} tokens {n}x{k} forward + backward", make,
                   lambda x, w, a, b: lora_linear(x, w, None, a, b, 0.5), 0,
                   reference=lambda x, w, a, b: F.linear(x, w) + F.linear(F.linear(x, a), b) * 0.5,
                   target=1.06, together=True, other=lambda x, w, a, b: F.linear(x, w),
                   other_name="no LoRA")  # fmt: skip


def head(device, tiny) -> Iterator[Case]:
    tokens, hidden, vocab = (32, 16, 64) if tiny else (8192, 4096, 128256)
    # One weight for all sets of operands: 1 GB passes the L2 by itself.
    weight = bf16(device, vocab, hidden, scale=hidden**-0.5)

    def make():
        target = torch.randint(vocab, (tokens,), device=device)
        return bf16(device, tokens, hidden, grad=True), weight, target

    yield Case("linear_cross_entropy", f"frozen head {tokens}x{hidden}x{vocab} forward + backward", make,
               lambda x, w, t: head_module.linear_cross_entropy(x, w, None, t), 4.0 * tokens * hidden * vocab,
               reference=lambda x, w, t: head_module.linear_cross_entropy_reference(x, w, None, t),
               unit="FLOP", target=600e12, together=True)  # fmt: skip


def flex_attention_of(allowed, tokens, device) -> Callable:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = create_block_mask(allowed, None, None, tokens, tokens, device=device)
    return partial(torch.compile(flex_attention, dynamic=False), block_mask=mask, enable_gqa=True)


def attention(device, tiny) -> Iterator[Case]:
    tokens, heads, kv, dim = (32, 2, 1, 16) if tiny else (16384, 32, 8, 128)
    window = tokens // 4
    edges = torch.tensor([1, 3, 4, 8], device=device) * (tokens // 8)
    ids = torch.searchsorted(edges, torch.arange(tokens, device=device), right=True)[None]
    position = torch.arange(tokens, device=device)

    def make():
        return [bf16(device, 1, tokens, n, dim).transpose(1, 2).requires_grad_() for n in (heads, kv, kv)]

    def pairs(lengths: list[int], width: int) -> int:
        return sum(n * (n + 1) // 2 - max(0, n - width) * (max(0, n - width) + 1) // 2 for n in lengths)

    eighths = [tokens // 8 * n for n in (1, 2, 1, 4)]
    for name, terms, visible in [
        (f"sliding {window} of {tokens}", {"window": window}, pairs([tokens], window)),
        (f"{len(eighths)} packed documents, {tokens}", {"segments": ids}, pairs(eighths, tokens)),
    ]:

        def allowed(b, h, i, j, terms=terms):
            near = i - j < window if "window" in terms else ids[0, i] == ids[0, j]
            return (i >= j) & near

        mask = allowed(0, 0, position[:, None], position[None, :])

        def sdpa(q, k, v, mask=mask):
            k, v = (x.repeat_interleave(heads // kv, dim=1) for x in (k, v))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

        shared = {
            "kernel": "attention",
            "make": make,
            "ours": lambda q, k, v, terms=terms: attention_module.attention(
                q, k, v, scale=None, causal=True, **terms
            ),
            "reference": sdpa,
            "unit": "FLOP",
            "compiled": False,
            "other": flex_attention_of(allowed, tokens, device) if device.type == "cuda" else None,
            "other_name": "flex",
        }
        yield Case(name=f"{name} forward", work=4.0 * dim * heads * visible, **shared)
        yield Case(name=f"{name} backward", work=10.0 * dim * heads * visible, backward=True, **shared)


GROUPS = {
    "rms_norm": partial(norms, "rms"),
    "layer_norm": partial(norms, "layer"),
    "rotary": rotary,
    "gated_activation": gated,
    "dequantize": dequantize,
    "lora_linear": lora,
    "linear_cross_entropy": head,
    "attention": attention,
}
