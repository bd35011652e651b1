"""Dropout by position: the Triton kernel against plain PyTorch, and both against what dropout is."""

import math

import pytest
import torch

from rewriter.kernels.dropout import dropout_seeds, dropped, dropped_reference, scale, threshold
from rewriter.kernels.dropout_triton import BLOCK, launch

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def tokens(count, first=0):
    return torch.arange(first, first + count, device=device)


def by_kernel(x, numbers, seed, p):
    """What the op does on a GPU."""
    out = torch.empty_like(x)
    launch(x, numbers, seed, out, threshold(p), scale(p))
    return out


def assert_same(ours, reference):
    """Bit for bit; Triton's interpreter does not round to bf16 as a GPU does."""
    rounds = ours.dtype == torch.bfloat16 and not ours.is_cuda
    torch.testing.assert_close(ours, reference, rtol=2**-7 if rounds else 0.0, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(2, 3, 33), (1, 3, 1)])
def test_the_kernel_gives_the_bits_of_plain_pytorch(shape, dtype):
    x = torch.randn(shape, device=device).to(dtype)
    for p, seed in zip((0.3, 0.9), dropout_seeds(2, device), strict=True):
        # Numbers of 32 bits, some of which an int32 would take for negative.
        numbers = tokens(shape[1], first=2**31 - 2)
        assert_same(by_kernel(x, numbers, seed, p), dropped_reference(x, numbers, seed, p))


def test_more_channels_than_a_program_takes_are_several_programs():
    x, (seed,) = torch.randn(1, 2, BLOCK + 6, device=device), dropout_seeds(1, device)
    assert torch.equal(by_kernel(x, tokens(2), seed, 0.5), dropped_reference(x, tokens(2), seed, 0.5))


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_nothing_is_dropped_of_nothing(shape):
    x, (seed,) = torch.randn(shape, device=device), dropout_seeds(1, device)
    for function in (dropped, by_kernel):
        assert function(x, tokens(shape[1]), seed, 0.5).shape == shape


def test_the_random_bits_are_those_that_philoxs_authors_publish():
    """Of a key and a counter of zeros (Random123, ``kat_vectors``)."""
    zeros, ones = torch.zeros(2, dtype=torch.int64, device=device), torch.ones(1, 1, 4, device=device)
    for channel, bits in enumerate((0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)):
        for least in (bits, bits + 1):
            out = torch.empty_like(ones)
            launch(ones, zeros[:1], zeros, out, least, 1.0)
            assert (out[0, 0, channel] != 0) == (least == bits)


@pytest.mark.parametrize("function", [dropped, by_kernel])
def test_a_tile_drops_what_the_whole_drops(function):
    x, (seed,) = torch.randn(2, 11, 6, device=device), dropout_seeds(1, device)
    whole = function(x, tokens(11), seed, 0.5)
    tiles = [function(x[:, a : a + 4], tokens(11)[a : a + 4], seed, 0.5) for a in (0, 4, 8)]
    assert torch.equal(torch.cat(tiles, 1), whole)


@pytest.mark.parametrize("function", [dropped, by_kernel])
def test_any_strides_are_taken(function):
    (seed,) = dropout_seeds(1, device)
    expected = torch.randn(3, 5, 8, device=device)
    whole = function(expected, tokens(5), seed, 0.5)
    for x in (expected.transpose(0, 1).contiguous().transpose(0, 1), expected.mT.contiguous().mT):
        assert torch.equal(function(x, tokens(5), seed, 0.5), whole)
    wide, every_second = expected.repeat_interleave(2, 2)[..., ::2], tokens(5).repeat_interleave(2)[::2]
    assert torch.equal(function(wide, every_second, seed, 0.5), whole)
    one = torch.ones((), device=device).expand(3, 5, 8)
    assert torch.equal(function(one, tokens(5), seed, 0.5) != 0, whole != 0)


def test_the_result_has_the_memory_order_of_the_input():
    (seed,) = dropout_seeds(1, device)
    x = torch.randn(5, 3, 8, device=device).transpose(0, 1)
    assert dropped(x, tokens(5), seed, 0.5).stride() == x.stride()


