"""Triton kernel of dropout by position: a program owns a block of one token's channels.

One Philox gives the numbers of four channels, so that the arithmetic takes less than the memory.
"""

# Triton types a kernel as the plain function below its decorator, and `tl.range` as a function: launch
# options, numbers for constexpr parameters and loops look like errors.
# pyright: reportCallIssue=false

import torch
import triton
import triton.language as tl

BLOCK = 2048
WARPS = 4


@triton.jit(do_not_specialize=["length", "blocks", "least", "scale"])
def _kernel(
    x, tokens, seed, out, x_batch, x_token, x_channel, out_batch, out_token, out_channel, tokens_stride,
    length, channels, blocks, least, scale, FOURS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = program // blocks
    batch, token = row // length, row % length
    first = (program % blocks) * FOURS
    number = tl.load(tokens + token.to(tl.int64) * tokens_stride)
    fours = first + tl.arange(0, FOURS)
    nothing = fours * 0
    a, b, c, d = tl.philox(
        tl.load(seed),
        fours,
        nothing + number.to(tl.int32),
        nothing + batch.to(tl.int32),
        nothing + tl.load(seed + 1).to(tl.int32),
    )
    bits = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (4 * FOURS,))
    channel = first.to(tl.int64) * 4 + tl.arange(0, 4 * FOURS)
    inside = channel < channels
    source = x + batch.to(tl.int64) * x_batch + token.to(tl.int64) * x_token + channel * x_channel
    value = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    # A product, not a choice: what is not finite must come through.
    value = value * tl.where(bits.to(tl.int64) >= least, scale, 0.0)
    place = out + batch.to(tl.int64) * out_batch + token.to(tl.int64) * out_token + channel * out_channel
    tl.store(place, value.to(out.dtype.element_ty), mask=inside)


def launch(
    x: torch.Tensor, tokens: torch.Tensor, seed: torch.Tensor, out: torch.Tensor, least: int, scale: float
) -> None:
    """``out = x * scale`` where the random bits of an element are ``least`` or more, else 0.

    Args:
        x, out: (batch, tokens, channels), any strides.
        tokens: (tokens,), int64.
        seed: (2,), int64, dense.
    """
    if out.numel() == 0:
        return
    batch, length, channels = x.shape
    fours = min(BLOCK // 4, triton.next_power_of_2(triton.cdiv(channels, 4)))
    blocks = triton.cdiv(channels, 4 * fours)
    _kernel[(batch * length * blocks,)](
        x, tokens, seed, out, *x.stride(), *out.stride(), tokens.stride(0),
        length, channels, blocks, least, scale, FOURS=fours, num_warps=WARPS,
    )  # fmt: skip
