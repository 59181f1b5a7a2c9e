"""A matrix of scipy.sparse, from the arrays that it is stored as, to an ordinary one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from expt.errors import DataError

FORMATS = ("csr", "csc", "bsr", "coo", "dia")
"""Those that `scipy.sparse.save_npz` writes."""


def to_dense(parts: Mapping[str, Any]) -> npt.NDArray[Any]:
    """Return the matrix [M, N] that these parts stand for, by the names SciPy gives them.

    Every index is checked: SciPy's own conversion would write wherever one points. Raises
    `DataError` when the parts do not fit each other.
    """
    import scipy.sparse

    kind, shape = _text(parts.get("format", "")), parts.get("shape")
    if kind not in FORMATS or shape is None:
        raise DataError(f"holds a sparse matrix of format {kind!r}; expected {', '.join(FORMATS)}")
    try:
        size = tuple(int(length) for length in shape)
        data = _numbers(parts["data"])
        if kind == "coo":
            places = parts["coords"] if "coords" in parts else (parts["row"], parts["col"])
            where: Any = (data, tuple(_numbers(place) for place in places))
        elif kind == "dia":
            where = (data, _numbers(parts["offsets"]))
        else:
            where = (data, _numbers(parts["indices"]), _numbers(parts["indptr"]))
        matrix = getattr(scipy.sparse, f"{kind}_matrix")(where, shape=size)
        if kind in ("csr", "csc", "bsr"):
            matrix.check_format(full_check=True)
        dense: npt.NDArray[Any] = matrix.toarray()
    except (KeyError, TypeError, ValueError, IndexError, OverflowError, MemoryError) as error:
        raise DataError(
            f"holds a sparse matrix ({kind}) whose parts do not fit each other "
            f"({type(error).__name__}: {error}); save it again, scipy.sparse.save_npz(path, matrix)"
        ) from error
    return dense


def _numbers(raw: Any) -> npt.NDArray[Any]:
    array = np.array(raw, subok=False)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"an array of {array.dtype} among them")
    return array


def _text(raw: Any) -> str:
    value = raw.item() if isinstance(raw, np.ndarray) else raw
    return value.decode("ascii", "replace") if isinstance(value, bytes) else str(value)
