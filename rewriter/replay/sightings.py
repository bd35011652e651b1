"""When a size is recorded: once it has come back, the more often the less a recording of it gains.

Of short steps a bucket is recorded at once, since buckets are known to come back, and other sizes at their
fourth run. A long step is run twice more for its recording, which gains a few per cent of a step at most: its
size has to come three times in a row, as where all batches have one length, or to be frequent.
"""

from collections import Counter

_RUNS_BEFORE_BUCKET, _RUNS_BEFORE_SIZE = 1, 3
_IN_A_ROW, _FREQUENT = 3, 32


class Sightings:
    """Counts calls by size: a length, and the other sizes among their inputs."""

    def __init__(self):
        self._runs: Counter[tuple] = Counter()
        self._runs_of_others: Counter[tuple] = Counter()
        self._latest: tuple | None = None
        self._in_a_row = 0

    def add(self, key: tuple) -> None:
        """A call of the size ``key``: its length as it would be recorded, then its other sizes."""
        self._runs[key] += 1
        self._runs_of_others[key[1:]] += 1
        self._in_a_row = self._in_a_row + 1 if key == self._latest else 1
        self._latest = key

    def is_time(self, key: tuple, *, short: bool, is_bucket: bool) -> bool:
        """Whether to record the latest call, which was of this size."""
        if not short:
            return self._in_a_row >= _IN_A_ROW or self._runs[key] >= _FREQUENT
        if is_bucket:
            return self._runs_of_others[key[1:]] > _RUNS_BEFORE_BUCKET
        return self._runs[key] > _RUNS_BEFORE_SIZE
