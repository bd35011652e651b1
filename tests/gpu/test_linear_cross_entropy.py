import pytest
import torch
import torch.nn.functional as F

from rewriter.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from tests.accuracy import assert_as_accurate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

tokens, hidden, vocab = 8192, 4096, 128256  # Llama-3.1-8B's head


def head(rows: int = tokens, dtype=torch.bfloat16, *, trainable=False, width=hidden, words=vocab):
    x = torch.randn(rows, width, device="cuda", dtype=dtype, requires_grad=True)
    weight = torch.randn(words, width, device="cuda", dtype=dtype).mul_(width**-0.5).requires_grad_(trainable)
    return x, weight, torch.randint(words, (rows,), device="cuda")


def test_the_head_of_an_8b_model_takes_half_a_gigabyte_beside_its_gradient():
    x, weight, target = head()
    linear_cross_entropy(x, weight, None, target).backward()
    x.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = linear_cross_entropy(x, weight, None, target)
    extra = torch.cuda.max_memory_allocated() - before - x.nbytes
    assert loss.requires_grad
    assert extra <= 5e8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("words", [vocab, 50257])
def test_a_trainable_head_over_several_chunks_is_as_accurate_as_eager(dtype, words):
    x, weight, target = head(5000, dtype, trainable=True, width=256, words=words)
    target[::3] = -100

    def gradients(function, x, weight, **options):
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        function(x, weight, None, target, reduction="sum", **options).backward()
        return x.grad, weight.grad

    ours, eager = (
        gradients(linear_cross_entropy, x, weight),
        gradients(linear_cross_entropy_reference, x, weight),
    )
    truth = gradients(linear_cross_entropy_reference, x.double(), weight.double(), loss_dtype=torch.float64)
    for name, a, b, c in zip(("dx", "dweight"), ours, eager, truth, strict=True):
        assert_as_accurate(a, b, c, name=name)


def test_a_chunk_of_more_than_2_31_logits():
    from rewriter.kernels.linear_cross_entropy_triton import chunk_loss

    rows, words = 2**31 // 131072 + 64, 131072
    logits = torch.randn(rows, words, device="cuda", dtype=torch.bfloat16)
    target = torch.randint(words, (rows,), device="cuda")
    last = logits[-64:].float().requires_grad_()
    expected = F.cross_entropy(last, target[-64:], reduction="none")
    expected.sum().backward()
    losses = torch.empty(rows, device="cuda")
    options = {"scale": 1.0, "softcap": 0.0, "ignore_index": -100, "label_smoothing": 0.0}
    chunk_loss(logits, target, torch.ones((), device="cuda"), losses, gradient=True, **options)
    torch.testing.assert_close(losses[-64:], expected.detach())
    torch.testing.assert_close(logits[-64:], last.grad.bfloat16(), rtol=1e-2, atol=0)


@pytest.mark.parametrize("size", [1.0, 30.0, 1e4])
def test_losses_of_large_logits_keep_their_digits(size):
    from rewriter.kernels.linear_cross_entropy_triton import chunk_loss

    logits = torch.randn(64, 50257, device="cuda") * size
    target = torch.randint(50257, (64,), device="cuda")
    truth, eager = (F.cross_entropy(z, target, reduction="none") for z in (logits.double(), logits))
    losses = torch.empty(64, device="cuda")
    options = {"scale": 1.0, "softcap": 0.0, "ignore_index": -100, "label_smoothing": 0.0}
    chunk_loss(logits, target, torch.ones((), device="cuda"), losses, gradient=True, **options)
    assert_as_accurate(losses, eager, truth)


def test_a_cuda_graph_captures_it_and_replays_with_other_labels():
    x, weight, target = head(1024, width=512)
    target[::2] = -100
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        linear_cross_entropy(x, weight, None, target)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        loss = linear_cross_entropy(x, weight, None, target)
    target.random_(vocab)
    target[::5] = -100
    graph.replay()
    with torch.no_grad():
        torch.testing.assert_close(
            loss, linear_cross_entropy_reference(x, weight, None, target), rtol=1e-4, atol=0
        )
