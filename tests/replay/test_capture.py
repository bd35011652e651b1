"""What is said of a recording that fails."""

import pytest

from rewriter.replay import capture


class Graph:
    """Ends as often as it is told to, and fails to where the recording became invalid."""

    def __init__(self, is_valid=True):
        self.ended, self.is_valid = 0, is_valid

    def capture_end(self):
        self.ended += 1
        if not self.is_valid:
            raise RuntimeError("operation failed due to a previous error during capture")


@pytest.mark.parametrize("is_valid", [True, False])
def test_what_failed_is_told_not_that_the_recording_could_not_be_ended(is_valid):
    graph = Graph(is_valid)
    with pytest.raises(ValueError, match="the cause"), capture._ended(graph):  # pyright: ignore
        raise ValueError("the cause")
    assert graph.ended == 1


def test_a_recording_that_cannot_be_ended_fails():
    with capture._ended(Graph()):  # pyright: ignore
        pass
    with pytest.raises(RuntimeError, match="previous error"), capture._ended(Graph(False)):  # pyright: ignore
        pass
