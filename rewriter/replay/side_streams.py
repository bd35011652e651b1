"""On which other streams the memory of a tensor is said to be in use, for memory that no allocator frees.

Who reads a tensor on a side stream and then drops it calls ``record_stream``, so that the allocator gives its
memory to nobody before that stream is done. Of memory that the allocator does not own, as of gradients that a
recording lends (``lending``), that call says nothing to anyone: PyTorch passes over it. It is made to tell
listeners too, from when there is one on; whoever writes the memory next waits for the streams.

What calls the allocator itself instead of the operator is not heard: in PyTorch that is autograd, which has
the caller's stream wait at the end of a backward, and collectives, for which their callers wait.
"""

import functools
import warnings
from threading import RLock
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor
from torch.library import Library, get_kernel


class Listener(Protocol):
    """Told of each ``record_stream``, of any tensor."""

    def used_on(self, tensor: Tensor, stream: torch.Stream) -> None: ...


_listeners: WeakSet[Listener] = WeakSet()
# One thread may make a recorder while another says ``record_stream``. Reentrant, since what a collection
# destroys in the middle of either may say it too.
_listening = RLock()


def listen(listener: Listener) -> None:
    """Tell ``listener``, for as long as it is there, what is recorded of tensors on GPUs."""
    with _listening:
        _listeners.add(listener)
        # Of two threads, one: each would hear the other's.
        _listen_on_gpus()


@functools.cache
def _listen_on_gpus() -> Library:
    return telling("CUDA")


def telling(key: str) -> Library:
    """While the result lives, ``record_stream`` of tensors of that dispatch key tells the listeners."""
    kernel = get_kernel("aten::record_stream", key)

    def record_stream(keys: Any, tensor: Tensor, stream: torch.Stream) -> None:
        with _listening:
            told = tuple(_listeners)
        for listener in told:
            listener.used_on(tensor, stream)
        kernel.call_boxed(keys, tensor, stream)

    library = Library("aten", "IMPL")
    with warnings.catch_warnings():
        # That a kernel takes the place of another is what is wanted.
        warnings.simplefilter("ignore", UserWarning)
        library.impl("record_stream", record_stream, key, with_keyset=True, allow_override=True)
    return library
