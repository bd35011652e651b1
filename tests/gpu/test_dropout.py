"""Dropout by position at sizes of real models, past 2^31 elements, and in a recording."""

import pytest
import torch

from rewriter.kernels.dropout import dropout_seeds, dropped, dropped_reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

device = torch.device("cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("channels", [14336, 8193, 4096])
def test_widths_of_real_models_have_the_bits_of_plain_pytorch_and_of_a_cpu(channels, dtype):
    x = torch.randn(2, 65, channels, device=device).to(dtype).requires_grad_()
    numbers, (seed,) = torch.arange(65, device=device), dropout_seeds(1, device)
    ours = dropped(x, numbers, seed, 0.1)
    assert torch.equal(ours, dropped_reference(x, numbers, seed, 0.1))
    assert torch.equal(ours.cpu(), dropped(x.cpu(), numbers.cpu(), seed.cpu(), 0.1))
    grad = torch.randn_like(x)
    (gradient,) = torch.autograd.grad(ours, x, grad)
    assert torch.equal(gradient, dropped(grad, numbers, seed, 0.1))


def test_past_two_to_the_31_elements():
    x, (seed,) = torch.ones(3, 50_000, 14336, device=device, dtype=torch.bfloat16), dropout_seeds(1, device)
    assert x.numel() > 2**31
    numbers = torch.arange(50_000, device=device)
    ours = dropped(x, numbers, seed, 0.25)
    last = slice(49_936, 50_000)
    assert torch.equal(ours[:, last], dropped_reference(x[:, last], numbers[last], seed, 0.25))


def test_a_recording_draws_other_seeds_at_each_replay():
    torch.cuda.synchronize()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=stream):
        seeds = dropout_seeds(3, device)
    drawn = []
    for _ in range(3):
        graph.replay()
        drawn.append(seeds.clone())
    assert torch.stack(drawn).unique().numel() == 18
