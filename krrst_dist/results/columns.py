"""Columns of texts as numbers, so that NumPy can group rows."""

from __future__ import annotations

import numpy as np
import pyarrow as pa


def codes(column: pa.ChunkedArray) -> np.ndarray:
    """Equal texts of a column to equal numbers, from 0 on in the order in which they come."""
    return column.combine_chunks().dictionary_encode().indices.to_numpy().astype(np.int64)
