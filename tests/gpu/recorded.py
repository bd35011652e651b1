"""What recordings on a GPU give, for tests."""


def gradient_of(recording):
    """Of its one trained input."""
    recording.forward()
    recording.seeds[0].fill_(1.0)
    (gradient,) = recording.backward()
    assert gradient is not None
    return gradient
