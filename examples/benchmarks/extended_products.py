"""Where an adapter in the base's own product pays: plain products of 8B's widths, in each form.

    python examples/benchmarks/extended_products.py          # some 10 s on a GPU; --tokens 32768 for more
    python examples/benchmarks/extended_products.py --tiny   # a dry run on a CPU

For the reasons and bounds see ``rewriter/kernels/extended_product.py``, whose forms these are, beside
``add_product.py``'s. Weights are in 16 bits here: dequantising costs all forms the same. Writes
``results/extended_products_<tokens>.json``.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from end_to_end import machine, versions
from timing import copies, median_seconds
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
RANK, ROOM, ROUNDS = 32, 64, 3
Form = Callable[..., Mapping[str, Callable[[], object]]]


def forward(x: Tensor, weight: Tensor, wide: Tensor, down: Tensor, b: Tensor, columns: Tensor, *_: Tensor):
    """Of one projection: its product alone, its update added to it, it added to its update, one for both."""
    return {
        "the product alone": lambda: x @ weight.t(),
        "update added": lambda: (x @ weight.t()).addmm_(down, b.t()),
        "added to the update": lambda: (down @ b.t()).addmm_(x, weight.t()),
        "in one product": lambda: torch.cat((x, columns), 1) @ wide.t(),
    }


def backward(dy: Tensor, weight: Tensor, wide: Tensor, v: Tensor, a: Tensor, columns: Tensor, *_: Tensor):
    """Of a projection that alone reads its input: the adapter's gradient of that, likewise."""
    return {
        "the product alone": lambda: dy @ weight,
        "update added": lambda: (dy @ weight).addmm_(v, a),
        "added to the update": lambda: (v @ a).addmm_(dy, weight),
        "in one product": lambda: torch.cat((dy, columns), 1) @ wide,
    }


def read_beside(dy: Tensor, weight: Tensor, wide: Tensor, b: Tensor, *_: Tensor):
    """A gradient read once more for B, and ``dy B`` beside the gradient of the input."""
    return {
        "dy W and dy B": lambda: (dy @ weight, dy @ b),
        "dy [W | B]": lambda: dy @ wide,
    }


def cases(tokens: int, hidden: int, inner: int) -> dict[str, tuple[Form, Callable[[], list[Tensor]]]]:
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def random(*sizes: tuple[int, int]) -> Callable[[], list[Tensor]]:
        return lambda: [torch.randn(size, device=device, dtype=torch.bfloat16) for size in sizes]

    def wide(n: int, k: int) -> Callable[[], list[Tensor]]:
        return random((tokens, k), (n, k), (n, k + ROOM), (tokens, RANK), (n, RANK), (tokens, ROOM))

    def deep(n: int, k: int) -> Callable[[], list[Tensor]]:
        return random((tokens, n), (n, k), (n + ROOM, k), (tokens, RANK), (RANK, k), (tokens, ROOM))

    def beside(n: int, k: int) -> Callable[[], list[Tensor]]:
        return random((tokens, n), (n, k), (n, k + ROOM), (n, RANK))

    return {
        "gate, forward": (forward, wide(inner, hidden)),
        "o, forward": (forward, wide(hidden, hidden)),
        "down, forward": (forward, wide(hidden, inner)),
        "down, backward": (backward, deep(hidden, inner)),
        "o, backward": (backward, deep(hidden, hidden)),
        "k, forward": (forward, wide(hidden // 4, hidden)),
        "k, backward": (backward, deep(hidden // 4, hidden)),
        "gate, backward": (read_beside, beside(inner, hidden)),
        "q, backward": (read_beside, beside(hidden, hidden)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--tiny", action="store_true", help="small matrices, to try the script on a CPU")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokens, hidden, inner = (64, 64, 160) if arguments.tiny else (arguments.tokens, 4096, 14336)
    result: dict = {**machine(device.type), "versions": versions(), "tokens": tokens, "microseconds": {}}
    for name, (form, make) in cases(tokens, hidden, inner).items():
        calls = [form(*operands) for operands in copies(make, device)]
        # In turn: a card at its power limit runs one form after another slower.
        rounds = [
            {way: median_seconds([each[way] for each in calls], device) for way in calls[0]}
            for _ in range(ROUNDS)
        ]
        times = {way: round(1e6 * statistics.median(r[way] for r in rounds), 1) for way in calls[0]}
        result["microseconds"][name] = times
        print(f"{name:16s}", "   ".join(f"{way} {time:.0f} µs" for way, time in times.items()), flush=True)
    arguments.results.mkdir(parents=True, exist_ok=True)
    (arguments.results / f"extended_products_{tokens}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
