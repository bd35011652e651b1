"""Outputs of a graph that are computed when somebody first reads them."""

from collections.abc import Callable

from torch.fx import GraphModule


def split_deferred(module: GraphModule) -> tuple[GraphModule, Callable[[Callable], Callable]]:
    return module, lambda compiled: compiled
