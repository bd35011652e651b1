"""Adapters' matrices into the rooms of weights that stay dequantised, all of a program in one launch.

    fill(matrices)       # for each: room[:, :] = scale * matrix

The rooms lie inside of weights (``resident_weight.Form``), so that PyTorch's own copy of many tensors, which
wants dense ones, launches for each: 96 times for gate, up and down of 32 layers. Here a table on the device
says where each matrix and each room is. What it moves is little: of gate and up of 32 layers of 8B and rank
32, 117 MB read and 59 written, 45 µs at 3.9 TB/s by that count; it was not timed.

On the CPU PyTorch's own operations do the same.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, _foreach_copy_, _foreach_mul  # pyright: ignore[reportPrivateImportUsage]


class Rooms:
    """The rooms of a program, to be filled again and again.

    Args:
        rooms: (rows, columns) each, 16 or 32 bits, of unit stride along columns; kept alive.
        matrices: of the same shapes, of any strides, 16 or 32 bits; not kept alive.
        scales: times each matrix; powers of two from 1 on, so that no dtype rounds.

    Raises:
        ValueError: a room's columns are not next to each other.
    """

    def __init__(self, rooms: Sequence[Tensor], matrices: Sequence[Tensor], scales: Sequence[float]):
        for room in rooms:
            if room.stride(1) != 1:
                raise ValueError(
                    f"rooms: one of {tuple(room.shape)} has strides {room.stride()}; its columns have to be "
                    f"next to each other."
                )
        self._rooms, self._scales = tuple(rooms), tuple(scales)
        self._tables = self._made(matrices) if any(room.is_cuda for room in rooms) else None

    def fill(self, matrices: Sequence[Tensor]) -> None:
        """Write them; may be recorded as a CUDA graph.

        Args:
            matrices: as they were given, where they were; only what is in them may be another.
        """
        if not self._rooms:
            return
        if self._tables is None:
            self._fill_by_operations(matrices)
            return
        for table in self._tables:
            table.fill()

    def used_on(self, stream: Any) -> None:
        """The tables' memory is given to nobody before what ``stream`` has been given by then."""
        for table in self._tables or ():
            table.used_on(stream)

    def _made(self, matrices: Sequence[Tensor]) -> list:
        from .resident_rooms_triton import Table

        found: dict[tuple, list[int]] = {}
        for i, (room, matrix) in enumerate(zip(self._rooms, matrices, strict=True)):
            found.setdefault((room.device, room.dtype, matrix.dtype), []).append(i)
        return [
            Table(
                [self._rooms[i] for i in some], [matrices[i] for i in some], [self._scales[i] for i in some]
            )
            for some in found.values()
        ]

    def _fill_by_operations(self, matrices: Sequence[Tensor]) -> None:
        matrices = [matrix.detach() for matrix in matrices]
        for scale in set(self._scales):
            some = [i for i, other in enumerate(self._scales) if other == scale]
            given = [matrices[i] for i in some]
            scaled = given if scale == 1 else _foreach_mul(given, scale)
            _foreach_copy_([self._rooms[i] for i in some], scaled)
