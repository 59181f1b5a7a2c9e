"""Reads a pickle that holds nothing but arrays and plain containers, and runs nothing of it.

An ordinary `pickle.load` calls whatever functions the file names. This one admits only the names
by which NumPy rebuilds an array (see "Restricting Globals" in Python's `pickle` documentation),
and answers to them with the stand-ins below: NumPy's own would let a file set the internal flags
of a dtype. Pickles written by Python 2 are read too, DCRNN's adj_mx.pkl being one.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from expt.errors import DataError

# Garbage can make the interpreter of pickle's opcodes raise nearly anything (its documentation
# says so); none of it comes from code that the file brought along.
_GARBAGE = (
    pickle.UnpicklingError,
    EOFError,
    ImportError,
    AttributeError,
    LookupError,
    ValueError,
    TypeError,
    ArithmeticError,
    MemoryError,
    RecursionError,
)


def load_array_pickle(path: Path) -> Any:
    """Return what the pickle holds: arrays of numbers or text, in lists, tuples and dicts.

    Raises `DataError` when it names any global that does not rebuild an array, or is damaged.
    """
    with path.open("rb") as file:
        try:
            return _unwrapped(_ArrayUnpickler(file, encoding="latin1").load())
        except DataError:
            raise
        except _GARBAGE as error:
            raise DataError(
                f"cannot be read as a pickle ({type(error).__name__}: {error}); it is damaged, cut "
                "short or of another format: copy or download it again"
            ) from error


class _Type:
    """Stands in for `numpy.dtype`."""

    def __init__(self, code: str, *_: Any) -> None:
        if not re.fullmatch(r"[biufSU]\d+", code):
            raise DataError(f"holds an array of type {code}; expected numbers or text")
        self.dtype: np.dtype[Any] = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        byte_order = state[1]
        self.dtype = self.dtype.newbyteorder(byte_order)


class _Array:
    """Stands in for `numpy.ndarray`, and for the empty one that `_reconstruct` makes."""

    array: npt.NDArray[Any]

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, is_fortran, data = state
        self.array = _from_bytes(data, kind, shape, "F" if is_fortran else "C")


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _scalar(kind: _Type, data: Any) -> Any:
    return _from_bytes(data, kind, (), "C")[()]


def _from_buffer(data: Any, kind: _Type, shape: Any, order: Any) -> npt.NDArray[Any]:
    return _from_bytes(data, kind, shape, order)


def _from_bytes(data: Any, kind: _Type, shape: Any, order: Any) -> npt.NDArray[Any]:
    raw = data.encode("latin1") if isinstance(data, str) else data  # Python 2 has no bytes
    return np.ndarray(shape, kind.dtype, buffer=raw, order=order).copy(order="C")


def _encode(text: str, encoding: str) -> bytes:
    """Protocols 0 to 2 write bytes as latin1 text; other codecs are never needed."""
    return text.encode({"latin1": "latin1"}[encoding])


_STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("_codecs", "encode"): _encode,
}
"""By the names of NumPy 1; NumPy 2 writes ``numpy._core``."""


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        key = (module.replace("numpy._core", "numpy.core"), name)
        if key not in _STAND_INS:
            raise DataError(
                f"is a pickle with anything but arrays: it asks for {module}.{name}, which is "
                "refused, and nothing of it was run; expected NumPy arrays, lists and dicts. If "
                "you trust the file, load it yourself and save the matrix with "
                "np.savez(path, adjacency=…, sensor_ids=…)"
            )
        return _STAND_INS[key]

    def persistent_load(self, pid: Any) -> NoReturn:
        raise DataError(f"is a pickle that refers to an outside object, {pid!r}; expected arrays")


def _unwrapped(content: Any) -> Any:
    if isinstance(content, _Array):
        return content.array
    if isinstance(content, list | tuple):
        return type(content)(_unwrapped(part) for part in content)
    if isinstance(content, dict):
        return {name: _unwrapped(part) for name, part in content.items()}
    return content
