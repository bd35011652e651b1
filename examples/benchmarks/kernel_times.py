"""Each kernel beside its bound, and beside what else computes the same.

    python examples/benchmarks/kernel_times.py     # all of them; it says about how long that takes
    python examples/benchmarks/kernel_times.py --kernel rms_norm rotary
    python examples/benchmarks/kernel_times.py --kernel lora_linear --profile  # and where the time goes
    python examples/benchmarks/kernel_times.py --tiny  # on the CPU, without Triton: a dry run

The bound is the fewest bytes at the bandwidth of a clone, or the operations at the rate of a large product,
both measured in the same run; for LoRA it is the time of the product without an adapter. Times are medians on
buffers that the L2 does not hold. Writes ``kernels.json`` to the results' folder: device, versions, rows.
"""

import argparse
import importlib.metadata
import itertools
import json
import platform
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import ahead
import kernel_peers
import torch
from cases import GROUPS, Case
from timing import Call, Machine, copies, measure_machine, median_seconds

import rewriter

RESULTS = Path(__file__).parent / "results"
COLUMNS = "{:<52}{:>10}{:>10}{:>9}{:>9}{:>11}{:>10}  {}"


def calls(case: Case, function: Callable, sets: list) -> list[Call]:
    """One call for each set of operands: forward, backward on a kept graph, or both."""

    def outputs(operands) -> list[torch.Tensor]:
        out = function(*operands)
        return [t for t in (out if isinstance(out, tuple) else (out,)) if t is not None and t.requires_grad]

    def forward(operands) -> object:
        with torch.no_grad():
            return function(*operands)

    def differentiate(outs, leaves, grads, keep: bool) -> object:
        # The product without an adapter leaves the adapter out.
        return torch.autograd.grad(outs, leaves, grads, retain_graph=keep, allow_unused=True)

    made = []
    for operands in sets:
        if not (case.backward or case.together):
            made.append(lambda operands=operands: forward(operands))
            continue
        leaves = [t for t in operands if t.requires_grad]
        outs = outputs(operands)
        grads = [torch.ones_like(t) if t.dim() == 0 else torch.randn_like(t) for t in outs]
        if case.backward:
            made.append(
                lambda outs=outs, leaves=leaves, grads=grads: differentiate(outs, leaves, grads, True)
            )
            continue
        del outs
        made.append(lambda operands=operands, leaves=leaves, grads=grads:
                    differentiate(outputs(operands), leaves, grads, False))  # fmt: skip
    return made


def peak_beyond(call: Call) -> int:
    """Bytes that a call takes at its peak beyond what is allocated before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def run(case: Case, machine: Machine, beside: list[str]) -> dict:
    """Times in seconds, and what of the bound was reached."""
    cuda, device = machine.device.type == "cuda", machine.device
    sets = copies(case.make, device)

    def seconds(function: Callable) -> float:
        return median_seconds(calls(case, function, sets), device)

    ours, others = seconds(case.ours), {}
    if case.compiled and cuda and "inductor" in beside:
        torch._dynamo.reset()
        others["inductor"] = seconds(torch.compile(case.reference, dynamic=False))
    if case.other is not None and (cuda or case.other_name != "bitsandbytes"):
        others[case.other_name] = seconds(case.other)
    if not cuda:
        others["eager"] = seconds(case.reference)
    bound = bound_seconds(case, machine, others)
    row = {
        "kernel": case.kernel,
        "case": case.name,
        "unit": case.unit,
        "work": case.work,
        "target": case.target,
        "seconds": ours,
        "bound_seconds": bound,
        "share_of_bound": bound / ours,
        "others_seconds": others,
        **verdict(case, ours, bound),
    }
    if cuda and case.together:
        row["peak_bytes_beyond_operands"] = peak_beyond(calls(case, case.ours, sets[:1])[0])
    return row


def profiled(case: Case, device: torch.device) -> str:
    """Where the time of our calls goes, by product and kernel, each with its own bound."""
    turn = itertools.cycle(calls(case, case.ours, copies(case.make, device)))
    return str(rewriter.profile(lambda: next(turn)(), steps=10))


def bound_seconds(case: Case, machine: Machine, others: dict[str, float]) -> float:
    if not case.work:
        return others[case.other_name]
    return case.work / (machine.bandwidth if case.unit == "B" else machine.rate)


def verdict(case: Case, ours: float, bound: float) -> dict:
    """What is compared with the target: a share of the bound, a multiple of it, or a rate."""
    if not case.work:
        return {"reached": ours / bound, "met": ours / bound <= case.target}
    reached = case.work / ours if case.target is not None and case.target > 1 else bound / ours
    return {"reached": reached} | ({} if case.target is None else {"met": reached >= case.target})


def run_beside(peer: str, cases: list[Case], rows: list[dict], device: torch.device) -> None:
    """A peer's own kernels, after all else: importing it changes settings that others run under."""
    for case, row in zip(cases, rows, strict=True):
        function = kernel_peers.of(peer, case)
        if function is None:
            continue
        time = median_seconds(calls(case, function, copies(case.make, device)), device)
        row["others_seconds"][peer] = time
        print(f"{row['case']:<52} {peer} {time * 1e6:.1f} us ({time / row['seconds']:.2f}x)", flush=True)


