"""Whether two systems' losses over the first steps are one curve, but for the rounding of bf16.

A bf16 value is off by up to 2^-9 of itself, and a loss is a mean over tokens whose errors are independent:
for n tokens the limit is 2^-5 of the loss over the root of n. At 4,096 tokens that is 2^-11; eager and
Inductor differ by a third of it. Errors that all tokens share do not shrink, so that n counts up to 4,096.
The loss is the run's largest: where a model learns its batches by heart, a small loss still has the errors
of weights that larger losses moved.
"""

from collections.abc import Sequence

STEPS = 20


def agreement(losses: Sequence[float], eager: Sequence[float], tokens: int) -> dict:
    """The differences over the first twenty steps, and whether the largest is within the limit."""
    pairs = list(zip(losses, eager, strict=False))[:STEPS]
    differences = [abs(ours - theirs) for ours, theirs in pairs]
    limit = 2**-5 * max(theirs for _, theirs in pairs) / min(tokens, 4096) ** 0.5
    return {
        "steps": len(pairs),
        "largest": round(max(differences), 6),
        "mean": round(sum(differences) / len(differences), 6),
        "limit": round(limit, 6),
        "agree": max(differences) <= limit,
    }
