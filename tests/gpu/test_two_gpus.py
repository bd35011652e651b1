"""Two processes with DDP, a GPU each, plan within one host's memory.

``outcomes`` does the same on a CPU with gloo, for a dry run without figures of memory:

    from tests.gpu.test_two_gpus import Sizes, outcomes
    if __name__ == "__main__":
        print(outcomes("cpu", 512, Sizes(hidden=64, inner=176, heads=4, groups=2)))
"""

import copy
import os
import socket
from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing import SimpleQueue, get_context
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from rewriter.memory.budgets import card_bytes
from rewriter.memory.host_share import host_share
from rewriter.memory.planned import transfers_of
from rewriter.report import MemoryRecord
from tests.memory.on_device import (
    CONTEXT,
    Outcome,
    Sizes,
    compiled,
    free_bus,
    plan,
    small_llama,
    step,
    tokens,
)

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

LENGTH = 16384
# Of what activations take where everything is kept.
SHARE = 0.5
# NVLink's multicast needs rights that a container may lack.
ENVIRONMENT = {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2", "NCCL_NVLS_ENABLE": "0"}


@dataclass(frozen=True)
class Seen:
    """By one process, in numbers alone.

    Attributes:
        errors: of each gradient and the loss, in units of its size: ours, and eager's, from fp32.
        alone: the plan where host memory is not short; ``plan``: the one within the host budget.
        host: the budget of both processes; ``pinned``: what this one has of it.
        card, peak: what the device was to have, and the most that was allocated.
    """

    errors: dict[str, tuple[float, float]]
    alone: MemoryRecord
    plan: MemoryRecord
    host: int
    pinned: int
    card: int
    peak: int


@pytest.fixture(scope="module")
def seen():
    return outcomes("cuda", LENGTH, Sizes())


def test_gradients_are_those_of_one_process_in_eager_over_both_batches(seen):
    for process in seen:
        for name, (ours, eager) in process.errors.items():
            assert ours <= 1.5 * eager + 1e-4, (name, ours, eager)


def test_both_offload_within_one_host_budget(seen):
    for process in seen:
        assert process.alone.hosted * len(seen) > process.host
        assert 0 < process.plan.hosted <= process.plan.host_budget <= process.host // len(seen)
        assert process.plan.hosted <= process.pinned
    assert sum(process.pinned for process in seen) <= seen[0].host


def test_both_stay_within_their_device_budget(seen):
    for process in seen:
        assert process.plan.peak <= process.plan.device_budget
        # Of the card; the plan's own share of it leaves products' workspaces out.
        assert process.peak <= process.card - CONTEXT
        assert abs(process.peak / process.plan.peak - 1) < 0.1


def outcomes(kind: str, length: int, sizes: Sizes) -> list[Seen]:
    """What two processes saw, each on a device of its own of ``kind``, "cuda" or "cpu"."""
    context = get_context("spawn")
    results = context.SimpleQueue()
    given = (_free_port(), kind, length, sizes, results)
    spawn(_work, given, nprocs=2)
    return [results.get() for _ in range(2)]


def _work(rank: int, port: int, kind: str, length: int, sizes: Sizes, results: SimpleQueue) -> None:
    os.environ.update(ENVIRONMENT, MASTER_PORT=str(port), RANK=str(rank))
    torch.set_num_threads(1)
    device = "cpu"
    if kind == "cuda":
        torch.cuda.set_device(rank)
        device = f"cuda:{rank}"
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    model = small_llama(device, sizes, nf4=False)
    batches = [tokens(length, device, seed) for seed in range(2)]
    both, own = torch.cat(batches), batches[rank]
    truth, eager = _exact(model, both), step(model, both)

    step(compiled(model, 1 << 50), own)
    kept = plan()
    card = card_bytes(kept.static + int(SHARE * (kept.peak - kept.static)), torch.device(device))
    parallel = DistributedDataParallel(model)
    with free_bus():
        compiled(model, card)
        step(parallel, own)
        alone = _numbers(plan())
        host = _of_the_first(alone.hosted * 3 // 2)
        compiled(model, card, host_budget=host)
        step(parallel, own)
        ours = step(parallel, own)
    pinned = transfers_of(device, host_share(host)).arena.capacity
    errors, within = _errors(ours, eager, truth), _numbers(plan())
    results.put(Seen(errors, alone, within, host, pinned, card, ours.peak))
    dist.barrier()
    dist.destroy_process_group()


def _numbers(memory: MemoryRecord) -> MemoryRecord:
    """Short enough for a pipe that nobody reads yet."""
    return replace(memory, timeline=(), chart="", picture="")


def _exact(model: nn.Module, ids: Tensor) -> Outcome:
    """Eager's in fp32."""
    model = copy.deepcopy(model).float()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return Outcome(loss.detach(), gradients, 0, 0)


def _errors(ours: Outcome, eager: Outcome, truth: Outcome) -> dict[str, tuple[float, float]]:
    loss = ours.loss.float()
    dist.all_reduce(loss)
    mine = {n.removeprefix("module."): g for n, g in ours.gradients.items()} | {"loss": loss / 2}
    theirs, exact = eager.gradients | {"loss": eager.loss}, truth.gradients | {"loss": truth.loss}
    assert mine.keys() == theirs.keys() == exact.keys()
    return {n: (_distance(mine[n], exact[n]), _distance(theirs[n], exact[n])) for n in exact}


def _distance(value: Tensor, truth: Tensor) -> float:
    return ((value.double() - truth.double()).norm() / truth.double().norm()).item()


def _of_the_first(number: int) -> int:
    """What process 0 has."""
    found = [number]
    dist.broadcast_object_list(found)
    return found[0]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
