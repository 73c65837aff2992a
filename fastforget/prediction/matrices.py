"""What stands for a forgetting matrix, and for the known entries of a new row."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["known_entries", "matrix_values"]


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
    predicted = getattr(matrix, "predicted", None)
    if predicted is not None:  # what is predicted teaches nothing
        result = np.where(predicted, np.nan, result)
    if not np.isfinite(result).any():
        raise ValueError("matrix: expected at least one finite value, got none")
    return result


def known_entries(columns: Any, values: Any, examples: int) -> tuple[np.ndarray, np.ndarray]:
    """The known entries of a new row.

    Args:
        columns: `[S]` integers.
        values: `[S]`; NaN where unknown after all.
        examples: N.

    Returns:
        Columns, int64, and values, float64, of those that are known.

    Raises:
        ValueError: A shape or a dtype is wrong, a column is out of range, or a value is infinite.
    """
    columns, values = np.asarray(columns), np.asarray(values, np.float64)
    if columns.ndim != 1 or (columns.size and not np.issubdtype(columns.dtype, np.integer)):
        raise ValueError(f"columns: expected integers [S], got {columns.dtype} {columns.shape}; pass indices")
    if values.shape != columns.shape:
        raise ValueError(f"values: expected shape [S] = {columns.shape}, got {values.shape}; pass one value a column")
    if columns.size and not 0 <= columns.min() <= columns.max() < examples:
        wrong = columns[(columns < 0) | (columns >= examples)][0]
        raise ValueError(f"columns: expected indices in [0, {examples}), got {wrong}; index the known tasks' columns")
    if np.isinf(values).any():
        raise ValueError(
            f"values: expected finite numbers or NaN, got infinity at {np.isinf(values).argmax()}; leave it out"
        )
    known = ~np.isnan(values)
    return columns[known].astype(np.int64), values[known]
