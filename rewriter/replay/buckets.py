"""Lengths in steps: how long the inputs of a captured program are made, so that a few captures serve all.

Steps of 64 tokens up to 512, then eighths of the power of two below: no length is padded by more than an
eighth, or 63 tokens, and lengths up to 4,096 make 32 buckets. Steps of 32 were no faster (32 layers
of 8B, two rows, one H200: at 224 tokens 48 ms, at 256 46) and double the recordings.
"""

_STEP = 64


def bucket(length: int) -> int:
    """The least length of a bucket that ``length`` fits in."""
    step = max(_STEP, 1 << max(0, (length - 1).bit_length() - 4))
    return -(-length // step) * step
