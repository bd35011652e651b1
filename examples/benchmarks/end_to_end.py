"""Time and memory of whole training steps, one system a process.

    python examples/benchmarks/end_to_end.py --system rewriter --case 8x2x2048
    python examples/benchmarks/end_to_end.py --all --case 8x2x2048      # each system in turn, then the ratios

A step is forward, backward and AdamW on the adapters, bf16 autocast, of a model of Llama-3.1-8B's shape with
random weights. Writes ``examples/benchmarks/results/end_to_end_<case>_<system>.json``: device, versions, the
median step in ms, the first step in s, peak memory in GiB and the losses.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn

RESULTS = Path(__file__).parent / "results"
SYSTEMS = ("rewriter", "inductor", "hf", "liger", "liger_compiled", "unsloth", "unsloth_gc")
RANK = 32
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def configuration(layers: int, tiny: bool):
    """Llama-3.1-8B's shape, or a tiny one."""
    from transformers import LlamaConfig

    hidden, inner, heads, groups = (128, 256, 4, 2) if tiny else (4096, 14336, 32, 8)
    return LlamaConfig(
        vocab_size=1024 if tiny else 128256,
        hidden_size=hidden,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        num_hidden_layers=layers,
        max_position_embeddings=131072,
        use_cache=False,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )


def build(layers: int, quantised: bool, device: str, tiny: bool) -> nn.Module:
    """The model with adapters of rank 32 on all seven linears; the same weights for the same arguments."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(configuration(layers, tiny), dtype=torch.bfloat16)
    model.requires_grad_(False)
    if quantised:
        quantise(model)
    rank = 8 if tiny else RANK
    adapters = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=list(LINEARS))
    return get_peft_model(model, adapters)


def with_random_adapters(model: nn.Module) -> nn.Module:
    """B starts at zero, which would leave half of the gradients zero."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.01)
    return model.train()


def quantise(model: nn.Module) -> None:
    """Every linear but the head to NF4 with double quantisation."""
    import bitsandbytes as bnb

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and name in LINEARS:
                linear = bnb.nn.Linear4bit(
                    child.in_features, child.out_features, bias=False, compute_dtype=torch.bfloat16,
                    compress_statistics=True, quant_type="nf4", device="meta",
                )  # fmt: skip
                device = child.weight.device
                linear.weight = bnb.nn.Params4bit(
                    child.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
                ).to(device)
                setattr(parent, name, linear)


def prepared(arguments: argparse.Namespace, layers: int, device: str) -> nn.Module:
    """The model as the system asked for sets it up."""
    import peers

    system, quantised = arguments.system, not arguments.no_quantise
    if system.startswith("unsloth"):
        shape = {"num_hidden_layers": layers, "hidden_size": 4096, "max_position_embeddings": 131072}
        model = peers.unsloth(shape, RANK, list(LINEARS), quantised, system.endswith("_gc"))
        return with_random_adapters(model)

    def plain() -> nn.Module:
        return with_random_adapters(build(layers, quantised, device, arguments.tiny))

    if system.startswith("liger"):
        return peers.liger(plain, system.endswith("_compiled"))
    model = plain()
    if system == "rewriter":
        model.compile(backend="rewriter", options=arguments.options)
    elif system == "inductor":
        model.compile()
    return model


def lengths(text: str, count: int) -> list[int]:
    """Of each step's batch: "2048", or random ones from "128-255"."""
    least, _, most = text.partition("-")
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(int(least), int(most or least) + 1, (count,), generator=generator)
    return drawn.tolist()


