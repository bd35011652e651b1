"""What recordings on a GPU give, and what the report says of them, for tests."""

import rewriter


def notes() -> list[str]:
    """Of all graphs."""
    return [note for graph in rewriter.report().graphs for note in graph.notes]


def gradient_of(recording):
    """Of its one trained input."""
    recording.forward()
    recording.seeds[0].fill_(1.0)
    (gradient,) = recording.backward()
    assert gradient is not None
    return gradient
