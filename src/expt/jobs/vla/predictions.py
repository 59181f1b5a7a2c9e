"""Predicted actions beside demonstrated ones, as npz or parquet.

Letters: `B` samples, `H` steps of a chunk, `A` values of an action.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from expt.files import replace_atomically
from expt.jobs.vla.episodes import Array
from expt.jobs.vla.metrics import distinct


def write_actions(path: Path, names: Sequence[str], columns: Mapping[str, Array]) -> None:
    """Write chunks of actions; the ending of the path is the format.

    Args:
        path: ``.npz`` holds the arrays as they are, ``.parquet`` a row for each step of a chunk.
        names: of the values of an action, A; where several have one name, parquet's columns get
            a number.
        columns: ``episode`` and ``step`` [B], where a chunk begins; ``predicted`` and
            ``demonstrated`` [B, H, A] in the robot's own units, NaN beyond an episode's end.

    """
    write = _npz if path.suffix == ".npz" else _parquet
    replace_atomically(path, lambda temporary: write(temporary, names, columns))


def _npz(path: Path, names: Sequence[str], columns: Mapping[str, Array]) -> None:
    arrays = {"action_names": np.array(names), **columns}
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def _parquet(path: Path, names: Sequence[str], columns: Mapping[str, Array]) -> None:
    import pandas as pd

    count, chunk = columns["predicted"].shape[:2]
    rows = {
        "episode": np.repeat(columns["episode"], chunk),
        "step": np.repeat(columns["step"], chunk),
        "ahead": np.tile(np.arange(chunk), count),
    }
    for kind in ("predicted", "demonstrated"):
        flat = columns[kind].reshape(-1, len(names))
        rows |= {f"{kind}_{name}": flat[:, at] for at, name in enumerate(distinct(names))}
    pd.DataFrame(rows).to_parquet(path)
