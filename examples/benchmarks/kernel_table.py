"""Writes what ``kernel_times.py`` measured as a page: ``docs/kernels.md``.

python examples/benchmarks/kernel_table.py
"""

import json
from pathlib import Path

from table import README, row

RESULTS = Path(__file__).parent / "results/kernels.json"
PAGE = README.parent / "docs/kernels.md"
PEAK = "peak_bytes_beyond_operands"
HEAD = ("kernel", "fewest", "bound µs", "µs", "reached", "aim", "others µs (times ours)")
INTRODUCTION = """# Kernels, each beside its bound

`python examples/benchmarks/kernel_times.py` measures, `kernel_table.py` beside it writes this page. A bound
is the fewest bytes that an operation must move at the bandwidth of a clone, or its operations at the rate of
a large bf16 product, both measured in the same run; LoRA's is the time of the product without an adapter, and
what it reaches a multiple of that. Medians on buffers that no cache holds; a backward is all of
`torch.autograd.grad`.
"""
BELOW = """
## LoRA, above its aim

First builds took 1.20 and 1.47 times the product. Beside the base's own products the wide row has, on 16-bit
weights, in µs as profiled on an H200 (`kernel_times.py --kernel lora_linear --profile` shows it): dB 31, dy·B
30, v·A 19, x·A 15, dA 11, and the update. The aim allows 66 for all, and to read dy and x once each takes 45.
The update writes and reads the result once more. Added to the base's result it took 90 µs; made first, so
that the base's product adds to it, it takes 46; in the base's own product
(`rewriter/kernels/extended_product.py`) 26, but only where the weight is made anew, as from 4 bits
(`extended_products.py`, gate forward; at 32,768 tokens 790, 388 and 242).

In the square row the tensors that adapters read are as large as the product's own: dy and x read twice, y and
dx read and written are 268 MB, 71 µs at a clone's bandwidth, 1.20 by themselves.

## A step of 32,768 tokens with everything kept, 0.954 of Unsloth's where 0.95 was aimed at

`end_to_end.py --case 8x1x32768 --profile` (`results/profile_8x1x32768.json`): of 966 ms the device computes
for 960.

| what | ms | by operations or bytes, ms |
| --- | --- | --- |
| attention, cuDNN's forward and backward, in both systems | 486 | 314 |
| products of the layers, adapters' columns included | 317 | 293 |
| the head and its loss | 106 | 88 |
| all else: norms, gates, rotary, dequantisation, adapters' short products | 51 | 47 |

The second column takes the rate of a product on a device that was idle before, 783 TFLOP/s, which heat and
power do not allow for a whole step. Beside the same attention, what is left is 0.91 of Unsloth's; 0.95 of the
whole would need 4 ms less of 480, as much as all else is above its bytes. Norms that leave room for adapters'
columns spared 2.1 of them; weights that stay dequantised spare 2.5 and take 3.3 GiB, more than Unsloth's peak
leaves.
"""


def main() -> None:
    found = json.loads(RESULTS.read_text())
    bandwidth, rate = found["clone_bytes_per_second"] / 1e12, found["product_flop_per_second"] / 1e12
    versions = ", ".join(
        f"{p} {found[p]}" for p in ("torch", "triton", "liger_kernel", "unsloth") if p in found
    )
    lines = [INTRODUCTION, row(HEAD), row("---" for _ in HEAD), *(row(cells(r)) for r in found["rows"])]
    lines += ["", f"{found['device']}, {versions}: clone {bandwidth:.2f} TB/s, product {rate:.0f} TFLOP/s."]
    lines += [memory(r) for r in found["rows"] if r["kernel"] == "linear_cross_entropy" and PEAK in r]
    PAGE.write_text("\n".join(lines) + "\n" + BELOW)
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


def memory(result: dict) -> str:
    peak = amount(result[PEAK], "B")
    return f"\nThe head's peak is {peak} beyond its operands, with the gradient of the hidden states."


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
