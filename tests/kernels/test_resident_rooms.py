"""Matrices of adapters in their rooms: what one launch, or PyTorch's own operations, writes and leaves."""

import pytest
import torch

from rewriter.kernels.resident_rooms import Rooms
from rewriter.kernels.resident_rooms_triton import Table

device = "cuda" if torch.cuda.is_available() else "cpu"
SCALES = (1.0, 2.0, 4.0)
# More elements than a program copies at once, and than all programs of a matrix do.
SHAPES = ((3, 5), (70, 33), (17, 4100))


def wholes(dtype):
    """Weights with a room to the right or beneath, full of ones, and the rooms."""
    found = [torch.ones(rows + 2, columns + 3, dtype=dtype, device=device) for rows, columns in SHAPES]
    return found, [whole[1:-1, 2:-1] for whole in found]


def given(dtype):
    made = [torch.randn(shape, device=device).to(dtype) for shape in SHAPES]
    # One is transposed in memory.
    return [made[0], made[1].t().contiguous().t(), made[2]]


def expected(matrices, dtype):
    found, rooms = wholes(dtype)
    for room, matrix, scale in zip(rooms, matrices, SCALES, strict=True):
        room.copy_(matrix.double() * scale)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_one_launch_writes_the_rooms_and_nothing_beside_them(dtype):
    found, rooms = wholes(dtype)
    matrices = given(torch.float32)
    table = Table(rooms, matrices, SCALES)
    for _ in range(2):
        table.fill()
        for ours, theirs in zip(found, expected(matrices, dtype), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        # What is in a matrix is read anew.
        for matrix in matrices:
            matrix.mul_(-3)


def test_rooms_of_several_dtypes_are_filled_from_matrices_that_need_gradients():
    ours, rooms = (sum(both, []) for both in zip(wholes(torch.bfloat16), wholes(torch.float32), strict=True))
    matrices = [m.requires_grad_() for m in (*given(torch.bfloat16), *given(torch.float32))]
    all_of_them = Rooms(rooms, matrices, SCALES * 2)
    with torch.no_grad():
        all_of_them.fill(matrices)
        theirs = expected(matrices[:3], torch.bfloat16) + expected(matrices[3:], torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_room_whose_columns_are_apart_is_refused():
    with pytest.raises(ValueError, match="next to each other"):
        Rooms([torch.ones(4, 6).t()], [torch.ones(6, 4)], [1.0])
    Rooms([], [], []).fill([])
