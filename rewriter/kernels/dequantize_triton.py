"""Triton kernel of ``dequantize_4bit``: packed nibbles and both levels of scales in, weights out, one launch.

A thread reads one 32-bit word (8 weights) and writes 8 weights (16 bytes of a 16-bit dtype), eight times:
loads and stores of a warp are each one unbroken run, and nothing changes threads in between. The 16 values of
the code are made by the program itself and looked up in shared memory (``tl.gather``, no bank conflicts): a
tree of selections costs 15 instructions a weight, where an H200 has 17 at full bandwidth (this takes 10 in
all), and a table in device memory would be state that somebody has to own.

With room for another matrix, the last programs fill it, so that there is still one launch. Room to the right
makes the result's rows longer than the weight's: a division a word says in which row it lies. Room beneath
changes nothing for the weight.
"""

# Triton types a kernel as the plain function below its decorator, and `tl.range` as a function: launch
# options, numbers for constexpr parameters and loops look like errors.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false

import triton
import triton.language as tl

_WARPS = 4
_WORDS = 32 * _WARPS
_TILES = 8
_SPAN = 2048


@triton.jit
def _codebook(NF4: tl.constexpr):
    i = tl.arange(0, 16)
    if NF4:
        v = tl.where(i == 0, -1.0, 0.0)
        v = tl.where(i == 1, -0.6961928009986877, v)
        v = tl.where(i == 2, -0.5250730514526367, v)
        v = tl.where(i == 3, -0.39491748809814453, v)
        v = tl.where(i == 4, -0.28444138169288635, v)
        v = tl.where(i == 5, -0.18477343022823334, v)
        v = tl.where(i == 6, -0.09105003625154495, v)
        v = tl.where(i == 8, 0.07958029955625534, v)
        v = tl.where(i == 9, 0.16093020141124725, v)
        v = tl.where(i == 10, 0.24611230194568634, v)
        v = tl.where(i == 11, 0.33791524171829224, v)
        v = tl.where(i == 12, 0.44070982933044434, v)
        v = tl.where(i == 13, 0.5626170039176941, v)
        v = tl.where(i == 14, 0.7229568362236023, v)
        v = tl.where(i == 15, 1.0, v)
    else:
        magnitude = i & 7
        v = tl.where(magnitude == 1, 0.0052083334885537624, 0.0)
        v = tl.where(magnitude == 2, 0.6666666865348816, v)
        v = tl.where(magnitude == 3, 1.0, v)
        v = tl.where(magnitude == 4, 0.3333333432674408, v)
        v = tl.where(magnitude == 5, 0.5, v)
        v = tl.where(magnitude == 6, 0.1666666716337204, v)
        v = tl.where(magnitude == 7, 0.25, v)
        v = tl.where(i >= 8, -v, v)
    return v.to(tl.float32)


@triton.jit
def _load_words(data, left, tile: tl.constexpr, WORDS: tl.constexpr, ALIGNED: tl.constexpr):
    word = tile * WORDS + tl.arange(0, WORDS)
    n_bytes = (left + 1) // 2
    if ALIGNED:
        return tl.load(data.to(tl.pointer_type(tl.int32)) + word, mask=word * 4 < n_bytes, other=0)
    at = word * 4
    value = tl.load(data + at, mask=at < n_bytes, other=0).to(tl.int32)
    value |= tl.load(data + at + 1, mask=at + 1 < n_bytes, other=0).to(tl.int32) << 8
    value |= tl.load(data + at + 2, mask=at + 2 < n_bytes, other=0).to(tl.int32) << 16
    value |= tl.load(data + at + 3, mask=at + 3 < n_bytes, other=0).to(tl.int32) << 24
    return value


