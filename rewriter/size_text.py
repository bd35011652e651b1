"""Bytes as text for people: the words in which reports, notes and errors give a size."""


def size_text(size: float, digits: int = 2) -> str:
    """``size`` bytes in the unit that leaves a tenth or more of it: "20.97 GiB", "2.50 MiB", "1,024 bytes".

    Args:
        digits: behind the point. Nothing at all is "0.00 GiB", as what stands beside it mostly is.
    """
    if size >= 2**30 / 10 or not size:
        return f"{size / 2**30:.{digits}f} GiB"
    if size >= 2**20 / 10:
        return f"{size / 2**20:.{digits}f} MiB"
    return f"{size:,.0f} bytes"
