"""``dequantize_4bit`` gives bitsandbytes' weights bit for bit."""

import pytest
import torch

from rewriter.kernels.dequantize import (
    Packed4bit,
    dequantize_4bit,
    dequantize_4bit_extended,
    dequantize_4bit_extended_reference,
    dequantize_4bit_reference,
)

bitsandbytes = pytest.importorskip("bitsandbytes.functional")

device = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(autouse=True)
def _bitsandbytes_uncompiled():
    """Its generic path compiles itself anew for every shape."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def quantise(weight, quant_type="nf4", nested=True, blocksize=64, storage=torch.uint8):
    """bitsandbytes' packed form of ``weight``, with its state."""
    data, state = bitsandbytes.quantize_4bit(
        weight, quant_type=quant_type, compress_statistics=nested, blocksize=blocksize, quant_storage=storage
    )
    second = (state.absmax, state.state2.code, state.offset) if nested else (None, None, None)
    absmax = state.state2.absmax if nested else state.absmax
    return Packed4bit(data, tuple(weight.shape), absmax, blocksize, quant_type, *second), data, state


def kernel(packed, dtype):
    return torch.ops.rewriter.dequantize_4bit(*packed, dtype)


def assert_same_bits(ours, theirs):
    if device == "cpu" and ours.dtype == torch.bfloat16:  # Triton's interpreter truncates to bf16
        unit = torch.finfo(torch.bfloat16).eps * theirs.abs()
        assert ((ours.float() - theirs.float()).abs() <= unit).all()
        return
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


# bitsandbytes' CPU kernel is wrong where a block ends inside a row of even length, and there only: odd rows
# take its generic path.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize(
    "shape, blocksize", [((64, 96), 32), ((96, 256), 64), ((33, 65), 64), ((3, 7), 64), ((5, 4097), 4096)]
)
def test_weights_are_bitsandbytes_own(shape, blocksize, quant_type, nested, dtype):
    packed, data, state = quantise(torch.randn(shape, device=device), quant_type, nested, blocksize)
    state.dtype = dtype
    theirs = bitsandbytes.dequantize_4bit(data, state)
    torch.testing.assert_close(dequantize_4bit_reference(packed, dtype), theirs, rtol=0, atol=0)
    assert_same_bits(kernel(packed, dtype), theirs)


def test_blocks_may_cross_rows_of_even_length():
    weight = torch.randn(64, 96, device=device)
    packed, _, _ = quantise(weight, nested=False)
    flat = packed._replace(shape=(1, 64 * 96))
    theirs = dequantize_4bit_reference(flat, torch.float32).view(64, 96)
    torch.testing.assert_close(kernel(packed, torch.float32), theirs, rtol=0, atol=0)
    assert (theirs - weight).abs().max() < 0.2 * weight.abs().max()


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_other_storage_dtypes_hold_the_same_bytes(storage):
    weight = torch.randn(32, 64, device=device)
    packed, _, _ = quantise(weight)
    other, _, _ = quantise(weight, storage=storage)
    assert other.data.dtype == storage
    torch.testing.assert_close(kernel(other, torch.float32), kernel(packed, torch.float32), rtol=0, atol=0)
    reference = dequantize_4bit_reference(other, torch.float32)
    torch.testing.assert_close(reference, kernel(packed, torch.float32), rtol=0, atol=0)


@pytest.mark.parametrize("offset", [1, 2, 4])
def test_packed_data_may_start_at_any_byte(offset):
    packed, _, _ = quantise(torch.randn(24, 31, device=device))
    padded = torch.zeros(packed.data.numel() + offset, dtype=torch.uint8, device=device)
    padded[offset:] = packed.data.view(-1)
    moved = packed._replace(data=padded[offset:])
    torch.testing.assert_close(kernel(moved, torch.float32), kernel(packed, torch.float32), rtol=0, atol=0)


def test_transposed_packed_data_is_read_in_memory_order():
    packed, _, _ = quantise(torch.randn(16, 64, device=device))
    turned = packed._replace(data=packed.data.t())
    torch.testing.assert_close(kernel(turned, torch.float16), kernel(packed, torch.float16), rtol=0, atol=0)


def test_infinite_and_nan_scales_spread_as_in_the_reference():
    packed, _, _ = quantise(torch.randn(4, 128, device=device), nested=False)
    packed.absmax[1], packed.absmax[2] = torch.inf, torch.nan
    ours, reference = kernel(packed, torch.float32), dequantize_4bit_reference(packed, torch.float32)
    torch.testing.assert_close(ours, reference, rtol=0, atol=0, equal_nan=True)


def test_an_empty_weight_is_empty():
    packed = Packed4bit(
        torch.empty(0, 1, dtype=torch.uint8, device=device), (0, 8), torch.empty(0, device=device), 64, "nf4"
    )
    assert kernel(packed, torch.bfloat16).shape == (0, 8)
    assert dequantize_4bit(packed, torch.bfloat16).shape == (0, 8)


def test_op_passes_pytorch_checks():
    packed, _, _ = quantise(torch.randn(8, 64, device=device))
    torch.library.opcheck(torch.ops.rewriter.dequantize_4bit.default, (*packed, torch.float32))


def extended(packed, *arguments, scale=1.0):
    return torch.ops.rewriter.dequantize_4bit_extended(*packed, *arguments, scale, 0)


