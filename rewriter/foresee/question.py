"""A model, a machine and budgets to what the planner is asked for a length."""

from collections.abc import Iterable
from typing import Any

import torch

from rewriter.foresee.blueprint import Blueprint, blueprint
from rewriter.foresee.repetition import Uneven, calls_of_all
from rewriter.foresee.traced import in_tracing, traced
from rewriter.hostable import LAYERS
from rewriter.memory.budgets import foreseen_bytes, usable_bytes
from rewriter.memory.head_ahead import HeadInHost, head_in_host
from rewriter.memory.in_host import packed_weights
from rewriter.memory.machine import Machine
from rewriter.memory.plan import Problem
from rewriter.memory.planned import parts_of
from rewriter.memory.resident_choice import Offer
from rewriter.memory.resident_program import offer, weights_of
from rewriter.memory.ways import Ways


class Question:
    """A model and budgets; asked for lengths, each once."""

    def __init__(
        self,
        given: Any,
        lora_rank: int | None,
        quantise: str | None,
        dtype: torch.dtype,
        autocast: torch.dtype | None,
        rows: int,
        card: int,
        host: int,
        machine: Machine,
        in_host: Iterable[str] = (),
    ):
        self._make = lambda whole: blueprint(given, lora_rank, quantise, dtype, in_host, whole=whole)
        self.made: Blueprint = self._make(False)
        self._autocast, self._rows, self._machine = autocast, rows, machine
        self._device, self._host = usable_bytes(card), host
        self._offers: dict[int, list[Offer | None]] = {}
        self._heads: dict[int, HeadInHost | None] = {}
        self._known: dict[int, tuple[tuple[Problem, ...], tuple[str, ...]]] = {}

    def problem(self, tokens: int) -> tuple[Problem, tuple[str, ...]]:
        """The first of ``problems``, which needs least."""
        problems, notes = self.problems(tokens)
        return problems[0], notes

    def problems(self, tokens: int) -> tuple[tuple[Problem, ...], tuple[str, ...]]:
        """What the planner is asked for ``tokens``, that which needs least first; what it is not offered."""
        if tokens not in self._known:
            try:
                self._known[tokens] = self._problems(tokens)
            except Uneven:
                self.made = self._make(True)
                self._known[tokens] = self._problems(tokens)
        return self._known[tokens]

    def offers(self, tokens: int) -> list[Offer | None]:
        """Of each call of ``problems``, what it takes and spares if its 4-bit weights stay dequantised."""
        self.problems(tokens)
        return self._offers[tokens]

    def head(self, tokens: int) -> HeadInHost | None:
        """Which call of ``problems`` reads a head from host memory."""
        self.problems(tokens)
        return self._heads[tokens]

    def _problems(self, tokens: int) -> tuple[tuple[Problem, ...], tuple[str, ...]]:
        made = self.made
        program = traced(made, self._rows, tokens, self._autocast)
        calls = calls_of_all(program, made.left_out)
        in_host = packed_weights(program) if LAYERS in made.host.there else frozenset()
        ways = Ways(program, self._machine, in_host)
        everything = in_tracing(made, self._autocast, ways.all)
        # Those in host memory are there for want of room.
        weights = {} if in_host else weights_of(program)
        self._offers[tokens] = [offer(weights.get(call.region, ()), self._machine) for call in calls]
        # Where it is not in host memory, nothing copies it.
        self._heads[tokens] = head_in_host(calls, lambda _: True)
        static = foreseen_bytes(made.weight_bytes, made.trained_bytes)
        name = f"{self._rows} × {tokens:,} tokens"
        problems = tuple(
            Problem(parts_of(calls, found), static, self._device, self._host, name, window=aside.nbytes)
            for aside, found in everything.items()
        )
        return problems, tuple(ways.notes)