@triton.jit
def _load_scales(
    absmax,
    quantised,
    code,
    offset,
    block,
    left,
    tile: tl.constexpr,
    BLOCK: tl.constexpr,
    WORDS: tl.constexpr,
    NESTED: tl.constexpr,
):
    at = (tile * WORDS + tl.arange(0, WORDS)) * 8
    block += at // BLOCK
    if not NESTED:
        return tl.load(absmax + block, mask=at < left, other=0.0)
    level = tl.load(quantised + block, mask=at < left, other=0).to(tl.int32)
    return tl.load(code + level) * tl.load(absmax + block // 256, mask=at < left, other=0.0) + offset


@triton.jit
def _store_weights(
    out, left, column, k, room, word, scale, values,
    tile: tl.constexpr, WORDS: tl.constexpr, BESIDE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    nibble = tl.arange(0, 8)
    # Within a byte the high nibble is the earlier weight, hence the exclusive or.
    index = (word[:, None] >> (4 * (nibble ^ 1))[None, :]) & 15
    weight = tl.gather(values, tl.reshape(index, (WORDS * 8,)), 0)
    weight = tl.reshape(weight, (WORDS, 8)) * scale[:, None]
    first = (tile * WORDS + tl.arange(0, WORDS)) * 8
    at = first[:, None] + nibble[None, :]
    place = at
    if BESIDE:
        if WHOLE:
            # The eight weights of a word lie in one row.
            first += column
            place = tl.multiple_of(first + first // k * room, [8])[:, None] + nibble[None, :]
        else:
            place = at + column
            place += place // k * room
    tl.store(out + place, weight.to(out.dtype.element_ty), mask=at < left)


@triton.jit
def _fill(
    out, number, height, width, stride, matrix, scale, rows, columns, top, left, row_stride, column_stride,
    SPAN: tl.constexpr,
):  # fmt: skip
    """A program's part of the room: ``scale * matrix`` from row ``top`` and column ``left`` on, among
    zeros.
    """
    first = number.to(tl.int64) * SPAN
    row = first // width
    at = (first - row * width).to(tl.int32) + tl.arange(0, SPAN)
    column = at % width
    row += at // width
    i, j = row - top, (column - left).to(tl.int64)
    given = (i >= 0) & (i < rows) & (j >= 0) & (j < columns)
    value = tl.load(matrix + i * row_stride + j * column_stride, mask=given, other=0.0)
    value = value.to(tl.float32) * scale
    tl.store(out + row * stride + column, value.to(out.dtype.element_ty), mask=row < height)


@triton.jit
def _weights(
    data, absmax, quantised, code, offset_pointer, out, number, n, k, room,
    BLOCK: tl.constexpr, NF4: tl.constexpr, NESTED: tl.constexpr, ALIGNED: tl.constexpr,
    BESIDE: tl.constexpr, WHOLE: tl.constexpr, WORDS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """A program's part of the weights."""
    values = _codebook(NF4)
    span: tl.constexpr = WORDS * TILES * 8
    # Only a program's first weight can lie past 2^31; inside it, and for blocks of 32 or more, 32 bits do.
    first = number.to(tl.int64) * span
    left = tl.minimum(n - first, span).to(tl.int32)
    block = (first // BLOCK).to(tl.int32)
    data += first // 2
    column = 0
    if BESIDE:
        row = first // k
        column = (first - row * k).to(tl.int32)
        out += row * (k + room)
    else:
        out += first
    offset = 0.0
    if NESTED:
        offset = tl.load(offset_pointer)
    # Every load stands before the first store, so that a thread has all its words in flight at once.
    words = ()
    scales = ()
    for tile in tl.static_range(TILES):
        words = words + (_load_words(data, left, tile, WORDS, ALIGNED),)
    for tile in tl.static_range(TILES):
        scales = scales + (
            _load_scales(absmax, quantised, code, offset, block, left, tile, BLOCK, WORDS, NESTED),
        )
    for tile in tl.static_range(TILES):
        _store_weights(
            out, left, column, k, room, words[tile], scales[tile], values, tile, WORDS, BESIDE, WHOLE
        )


@triton.jit
def _dequantize_kernel(
    data, absmax, quantised, code, offset_pointer, out, programs, n, k, room,
    vacant, height, width, matrix, scale, rows, columns, top, left, row_stride, column_stride,
    BLOCK: tl.constexpr, NF4: tl.constexpr, NESTED: tl.constexpr, ALIGNED: tl.constexpr,
    BESIDE: tl.constexpr, WHOLE: tl.constexpr, FILLED: tl.constexpr,
    WORDS: tl.constexpr, TILES: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0)
    if FILLED:
        if number >= programs:
            _fill(vacant, number - programs, height, width, k + room, matrix, scale, rows, columns, top,
                  left, row_stride, column_stride, SPAN)  # fmt: skip
        else:
            _weights(data, absmax, quantised, code, offset_pointer, out, number, n, k, room,
                     BLOCK, NF4, NESTED, ALIGNED, BESIDE, WHOLE, WORDS, TILES)  # fmt: skip
    else:
        _weights(data, absmax, quantised, code, offset_pointer, out, number, n, k, room,
                 BLOCK, NF4, NESTED, ALIGNED, BESIDE, WHOLE, WORDS, TILES)  # fmt: skip


def launch(packed, out, matrix, start, scale) -> None:
    """Fill the dense ``out`` with the weights of ``packed``, and with ``scale * matrix``.

    Args:
        packed: a ``Packed4bit`` whose data is a dense uint8 vector.
        out: of the weight's shape, or with more columns, or with more rows.
        matrix: None; or as many rows as ``out``, for its further columns; or as many columns, for its further
            rows. The rest of the room is filled with zeros.
        start: how many of those columns or rows are before it.
        scale: times the matrix, a number.
    """
    octets, (n, k), absmax, blocksize, quant_type, absmax_8bit, absmax_code, absmax_offset = packed
    room = out.shape[1] - k
    vacant = out[:, k:] if room else out[n:]
    programs = triton.cdiv(n * k, _WORDS * _TILES * 8)
    filling = triton.cdiv(vacant.numel(), _SPAN)
    if programs + filling == 0:
        return
    nested = absmax_8bit is not None
    matrix = absmax.reshape(1, -1) if matrix is None else matrix
    _dequantize_kernel[(programs + filling,)](
        octets,
        absmax.contiguous(),
        absmax_8bit.contiguous() if nested else octets,
        absmax_code.contiguous() if nested else absmax,
        absmax_offset if nested else absmax,
        out,
        programs,
        n * k,
        k,
        room,
        vacant,
        *vacant.shape,
        matrix,
        scale,
        *matrix.shape,
        0 if room else start,
        start if room else 0,
        *matrix.stride(),
        BLOCK=blocksize,
        NF4=quant_type == "nf4",
        NESTED=nested,
        # The last word may be read past the weights, never past the tensor.
        ALIGNED=octets.data_ptr() % 4 == 0 and octets.numel() % 4 == 0,
        BESIDE=room > 0,
        WHOLE=k % 8 == 0 and room % 8 == 0,
        FILLED=filling > 0,
        WORDS=_WORDS,
        TILES=_TILES,
        SPAN=_SPAN,
        num_warps=_WARPS,
        # A scale of double quantisation is a product and a sum, each rounded.
        enable_fp_fusion=False,
    )
