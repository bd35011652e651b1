"""Lengths in steps: how long the inputs of a captured program are made, so that a few captures serve all.

Steps of 64 tokens up to 512, then eighths of the power of two below: no length is padded by more than an
eighth, or 63 tokens, and lengths up to 4,096 make 32 buckets. Steps of 32 would double the recordings.

Long steps are bound by their products, of which padding makes more, and gain little from a recording. Theirs
are multiples of 8, and beyond 256 thirty-seconds of the power of two below: a length is padded by less than
1/32, by 1/64 on average.
"""

_STEP, _FINE_STEP = 64, 8


def bucket(length: int) -> int:
    """The least length of a bucket that ``length`` fits in."""
    return _rounded(length, max(_STEP, _power_below(length) >> 3))


def fine_bucket(length: int) -> int:
    """The same for long steps, with little padding."""
    return _rounded(length, max(_FINE_STEP, _power_below(length) >> 5))


def _power_below(length: int) -> int:
    """The largest power of two below ``length``; 0 for 1."""
    return (1 << (length - 1).bit_length()) >> 1 if length > 1 else 0


def _rounded(length: int, step: int) -> int:
    return -(-length // step) * step
