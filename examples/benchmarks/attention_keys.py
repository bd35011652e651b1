"""What keys up to whole blocks spare of causal attention: cuDNN's forward, and backward by groups.

    python examples/benchmarks/attention_keys.py                 # 50,000 tokens, 32 heads of 128, 8 of keys
    python examples/benchmarks/attention_keys.py --tokens 20000

Both forms take turns, so that the clock of the card is the same; copies of keys and values count. Writes
``results/attention_keys.json``: milliseconds of each run. Needs a GPU whose attention cuDNN computes.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from end_to_end import machine, versions

from rewriter.kernels import attention_key_blocks
from rewriter.kernels.attention_groups import by_groups
from rewriter.kernels.attention_key_blocks import missing_keys, with_keys

RESULTS = Path(__file__).parent / "results"
HEADS, GROUPS, DIM = 32, 8, 128

_aten = torch.ops.aten
_backward = by_groups[_aten._scaled_dot_product_cudnn_attention_backward.default]


def forms(tokens: int) -> dict[str, Callable]:
    """Forward and backward, as it is and with whole blocks."""
    shapes = [(1, tokens, heads, DIM) for heads in (HEADS, GROUPS, GROUPS, HEADS)]
    made = [torch.randn(s, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for s in shapes]
    (q, k, v, grad), scale = made, DIM**-0.5

    def forward(missing: int) -> tuple:
        keys, values = with_keys(k, missing), with_keys(v, missing)
        return _aten._scaled_dot_product_cudnn_attention(
            q, keys, values, None, True, 0.0, True, False, scale=scale
        )

    out, logsumexp, *_ = forward(0)
    unused = torch.empty(2, dtype=torch.int64, device="cuda")
    given = grad, q, k, v, out, logsumexp, *unused, None, None, None, tokens, tokens, 0.0, True

    def backward(shortest: int) -> tuple:
        before, attention_key_blocks._LONG = attention_key_blocks._LONG, shortest
        try:
            return _backward(*given, scale=scale)
        finally:
            attention_key_blocks._LONG = before

    missing = missing_keys(q, k, True)
    return {
        "forward": lambda: forward(0),
        "forward, whole blocks": lambda: forward(missing),
        "backward": lambda: backward(tokens + 1),
        "backward, whole blocks": lambda: backward(0),
    }


def timed(run: Callable) -> float:
    """Milliseconds."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=50_000)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    runs = forms(arguments.tokens)
    for run in runs.values():
        run()
    ms: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(arguments.turns):
        for name, run in runs.items():
            ms[name].append(timed(run))
    for name, found in ms.items():
        print(f"{name:24s} {statistics.median(found):7.2f} ms")
    told = {**machine("cuda"), "versions": versions(), "tokens": arguments.tokens, "ms": ms}
    arguments.results.mkdir(parents=True, exist_ok=True)
    (arguments.results / "attention_keys.json").write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
