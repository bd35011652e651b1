"""The processes of one machine have equal parts of what its memory, or a budget, allows."""

import torch.distributed as dist

from rewriter.memory import host_share as module
from rewriter.memory.arena import HostArena
from rewriter.memory.host_share import host_share, machine_memory

MiB = 1 << 20


def test_alone_a_process_has_all_that_is_asked_for_and_most_of_the_memory_where_nobody_asks():
    assert host_share(300 * MiB, {}) == 300 * MiB
    assert host_share(0.5, {}) == machine_memory() // 2
    assert host_share(None, {}) == int(0.8 * machine_memory())
    assert HostArena(pin=False).limit == host_share()


def test_processes_of_one_machine_share_its_memory_and_a_budget():
    for budget in (None, 0.5, 300 * MiB):
        assert host_share(budget, {"LOCAL_WORLD_SIZE": "4"}) == host_share(budget, {}) // 4


def test_where_the_launcher_does_not_say_all_processes_are_taken_to_be_here(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    assert host_share(300 * MiB, {}) == 100 * MiB
    assert host_share(300 * MiB, {"LOCAL_WORLD_SIZE": "2"}) == 150 * MiB


def test_a_container_has_the_memory_that_its_limit_says(monkeypatch, tmp_path):
    limit = tmp_path / "memory.max"
    limit.write_text("max\n")
    monkeypatch.setattr(module, "_CONTAINER_LIMIT", limit)
    machine = host_share(None, {})
    limit.write_text(f"{100 * MiB}\n")
    assert host_share(None, {}) == 80 * MiB < machine
    assert machine_memory() == 100 * MiB
