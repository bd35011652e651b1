import pytest

from rewriter.size_text import size_text


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0.00 GiB"),
        (1000, "1,000 bytes"),
        (2**20, "1.00 MiB"),
        (2**29, "512.00 MiB"),
        (999.9 * 2**20, "999.90 MiB"),
        (1000 * 2**20, "0.98 GiB"),
        (3 * 2**30, "3.00 GiB"),
    ],
)
def test_a_size_is_told_in_mib_below_a_gib(size, text):
    assert size_text(size) == text


def test_a_size_may_be_told_in_fewer_digits():
    assert size_text(1.26 * 2**30, 1) == "1.3 GiB"


def test_sizes_of_one_axis_are_told_in_one_unit():
    assert [size_text(2**29 * i, 1, like=2**30) for i in range(3)] == ["0.0 GiB", "0.5 GiB", "1.0 GiB"]
    assert size_text(0, 1, like=2**20) == "0.0 MiB"
