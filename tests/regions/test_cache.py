"""AOTAutograd's cache holds regions with switches of autocast in them."""

import torch
from torch import nn
from torch._dynamo.utils import counters


class Layer(nn.Module):
    """Leaves autocast for a while, as rotary embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            inner = self.linear(x.float())
        return x + torch.tanh(inner)


def test_the_second_compilation_of_regions_with_autocast_hits_the_cache():
    model, x = nn.Sequential(*(Layer() for _ in range(3))), torch.randn(2, 8)
    for _ in range(2):
        torch._dynamo.reset()
        counters.clear()
        with torch.autocast("cpu", torch.bfloat16):
            torch.compile(model, backend="rewriter")(x).sum().backward()
    found = counters["aot_autograd"]
    assert found["autograd_cache_hit"] == found["total"] > 1
    assert not found["autograd_cache_bypass"] and not found["autograd_cache_miss"]
