"""Grad mode and autocast as a graph's nodes have them, put into a graph made of some of those nodes."""

from typing import Any

import torch
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx import Graph, Node


class ModeSwitches:
    """Writes the calls that switch modes in front of the nodes that need them.

    Args:
        graph: being built, in order.
        mode: of each node, as ``Effects`` has it.
        grad: the grad mode in which ``graph`` will be called.
    """

    def __init__(self, graph: Graph, mode: dict[Node, tuple], grad: bool):
        self.graph, self.mode = graph, mode
        self.outside = self.grad = grad
        self.autocasts: list[tuple[tuple, Node]] = []

    def enter(self, node: Node) -> None:
        """Make the modes those of ``node``."""
        self._switch(*self.mode[node])

    def leave(self) -> None:
        """Make the modes those of the caller again."""
        self._switch(self.outside, ())

    def _switch(self, grad: bool, autocasts: tuple[tuple[Any, ...], ...]) -> None:
        same = 0
        while same < min(len(autocasts), len(self.autocasts)) and self.autocasts[same][0] == autocasts[same]:
            same += 1
        while len(self.autocasts) > same:
            self.graph.call_function(_exit_autocast, (self.autocasts.pop()[1],))
        for settings in autocasts[same:]:
            self.autocasts.append((settings, self.graph.call_function(_enter_autocast, settings)))
        if grad != self.grad:
            self.graph.call_function(torch._C._set_grad_enabled, (grad,))
            self.grad = grad
