"""The accuracy criterion of every kernel and rewrite: as near to fp64 as eager is.

``ours`` may be at most as far from the fp64 truth as ``eager`` in the median, and at most twice as far in
the worst element. Where eager happens to be better than its dtype promises, half a unit in the last place
(median) and two units (worst) are always allowed: no result of that dtype can promise more.
"""

import torch


def assert_as_accurate(ours, eager, truth, *, name="result", median=1.0, worst=2.0):
    """Compare one tensor, computed by us and by eager in a model's dtype, with its fp64 value.

    Args:
        ours, eager: tensors of one shape and dtype.
        truth: the same value computed in fp64.
    """
    assert ours.shape == eager.shape == truth.shape, f"{name}: {ours.shape}, {eager.shape}, {truth.shape}"
    assert ours.dtype == eager.dtype, f"{name}: dtype {ours.dtype} where eager has {eager.dtype}"
    assert truth.dtype == torch.float64, f"{name}: the truth is {truth.dtype}, not float64"
    if truth.numel() == 0:
        return
    assert torch.isfinite(truth).all(), f"{name}: the truth is not finite"
    assert torch.isfinite(ours).all(), f"{name}: not finite"
    unit = torch.finfo(ours.dtype).eps
    error, allowed = (ours.double() - truth).abs(), (eager.double() - truth).abs()
    median_limit = max(median * allowed.median().item(), 0.5 * unit * truth.abs().median().item())
    worst_limit = max(worst * allowed.max().item(), 2.0 * unit * truth.abs().max().item())
    assert error.median().item() <= median_limit, (
        f"{name}: median error {error.median().item():.3e} exceeds {median_limit:.3e}, from eager's"
    )
    assert error.max().item() <= worst_limit, (
        f"{name}: worst error {error.max().item():.3e} exceeds {worst_limit:.3e}, from eager's"
    )
