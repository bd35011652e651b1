"""Random plans: at no moment of a step are more copies under way than the plan leaves free there."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from unittest.mock import patch

import pytest
import torch

from rewriter.memory.arena import HostArena
from rewriter.memory.groups import Group
from rewriter.memory.layout import Layout
from rewriter.memory.plan import Choice, MemoryPlan, Part, Problem
from rewriter.memory.spare import spare_of
from rewriter.memory.tickets import Copy, Ticket
from rewriter.memory.transfer import Transfers


@dataclass(frozen=True)
class Sent:
    """By a part that bounds what is under way: bytes of each tensor that it sends whole, and of each tile."""

    wholes: tuple[int, ...]
    tiles: tuple[int, ...]


def _random_plan(draw: random.Random) -> tuple[MemoryPlan, list[Sent | None]]:
    window, sent, choices = draw.choice([0, 500, 1500]), [], []
    for i in range(draw.randint(2, 7)):
        bounds = draw.random() < 0.75
        wholes = tuple(draw.randint(1, 400) for _ in range(draw.randint(0, 3) if bounds else 0))
        count = draw.randint(0, 8) if bounds and window else 0
        tiles = tuple(draw.randint(1, max(window // 3, 1)) for _ in range(count))
        sent.append(Sent(wholes, tiles) if bounds else None)
        # What is sent whole has its place in both directions, and a tile where it is read.
        ahead, back = sum(wholes), sum(wholes) + max(tiles, default=0)
        peaks = (ahead + draw.randint(0, 3000), back + draw.randint(0, 3000))
        saved, hosted = draw.randint(0, 300), ahead + sum(tiles)
        choices.append(Choice(f"{i}", saved, hosted, *peaks, 1.0, 1.0, flight=max(0, ahead - window)))
    parts = tuple(Part(choice.name, choice.name, (choice,)) for choice in choices)
    peak = MemoryPlan(Problem(parts, 0, 1 << 40, 1 << 40, window=window), tuple(choices)).peak
    problem = Problem(parts, 0, peak + draw.choice([0, 300, 2000]), 1 << 40, window=window)
    return MemoryPlan(problem, tuple(choices)), sent


class _Step:
    """Steps by ``plan``; after each move it looks at what is there."""

    def __init__(self, plan: MemoryPlan, sent: Sequence[Sent | None], draw: random.Random):
        self.plan, self.sent, self.draw = plan, sent, draw
        self.transfers = Transfers(HostArena(1 << 20, pin=False, growth=1 << 16), "cpu")
        self.moments = {(moment.part, moment.backward): moment for moment in plan.moments}
        # What has its place in the part whose backward runs.
        self.placed: list[Copy] = []

    def run(self) -> None:
        window = self.plan.problem.window
        self.transfers.expect(spare_of(self.plan, [own is not None for own in self.sent], window))
        made = [self._forward(i, own) for i, own in enumerate(self.sent)]
        for i in reversed(range(len(made))):
            self._backward(i, made[i])

    def _forward(self, i: int, own: Sent | None) -> tuple[Group, list[Ticket]] | None:
        if own is None:
            return self._look(i, False)
        tickets, window, placed = [], self.plan.problem.window, 0
        with self.transfers.group(window) as group:
            self._look(i, False)
            kinds = [(nbytes, False) for nbytes in own.wholes] + [(nbytes, True) for nbytes in own.tiles]
            for nbytes, tile in self.draw.sample(kinds, len(kinds)):
                tickets.append(self.transfers.offload(torch.empty(nbytes, dtype=torch.uint8), tile=tile))
                placed += 0 if tile else nbytes
                self._look(i, False, -placed)
            self.draw.shuffle(tickets)
            group.will_need(tickets)
        return group, tickets

    def _backward(self, i: int, made: tuple[Group, list[Ticket]] | None) -> None:
        if made is None:
            return self._look(i, True)
        group, tickets = made
        own, empty = [copy for copy in group.copies if group.places_wholes and not copy.tile], Layout.empty
        self.placed = own

        def looking(layout: Layout, device: torch.device) -> torch.Tensor:
            counts = all(layout is not copy.layout for copy in self.placed)
            self._look(i, True, layout.nbytes if counts else 0)
            return empty(layout, device)

        with patch.object(Layout, "empty", looking):
            self.transfers.begin_backward(group)
            self._look(i, True)
            for ticket in tickets:
                self.placed = [*own, ticket._copy]
                self.transfers.reload(ticket)
                self._look(i, True)
        self.placed = []

    def _look(self, part: int, backward: bool, more: int = 0) -> None:
        leaving = [copy for copy in self.transfers._leaving._copies if copy.source is not None]
        back = [c for group in self.transfers._groups for c in group.copies if c.device is not None]
        there = sum(copy.layout.nbytes for copy in (*leaving, *back) if copy not in self.placed)
        moment = self.moments[part, backward]
        assert moment.static + moment.earlier + moment.own + max(there + more, 0) <= max(
            self.plan.limit, moment.device
        )


@pytest.mark.parametrize("seed", range(40))
def test_no_more_is_under_way_than_the_plan_leaves_free_at_any_moment(seed):
    draw = random.Random(seed)
    _Step(*_random_plan(draw), draw).run()
