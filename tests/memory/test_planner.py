"""Plans against brute force, within budgets, in time; what is said where nothing fits."""

import itertools
import random
import subprocess
import sys

import pytest
import scipy.optimize

from rewriter.memory import planner, relaxation, search, staircase
from rewriter.memory.plan import Choice, Infeasible, MemoryPlan, Part, Problem, moments, seconds
from rewriter.memory.planner import best, fits, largest, least, plan

GIB = 2**30


def random_choice(r: random.Random, name: str) -> Choice:
    """Small whole numbers, so that ties are common."""
    saved, hosted = r.randint(0, 9), r.choice([0, 0, r.randint(1, 9)])
    copies = [hosted * r.randint(0, 3) / 2 for _ in range(2)]
    work = [float(r.randint(1, 9)) for _ in range(2)]
    forward, backward = saved + r.randint(0, 9), saved + hosted + r.randint(0, 9)
    flight = r.choice([hosted, hosted // 2, 0])
    return Choice(name, saved, hosted, forward, backward, *work, *copies, flight=flight)


def random_problem(seed: int) -> Problem:
    r = random.Random(seed)
    kinds = [tuple(random_choice(r, str(i)) for i in range(r.randint(1, 4))) for _ in range(r.randint(1, 3))]
    order = [r.randrange(len(kinds)) for _ in range(r.randint(1, 6))]
    parts = tuple(Part(f"part {i}", f"kind {k}", kinds[k]) for i, k in enumerate(order))
    static = r.randint(0, 10)
    return Problem(parts, static, static + r.randint(5, 60), r.choice([0, r.randint(0, 30), 1000]))


def by_brute_force(problem: Problem) -> tuple[tuple[float, int, int] | None, int | None]:
    """(seconds, host bytes, peak) of the best plan, and the lowest peak of all within the host budget."""
    ways, peaks = [], []
    for choices in itertools.product(*(part.choices for part in problem.parts)):
        hosted = sum(choice.hosted for choice in choices)
        if hosted <= problem.host_budget:
            peaks.append(max(moment.device for moment in moments(problem, choices)))
            if peaks[-1] <= problem.device_budget:
                ways.append((seconds(choices), hosted, peaks[-1]))
    return min(ways, default=None), min(peaks, default=None)


@pytest.mark.parametrize("seeds", [range(0, 60), range(60, 120)], ids=str)
def test_plans_are_those_of_brute_force(seeds):
    for seed in seeds:
        problem = random_problem(seed)
        expected, lowest = by_brute_force(problem)
        if expected is None:
            with pytest.raises(Infeasible) as error:
                plan(problem)
            assert error.value.least_device == lowest, seed
            continue
        found = plan(problem)
        assert (found.seconds, found.hosted, found.peak) == pytest.approx(expected), seed
        assert found.slack == 0.0
        assert least(problem).peak == lowest, seed


def test_searches_that_keep_and_combine_little_are_as_exact_in_what_they_prove(monkeypatch):
    monkeypatch.setattr(search, "_NARROW", 1)
    monkeypatch.setattr(search, "_FEW", 1)
    monkeypatch.setattr(staircase, "_COMBINED", 20)
    for seed in range(40):
        expected, _ = by_brute_force(problem := random_problem(seed))
        if expected is not None:
            monkeypatch.setattr(planner, "WORK", 30 + 1000 * (seed % 5))
            found = plan(problem)
            assert found.seconds - found.slack <= expected[0] + 1e-9 <= found.seconds + 2e-9, seed
            monkeypatch.setattr(planner, "WORK", search.WORK)
            found = plan(problem)
            assert (found.seconds, found.hosted, found.peak) == pytest.approx(expected), seed


def layers(tokens: int, count: int) -> Problem:
    """Layers much like an 8B Llama's on an H200: the frontier of what may be kept, hosted and recomputed."""
    unit = 8192 * tokens
    size = {"h": 1.0, "out": 1.01, "q": 1.0, "k, v": 0.5, "gate, up": 7.0}
    again = {
        "out": 8e-12 * tokens**2 / 593e2,
        "q": 4e-8 * tokens,
        "k, v": 2e-8 * tokens,
        "gate, up": 3.4e-7 * tokens,
    }
    work = 6.3e-7 * tokens + again["out"]
    choices = []
    for kept in ((), ("out",), ("out", "q", "k, v"), ("out", "q", "k, v", "gate, up")):
        for hosted, tiles in itertools.product(((), ("h",), ("h", "out")), (1, 4)):
            if set(hosted) <= {"h", *kept} and not (tiles > 1 and "gate, up" in kept):
                there = int(unit * sum(size[a] for a in hosted))
                here = int(unit * sum(size[a] for a in ("h", *kept))) - there
                room = int(unit * (4 + 14 / tiles))
                recompute = sum(again[a] for a in again if a not in kept)
                name = f"keep {', '.join(('h', *kept))} · host {', '.join(hosted)} · tiles {tiles}"
                forward, backward = work + 1e-4 * tiles, 2 * work + recompute + 2e-4 * tiles
                copy = there / 55e9
                choices.append(
                    Choice(name, here, there, here + room, here + there + room, forward, backward, copy, copy)
                )
    ends = [Choice(name, 0, 0, 3 * unit, 3 * unit, 0.01, 0.02) for name in ("embed", "loss")]
    middle = [Part(f"layer {i}", "layer", tuple(choices)) for i in range(count)]
    parts = (Part("embedding", "embedding", (ends[0],)), *middle, Part("loss", "loss", (ends[1],)))
    return Problem(parts, 8 * GIB, 40 * GIB, 128 * GIB, f"{count} layers at {tokens:,} tokens")


def within(problem: Problem, device: int, host: int) -> Problem:
    return Problem(problem.parts, problem.static, device, host, problem.name)


def test_with_room_to_spare_nothing_is_recomputed_or_offloaded():
    found = plan(within(layers(8192, 32), 10**15, 10**15))
    assert found.hosted == 0
    assert all("gate, up" in choice.name for choice in found.choices[1:-1])


def test_no_moment_exceeds_its_budget_and_larger_budgets_are_never_slower():
    problem, before = layers(32768, 16), float("inf")
    for gib in (16, 18, 22, 30, 60, 139):
        found = plan(within(problem, gib * GIB, 4 * GIB))
        assert found.peak <= gib * GIB and found.hosted <= 4 * GIB
        assert found.seconds <= before * (1 + 1e-9) + found.slack
        before = found.seconds


def test_larger_budgets_are_never_slower_in_random_problems():
    for seed in range(20):
        problem = random_problem(seed)
        budgets = range(least(within(problem, 0, 1000)).peak, problem.static + 70, 7)
        times = [plan(within(problem, budget, 1000)).seconds for budget in budgets]
        assert times == sorted(times, reverse=True), seed


def random_kind(r: random.Random) -> tuple[Choice, ...]:
    """24 choices, few of them dominated, no two alike to their neighbours."""
    choices = []
    for i in range(24):
        kept, hosted = r.random(), r.choice([0.0, r.random()])
        saved, there = int(kept * 3 * GIB), int(hosted * GIB)
        room = [int(r.random() * 2 * GIB) for _ in range(2)]
        work = 0.02 * (1 + r.random() / 10), 0.05 * (1.5 - kept / 2 + r.random() / 5 - hosted / 5)
        copies = there / 55e9, there / 55e9
        choices.append(Choice(str(i), saved, there, saved + room[0], saved + there + room[1], *work, *copies))
    return tuple(choices)


class Effort:
    """What plans take: programs that are solved, and suffixes that are made or compared."""

    def __init__(self, monkeypatch):
        self.programs, self._searches = 0, (searches := [])
        solved = relaxation._solved

        def counted(*given):
            self.programs += 1
            return solved(*given)

        class Noted(search.Search):
            def __init__(self, *given):
                super().__init__(*given)
                searches.append(self)

        monkeypatch.setattr(relaxation, "_solved", counted)
        monkeypatch.setattr(planner, "Search", Noted)

    @property
    def suffixes(self) -> int:
        return sum(search.done for search in self._searches)


@pytest.fixture
def effort(monkeypatch):
    return Effort(monkeypatch)


# What ``examples/benchmarks/search_times.py`` times: the programs of one problem, and a search's work, which
# the last stage of it may exceed.
PROGRAMS, SUFFIXES = 12, 1.1 * search.WORK


@pytest.mark.parametrize(("gib", "host"), [(24, 64), (80, 64), (139, 0)])
def test_80_layers_are_planned_with_no_more_than_a_bounded_effort(gib, host, effort):
    problem = within(layers(65536, 80), gib * GIB, host * GIB)
    try:
        found = plan(problem)
        assert found.slack <= 0.001 * found.seconds
    except Infeasible as error:
        assert error.least_device is not None and error.least_device > gib * GIB
        # The least that would do is two more searches: what is said, and what is thrown.
        assert effort.suffixes <= 3 * SUFFIXES
        return
    assert effort.programs <= 2 * PROGRAMS and effort.suffixes <= SUFFIXES


class _GivesUp:
    """A solver that solves as many programs as are said."""

    def __init__(self, solves: int):
        self.solves, self.real = solves, scipy.optimize.linprog

    def __call__(self, *arguments, **options):
        self.solves -= 1
        if self.solves >= 0:
            return self.real(*arguments, **options)
        return scipy.optimize.OptimizeResult(status=4, message="numerical difficulties", fun=None)


@pytest.mark.parametrize("solves", [0, 1])
def test_where_the_solver_gives_up_there_is_a_plan_and_how_far_it_may_be_from_the_best(solves, monkeypatch):
    problems = [random_problem(seed) for seed in range(4)]
    expected = [by_brute_force(problem) for problem in problems]
    hard = within(layers(65536, 80), 80 * GIB, 64 * GIB)
    best_of_hard = plan(hard).seconds
    monkeypatch.setattr(scipy.optimize, "linprog", _GivesUp(solves))
    found = plan(hard)
    assert found.peak <= 80 * GIB and found.hosted <= 64 * GIB
    assert found.seconds == pytest.approx(best_of_hard, rel=1e-3)
    assert found.seconds - found.slack <= best_of_hard * (1 + 1e-9)
    for problem, (cheapest, lowest) in zip(problems, expected, strict=True):
        monkeypatch.setattr(scipy.optimize, "linprog", _GivesUp(solves))
        if cheapest is not None:
            found = plan(problem)
            assert (found.seconds, found.hosted, found.peak) == pytest.approx(cheapest)
        assert least(problem).peak == lowest


def test_three_alternating_kinds_of_24_choices_are_planned_with_a_bounded_effort(effort):
    r = random.Random(0)
    kinds = [random_kind(r) for _ in range(3)]
    parts = tuple(Part(f"part {i}", f"kind {i % 3}", kinds[i % 3]) for i in range(80))
    found = plan(Problem(parts, 0, 60 * GIB, 20 * GIB))
    assert effort.programs <= PROGRAMS and effort.suffixes <= SUFFIXES
    assert found.peak <= 60 * GIB and found.hosted <= 20 * GIB
    assert found.slack <= 0.001 * found.seconds


def test_where_bytes_wait_is_proven_not_to_matter_where_copies_hide():
    """Many plans that no price tells apart: a layer's bytes are on the device, in host memory, or in both."""
    sizes = {"x": 640, "out": 650, "q, k, v": 800}
    choices = []
    for fates in itertools.product(("keep", "offload", "recompute"), repeat=len(sizes)):
        saved, hosted = (
            sum(s for s, f in zip(sizes.values(), fates, strict=True) if f == fate)
            for fate in ("keep", "offload")
        )
        again = sum(s / 8192 for s, f in zip(sizes.values(), fates, strict=True) if f == "recompute")
        copy = hosted / 8192
        peaks = saved + hosted + 9000, saved + hosted + 9000
        choices.append(Choice(str(fates), saved, hosted, *peaks, 0.5, 1.0 + again, copy, copy))
    parts = tuple(Part(f"part {i}", "kind", tuple(choices)) for i in range(60))
    found = plan(Problem(parts, 0, 60_000, 50_000))
    assert found.slack == 0.0
    # All budgets together hold so many bytes; what is computed again of the rest is at least this.
    rest = 60 * sum(sizes.values()) - (60_000 - 9000) - 50_000
    assert found.seconds >= 60 * 1.5 + rest / 8192
    assert found.seconds <= 60 * 1.5 + (rest + 800) / 8192 + 0.1


def test_of_two_problems_with_equally_fast_plans_the_first_is_answered():
    first = layers(16384, 8)
    plain = within(first, 100 * GIB, 128 * GIB)
    windowed = Problem(first.parts, first.static, 100 * GIB, 128 * GIB, window=GIB)
    assert best([plain, windowed]).problem is plain
    assert best([windowed, plain]).problem is windowed


def test_the_fastest_of_two_problems_is_answered():
    tight, ample = within(layers(65536, 16), 30 * GIB, 0), within(layers(65536, 16), 60 * GIB, 64 * GIB)
    found = best([tight, ample])
    assert found.problem is ample and found.seconds == plan(ample).seconds


def test_an_infeasible_budget_names_the_least_that_would_do_and_its_largest_part():
    problem = within(layers(65536, 32), 12 * GIB, 0)
    with pytest.raises(Infeasible) as error:
        plan(problem)
    message = str(error.value)
    assert "12.0 GiB cannot hold 32 layers at 65,536 tokens" in message
    assert "what earlier parts save" in message and "of layer 31" in message
    enough = error.value.least_device
    assert enough is not None and f"at least {enough / GIB:.1f} GiB" in message
    assert plan(within(problem, enough, 0)).peak == enough
    with pytest.raises(Infeasible):
        plan(within(problem, enough - 1, 0))


def test_weights_that_do_not_fit_are_named():
    problem = Problem(layers(8192, 2).parts, 30 * GIB, 24 * GIB, 0)
    with pytest.raises(Infeasible, match="of which 30.0 GiB are weights and optimizer states"):
        plan(problem)


def test_a_host_budget_that_is_too_small_is_named():
    part = Part("layer", "layer", (Choice("host h", 0, 100, 10, 110, 1.0, 1.0),))
    with pytest.raises(
        Infeasible, match="50 bytes of host memory cannot hold .* at least 100 bytes"
    ) as error:
        plan(Problem((part,), 0, 1000, 50))
    assert error.value.least_device is None and error.value.least_host == 100


def test_the_largest_length_fits_and_the_next_does_not():
    def at(tokens: int) -> Problem:
        return within(layers(tokens, 8), 24 * GIB, 64 * GIB)

    tokens = largest(at, 500_000)
    assert tokens % 256 == 0 and fits(at(tokens)) and not fits(at(tokens + 256))
    assert largest(at, 1024) == 1024
    assert largest(lambda tokens: within(at(tokens), 0, 0), 1024) == 0


def test_copies_in_flight_count_at_the_next_part_and_wait_where_they_do_not_hide():
    host = Choice("host", 1, 10, 5, 12, 2.0, 4.0, 3.0, 5.0)
    keep = Choice("keep", 4, 0, 6, 7, 1.0, 3.0)
    problem = Problem((Part("a", "a", (host,)), Part("b", "b", (keep,))), 100, 1000, 10)
    found = plan(problem)
    assert found.timeline() == [
        ("forward of a", 105, 0),
        ("forward of b", 117, 10),
        ("backward of b", 118, 10),
        ("backward of a", 112, 10),
    ]
    assert found.seconds == 2.0 + 3.0 + 4.0 + 5.0
    assert (found.peak, found.where, found.hosted) == (118, "backward of b", 10)
    assert found.counts == {("a", "host"): 1, ("b", "keep"): 1}


def test_copies_of_the_last_part_are_waited_for():
    assert seconds([Choice("host", 0, 10, 10, 10, 2.0, 4.0, 3.0, 5.0)]) == 14.0


def test_of_equally_fast_plans_the_one_with_fewest_host_bytes_is_taken():
    choices = (Choice("host", 0, 5, 5, 5, 1.0, 1.0), Choice("keep", 5, 0, 5, 5, 1.0, 1.0))
    parts = tuple(Part(f"part {i}", "kind", choices) for i in range(20))
    found = plan(Problem(parts, 0, 60, 1000))
    # 20 parts of 5 bytes: the last moment leaves room for 55 saved before it, and for no copy in flight.
    assert found.peak <= 60 and found.hosted == sum(c.name == "host" for c in found.choices) * 5 == 40


@pytest.mark.parametrize(
    ("field", "value"),
    [("saved", -1), ("hosted", 1.5), ("forward_seconds", float("nan")), ("reload_seconds", -1.0)],
)
def test_numbers_that_make_no_sense_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        Choice(**{**vars(Choice("c", 1, 1, 1, 1, 1.0, 1.0)), field: value})


def test_parts_without_choices_and_problems_without_parts_are_refused():
    with pytest.raises(ValueError, match="no choices"):
        Part("layer", "layer", ())
    with pytest.raises(ValueError, match="nothing to plan"):
        Problem((), 0, 0, 0)


def test_planning_loads_no_torch():
    program = """
import sys
from pathlib import Path
sys.modules["torch"] = None
import types
for name in ("rewriter", "rewriter.memory"):
    package = types.ModuleType(name)
    package.__path__ = [str(Path.cwd() / name.replace(".", "/"))]
    sys.modules[name] = package
import rewriter.memory.planner, rewriter.memory.timeline
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_a_plan_adds_up():
    found = plan(layers(16384, 12))
    assert isinstance(found, MemoryPlan)
    assert found.peak == max(device for _, device, _ in found.timeline())
    assert sum(found.counts.values()) == len(found.choices) == 14
    assert max(host for *_, host in found.timeline()) == found.hosted
