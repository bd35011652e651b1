"""A second process: its hashes are the first one's, and PyTorch's caches have what that one compiled."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn
from torch._dynamo.utils import counters

from rewriter.regions.signature import signature
from tests.regions.chains import Chain
from tests.regions.outlined import outlined

CHAIN = Chain(("mixed",), ("attention", "dropout", "narrow", "maximum"), 3, ("tuple",))


class Layer(nn.Module):
    """Leaves autocast for a while, as rotary embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            inner = self.linear(x.float())
        return x + torch.tanh(inner)


def cached() -> dict[str, int]:
    """AOTAutograd's cache on regions with switches of autocast, compiled by Inductor: what it counts."""
    model, x = nn.Sequential(*(Layer() for _ in range(3))), torch.randn(2, 8)
    torch._dynamo.reset()
    counters.clear()
    with torch.autocast("cpu", torch.bfloat16):
        torch.compile(model, backend="rewriter")(x).sum().backward()
    return dict(counters["aot_autograd"])


def signatures() -> list[str]:
    """Those of a program with constants, dtypes, modes and functions of ours."""
    program = outlined(CHAIN, *CHAIN.inputs()).program
    assert program is not None
    return [signature(region.module) for region in program.regions]


def test_another_process_with_another_seed_for_hashes_agrees_and_compiles_nothing_again():
    cached()
    code = "from tests.regions.test_cache import *; print(json.dumps([signatures(), cached()]))"
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    theirs, found = json.loads(run.stdout)
    assert theirs == signatures()
    assert found["autograd_cache_hit"] == found["total"] > 1
    assert not {"autograd_cache_bypass", "autograd_cache_miss"} & found.keys()
