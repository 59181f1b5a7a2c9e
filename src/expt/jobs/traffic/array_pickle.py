"""Reads a pickle that holds nothing but arrays and plain containers, and runs nothing of it.

An ordinary `pickle.load` calls whatever functions the file names. This one admits only the names
in `_ADMITTED` ("Restricting Globals" in Python's `pickle` documentation). Behind `numpy.dtype`
stands a class of ours, as NumPy's own takes internal flags from the file, which can make it follow
numbers as pointers. Pickles written by Python 2 are read too, DCRNN's adj_mx.pkl being one.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from expt.errors import DataError
from expt.jobs.traffic.sparse import FORMATS

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

    A matrix of scipy.sparse comes as `PickledSparse`. Raises `DataError` when the file names any
    global that does not rebuild one of these, or is damaged.
    """
    with path.open("rb") as file:
        try:
            return _ArrayUnpickler(file, encoding="latin1").load()
        except DataError:
            raise
        except _GARBAGE as error:
            raise DataError(
                f"cannot be read as a pickle ({type(error).__name__}: {error}); it is damaged, cut "
                "short or of another format: copy or download it again"
            ) from error


class PickledSparse:
    """The attributes of a matrix of scipy.sparse; `expt.jobs.traffic.sparse` checks them."""

    format = ""
    parts: Mapping[str, Any] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.parts = {**state, "shape": state["_shape"], "format": self.format}


class _Type:
    """Stands in for `numpy.dtype`: takes the order of bytes from the file, and nothing else."""

    def __init__(self, code: str, *_: Any) -> None:
        if not re.fullmatch(r"[biufSU]\d+", code):
            raise DataError(f"holds an array of type {code}; expected numbers or text")
        self.dtype: np.dtype[Any] = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class Array(np.ndarray[Any, Any]):
    """An array whose type has passed `_Type`, and whose cells are the file's own."""

    def __new__(cls, *_: Any) -> Array:
        """Refuse: `_reconstruct` is the only way to one."""
        raise TypeError("an array is made by numpy's _reconstruct alone")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        version, shape, kind, is_fortran, data = state
        given = _dtype(kind)
        native = given.newbyteorder("=")
        super().__setstate__((version, shape, native, is_fortran, data))
        if native != given:
            self.dtype = given  # type: ignore[misc]


def _dtype(kind: Any) -> np.dtype[Any]:
    if not isinstance(kind, _Type):  # any array has a dtype, which need not be a harmless one
        raise TypeError(f"a type was expected, not {type(kind).__name__}")
    return kind.dtype


def _scalar(kind: Any, data: Any) -> Any:
    raw = data.encode("latin1") if isinstance(data, str) else data  # Python 2 has no bytes
    return np.frombuffer(raw, _dtype(kind))[0]


def _from_buffer(data: Any, kind: Any, shape: Any, order: Any) -> npt.NDArray[Any]:
    return np.frombuffer(data, _dtype(kind)).reshape(shape, order=order).copy()


_ADMITTED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): Array,
    ("numpy", "dtype"): _Type,
    ("numpy.core.multiarray", "_reconstruct"): lambda *_: np.ndarray.__new__(Array, 0),
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    # Protocols 0 to 2 write bytes as latin1 text, by this codec alone.
    ("_codecs", "encode"): lambda text, codec: text.encode({"latin1": "latin1"}[codec]),
    # Protocols 0 and 1 make a plain object so.
    ("copy_reg", "_reconstructor"): lambda kind, *_: kind(),
    ("__builtin__", "object"): object,
}
"""By the names of Python 2 and NumPy 1; NumPy 2 writes ``numpy._core``."""
_ADMITTED |= {
    ("scipy.sparse", f"{name}_{kind}"): type(name, (PickledSparse,), {"format": name})
    for name in FORMATS
    for kind in ("matrix", "array")
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy._core", "numpy.core").replace("copyreg", "copy_reg")
        # SciPy has moved its classes from one module under scipy.sparse to another.
        package = re.sub(r"^scipy\.sparse\.\w+$", "scipy.sparse", module)
        if (package, name) not in _ADMITTED:
            raise DataError(
                f"is a pickle with anything but arrays: it asks for {module}.{name}, which is "
                "refused, and nothing of it was run; expected NumPy arrays, lists and dicts. If "
                "you trust the file, load it yourself and save the matrix with "
                "np.savez(path, adjacency=…, sensor_ids=…)"
            )
        return _ADMITTED[package, name]

    def persistent_load(self, pid: Any) -> NoReturn:
        raise DataError(f"is a pickle that refers to an outside object, {pid!r}; expected arrays")
