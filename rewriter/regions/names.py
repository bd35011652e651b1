"""What regions are called, by what repeats: beginning, layer_a, layer_b, ..., end."""

import string
from collections.abc import Iterator, Sequence, Set


def region_names(keys: Sequence[str], taken: Set[str]) -> dict[str, str]:
    """A name for each of ``keys``, the kinds of region in order of their calls; none of them ``taken``."""
    count = {key: keys.count(key) for key in keys}
    letters = _letters()
    repeated = [i for i, key in enumerate(keys) if count[key] > 1]
    first, last = (repeated[0], repeated[-1]) if repeated else (len(keys), -1)
    names: dict[str, str] = {}
    for index, key in enumerate(keys):
        if key in names:
            continue
        if index == 0 and index < first:
            names[key] = free_name("beginning", taken)
        elif index == len(keys) - 1 and index > last:
            names[key] = free_name("end", taken)
        else:
            names[key] = free_name(f"layer_{next(letters)}", taken)
    return names


def free_name(name: str, taken: Set[str]) -> str:
    """``name``, lengthened where a node of the graph has it: both stand in one text."""
    while name in taken:
        name = f"{name}_region"
    return name


def _letters() -> Iterator[str]:
    yield from string.ascii_lowercase
    number = 0
    while True:
        number += 1
        yield from (f"{letter}{number}" for letter in string.ascii_lowercase)
