import pytest

from rewriter.size_text import size_text


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0.00 GiB"),
        (1000, "1,000 bytes"),
        (2**20, "1.00 MiB"),
        (2**27, "0.12 GiB"),
        (3 * 2**30, "3.00 GiB"),
    ],
)
def test_a_size_is_told_in_the_unit_that_leaves_a_tenth_of_it(size, text):
    assert size_text(size) == text


def test_a_size_may_be_told_in_fewer_digits():
    assert size_text(1.26 * 2**30, 1) == "1.3 GiB"