def test_the_gradient_is_dropped_where_the_input_was():
    (seed,) = dropout_seeds(1, device)
    x = torch.randn(2, 7, 9, device=device, dtype=torch.float64, requires_grad=True)
    y = dropped(x, tokens(7), seed, 0.3)
    kept = y.detach() != 0
    torch.testing.assert_close(y.detach(), x.detach() * kept / 0.7, rtol=1e-15, atol=0.0)
    grad = torch.randn_like(x)
    (ours,) = torch.autograd.grad(y, x, grad)
    torch.testing.assert_close(ours, grad * kept / 0.7, rtol=1e-15, atol=0.0)
    assert torch.autograd.gradcheck(lambda x: dropped(x, tokens(7), seed, 0.3), (x,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_dtype_drops_the_same_and_rounds_once(dtype):
    (seed,) = dropout_seeds(1, device)
    x = torch.randn(2, 7, 9, device=device).to(dtype)
    ours, truth = (dropped(value, tokens(7), seed, 0.3) for value in (x, x.double()))
    assert ours.dtype == dtype and torch.equal(ours == 0, truth == 0)
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(ours.double(), truth, rtol=unit / 2 + 2.0**-24, atol=0.0)


@pytest.mark.parametrize("p", [0.01, 0.5, 0.95])
def test_a_share_of_p_is_dropped_along_every_dimension(p):
    shape = 16, 64, 48
    x, (seed,) = torch.ones(shape, device=device), dropout_seeds(1, device)
    kept = (dropped(x, tokens(shape[1]), seed, p) != 0).double()
    for dim in range(3):
        others = [d for d in range(3) if d != dim]
        count = kept.numel() // shape[dim]
        # Of at most 64 means: one beyond five standard deviations is drawn in 27,000 tests.
        assert (kept.mean(others) - (1 - p)).abs().max() < 5 * math.sqrt(p * (1 - p) / count)


def test_neighbours_and_seeds_have_nothing_to_do_with_each_other():
    x = torch.ones(16, 64, 48, device=device)
    first, second = (dropped(x, tokens(64), seed, 0.5) - 1.0 for seed in dropout_seeds(2, device))
    pairs = [(first, second), *((first, first.roll(1, dim)) for dim in range(3))]
    for a, b in pairs:
        assert (a * b).mean().abs() < 5 / math.sqrt(x.numel())


@pytest.mark.filterwarnings("ignore:invalid value")
def test_what_is_not_finite_comes_through_as_in_eager():
    x, (seed,) = torch.full((1, 8, 8), math.inf, device=device), dropout_seeds(1, device)
    for function in (dropped, by_kernel):
        y = function(x, tokens(8), seed, 0.5)
        assert (y.isnan() | y.isinf()).all() and y.isnan().any() and y.isinf().any()


def test_seeds_are_drawn_from_the_default_generator():
    torch.manual_seed(3)
    first, other = dropout_seeds(4, device), dropout_seeds(4, device)
    torch.manual_seed(3)
    assert torch.equal(dropout_seeds(4, device), first)
    assert torch.cat([first, other]).unique().numel() == 16
    assert torch.Tag.nondeterministic_seeded in torch.ops.rewriter.dropout_seeds.default.tags


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"x": torch.ones(3, 4)}, r"it takes floats of \(batch, tokens, channels\)"),
        ({"x": torch.ones(2, 3, 4, dtype=torch.int64)}, "x is torch.int64"),
        ({"tokens": torch.arange(4)}, r"token numbers of \(4,\)"),
        ({"seed": torch.tensor(3)}, r"a seed of \(\)"),
        ({"p": 1.0}, "the probability is 1.0"),
    ],
)
def test_what_it_does_not_take_is_named(given, reason):
    right = {"x": torch.ones(2, 3, 4), "tokens": torch.arange(3), "seed": torch.zeros(2).long(), "p": 0.5}
    with pytest.raises(ValueError, match=reason):
        dropped(**{**right, **given})
