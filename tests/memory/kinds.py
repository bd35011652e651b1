"""Every kind of plan by itself: the planner is offered no other way to run a layer."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from unittest.mock import patch

from rewriter.memory.choices import StagedChoice
from rewriter.memory.ways import ByAside, Ways


@dataclass(frozen=True)
class Kind:
    """Ways to run a layer; ``accepts`` says which.

    ``offloads``: whether anything leaves the device; ``hosted``: whether weights are in host memory;
    ``by_groups``: whether attention's backward may go group by group at any length; ``at_once``: whether it
    has all heads at once all the same.
    """

    accepts: Callable[[StagedChoice], bool]
    offloads: bool = False
    hosted: bool = False
    by_groups: bool = False
    at_once: bool = False


def _keeps(way: StagedChoice) -> bool:
    return not _sends(way) and not _again(way) and way.tile is None


def _sends(way: StagedChoice) -> bool:
    return way.schedule is not None and bool(way.schedule.offloaded)


def _again(way: StagedChoice) -> bool:
    return "recompute" in way.choice.name


def _has_its_input_alone(way: StagedChoice) -> bool:
    assert way.layer is not None and way.schedule is not None
    return _again(way) and not _sends(way) and way.schedule.kept == way.layer.own_inputs


def _sends_all(way: StagedChoice) -> bool:
    assert way.schedule is not None
    return _sends(way) and not _again(way) and not way.schedule.kept


def _saves_attention(way: StagedChoice) -> bool:
    """And makes what is before and after it again."""
    assert way.layer is not None and way.schedule is not None
    layer = way.layer
    saved = {layer.label(name) for name in (*way.schedule.kept, *way.schedule.offloaded)}
    return _again(way) and any(label.startswith("results of") for label in saved)


KINDS = {
    "keep": Kind(_keeps),
    "recompute": Kind(lambda way: _has_its_input_alone(way) and way.tile is None),
    "tiles": Kind(lambda way: _has_its_input_alone(way) and way.tile is not None),
    "offload": Kind(lambda way: _sends_all(way) and not way.window, offloads=True),
    "offload within a window": Kind(lambda way: _sends_all(way) and way.window > 0, offloads=True),
    "offload in tiles": Kind(lambda way: _sends_all(way) and bool(way.in_tiles), offloads=True),
    "attention saved": Kind(lambda way: _saves_attention(way) and not _sends(way)),
    "attention offloaded": Kind(lambda way: _saves_attention(way) and _sends(way), offloads=True),
    "groups of heads": Kind(_sends_all, offloads=True, by_groups=True),
    "heads at once": Kind(_sends_all, offloads=True, by_groups=True, at_once=True),
    "weights over the bus": Kind(
        lambda way: _sends_all(way) and not way.in_host.ahead, offloads=True, hosted=True
    ),
    "weights a layer ahead": Kind(
        lambda way: _sends_all(way) and way.in_host.ahead, offloads=True, hosted=True
    ),
}


@contextmanager
def only(kind: Kind) -> Iterator[None]:
    """Plans made inside run layers in ways of this kind, whatever the budget has room for."""
    every = Ways.all

    def some(self: Ways, *growth) -> ByAside:
        return _restricted(every(self, *growth), kind)

    with ExitStack() as stack:
        stack.enter_context(patch.object(Ways, "all", some))
        stack.enter_context(patch("rewriter.memory.planned._everything_kept", lambda *_: None))
        if kind.by_groups:
            stack.enter_context(patch("rewriter.memory.long_attention.LONG", 1))
        yield


def _restricted(found: ByAside, kind: Kind) -> ByAside:
    """Regions of which no way is of the kind, as the loss, run as they may."""
    kept = {
        aside: {
            r: [_as_asked(w, kind) for w in ways if w.schedule and kind.accepts(w)]
            for r, ways in by_region.items()
        }
        for aside, by_region in found.items()
    }
    bound = {region for by_region in kept.values() for region, ways in by_region.items() if ways}
    assert bound, "no layer has a way of this kind"
    return {
        aside: {region: (kept[aside] if region in bound else by_region)[region] for region in by_region}
        for aside, by_region in found.items()
        if all(kept[aside][region] for region in bound)
    }


def _as_asked(way: StagedChoice, kind: Kind) -> StagedChoice:
    """``way`` with its heads at once or not, where they may be."""
    if not kind.by_groups:
        return way
    if kind.at_once:
        return next((form for form in way.quicker if "heads at once" in form.choice.name), way)
    return replace(way, choice=replace(way.choice, quicker=()), quicker=())
