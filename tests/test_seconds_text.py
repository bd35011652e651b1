import pytest

from rewriter.seconds_text import seconds_text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (20e-6, "20 µs"),
        (0.00451234, "4.51 ms"),
        (0.99974, "1,000 ms"),
        (1, "1 s"),
        (84.62, "84.6 s"),
        (4321.4, "4,321 s"),
    ],
)
def test_a_time_is_told_in_three_digits_of_the_unit_that_leaves_one_of_it(seconds, text):
    assert seconds_text(seconds) == text
