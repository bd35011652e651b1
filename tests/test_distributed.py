"""Two processes on the CPU: gradients are reduced region by region, and equal those of eager.

Dynamo is left to its own choice to cut graphs at DDP's buckets, which loading the backend changes.
"""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import rewriter
from tests.families import batch, build

OPTIONS = {"lowering": "eager"}
LAYERS = 3
# Bytes: less than everything that a step keeps.
BUDGET = 2_500_000
# Of both processes.
HOST_BUDGET = 1 << 24


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {n: g.full_tensor() if hasattr(g, "full_tensor") else g.clone() for n, g in found.items()}


def data_parallel(rank: int, compiled: bool, **options) -> tuple[dict, list[str], dict]:
    """Gradients, in which order they were ready and sent, and how often each region is called."""
    torch._dynamo.reset()
    model = build("llama", layers=LAYERS)
    if compiled:
        model.compile(backend="rewriter", options={**OPTIONS, **options})
    parallel = DistributedDataParallel(model, bucket_cap_mb=0.01)
    events: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: events.append(name))

    def noted(state, bucket):
        events.append("sent")
        return allreduce_hook(state, bucket)

    parallel.register_comm_hook(None, noted)
    for _ in range(2):  # DDP divides gradients into buckets in the order in which the first step made them
        parallel.zero_grad()
        events.clear()
        parallel(**batch(seed=rank)).loss.backward()
    program = rewriter.report().program
    times = {region.name: region.times for region in program.regions} if program else {}
    return gradients(model), events, times


def sharded(rank: int, compiled: bool) -> dict:
    torch._dynamo.reset()
    model = build("llama", layers=2)
    mesh = init_device_mesh("cpu", (2,))
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=mesh)
    if compiled:
        model.compile(backend="rewriter", options=OPTIONS)
    model(**batch(seed=rank)).loss.backward()
    return gradients(model)


def work(rank: int, port: int, results) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    eager, _, _ = data_parallel(rank, compiled=False)
    ours, events, times = data_parallel(rank, compiled=True)
    planned, _, _ = data_parallel(rank, compiled=True, memory_budget=BUDGET, host_budget=HOST_BUDGET)
    memory = rewriter.report().memory
    assert memory is not None and any("tiles" in way or "whole" in way for _, way, _ in memory.ways)
    assert 0 < memory.host_budget <= HOST_BUDGET // 2
    parts = {"data parallel": (eager, ours), "within a budget": (eager, planned)}
    parts |= {"sharded": (sharded(rank, False), sharded(rank, True))}
    if rank == 0:
        differences = {
            name: max(((b[k] - a[k]).norm() / a[k].norm()).item() for k in a)
            for name, (a, b) in parts.items()
        }
        results.put((differences, events, times))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcome():
    # Both processes start as copies of one that has imported everything.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.conftest", "transformers.models.llama.modeling_llama", __name__])
    results, port = context.SimpleQueue(), free_port()
    processes = [context.Process(target=work, args=(rank, port, results)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    return results.get()


@pytest.mark.parametrize("way", ["data parallel", "within a budget", "sharded"])
def test_gradients_of_two_processes_equal_those_of_eager(outcome, way):
    differences, _, _ = outcome
    assert differences[way] < 1e-5


def test_gradients_are_sent_while_earlier_layers_are_still_to_come(outcome):
    _, events, times = outcome
    assert times == {"beginning": 1, "layer_a": LAYERS, "end": 1}
    for layer in range(1, LAYERS):
        done = [i for i, event in enumerate(events) if f"layers.{layer}." in event]
        before = [i for i, event in enumerate(events) if f"layers.{layer - 1}.mlp" in event]
        assert min(done) < min(before)
        assert "sent" in events[min(done) : min(before)]
