"""The values of whatever stands for a forgetting matrix."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["matrix_values"]


def matrix_values(matrix: Any) -> np.ndarray:
    """The values.

    Args:
        matrix: A `ForgettingMatrix`, or values `[M, N]`: an array, a tensor, a data frame or lists.

    Returns:
        float64 `[M, N]`, at least one entry finite.

    Raises:
        ValueError: It is none of these, or has no finite entry.
    """
    values = getattr(matrix, "values", None)
    try:
        result = np.asarray(matrix if values is None or callable(values) else values, np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"matrix: expected a ForgettingMatrix or values [M, N], got {type(matrix).__name__} ({error}); a run's folder is "
            "read by ForgettingMatrix.load"
        ) from None
    if result.ndim != 2 or not result.size:
        raise ValueError(f"matrix: expected values [M, N], got shape {result.shape}")
    if not np.isfinite(result).any():
        raise ValueError("matrix: expected at least one finite value, got none")
    return result
