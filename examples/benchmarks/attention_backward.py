"""Long causal attention by cuDNN: whole blocks of keys, and heads at once or by groups.

    python examples/benchmarks/attention_backward.py                 # 50,000, 32,768 and 20,000 tokens
    python examples/benchmarks/attention_backward.py --tokens 100000

32 heads of 128, 8 of keys. All forms take turns in random order, so that the clock of the card is the same;
copies of keys and values count. Writes ``results/attention_backward.json``: milliseconds of each run. Needs a
GPU whose attention cuDNN computes.
"""

import argparse
import json
import random
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from end_to_end import machine, versions

from rewriter.kernels import attention_key_blocks
from rewriter.kernels.attention_groups import at_once, by_groups
from rewriter.kernels.attention_key_blocks import missing_keys, with_keys

RESULTS = Path(__file__).parent / "results"
HEADS, GROUPS, DIM = 32, 8, 128

_aten = torch.ops.aten
_grouped = by_groups[_aten._scaled_dot_product_cudnn_attention_backward.default]


def forms(tokens: int) -> dict[str, Callable]:
    """Forward and backward, as they are and with whole blocks."""
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

    def backward(op: Callable, shortest: int) -> tuple:
        before, attention_key_blocks._LONG = attention_key_blocks._LONG, shortest
        try:
            return op(*given, scale=scale)
        finally:
            attention_key_blocks._LONG = before

    missing = missing_keys(q, k, True)
    return {
        "forward": lambda: forward(0),
        "forward, whole blocks": lambda: forward(missing),
        "backward by groups": lambda: backward(_grouped, tokens + 1),
        "backward by groups, whole blocks": lambda: backward(_grouped, 0),
        "backward at once": lambda: backward(at_once[_grouped], tokens + 1),
        "backward at once, whole blocks": lambda: backward(at_once[_grouped], 0),
    }


def timed(run: Callable) -> float:
    """Milliseconds."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def measured(tokens: int, turns: int) -> dict[str, list[float]]:
    runs = forms(tokens)
    for run in runs.values():
        run()
    ms: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    for _ in range(turns):
        random.shuffle(order)
        for name in order:
            ms[name].append(timed(runs[name]))
    print(f"{tokens:,} tokens")
    for name, found in ms.items():
        print(f"  {name:34s} {statistics.median(found):7.2f} ms")
    return ms


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[50_000, 32_768, 20_000])
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    ms = {str(tokens): measured(tokens, arguments.turns) for tokens in arguments.tokens}
    told = {**machine("cuda"), "versions": versions(), "ms": ms}
    arguments.results.mkdir(parents=True, exist_ok=True)
    (arguments.results / "attention_backward.json").write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
