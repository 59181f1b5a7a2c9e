"""A sparse matrix that lies about its parts must not reach SciPy's unchecked loops."""

import numpy as np
import pytest
import scipy.sparse

from expt.errors import DataError
from expt.jobs.traffic.sparse import FORMATS, to_dense

MATRIX = np.diag([1.0, 2.0, 3.0]) + np.diag([4.0, 5.0], 1)


def csr(**changes):
    matrix = scipy.sparse.csr_matrix(MATRIX)
    parts = {name: getattr(matrix, name) for name in ("shape", "data", "indices", "indptr")}
    return {"format": "csr", **parts, **changes}


@pytest.mark.parametrize("kind", FORMATS)
def test_what_scipy_saves_is_read(tmp_path, kind):
    matrix = getattr(scipy.sparse, f"{kind}_array")(MATRIX)
    scipy.sparse.save_npz(tmp_path / "x.npz", matrix)
    with np.load(tmp_path / "x.npz") as parts:
        np.testing.assert_array_equal(to_dense(parts), MATRIX)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"indices": np.array([0, 1, 1, 2, 99])}, "do not fit"),
        ({"indices": np.array([0, 1, 1, 2, -5])}, "do not fit"),
        ({"indptr": np.array([0, 2, 4, 500])}, "do not fit"),
        ({"indptr": np.array([0, 2])}, "do not fit"),
        ({"indices": "here"}, "do not fit"),
        ({"data": np.array([{}] * 5)}, "do not fit.*an array of object"),
        ({"shape": (10**9, 10**9)}, "do not fit"),
        ({"shape": None}, "format 'csr'; expected"),
        ({"format": "lil"}, "format 'lil'; expected csr, csc"),
        ({"format": np.array(b"coo")}, r"\(coo\) whose parts do not fit .*KeyError: 'row'"),
        ({"format": "coo", "row": [0] * 5, "col": [0, 1, 2, 3, 4]}, r"\(coo\) whose parts"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(DataError, match=message):
        to_dense(csr(**changes))
