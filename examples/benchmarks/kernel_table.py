"""Writes what ``kernel_times.py`` measured as a page: ``docs/kernels.md``.

python examples/benchmarks/kernel_table.py
"""

import json
from pathlib import Path

from table import README, row

RESULTS = Path(__file__).parent / "results/kernels.json"
PAGE = README.parent / "docs/kernels.md"
HEAD = ("kernel", "fewest", "bound µs", "µs", "reached", "aim", "others µs (times ours)")
INTRODUCTION = """# Kernels, each beside its bound

`python examples/benchmarks/kernel_times.py` measures, `kernel_table.py` beside it writes this page. A bound
is the fewest bytes that an operation must move at the bandwidth of a clone, or its operations at the rate of
a large bf16 product, both measured in the same run; LoRA's is the time of the product without an adapter, and
what it reaches a multiple of that. Medians on buffers that no cache holds; a backward is all of
`torch.autograd.grad`.
"""


def main() -> None:
    found = json.loads(RESULTS.read_text())
    bandwidth, rate = found["clone_bytes_per_second"] / 1e12, found["product_flop_per_second"] / 1e12
    versions = ", ".join(
        f"{p} {found[p]}" for p in ("torch", "triton", "liger_kernel", "unsloth") if p in found
    )
    lines = [INTRODUCTION, row(HEAD), row("---" for _ in HEAD), *(row(cells(r)) for r in found["rows"])]
    lines += ["", f"{found['device']}, {versions}: clone {bandwidth:.2f} TB/s, product {rate:.0f} TFLOP/s."]
    PAGE.write_text("\n".join(lines) + "\n")
    print(PAGE)


def cells(result: dict) -> tuple[str, ...]:
    ours = result["seconds"]
    others = (f"{name} {t * 1e6:.1f} ({t / ours:.2f})" for name, t in result["others_seconds"].items())
    return (
        result["case"],
        amount(result["work"], result["unit"]) if result["work"] else "",
        f"{result['bound_seconds'] * 1e6:.1f}",
        f"{ours * 1e6:.1f}",
        share(result, result["reached"]),
        "" if result["target"] is None else share(result, result["target"]),
        ", ".join(others),
    )


def amount(work: float, unit: str) -> str:
    scale, letter = (1e12, "T") if work >= 1e12 else (1e9, "G") if work >= 1e9 else (1e6, "M")
    return f"{work / scale:.3g} {letter}{unit}"


def share(result: dict, value: float) -> str:
    """A share of the bound, a multiple of it where that is another product's time, or a rate."""
    if value > 1e9:
        return f"{value / 1e12:.0f} TFLOP/s"
    return f"{value:.2f}" if result["work"] else f"{value:.2f}×"


if __name__ == "__main__":
    main()
