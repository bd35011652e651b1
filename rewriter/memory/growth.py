"""How much larger a batch is than the one that a program was traced with.

Bytes and products go by the number of tokens. Attention takes time by the tokens times the length of their
sequences: twice the sequences take it twice as long, sequences of twice the length four times.
"""

from typing import NamedTuple


class Growth(NamedTuple):
    """How many times the ``tokens`` of the batch at hand, and the ``length`` of its sequences."""

    tokens: float = 1.0
    length: float = 1.0


# The batch at hand.
AS_TRACED = Growth()
