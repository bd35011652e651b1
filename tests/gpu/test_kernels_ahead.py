"""Kernels compiled ahead in Inductor's processes are those that are launched: nothing is left to compile."""

import os
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="what is launched is seen on a GPU")

# A process of its own: kernels that another test has launched would not be looked up on disk.
SCRIPT = """
import sys, time
from pathlib import Path

import torch
import triton
from torch._inductor.async_compile import AsyncCompile
from torch.fx import Graph

import rewriter.passes
from rewriter.kernels_ahead import KernelsAhead, start_processes

ops, compiled = torch.ops.rewriter, []
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
before = set(Path(sys.argv[1]).rglob("*.*"))
triton.knobs.compilation.listener = lambda src, cache_hit, **_: cache_hit or compiled.append(src.fn.__name__)
for op, arguments in calls:
    op(*arguments)
torch.cuda.synchronize()
made = sorted(path.name for path in set(Path(sys.argv[1]).rglob("*.*")) - before)
print(len(before), "before;", compiled, "compiled at their launch;", made, "made")
assert before and not compiled and not made
"""


def test_what_a_job_compiled_is_what_is_launched(tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
