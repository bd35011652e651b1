"""Which rows have a label, without a wait in the middle of the device's work.

How many there are decides on the host which products are launched, and only the device knows it. ``nonzero``
makes the host wait until the device has run all that was launched, so that the device then idles until the
host has launched more. Here all rows are put into an order, those with a label first, which the device can
use at once; the number is copied to page-locked memory, and the host waits for that copy alone. What is
launched between the two, on the first rows of the order, runs while the host wakes up.
"""

import torch


class LabelledRows:
    """``order``: ``(rows,)`` int64, a permutation: rows with a label first, both parts in their own order."""

    def __init__(self, target: torch.Tensor, ignore_index: int) -> None:
        """``target``: ``(rows,)``. Launches the sort and the copy, and waits for neither."""
        ignored = (target == ignore_index).to(torch.uint8)
        self.order = torch.sort(ignored, stable=True).indices
        number = target.shape[0] - ignored.sum(dtype=torch.int64)
        self._copied = None
        if number.is_cuda:
            number = number.to("cpu", non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(target.device))
        self._number = number

    def count(self) -> int:
        """How many rows have a label; waits until the device knows."""
        if self._copied is not None:
            self._copied.synchronize()
        return int(self._number)
