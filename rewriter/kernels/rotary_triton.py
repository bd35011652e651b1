"""Triton kernel of the rotary embedding: one launch rotates the heads of q and of k.

A program owns a tile of tokens × heads. The cosines of its tokens are loaded once and serve all its heads.
The tile runs along the heads where a token's heads are neighbours in memory, else along the tokens.
"""

# Triton types a kernel as the plain function below its decorator, and `tl.range` as a function: launch
# options, numbers for constexpr parameters and loops look like errors.
# pyright: reportArgumentType=false, reportCallIssue=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from rewriter.kernels.rotary import LARGEST_HEAD

# Pairs of q per program: one 16-byte load a thread of each half. Tiles of twice that were slower on an H200,
# in four warps and in eight, and a limit on the registers spills.
TILE = 1024
PAIRS_PER_WARP = 256

HALVES, INTERLEAVED, HALF_SIZE = 0, 1, 2
# The two dimensions besides the heads: outer, and the one whose tokens a tile takes.
_OTHERS = ((1, 2), (0, 2), (0, 1))

COSINES_IN_HALVES = tl.constexpr(HALVES)
COSINES_INTERLEAVED = tl.constexpr(INTERLEAVED)


@triton.jit
def _load_pairs(
    x, rows, inside, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Both members of each pair, each ``(TOKENS, HEADS, BLOCK)`` in fp32."""
    if INTERLEAVED:
        column = tl.arange(0, 2 * BLOCK)[None, None, :]
        both = tl.load(x + rows + column, mask=inside & (column < 2 * HALF), other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(both, (TOKENS, HEADS, BLOCK, 2)))
    else:
        column = tl.arange(0, BLOCK)[None, None, :]
        mask = inside & (column < HALF)
        first = tl.load(x + rows + column, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(x + rows + HALF + column, mask=mask, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _store_pairs(
    out, rows, inside, first, second, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if INTERLEAVED:
        column = tl.arange(0, 2 * BLOCK)[None, None, :]
        both = tl.reshape(tl.join(first, second), (TOKENS, HEADS, 2 * BLOCK))
        tl.store(out + rows + column, both.to(out.dtype.element_ty), mask=inside & (column < 2 * HALF))
    else:
        column = tl.arange(0, BLOCK)[None, None, :]
        mask = inside & (column < HALF)
        tl.store(out + rows + column, first.to(out.dtype.element_ty), mask=mask)
        tl.store(out + rows + HALF + column, second.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _load_angles(
    table, rows, inside, HALF: tl.constexpr, COSINES: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr
):
    """The factors of the first and of the second member of each pair, each ``(TOKENS, 1, BLOCK)``."""
    if COSINES == COSINES_INTERLEAVED:
        first, second = _load_pairs(table, rows, inside, HALF, True, TOKENS, 1, BLOCK)
    elif COSINES == COSINES_IN_HALVES:
        first, second = _load_pairs(table, rows, inside, HALF, False, TOKENS, 1, BLOCK)
    else:
        column = tl.arange(0, BLOCK)[None, None, :]
        first = tl.load(table + rows + column, mask=inside & (column < HALF), other=0.0).to(tl.float32)
        second = first
    return first, second


@triton.jit
def _turn(a, b, cos1, cos2, sin1, sin2, BACKWARD: tl.constexpr):
    if BACKWARD:
        return a * cos1 + b * sin2, b * cos2 - a * sin1
    else:
        return a * cos1 - b * sin1, b * cos2 + a * sin2


@triton.jit
def _copy_rest(
    x, x_rows, out, out_rows, inside, ROTARY: tl.constexpr, REST: tl.constexpr, REST_BLOCK: tl.constexpr
):
    column = tl.arange(0, REST_BLOCK)[None, None, :]
    mask = inside & (column < REST)
    rest = tl.load(x + x_rows + ROTARY + column, mask=mask)
    tl.store(out + out_rows + ROTARY + column, rest.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens", "token_blocks", "q_heads", "k_heads", "head_blocks"])
def _rotate_kernel(
    q, k, q_out, k_out, cos, sin,
    q_outer, q_token, q_head, q_out_outer, q_out_token, q_out_head,
    k_outer, k_token, k_head, k_out_outer, k_out_token, k_out_head,
    cos_outer, cos_token,
    tokens, token_blocks, q_heads, k_heads, head_blocks,
    HALF: tl.constexpr, REST: tl.constexpr, IN_INTERLEAVED: tl.constexpr, OUT_INTERLEAVED: tl.constexpr,
    COSINES: tl.constexpr, BACKWARD: tl.constexpr,
    TOKENS: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    # The head blocks of one token run side by side, so that its cosines are still in the cache.
    head_block = (program % head_blocks).to(tl.int64)
    token_program = program // head_blocks
    outer = (token_program // token_blocks).to(tl.int64)
    first_token = (token_program % token_blocks).to(tl.int64) * TOKENS
    token = first_token + tl.arange(0, TOKENS)[:, None, None]
    token_inside = token < tokens

    # All loads stand before the first store: past it, the compiler could not move them up.
    lane = head_block * Q_HEADS + tl.arange(0, Q_HEADS)[None, :, None]
    q_inside = token_inside & (lane < q_heads)
    q_rows = outer * q_outer + token * q_token + lane * q_head
    q_out_rows = outer * q_out_outer + token * q_out_token + lane * q_out_head
    q1, q2 = _load_pairs(q, q_rows, q_inside, HALF, IN_INTERLEAVED, TOKENS, Q_HEADS, BLOCK)
    if K_HEADS > 0:
        lane = head_block * K_HEADS + tl.arange(0, K_HEADS)[None, :, None]
        k_inside = token_inside & (lane < k_heads)
        k_rows = outer * k_outer + token * k_token + lane * k_head
        k_out_rows = outer * k_out_outer + token * k_out_token + lane * k_out_head
        k1, k2 = _load_pairs(k, k_rows, k_inside, HALF, IN_INTERLEAVED, TOKENS, K_HEADS, BLOCK)
    cos_rows = outer * cos_outer + token * cos_token
    cos1, cos2 = _load_angles(cos, cos_rows, token_inside, HALF, COSINES, TOKENS, BLOCK)
    sin1, sin2 = _load_angles(sin, cos_rows, token_inside, HALF, COSINES, TOKENS, BLOCK)

    q1, q2 = _turn(q1, q2, cos1, cos2, sin1, sin2, BACKWARD)
    _store_pairs(q_out, q_out_rows, q_inside, q1, q2, HALF, OUT_INTERLEAVED, TOKENS, Q_HEADS, BLOCK)
    if K_HEADS > 0:
        k1, k2 = _turn(k1, k2, cos1, cos2, sin1, sin2, BACKWARD)
        _store_pairs(k_out, k_out_rows, k_inside, k1, k2, HALF, OUT_INTERLEAVED, TOKENS, K_HEADS, BLOCK)
    if REST > 0:
        _copy_rest(q, q_rows, q_out, q_out_rows, q_inside, 2 * HALF, REST, REST_BLOCK)
        if K_HEADS > 0:
            _copy_rest(k, k_rows, k_out, k_out_rows, k_inside, 2 * HALF, REST, REST_BLOCK)


def _power_of_2(n: int) -> int:
    """The least power of 2 that is at least ``n`` and 1."""
    return 1 << max(n - 1, 0).bit_length()


class Tile(NamedTuple):
    """What a program rotates, powers of 2: tokens, heads of q and of k (0: no k), and its warps."""

    tokens: int
    q_heads: int
    k_heads: int
    warps: int


def divide(q_heads: int, k_heads: int, tokens: int, block: int, neighbours: bool) -> Tile:
    """The tile for ``block`` pairs a head; ``neighbours``: a token's heads lie side by side in memory.

    Heads that do not are taken one at a time, for the longest run of memory: of a copy's bandwidth 0.93, with
    four at a time 0.83. The heads of k are spread evenly over the programs of a token: with twice as many for
    half of the programs, 0.86 instead of 0.90.
    """
    q = min(_power_of_2(q_heads), max(TILE // block, 1)) if neighbours else 1
    blocks = -(-q_heads // q)
    k = _power_of_2(-(-k_heads // blocks)) if k_heads else 0
    tokens = min(max(TILE // (block * q), 1), _power_of_2(tokens))
    return Tile(tokens, q, k, max(1, min(8, tokens * q * block // PAIRS_PER_WARP)))


def _dense_last(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _leading(dimensions: tuple[int, ...], fill: int) -> tuple[int, ...]:
    """Three sizes or strides before the last, with ``fill`` for those that are missing."""
    return (fill,) * (4 - len(dimensions)) + dimensions[:-1]


def _head_dimension(q: tuple[int, ...], k: tuple[int, ...], cos: tuple[int, ...]) -> int:
    """The dimension that shares its cosines: where q and k differ, else one in which cos has size 1."""
    shared = [d for d in (1, 2, 0) if cos[d] == 1]
    differing = [d for d in range(3) if q[d] != k[d]]
    if len(differing) > 1 or not shared or (differing and differing[0] not in shared):
        raise ValueError(
            f"rotary: q (but for features) {q} and k {k} may differ only in their heads, the dimension along "
            f"which cos {cos} has size 1; use rotary_reference."
        )
    heads_at = differing[0] if differing else shared[0]
    if any(cos[d] not in (1, q[d]) for d in range(3) if d != heads_at):
        raise ValueError(f"rotary: cos (but for features) {cos} does not broadcast to q {q}.")
    return heads_at


def rotate(
    q: torch.Tensor,
    q_out: torch.Tensor,
    k: torch.Tensor | None,
    k_out: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    rotary_dim: int,
    in_interleaved: bool,
    out_interleaved: bool,
    cosines: int,
    backward: bool,
) -> None:
    """Rotate ``q`` into ``q_out`` and ``k``, if there is one, into ``k_out``, in one launch.

    Args:
        q, k: (batch, heads, tokens, head) or (batch, tokens, heads, head), any strides; dimensions may be
            missing at the left.
        q_out, k_out: the same shapes, dense in the last dimension.
        cos, sin: broadcastable to ``q`` but for the last dimension, of size 1 along the heads.
        cosines: ``HALVES``, ``INTERLEAVED`` or ``HALF_SIZE``, where the factors of a pair stand in ``cos``.
        backward: rotate back, by the transpose of the forward's matrix.
    """
    head_dim = q.size(-1)
    if head_dim > LARGEST_HEAD:
        raise ValueError(
            f"rotary: head size {head_dim} exceeds {LARGEST_HEAD}, the most one program can hold; "
            "use rotary_reference."
        )
    q, cos, sin = _dense_last(q), _dense_last(cos), _dense_last(sin)
    if k is None or k_out is None:
        k, k_out, single = q, q_out, True
    else:
        k, single = _dense_last(k), False
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()

    q_shape, k_shape, cos_shape = (_leading(tuple(x.shape), 1) for x in (q, k, cos))
    heads_at = _head_dimension(q_shape, k_shape, cos_shape)
    outer_at, token_at = _OTHERS[heads_at]
    outer, tokens, q_heads = q_shape[outer_at], q_shape[token_at], q_shape[heads_at]
    k_heads = 0 if single else k_shape[heads_at]
    q_strides, q_out_strides, k_strides, k_out_strides = (
        _leading(x.stride(), 0) for x in (q, q_out, k, k_out)
    )
    cos_strides = _leading(cos.stride(), 0)

    half, rest = rotary_dim // 2, head_dim - rotary_dim
    block = _power_of_2(half)
    neighbours = q_out_strides[heads_at] <= q_out_strides[token_at]
    tile = divide(q_heads, k_heads, tokens, block, neighbours)
    token_blocks = -(-tokens // tile.tokens)
    head_blocks = -(-q_heads // tile.q_heads)
    if k_heads:
        head_blocks = max(head_blocks, -(-k_heads // tile.k_heads))
    programs = outer * token_blocks * head_blocks
    if programs == 0 or head_dim == 0:
        return
    _rotate_kernel[(programs,)](
        q, k, q_out, k_out, cos, sin,
        q_strides[outer_at], q_strides[token_at], q_strides[heads_at],
        q_out_strides[outer_at], q_out_strides[token_at], q_out_strides[heads_at],
        k_strides[outer_at], k_strides[token_at], k_strides[heads_at],
        k_out_strides[outer_at], k_out_strides[token_at], k_out_strides[heads_at],
        0 if cos_shape[outer_at] == 1 else cos_strides[outer_at],
        0 if cos_shape[token_at] == 1 else cos_strides[token_at],
        tokens, token_blocks, q_heads, k_heads, head_blocks,
        HALF=half, REST=rest, IN_INTERLEAVED=in_interleaved, OUT_INTERLEAVED=out_interleaved,
        COSINES=cosines, BACKWARD=backward,
        TOKENS=tile.tokens, Q_HEADS=tile.q_heads, K_HEADS=tile.k_heads, BLOCK=block,
        REST_BLOCK=_power_of_2(rest), num_warps=tile.warps,
    )  # fmt: skip
