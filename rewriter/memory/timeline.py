"""A plan's memory over a step, for people: a chart in plain text, and the same as one SVG image.

Both show the device above, with the budget as a line, and the host below, from the first forward to the last
backward. They need nothing but the plan, and load nothing.
"""

from collections.abc import Sequence
from functools import partial
from html import escape

from rewriter.memory.plan import MemoryPlan, Moment
from rewriter.size_text import size_text

_BLOCKS = " ▁▂▃▄▅▆▇█"
_MARGIN = 11  # "139.9 GiB ┤"
_size = partial(size_text, digits=1)


def text(plan: MemoryPlan, *, width: int = 100, height: int = 8) -> str:
    """A chart of ``width`` columns at most, ``height`` lines for the device and a few for the host."""
    columns = min(width - _MARGIN, len(plan.moments))
    repeat = max(1, (width - _MARGIN) // len(plan.moments))
    groups = _spread(plan.moments, columns)
    device = [max(m.device for m in group) for group in groups for _ in range(repeat)]
    host = [max(m.host for m in group) for group in groups for _ in range(repeat)]
    turn = sum(not group[0].backward for group in groups) * repeat
    lines = [
        f"device: {_size(plan.peak)} at the {plan.where}; budget {_size(plan.problem.device_budget)}, "
        f"{_size(plan.problem.static)} of it all the time",
        *_bars(device, max(plan.peak, 1), height),
        " " * _MARGIN + _captions(len(device), turn),
    ]
    if plan.hosted:
        lines += [
            f"host: {_size(plan.hosted)}; budget {_size(plan.problem.host_budget)}",
            *_bars(host, plan.hosted, (height + 1) // 2),
        ]
    return "\n".join(line[:width].rstrip() for line in lines)


def _spread(moments: Sequence[Moment], columns: int) -> list[list[Moment]]:
    """Moments in ``columns`` groups of nearly equal size; each is in one, so that no peak is lost."""
    edges = [len(moments) * column // columns for column in range(columns + 1)]
    return [list(moments[a:b]) for a, b in zip(edges, edges[1:], strict=False)]


def _bars(values: Sequence[int], top: int, height: int) -> list[str]:
    lines = []
    for row in reversed(range(height)):
        eighths = [round(value / top * height * 8) - row * 8 for value in values]
        label = _size(top * (row + 1) / height, like=top).rjust(_MARGIN - 2)
        lines.append(f"{label} ┤" + "".join(_BLOCKS[min(8, max(0, e))] for e in eighths))
    return lines


def _captions(columns: int, turn: int) -> str:
    return "forward"[:turn].ljust(turn) + "backward"[: columns - turn]


_WIDTH, _HEIGHT, _HOST_HEIGHT = 900, 260, 110
_LEFT, _RIGHT, _TOP, _GAP = 70, 16, 56, 46
_BANDS = (
    ("static", "#8da0cb", "all the time"),
    ("earlier", "#66c2a5", "saved by earlier parts"),
    ("flight", "#ffd92f", "copies under way"),
    ("own", "#fc8d62", "the part itself"),
)


def svg(plan: MemoryPlan) -> str:
    """The same as a self-contained SVG image: the device's bytes by what they are, and the host's."""
    steps = len(plan.moments)
    turn = sum(not moment.backward for moment in plan.moments)
    top = max(plan.peak, plan.problem.device_budget if plan.problem.device_budget < 2 * plan.peak else 0, 1)
    base = _TOP + _HEIGHT
    shapes = []
    below = [0] * steps
    for name, color, _ in _BANDS:
        above = [low + getattr(moment, name) for low, moment in zip(below, plan.moments, strict=True)]
        shapes.append(_band(below, above, top, base, _HEIGHT, color))
        below = above
    if plan.problem.device_budget <= top:
        y = base - _HEIGHT * plan.problem.device_budget / top
        shapes.append(_line(_LEFT, y, _WIDTH - _RIGHT, y, "#c00", dashed=True))
        shapes.append(_label(_WIDTH - _RIGHT, y - 4, f"budget {_size(plan.problem.device_budget)}", "end"))
    shapes += _axis(base, _HEIGHT, top)
    x = _LEFT + (_WIDTH - _LEFT - _RIGHT) * turn / steps
    total = base + 24
    if plan.hosted:
        total = base + _GAP + _HOST_HEIGHT
        hosts = [moment.host for moment in plan.moments]
        shapes.append(_band([0] * steps, hosts, plan.hosted, total, _HOST_HEIGHT, "#b3b3b3"))
        shapes += _axis(total, _HOST_HEIGHT, plan.hosted)
        shapes.append(_label(_LEFT, total - _HOST_HEIGHT - 8, f"host: {_size(plan.hosted)}"))
        total += 16
    shapes.append(_line(x, _TOP, x, total - 16, "#555", dashed=True))
    shapes += [_label(_LEFT, base + 15, "forward"), _label(x + 4, base + 15, "backward")]
    shapes.append(_label(_LEFT, 18, f"device: {_size(plan.peak)} at the {plan.where}"))
    shapes += _legend()
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {total}" width="{_WIDTH}" '
        f'height="{total}" font-family="sans-serif" font-size="12">'
        f"<title>Memory over a step</title>{''.join(shapes)}</svg>"
    )


def _band(low: Sequence[int], high: Sequence[int], top: int, base: int, height: int, color: str) -> str:
    """The area between two staircases."""
    if all(a == b for a, b in zip(low, high, strict=True)):
        return ""
    wide = (_WIDTH - _LEFT - _RIGHT) / len(low)
    edges = [(_LEFT + i * wide, _LEFT + (i + 1) * wide) for i in range(len(low))]
    over = [(x, base - height * v / top) for pair, v in zip(edges, high, strict=True) for x in pair]
    under = [(x, base - height * v / top) for pair, v in zip(edges, low, strict=True) for x in pair]
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in [*over, *reversed(under)])
    return f'<polygon points="{points}" fill="{color}"/>'


def _axis(base: int, height: int, top: int) -> list[str]:
    marks = [
        _label(_LEFT - 6, base - height * i / 4 + 4, _size(top * i / 4, like=top), "end") for i in range(5)
    ]
    return [
        *marks,
        _line(_LEFT, base - height, _LEFT, base, "#333"),
        _line(_LEFT, base, _WIDTH - _RIGHT, base, "#333"),
    ]


def _legend() -> list[str]:
    shapes, x = [], _LEFT
    for _, color, meaning in _BANDS:
        shapes.append(f'<rect x="{x}" y="27" width="11" height="11" fill="{color}"/>')
        shapes.append(_label(x + 15, 37, meaning))
        x += 35 + 7 * len(meaning)
    return shapes


def _line(x1: float, y1: float, x2: float, y2: float, color: str, *, dashed: bool = False) -> str:
    dashes = ' stroke-dasharray="5 4"' if dashed else ""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}"{dashes}/>'


def _label(x: float, y: float, words: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'
