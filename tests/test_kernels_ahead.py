"""Kernels compiled before they are launched: the jobs that a graph gives, and what one leaves behind."""

import importlib
import json
import os
import pickle
import pkgutil
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from torch._inductor import async_compile
from torch._subclasses import FakeTensorMode
from torch.fx import Graph

from rewriter import kernels
from rewriter.kernels import gated_activation, rms_norm  # noqa: F401
from rewriter.kernels.launching import Gpu, Ptxas, Shape
from rewriter.kernels.registration import launchers
from rewriter.kernels_ahead import KernelsAhead, start_processes

H200 = Gpu(9, 0, 32, 132, 232448)
PTXAS = Ptxas("/bin/ptxas", "release 13.0")
FAKES = FakeTensorMode()
_ops = torch.ops.rewriter


class Pool:
    """A pool that keeps its jobs."""

    def __init__(self):
        self.jobs: list[tuple] = []

    def submit(self, run, *given) -> Future:
        self.jobs.append((run, *given))
        self.last = Future()
        return self.last


@pytest.fixture
def pool(monkeypatch) -> Pool:
    """In the place of Inductor's, of a machine with an H200."""
    found = Pool()
    monkeypatch.setattr(async_compile.AsyncCompile, "use_process_pool", classmethod(lambda cls: True))
    monkeypatch.setattr(async_compile.AsyncCompile, "process_pool", staticmethod(lambda: found))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: H200)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(Ptxas, "of_this_process", lambda gpu: PTXAS)
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    monkeypatch.delenv("TRITON_CACHE_DIR")
    return found


def tensor(graph: Graph, *sizes: int):
    """A placeholder of a GPU's tensor."""
    node = graph.placeholder("x")
    with FAKES:
        node.meta["val"] = torch.empty(sizes, dtype=torch.bfloat16, device="cuda:0")
    return node


def norm(graph: Graph, rows: int, hidden: int):
    given = (tensor(graph, rows, hidden), tensor(graph, hidden), 1e-5, 0.0, True, None)
    return graph.call_function(_ops.rms_norm.default, given)


def test_a_call_is_one_job_however_often_it_is_met(pool):
    ahead = KernelsAhead()
    graph = Graph()
    for hidden in (64, 64, 128):
        norm(graph, 8, hidden)
    ahead.compile(graph)
    ahead.compile(graph)
    ((_, kernel, calls, *target),) = pool.jobs
    assert kernel is launchers[_ops.rms_norm.default]
    # The launches of this process look there, too.
    assert target == [H200, PTXAS, {"TRITON_CACHE_DIR": os.environ["TRITON_CACHE_DIR"]}]
    shapes = [Shape((8, n), (n, 1), torch.bfloat16) for n in (64, 128)]
    assert [call[0] for call in calls] == shapes
    assert calls[0][1:] == (Shape((64,), (1,), torch.bfloat16), 1e-5, 0.0, True, None, 0)


def test_a_launch_that_writes_is_one_too(pool):
    graph = Graph()
    given = {name: tensor(graph, 8, 64) for name in ("grad", "gate", "up")}
    op = _ops.gated_activation_backward_with_result_.default
    graph.call_function(torch.ops.higher_order.auto_functionalized, (op,), {**given, "activation": "silu"})
    KernelsAhead().compile(graph)
    ((_, kernel, (call,), *_),) = pool.jobs
    assert kernel is launchers[op]
    assert call == (*[Shape((8, 64), (64, 1), torch.bfloat16)] * 3, "silu")


def test_a_job_that_fails_is_reported(pool, caplog):
    graph = Graph()
    norm(graph, 8, 64)
    KernelsAhead().compile(graph)
    pool.last.set_exception(RuntimeError("no compiler"))
    assert "rewriter.kernels.rms_norm is compiled when it is launched: no compiler" in caplog.text


def test_other_processes_find_each_kernel_by_its_name():
    for module in pkgutil.iter_modules(kernels.__path__, "rewriter.kernels."):
        if not module.name.endswith("_triton"):
            importlib.import_module(module.name)
    assert len(launchers) > 20
    for kernel in launchers.values():
        assert pickle.loads(pickle.dumps(kernel)) is kernel


@pytest.mark.parametrize("manner", ["by_groups", "in_blocks"])
def test_ops_that_launch_no_kernel_of_ours_are_left_out(pool, manner):
    import rewriter.kernels.attention_groups  # noqa: F401

    op = getattr(torch.ops.rewriter, f"scaled_dot_product_cudnn_attention_backward_{manner}").default
    graph = Graph()
    x = tensor(graph, 1, 2, 64, 16)
    graph.call_function(op, (x, x, x, x, x, x, x, x, None, None, None, 64, 64, 0.0, True))
    KernelsAhead().compile(graph)
    assert not pool.jobs


def test_a_pool_that_takes_no_jobs_is_reported(pool, caplog):
    pool.submit = lambda *given: pickle.dumps(lambda: None)
    graph = Graph()
    norm(graph, 8, 64)
    KernelsAhead().compile(graph)
    assert "the pool takes no jobs" in caplog.text


@pytest.mark.parametrize("initialised", [False, True])
def test_processes_start_where_a_gpu_is_in_use(monkeypatch, initialised):
    started = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: initialised)
    monkeypatch.setattr(async_compile, "maybe_warm_pool", lambda: started.append(True))
    start_processes()
    assert bool(started) == initialised


JOB = """
import json, sys, torch
from rewriter.kernels.launching import Gpu, Ptxas, Shape, compile_launches
from rewriter.kernels.rms_norm import _backward_kernel, _forward_kernel

x, weight = Shape((4, 64), (64, 1), torch.bfloat16), Shape((64,), (1,), torch.bfloat16)
row = Shape((4,), (1,), torch.float32)
Ptxas.of_this_process(gpu := Gpu(9, 0, 32, 132, 232448))  # as if a kernel of Inductor's had been compiled
cache = {"TRITON_CACHE_DIR": sys.argv[1]}
ptxas = Ptxas(*json.loads(sys.argv[2])) if sys.argv[2:] else Ptxas.of_this_process(gpu)
compile_launches(_forward_kernel, [(x, weight, 1e-5, 0.0, True, None)] * 2, gpu, ptxas, cache)
compile_launches(_backward_kernel, [(x, None, x, weight, row, 0.0, True, False)], gpu, ptxas, cache)
"""


def test_a_job_compiles_for_another_process_and_a_gpu_that_it_does_not_have(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    given = {**environment, "PYTHONPATH": str(Path(__file__).parent.parent)}
    # PyTorch has Inductor's processes take its own assembler, which the process that launches does not.
    other = tmp_path / "ptxas"
    other.write_text("#!/bin/sh\n[ $1 = --version ] && echo Cuda compilation tools, release 13.9, V13.9.9\n")
    other.chmod(0o755)
    pool = {**given, "TRITON_PTXAS_PATH": str(other), "TRITON_PTXAS_BLACKWELL_PATH": str(other)}
    job = [sys.executable, "-c", JOB, str(tmp_path)]
    subprocess.run([*job, json.dumps(Ptxas.of_this_process(H200))], check=True, env=pool)
    subprocess.run(job, check=True, env=given)
    assert sorted(path.name for path in tmp_path.glob("*/*.cubin")) == [
        "norm_backward_kernel.cubin",
        "norm_forward_kernel.cubin",
    ]
