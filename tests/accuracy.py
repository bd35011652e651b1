"""The accuracy criterion of every kernel and rewrite: as near to fp64 as eager is.

16-bit results: ``ours`` may be at most as far from the fp64 truth as ``eager`` in the median, and at most
twice as far in the worst element. Rounding to 16 bits dominates there, at the same places in both.

fp32 results: at most 1.5 times as far in the median, and 3 times in the worst element. Nothing is rounded to
fewer bits; what differs is the order of sums, and the GPU's own exponential, good to two units in the last
place where the library's is good to one. Neither can be had without giving up the fusion.

To both medians comes the noise of their measurement: medians of ``n`` errors of one distribution differ by
1.17 * sqrt(2 / n) of their value (one standard deviation, normal errors), and twice that is allowed: 33% for
100 elements, 1% for 100,000. Where eager happens to be better than its dtype promises, half a unit in the
last place (median) and two units (worst) are always allowed: no result of that dtype can promise more.
"""

import math

import torch

LIMITS = {torch.float32: (1.5, 3.0)}  # (median, worst), in eager's errors
NARROW_LIMITS = (1.0, 2.0)


def assert_as_accurate(ours, eager, truth, *, name="result", median=None, worst=None, slack=1.0, size=0.0):
    """Compare one tensor, computed by us and by eager in a model's dtype, with its fp64 value.

    Args:
        ours, eager: tensors of one shape and dtype.
        truth: the same value computed in fp64.
        median, worst: limits in place of the dtype's own.
        slack: factor on the limit of the median, for a rounding that the op documents.
        size: of terms that cancel in the result, half a rounding unit of which is no error: eager may meet
            an exact zero by doing nothing where another order of the same sums leaves a rounding.
    """
    assert ours.shape == eager.shape == truth.shape, f"{name}: {ours.shape}, {eager.shape}, {truth.shape}"
    assert ours.dtype == eager.dtype, f"{name}: dtype {ours.dtype} where eager has {eager.dtype}"
    assert truth.dtype == torch.float64, f"{name}: the truth is {truth.dtype}, not float64"
    if truth.numel() == 0:
        return
    assert torch.isfinite(truth).all(), f"{name}: the truth is not finite"
    assert torch.isfinite(ours).all(), f"{name}: not finite"
    own_median, own_worst = LIMITS.get(ours.dtype, NARROW_LIMITS)
    noise = 1 + 2 * 1.17 * math.sqrt(2 / truth.numel())
    factor = slack * noise * (own_median if median is None else median)
    worst_factor = own_worst if worst is None else worst
    unit = torch.finfo(ours.dtype).eps
    error, allowed = (ours.double() - truth).abs(), (eager.double() - truth).abs()
    typical = max(truth.abs().median().item(), size)
    median_limit = max(factor * allowed.median().item(), 0.5 * unit * typical)
    largest = max(truth.abs().max().item(), size)
    worst_limit = max(worst_factor * allowed.max().item(), 2.0 * unit * largest)
    assert error.median().item() <= median_limit, (
        f"{name}: median error {error.median().item():.3e} exceeds {median_limit:.3e}, from eager's"
    )
    assert error.max().item() <= worst_limit, (
        f"{name}: worst error {error.max().item():.3e} exceeds {worst_limit:.3e}, from eager's"
    )
