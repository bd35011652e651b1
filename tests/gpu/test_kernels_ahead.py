"""Kernels compiled ahead in Inductor's processes are those that are launched: nothing is left to compile."""

import os
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="what is launched is seen on a GPU")

# A process of its own: kernels that another test has launched would not be looked up on disk.
SCRIPT = """
import json, os, sys, time
from pathlib import Path

import torch
import triton
from torch._inductor.async_compile import AsyncCompile
from torch.fx import Graph

import rewriter.passes
from rewriter.kernels.launching import Ptxas
from rewriter.kernels_ahead import KernelsAhead, _target, start_processes

ops, compiled, root = torch.ops.rewriter, [], Path(sys.argv[1])
x = torch.randn(64, 4096, device="cuda", dtype=torch.bfloat16)
weight, head, row = x[0].clone(), x.new_ones(1000, 4096), x.new_ones(64, dtype=torch.float32)
labels, heads = torch.arange(64, device="cuda"), x.view(1, 64, 32, 128).transpose(1, 2)
table = x.new_ones(1, 1, 64, 128)
calls = [
    (ops.rms_norm.default, (x, weight, 1e-5, 0.0, True, None)),
    (ops.add_rms_norm.default, (x, x, weight, 1e-5, 0.0, True, None)),
    (ops.rms_norm_backward.default, (x, x, x, weight, row, 0.0, True, False)),
    (ops.rms_norm_backward.default, (x, None, x, weight, row, 0.0, True, True)),
    (ops.gated_activation.default, (x, x, "silu")),
    (ops.gated_activation_backward_with_result_.default, (x.clone(), x, x, "silu")),
    (ops.rotary.default, (heads, heads[:, :8], table, table, "halves")),
    (ops.linear_cross_entropy.default,
     (x, head, None, labels, None, 1.0, 0.0, -100, 0.0, True, x.dtype, torch.float32, True, False, False)),
]
start_processes()
while not AsyncCompile.use_process_pool():
    time.sleep(0.1)
graph = Graph()


def given(value):
    if not isinstance(value, torch.Tensor):
        return value
    node = graph.placeholder("x")
    node.meta["val"] = value
    return node


for op, arguments in calls:
    graph.call_function(op, tuple(map(given, arguments)))
KernelsAhead().compile(graph)
pool = AsyncCompile.process_pool()
while pool.pending_futures:
    time.sleep(0.1)
triton.runtime.driver.active.utils  # a library of Triton's own is made at its first use
before = set(root.rglob("*.*"))


def listen(metadata_group, cache_hit, **_):
    if not cache_hit:
        compiled.append(Path(next(path for name, path in metadata_group.items() if name.endswith(".json"))))


triton.knobs.compilation.listener = listen
for op, arguments in calls:
    op(*arguments)
torch.cuda.synchronize()
made = sorted(path.name for path in set(root.rglob("*.*")) - before)
ahead = [path for path in before if path.suffix == ".cubin"]
print(len(ahead), "kernels by jobs;", len(compiled), "at their launch:", [path.stem for path in compiled])
print(len(made), "files made at launches")
gpu, ptxas, folder = _target(x.device)
print("launches:", triton.knobs.cache.dir, gpu, Ptxas.of_this_process(gpu))
workers = pool.submit(eval, "{k: v for k, v in __import__('os').environ.items() if 'TRITON' in k}").result()
print("environment of jobs:", workers, "of launches:", {k: v for k, v in os.environ.items() if "TRITON" in k})
for launched in compiled[:3]:
    for job in (path.with_suffix(".json") for path in ahead if path.stem == launched.stem):
        one, other = (json.loads(path.read_text()) for path in (job, launched))
        fields = {k: (one.get(k), other.get(k)) for k in one | other if one.get(k) != other.get(k)}
        files = [p.suffix for p in job.parent.glob(launched.stem + ".*")
                 if p.read_bytes() != (launched.parent / p.name).read_bytes()]
        print(launched.stem, "differs from a job's in", fields, files)
print("made:", made)
assert ahead and not compiled and not made
"""


def test_what_a_job_compiled_is_what_is_launched(tmp_path):
    # The cache is where Inductor lets it be, of which a process without kernels of Inductor's does not know.
    given = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TRITON_HOME": str(tmp_path / "home")}
    environment = {**os.environ, **given, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("TRITON_CACHE_DIR", None)
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[:3000] + run.stderr[-2000:]
