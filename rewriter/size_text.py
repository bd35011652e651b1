"""Bytes as text for people: the words in which reports, notes and errors give a size."""

# From a thousand MiB on a size is told in GiB, so that none has more than three digits before the point.
_GIB_FROM = 1000 * 2**20


def size_text(size: float, digits: int = 2, like: float | None = None) -> str:
    """``size`` bytes: "20.97 GiB", "250.00 MiB", "1,024 bytes" below a tenth of a MiB.

    Args:
        digits: behind the point. Nothing at all is "0.00 GiB", as what stands beside it mostly is.
        like: another size, in whose unit this one is told: of an axis, its top.
    """
    scale = size if like is None else like
    if scale >= _GIB_FROM or not scale:
        return f"{size / 2**30:.{digits}f} GiB"
    if scale >= 2**20 / 10:
        return f"{size / 2**20:.{digits}f} MiB"
    return f"{size:,.0f} bytes"
