"""Seconds as text for people: the words in which reports, notes and progress give a time."""


def seconds_text(seconds: float) -> str:
    """``seconds`` in three digits of the largest unit that leaves one of it: "84.6 s", "4.51 ms", "20 µs"."""
    value, unit = seconds, "s"
    if 0 < seconds < 1e-3:
        value, unit = seconds * 1e6, "µs"
    elif 0 < seconds < 1:
        value, unit = seconds * 1e3, "ms"
    # Three digits of a thousand would be "1e+03".
    return f"{value:.3g} {unit}" if value < 999.5 else f"{value:,.0f} {unit}"
