"""4-bit weights of bitsandbytes (NF4, FP4, double quantisation or not) to 16 or 32 bits, in one launch.

A weight is a nibble, the position of its value in a code of 16; each run of ``blocksize`` weights of the
flattened matrix has one fp32 scale. Double quantisation (Dettmers et al., "QLoRA", arXiv:2305.14314) stores
that scale in 8 bits, as ``absmax_code[absmax_8bit] * absmax[block // 256] + absmax_offset``. bitsandbytes
takes three launches and two fp32 copies of the scales; here both levels are undone where the weight is made,
and the result is bit for bit the same: every product and the sum in fp32, rounded once each, the weight once
more to ``dtype``.

Bytes moved per weight to bf16: 0.5 read, 2 written, and 1/64 or, without double quantisation, 1/16 for the
scales; the aim is 85% of what a copy moves in a second. Nothing is saved and nothing has a gradient: a 4-bit
weight is frozen.

In the same launch ``dequantize_4bit_extended`` puts an adapter's matrix to the right of the weight or beneath
it, among zeros; ``extended_product`` says what for. Every byte of the result is written.

The packed weight, but not its scales, may lie in page-locked host memory: the kernel then reads it over the
bus, 0.5 bytes a weight, and nothing of it stays on the device. Where it is not locked it is copied first.

Refused: block sizes that are no power of two from 32 to 4096, second-level blocks other than 256, fp64.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .registration import define

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
SECOND_BLOCKSIZE = 256

# Quantiles of the normal distribution (QLoRA, appendix E), as the fp32 numbers that bitsandbytes has.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4_MAGNITUDES = (0.0, 0.0625 / 12, 8 / 12, 1.0, 4 / 12, 0.5, 2 / 12, 0.25)
CODES = {"nf4": _NF4, "fp4": (*_FP4_MAGNITUDES, *(-m for m in _FP4_MAGNITUDES))}


class Packed4bit(NamedTuple):
    """A 4-bit weight, in the order of the arguments of ``bitsandbytes::gemm_4bit``.

    Attributes:
        data: two weights a byte, the earlier one in the high nibble; any shape and storage dtype; on the
            device of ``absmax``, or on the host.
        shape: (N, K) of the weight, output features first.
        absmax: fp32, a scale a block; with double quantisation the second level's, a scale 256 blocks.
        blocksize: weights a scale, in the flattened matrix.
        quant_type: "nf4" or "fp4".
        absmax_8bit: uint8, a first-level scale a block; this and the next two are None without double
            quantisation.
        absmax_code: fp32 (256,), what the 8 bits stand for.
        absmax_offset: fp32 scalar, added to each first-level scale.
    """

    data: Tensor
    shape: tuple[int, int]
    absmax: Tensor
    blocksize: int
    quant_type: str
    absmax_8bit: Tensor | None = None
    absmax_code: Tensor | None = None
    absmax_offset: Tensor | None = None


def dequantize_4bit(packed: Packed4bit, dtype: torch.dtype, use: int = 0) -> Tensor:
    """The weight of ``packed``, (N, K) in ``dtype``: bf16, fp16 or fp32; on the device of its scales.

    Args:
        use: any number. Calls that differ in it stay apart in a compiled graph. Where a forward and its
            backward both want the weight, give them different ones: two equal calls would be merged, and the
            large 16-bit weight be saved between them.

    Raises:
        ValueError: the block size or the type of quantisation is not bitsandbytes', sizes do not agree, or a
            part of double quantisation is missing.
        TypeError: ``dtype`` is not bf16, fp16 or fp32.
    """
    if not packed.absmax.is_cuda:
        return dequantize_4bit_reference(packed, dtype)
    return torch.ops.rewriter.dequantize_4bit(*packed, dtype, use)


def dequantize_4bit_extended(
    packed: Packed4bit,
    dtype: torch.dtype,
    matrix: Tensor,
    dim: int,
    room: int,
    start: int = 0,
    scale: float = 1.0,
    use: int = 0,
) -> Tensor:
    """``[W | 0 | matrix | 0]``, or ``[W ; 0 ; matrix ; 0]``: the weight as ``dequantize_4bit`` gives it.

    Args:
        matrix: (N, r) to the right of the weight, (r, K) beneath it; of any strides, 16 or 32 bits.
        dim: 1 for room to the right, 0 for room beneath, as in ``torch.cat``.
        room: columns or rows more than the weight has.
        start: how many of them are before the matrix.
        scale: times the matrix, in fp32, rounded to ``dtype`` once.
        use: as in ``dequantize_4bit``.

    Returns:
        (N, K + room) or (N + room, K) in ``dtype``.

    Raises:
        ValueError, TypeError: as ``dequantize_4bit``, or the matrix does not fit the weight or the room.
    """
    if not packed.absmax.is_cuda:
        return dequantize_4bit_extended_reference(packed, dtype, matrix, dim, room, start, scale, use)
    return torch.ops.rewriter.dequantize_4bit_extended(*packed, dtype, matrix, dim, room, start, scale, use)


def dequantize_4bit_extended_reference(
    packed: Packed4bit,
    dtype: torch.dtype,
    matrix: Tensor,
    dim: int,
    room: int,
    start: int = 0,
    scale: float = 1.0,
    use: int = 0,
) -> Tensor:
    """The same in plain PyTorch."""
    _check_room(packed.shape, matrix, dim, room, start)
    weight = dequantize_4bit_reference(packed, dtype)
    around = (start, room - start - matrix.shape[dim])
    filled = torch.nn.functional.pad((matrix.float() * scale).to(dtype), around if dim else (0, 0, *around))
    if use:
        # By other operations: a compiler would keep what the same ones made in the forward.
        return torch.cat((weight.t(), filled.t()), 1 - dim).t()
    return torch.cat((weight, filled), dim)


def dequantize_4bit_reference(packed: Packed4bit, dtype: torch.dtype) -> Tensor:
    """The same in plain PyTorch."""
    _check(packed, dtype)
    data, (rows, columns), absmax, blocksize, quant_type, absmax_8bit, absmax_code, absmax_offset = packed
    count = rows * columns
    blocks = -(-count // blocksize)
    if absmax_8bit is not None and absmax_code is not None and absmax_offset is not None:
        outer = absmax.repeat_interleave(SECOND_BLOCKSIZE)[:blocks]
        absmax = absmax_code[absmax_8bit.reshape(-1)[:blocks].int()] * outer + absmax_offset
    code = torch.tensor(CODES[quant_type], dtype=torch.float32, device=data.device)
    octets = _octets(data)
    nibbles = torch.stack((octets >> 4, octets & 15), dim=-1).reshape(-1)[:count]
    values = torch.nn.functional.pad(code[nibbles.int()], (0, blocks * blocksize - count))
    values = values.view(blocks, blocksize) * absmax[:blocks, None]
    return values.view(-1)[:count].to(dtype).view(rows, columns)


def _octets(data: Tensor) -> Tensor:
    data = data.detach().reshape(-1)
    return data if data.dtype == torch.uint8 else data.view(torch.uint8)


def _check(packed: Packed4bit, dtype: torch.dtype) -> None:
    data, shape, absmax, blocksize, quant_type, absmax_8bit, absmax_code, absmax_offset = packed
    if dtype not in DTYPES:
        raise TypeError(f"dequantize_4bit: {dtype} asked for; bf16, fp16 and fp32 are possible.")
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"dequantize_4bit: block size {blocksize}; bitsandbytes has {BLOCKSIZES}.")
    if quant_type not in CODES:
        raise ValueError(f"dequantize_4bit: quantisation {quant_type!r}; 'nf4' and 'fp4' are possible.")
    if absmax.dtype != torch.float32:
        raise TypeError(f"dequantize_4bit: absmax is {absmax.dtype}, not fp32.")
    if absmax_8bit is not None and (absmax_code is None or absmax_offset is None):
        raise ValueError("dequantize_4bit: absmax_8bit is given without absmax_code and absmax_offset.")
    if len(shape) != 2:
        raise ValueError(f"dequantize_4bit: shape {tuple(shape)}; a weight is (N, K).")
    count = shape[0] * shape[1]
    held = data.numel() * data.element_size() * 2
    if held < count:
        raise ValueError(f"dequantize_4bit: {held} packed weights are too few for shape {tuple(shape)}.")
    scales, blocks = absmax if absmax_8bit is None else absmax_8bit, -(-count // blocksize)
    if scales.numel() < blocks:
        raise ValueError(f"dequantize_4bit: {scales.numel()} scales are too few for {blocks} blocks.")
    if absmax_8bit is not None and absmax.numel() * SECOND_BLOCKSIZE < blocks:
        raise ValueError(
            f"dequantize_4bit: {absmax.numel()} second-level scales are too few for {blocks} blocks; each "
            f"stands for {SECOND_BLOCKSIZE}."
        )


def _check_room(shape: Sequence[int], matrix: Tensor, dim: int, room: int, start: int) -> None:
    if dim not in (0, 1):
        raise ValueError(
            f"dequantize_4bit_extended: dim {dim}; 1 is to the right of the weight, 0 beneath it."
        )
    side, across = ("columns", "rows") if dim else ("rows", "columns")
    length = shape[1 - dim]
    if matrix.dim() != 2 or matrix.shape[1 - dim] != length:
        raise ValueError(
            f"dequantize_4bit_extended: {side} {tuple(matrix.shape)}; the weight has {length} {across}."
        )
    given = matrix.shape[dim]
    if start < 0 or start + given > room:
        raise ValueError(
            f"dequantize_4bit_extended: {given} {side} from {start} on do not fit a room of {room}."
        )


def _launch(
    packed: Packed4bit, out: Tensor, matrix: Tensor | None = None, start: int = 0, scale: float = 1.0
) -> Tensor:
    from .dequantize_triton import launch

    data = packed.data
    if data.device != out.device and not data.is_pinned():
        data = data.to(out.device)
    launch(packed._replace(data=_octets(data)), out, matrix, start, scale)
    return out


def _given(arguments: tuple) -> tuple:
    """An op's arguments, the packed weight's made one."""
    width = len(Packed4bit._fields)
    return Packed4bit(*arguments[:width]), *arguments[width:]


def _kernel(*arguments) -> Tensor:
    packed, *_ = _given(arguments)
    return _launch(packed, _fake(*arguments))


def _fake(*arguments) -> Tensor:
    packed, dtype, *_ = _given(arguments)
    _check(packed, dtype)
    return packed.absmax.new_empty(packed.shape, dtype=dtype)


def _extended_kernel(*arguments) -> Tensor:
    packed, _, matrix, _, _, start, scale, _ = _given(arguments)
    return _launch(packed, _extended_fake(*arguments), matrix, start, scale)


def _extended_fake(*arguments) -> Tensor:
    packed, dtype, matrix, dim, room, start, _, _ = _given(arguments)
    _check(packed, dtype)
    _check_room(packed.shape, matrix, dim, room, start)
    n, k = packed.shape
    return packed.absmax.new_empty((n, k + room) if dim else (n + room, k), dtype=dtype)


_PACKED = (
    "Tensor data, SymInt[] shape, Tensor absmax, int blocksize, str quant_type, Tensor? absmax_8bit, "
    "Tensor? absmax_code, Tensor? absmax_offset, ScalarType dtype"
)
define(f"dequantize_4bit({_PACKED}, int use=0) -> Tensor", kernel=_kernel, fake=_fake)
define(
    f"dequantize_4bit_extended({_PACKED}, Tensor matrix, int dim, int room, int start, float scale, int use) "
    "-> Tensor",
    kernel=_extended_kernel,
    fake=_extended_fake,
)