def measure(arguments: argparse.Namespace) -> dict:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layers, rows, length = arguments.case.split("x")
    model = prepared(arguments, int(layers), device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    sizes = [(int(rows), n) for n in lengths(length, 4 if length.isdigit() else 4 + arguments.steps)]
    batches = [torch.randint(vocabulary, size, generator=generator).to(device) for size in sizes]

    def step(index: int) -> torch.Tensor:
        ids = batches[index % len(batches)]
        with torch.autocast(device, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def synchronise() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    synchronise()
    start = time.perf_counter()
    losses = [step(0)]
    synchronise()
    first = time.perf_counter() - start
    compiling = compile_seconds()
    losses += [step(i) for i in range(1, 4)]
    synchronise()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = []
    for index in range(4, 4 + arguments.steps):
        synchronise()
        start = time.perf_counter()
        losses.append(step(index))
        synchronise()
        times.append(1e3 * (time.perf_counter() - start))
    result = {
        "system": arguments.system,
        "case": arguments.case,
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "cpu",
        "versions": versions(),
        "median_ms": statistics.median(times),
        "min_ms": min(times),
        "first_step_s": first,
        "compile_s": compiling,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None,
        "losses": [round(loss.item(), 6) for loss in losses],
    }
    if arguments.system == "rewriter":
        import rewriter

        result["counts"] = rewriter.report().counts()
        result["rewriter_s"] = [graph.seconds for graph in rewriter.report().graphs]
        print(rewriter.report())
    if arguments.profile and device == "cuda":
        profile(step)
    return result


def compile_seconds() -> dict[str, float]:
    """What the first step spent where: PyTorch's own counts of seconds, each with those inside it."""
    from torch._dynamo.utils import compilation_time_metrics

    return {
        name: round(sum(seconds), 2)
        for name, seconds in compilation_time_metrics.items()
        if sum(seconds) > 0.1
    }


def profile(step) -> None:
    """Where the GPU's time goes, kernel by kernel, over three steps."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    with profiler(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as recorded:
        for index in range(3):
            step(index)
        torch.cuda.synchronize()
    print(
        recorded.key_averages().table(sort_by="self_cuda_time_total", row_limit=28, max_name_column_width=70)
    )


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in ("torch", "triton", "transformers", "peft", "bitsandbytes"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def compare(case: str, results: Path) -> None:
    """Print what the files of a case hold, and each system's ratio to the rewriter's."""
    found = {
        s: json.loads(p.read_text())
        for s in SYSTEMS
        if (p := results / f"end_to_end_{case}_{s}.json").exists()
    }
    ours = found.get("rewriter")
    print(f"{'system':10s} {'ms':>9s} {'ratio':>6s} {'GiB':>7s} {'first s':>8s}  loss, step 1 and last")
    for system, r in found.items():
        ratio = r["median_ms"] / ours["median_ms"] if ours else float("nan")
        peak = r["peak_gib"] or 0.0
        print(
            f"{system:10s} {r['median_ms']:9.1f} {ratio:6.2f} {peak:7.2f} {r['first_step_s']:8.1f}  "
            f"{r['losses'][0]:.4f} {r['losses'][-1]:.4f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--system", choices=SYSTEMS, default="rewriter")
    parser.add_argument("--all", action="store_true", help="every system, each in a process of its own")
    parser.add_argument("--case", default="8x2x2048", help="layers x rows x tokens, or a range of tokens")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--no-quantise", action="store_true", help="16-bit base weights")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, to try the script on a CPU")
    parser.add_argument("--options", type=json.loads, default={}, help="the rewriter's options, as JSON")
    parser.add_argument("--profile", action="store_true", help="also print the GPU's time by kernel")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.all:
        rest = [a for a in sys.argv[1:] if a != "--all"]
        for system in SYSTEMS:
            subprocess.run([sys.executable, __file__, *rest, "--system", system], check=False)
        compare(arguments.case, arguments.results)
        return
    result = measure(arguments)
    arguments.results.mkdir(parents=True, exist_ok=True)
    path = arguments.results / f"end_to_end_{arguments.case}_{arguments.system}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"{arguments.system}: {result['median_ms']:.1f} ms a step, "
        f"first {result['first_step_s']:.1f} s -> {path}"
    )


if __name__ == "__main__":
    main()