def line(row: dict) -> str:
    ours, rate = row["seconds"], row["work"] / row["seconds"] / 1e12
    target = row["target"]
    reached = f"{row['reached'] / 1e12:.0f}T" if row["reached"] > 1e9 else f"{row['reached']:.3f}"
    wanted = "" if target is None else f"{target / 1e12:.0f}T" if target > 1e9 else f"{target:.2f}"
    beside = ", ".join(f"{name} {t * 1e6:.1f} ({t / ours:.2f}x)" for name, t in row["others_seconds"].items())
    if "peak_bytes_beyond_operands" in row:
        beside += f", peak {row['peak_bytes_beyond_operands'] / 2**20:.0f} MiB"
    speed = f"{rate:.2f} T{'B' if row['unit'] == 'B' else 'F'}/s" if row["work"] else ""
    met = {True: "met", False: "below", None: ""}[row.get("met")]
    times = f"{ours * 1e6:.1f}", f"{row['bound_seconds'] * 1e6:.1f}"
    return COLUMNS.format(row["case"], *times, reached, wanted, speed, met, beside)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kernel", nargs="+", help="kernels to run; all where left out")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of kernels.json")
    parser.add_argument("--beside", nargs="*", default=["inductor", *kernel_peers.installed()],
                        choices=["inductor", *kernel_peers.PEERS], help="whose kernels run, too")  # fmt: skip
    parser.add_argument("--ahead", type=int, default=ahead.room(),
                        help="processes that compile before anything is timed; 0 for none")  # fmt: skip
    parser.add_argument("--profile", action="store_true", help="print also where each one's time goes")
    parser.add_argument("--share", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true", help="small sizes on the CPU, references alone")
    options = parser.parse_args()
    if unknown := set(options.kernel or ()) - set(GROUPS):
        parser.error(f"unknown kernel {', '.join(sorted(unknown))}; known are {', '.join(GROUPS)}")
    if not options.tiny and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --tiny runs the references on the CPU")
    torch.manual_seed(0)
    device = torch.device("cpu" if options.tiny else "cuda")
    cases = [case for kernel in options.kernel or GROUPS for case in GROUPS[kernel](device, options.tiny)]
    if options.share:
        run_once(cases, options, device)
        return
    print(f"about {ahead.seconds(cases, options):.0f} s", flush=True)
    ahead.compile_all(options)
    machine = measure_machine(device, options.tiny)
    name = platform.machine() if options.tiny else torch.cuda.get_device_name()
    print(f"{name}: clone {machine.bandwidth / 1e12:.2f} TB/s, product {machine.rate / 1e12:.0f} TFLOP/s")
    print(COLUMNS.format("", "us", "bound us", "reached", "target", "", "", "others, us (x ours)"))
    rows = []
    for case in cases:
        rows.append(run(case, machine, options.beside))
        print(line(rows[-1]), flush=True)
        if options.profile:
            print(profiled(case, device), flush=True)
    write(options.results, name, machine, rows)
    for peer in kernel_peers.PEERS:
        if peer in options.beside and not options.tiny:
            run_beside(peer, cases, rows, machine.device)
            write(options.results, name, machine, rows)


def run_once(cases: list[Case], options: argparse.Namespace, device: torch.device) -> None:
    """Run what is compiled of a share of the cases, once."""
    share, first, step = options.share[0], *map(int, options.share[1:])
    for case in cases[first::step]:
        for function in ahead.functions(share, case, options.beside, device.type == "cuda"):
            calls(case, function, [case.make()])[0]()


def write(folder: Path, device: str, machine: Machine, rows: list[dict]) -> None:
    """``kernels.json``: what ran on what."""
    packages = ("torch", "triton", *kernel_peers.PEERS.values())
    versions = {p: importlib.metadata.version(p) for p in packages if find_spec(p)}
    record = {
        "device": device,
        **versions,
        "python": platform.python_version(),
        "clone_bytes_per_second": machine.bandwidth,
        "product_flop_per_second": machine.rate,
        "rows": rows,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kernels.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
