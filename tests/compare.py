"""The measure of parity used by all tests against reference implementations."""

from torch import Tensor

TOLERANCE = 1e-4  # of the reference's standard deviation; float32 on CPU


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """max |ours - reference| over the reference's standard deviation."""
    assert ours.shape == reference.shape, f"{tuple(ours.shape)} against {tuple(reference.shape)}"
    return ((ours.float() - reference.float()).abs().max() / reference.float().std()).item()


def assert_close_to_std(ours: Tensor, reference: Tensor, tolerance: float = TOLERANCE) -> None:
    error = relative_error(ours, reference)
    assert error <= tolerance, f"error {error:.2e} of the standard deviation, allowed {tolerance:.0e}"
