"""``dequantize_4bit`` at the sizes of real models: exact past 2^31 weights, and bitsandbytes' own."""

import pytest
import torch

from rewriter.kernels.dequantize import Packed4bit, dequantize_4bit, dequantize_4bit_reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def random_weight(n, k, nested, blocksize=64):
    blocks = n * k // blocksize
    data = torch.randint(256, (n * k // 2, 1), dtype=torch.uint8, device="cuda")
    if not nested:
        return Packed4bit(data, (n, k), torch.rand(blocks, device="cuda"), blocksize, "nf4")
    quantised = torch.randint(256, (blocks,), dtype=torch.uint8, device="cuda")
    second = torch.rand(-(-blocks // 256), device="cuda")
    code, offset = torch.linspace(-1, 1, 256, device="cuda"), torch.tensor(0.7, device="cuda")
    return Packed4bit(data, (n, k), second, blocksize, "nf4", quantised, code, offset)


def rows(packed, first, last):
    """Rows ``first`` to ``last``, which begin at a multiple of 256 blocks, as a weight of its own."""
    k = packed.shape[1]
    start, stop = first * k, last * k
    block = slice(start // packed.blocksize, stop // packed.blocksize)
    part = packed._replace(data=packed.data[start // 2 : stop // 2], shape=(last - first, k))
    if packed.absmax_8bit is None:
        return part._replace(absmax=packed.absmax[block])
    return part._replace(absmax_8bit=packed.absmax_8bit[block], absmax=packed.absmax[block.start // 256 :])


@pytest.mark.parametrize("nested", [False, True])
def test_weights_past_two_to_the_31st_are_exact(nested):
    n, k = 524_288 + 512, 4096
    packed = random_weight(n, k, nested)
    out = dequantize_4bit(packed, torch.bfloat16)
    assert out.numel() > 2**31
    for first in (0, 262_144, 524_288):
        last = first + 512
        expected = dequantize_4bit_reference(rows(packed, first, last), torch.bfloat16)
        torch.testing.assert_close(out[first:last], expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(14336, 4096), (4096, 14336), (1024, 4096)])
def test_a_models_weights_are_bitsandbytes_own(shape, dtype):
    bitsandbytes = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    data, state = bitsandbytes.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    state.dtype = dtype
    packed = Packed4bit(
        data, shape, state.state2.absmax, 64, "nf4", state.absmax, state.state2.code, state.offset
    )
    expected = bitsandbytes.dequantize_4bit(data, state)
    torch.testing.assert_close(dequantize_4bit(packed, dtype), expected, rtol=0, atol=0)
