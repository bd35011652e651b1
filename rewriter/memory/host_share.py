"""What of a machine's memory one process may offload to, where several run on it.

A ``host_budget`` is the machine's, as the memory is: the processes of one machine, under DDP one a GPU, have
equal parts of it. ``LOCAL_WORLD_SIZE``, which torchrun and accelerate set, says how many they are. Where it
is missing and ``torch.distributed`` runs, all of its processes are taken to be on this machine, which can
only make the parts too small.
"""

import os
from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist

# Of the machine's memory, what offloads may take together where nobody says: the rest is for the processes
# themselves, the weights on their way to the device, and the data.
_DEFAULT_SHARE = 0.8
# Past this the kernel ends the process, whatever the machine has.
_CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")


def host_share(host_budget: int | float | None = None, environment: Mapping[str, str] = os.environ) -> int:
    """Bytes for this process's offloads.

    Args:
        host_budget: those of all processes of the machine: bytes, a fraction of its memory, or None for most
            of it.
    """
    budget = _DEFAULT_SHARE if host_budget is None else host_budget
    machine = int(budget * machine_memory()) if isinstance(budget, float) else budget
    return machine // _processes(environment)


def machine_memory() -> int:
    """Bytes of the machine's memory, or of the container's where that is less."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    container = _CONTAINER_LIMIT.read_text().strip() if _CONTAINER_LIMIT.exists() else "max"
    return min(total, int(container)) if container.isdigit() else total


def _processes(environment: Mapping[str, str]) -> int:
    if said := environment.get("LOCAL_WORLD_SIZE"):
        return int(said)
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