# A row of whole words, rows that words cross, more than one program's weights, and more than its room.
@pytest.mark.parametrize(
    "shape, r, start, room",
    [
        ((33, 64), 8, 0, 64),
        ((33, 64), 3, 2, 5),
        ((9, 31), 5, 7, 16),
        ((70, 260), 16, 16, 32),
        ((3, 4104), 5, 7, 16),
        ((70, 260), 3, 0, 3),
    ],
)
@pytest.mark.parametrize("dim", [1, 0], ids=["beside", "beneath"])
def test_room_beside_or_beneath_a_weight_holds_a_matrix_among_zeros(dim, shape, r, start, room):
    packed, _, _ = quantise(torch.randn(shape, device=device))
    across = shape[1 - dim]
    matrix = torch.randn((across, r) if dim else (r, across), device=device)
    ours = extended(packed, torch.float16, matrix, dim, room, start)
    reference = dequantize_4bit_extended_reference(packed, torch.float16, matrix, dim, room, start)
    torch.testing.assert_close(ours, reference, rtol=0, atol=0)
    again = dequantize_4bit_extended_reference(packed, torch.float16, matrix, dim, room, start, use=1)
    torch.testing.assert_close(ours, again, rtol=0, atol=0)
    weight, filled = ours.split((shape[dim], room), dim)
    torch.testing.assert_close(weight, kernel(packed, torch.float16), rtol=0, atol=0)
    zeros = torch.zeros_like(filled)
    zeros.narrow(dim, start, r).copy_(matrix)
    torch.testing.assert_close(filled, zeros, rtol=0, atol=0)


def _poisoned(made):
    return made.fill_(torch.nan) if made.is_floating_point() else made


def test_room_is_written_where_memory_held_nan(monkeypatch):
    packed, _, _ = quantise(torch.randn(12, 64, device=device))
    make = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda x, *a, **k: _poisoned(make(x, *a, **k)))
    columns, rows = torch.ones(12, 3, device=device), torch.ones(3, 64, device=device)
    assert extended(packed, torch.float32, columns, 1, 64, 4).isfinite().all()
    assert extended(packed, torch.float32, rows, 0, 64, 4).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dim", [1, 0], ids=["beside", "beneath"])
def test_a_matrix_may_be_transposed_and_of_the_results_dtype(dim, dtype):
    packed, _, _ = quantise(torch.randn(24, 40, device=device))
    dense = torch.randn((24, 7) if dim else (7, 40), device=device).to(dtype)
    turned = dense.t().contiguous().t()
    reference = dequantize_4bit_extended_reference(packed, dtype, dense, dim, 8, 1)
    assert_same_bits(extended(packed, dtype, turned, dim, 8, 1), reference)


@pytest.mark.parametrize("given", [torch.float16, torch.float32])
def test_a_scaled_matrix_is_rounded_once(given):
    packed, _, _ = quantise(torch.randn(24, 40, device=device))
    columns = torch.randn(24, 7, device=device).to(given)
    ours = extended(packed, torch.float16, columns, 1, 8, 1, scale=2.7)
    torch.testing.assert_close(ours[:, 41:48], (columns.float() * 2.7).half(), rtol=0, atol=0)
    reference = dequantize_4bit_extended_reference(packed, torch.float16, columns, 1, 8, 1, 2.7)
    torch.testing.assert_close(ours, reference, rtol=0, atol=0)


def test_the_op_with_room_passes_pytorch_checks():
    packed, _, _ = quantise(torch.randn(8, 64, device=device))
    columns, rows = torch.randn(8, 3, device=device), torch.randn(3, 64, device=device)
    op = torch.ops.rewriter.dequantize_4bit_extended.default
    torch.library.opcheck(op, (*packed, torch.float32, columns, 1, 8, 1, 1.5, 0))
    torch.library.opcheck(op, (*packed, torch.float32, rows, 0, 8, 0, 1.0, 1))


def test_what_does_not_fit_its_room_is_named():
    packed, _, _ = quantise(torch.randn(8, 64, device=device))
    columns, rows = torch.randn(8, 3, device=device), torch.randn(3, 64, device=device)
    with pytest.raises(ValueError, match="3 columns from 6 on do not fit a room of 8"):
        dequantize_4bit_extended(packed, torch.float32, columns, 1, 8, 6)
    with pytest.raises(ValueError, match="the weight has 8 rows"):
        dequantize_4bit_extended(packed, torch.float32, columns[:7], 1, 8)
    with pytest.raises(ValueError, match="3 rows from 0 on do not fit a room of 2"):
        dequantize_4bit_extended(packed, torch.float32, rows, 0, 2)
    with pytest.raises(ValueError, match="the weight has 64 columns"):
        dequantize_4bit_extended(packed, torch.float32, rows[:, 1:], 0, 8)
    with pytest.raises(ValueError, match="dim 2"):
        dequantize_4bit_extended(packed, torch.float32, rows, 2, 8)


@pytest.mark.parametrize(
    "change, error, says",
    [
        ({"blocksize": 48}, ValueError, "block size 48"),
        ({"quant_type": "int4"}, ValueError, "'int4'"),
        ({"shape": (9, 64)}, ValueError, "512 packed weights are too few"),
        ({"absmax_code": None}, ValueError, "without absmax_code"),
        ({"absmax_8bit": torch.zeros(3, dtype=torch.uint8)}, ValueError, "3 scales are too few for 8"),
    ],
)
def test_malformed_weights_are_named(change, error, says):
    packed, _, _ = quantise(torch.randn(8, 64))
    with pytest.raises(error, match=says):
        dequantize_4bit(packed._replace(**change), torch.float32)


def test_double_precision_is_refused():
    packed, _, _ = quantise(torch.randn(8, 64))
    with pytest.raises(TypeError, match="float64"):
        dequantize_4bit(packed, torch.float64)
