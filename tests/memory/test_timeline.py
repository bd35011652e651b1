"""The chart of a plan's memory, as text and as an image."""

from xml.etree import ElementTree

import pytest

from rewriter.memory.plan import Choice, MemoryPlan, Part, Problem
from rewriter.memory.planner import plan
from rewriter.memory.timeline import svg, text

GIB = 2**30


def planned(count: int, host: int = 0) -> MemoryPlan:
    choices = (
        Choice("keep", GIB, 0, 2 * GIB, 3 * GIB, 1.0, 2.0),
        Choice("host", 0, GIB, 2 * GIB, 3 * GIB, 1.0, 2.5, 0.5, 0.5),
    )
    parts = tuple(Part(f"layer <{i}>", "layer", choices) for i in range(count))
    budget = (count + 7) * GIB if not host else (count // 2 + 7) * GIB
    return plan(Problem(parts, 2 * GIB, budget, host))


@pytest.mark.parametrize("count", [1, 3, 40, 300])
@pytest.mark.parametrize("host", [0, 1000 * GIB])
def test_charts_fit_a_hundred_columns_and_reach_the_peak(count, host):
    found = planned(count, host)
    chart = text(found)
    assert max(map(len, chart.splitlines())) <= 100
    assert f"device: {found.peak / GIB:.1f} GiB at the {found.where}" in chart
    # The highest row of the device has one full block at least: the peak.
    assert "█" in chart.splitlines()[1]
    assert ("host:" in chart) == (found.hosted > 0)
    assert "forward" in chart and "backward" in chart if count > 3 else True


def test_the_image_is_well_formed_and_needs_nothing_else():
    for found in (planned(1), planned(40), planned(40, 1000 * GIB)):
        image = svg(found)
        root = ElementTree.fromstring(image)
        assert root.tag.endswith("svg")
        assert "href" not in image and "url(" not in image
        assert f"at the {found.where}" in "".join(root.itertext())
        colors = {shape.get("fill") for shape in root.iter("{http://www.w3.org/2000/svg}polygon")}
        assert len(colors) >= 2


def test_names_are_escaped():
    assert "layer &lt;" in svg(planned(3))
