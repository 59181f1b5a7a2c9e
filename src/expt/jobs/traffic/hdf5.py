"""HDF5 files: what pandas' ``to_hdf(format="fixed")`` writes (DCRNN's metr-la.h5), or plain arrays.

Read with h5py, which needs no PyTables. The layout of the fixed format, as in pandas'
``io/pytables.py`` (`BlockManagerFixed`): a group holds

    axis0            column names                       [N]
    axis1            row index, int64 times             [S]
    blockK_items     the column names of block K        [N_K]
    blockK_values    its cells                          [S, N_K]

and `axis1` has the attribute `kind`, ``datetime64`` (then in ns) or ``datetime64[us]``.

Letters: `S` time steps, `N` sensors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from expt.errors import DataError
from expt.jobs.traffic.arrays import SPEED_KEYS, Arrays, to_seconds, wanted_keys
from expt.jobs.traffic.series import to_float32, to_sensor_ids
from expt.jobs.traffic.source import translated

_FRAME = ("axis0", "axis1", "block0_items", "block0_values")


def read_hdf5(path: Path) -> Arrays:
    """Read the first group that holds a pandas frame, else the first with plain arrays."""
    import h5py

    damaged = (OSError, RuntimeError, ValueError, KeyError, TypeError)
    with translated(path, "HDF5", *damaged), h5py.File(path, "r") as file:
        groups, datasets = [file], []

        def collect(name: str, node: Any) -> None:
            if isinstance(node, h5py.Group):
                groups.append(node)
            else:
                datasets.append(name)

        file.visititems(collect)
        for group in groups:
            if all(isinstance(group.get(name), h5py.Dataset) for name in _FRAME):
                return _read_frame(group)
        for group in groups:
            if not group.keys().isdisjoint(SPEED_KEYS):
                keys = wanted_keys(group.keys())
                return {name: _read(group[key]) for name, key in keys.items()}
        raise DataError(
            f"has neither a pandas frame nor arrays named {', '.join(SPEED_KEYS)}; found "
            f"{', '.join(datasets[:12]) or 'nothing'}. A frame must be saved with "
            'frame.to_hdf(path, key="df", format="fixed")'
        )


def _read_frame(group: Any) -> Arrays:
    columns = _read_names(group["axis0"])
    position = {name: column for column, name in enumerate(columns)}
    times = _read_times(group["axis1"])
    speed = np.full((len(times), len(columns)), np.nan, dtype=np.float32)
    blocks = sorted(key.removesuffix("_items") for key in group if key.endswith("_items"))
    for block in blocks:
        items = _read_names(group[f"{block}_items"])
        values = group[f"{block}_values"]
        if values.shape != (len(times), len(items)) or values.dtype.kind not in "biuf":
            raise DataError(
                f"{block}_values of {group.name} holds {values.dtype} of shape {values.shape}; "
                f"expected numbers, {len(times)} time steps x {len(items)} sensors"
            )
        unknown = [name for name in items if name not in position]
        if unknown:
            raise DataError(f"{block}_items names {unknown[0]!r}, which axis0 does not have")
        speed[:, [position[name] for name in items]] = to_float32(_read(values), block)
    return {"speed": speed, "timestamps": times, "sensor_ids": np.array(columns)}


def _read_names(node: Any) -> tuple[str, ...]:
    if _kind(node) == "object":
        raise DataError(
            f"{node.name} holds pickled column names, which are not read; make them text, "
            "frame.columns = frame.columns.astype(str), and save again"
        )
    return to_sensor_ids(_read(node))


def _read_times(node: Any) -> Any:
    raw, kind = _read(node), _kind(node)
    if not (kind or "datetime64").startswith("datetime64") or raw.dtype.kind not in "iu":
        raise DataError(
            f"has no timestamps: the row index {node.name} is of kind {kind or raw.dtype}; "
            "expected times, frame.index = pandas.to_datetime(frame.index)"
        )
    if "tz" in node.attrs:
        raise DataError(
            f"the row index {node.name} is stored in UTC for a time zone; expected local clock "
            "times, frame.index = frame.index.tz_localize(None), saved again"
        )
    unit = kind.removeprefix("datetime64")
    return raw.astype(np.int64).view(f"datetime64{unit}") if unit else to_seconds(raw)


def _read(node: Any) -> Any:
    import h5py

    if not isinstance(node, h5py.Dataset):
        raise DataError(f"{node.name} is not an array; expected a data set of numbers")
    creation = node.id.get_create_plist()
    for number in range(creation.get_nfilters()):
        code, _, _, name = creation.get_filter(number)
        if not h5py.h5z.filter_avail(code):
            raise DataError(
                f"{node.name} is compressed with {name.decode()}, which needs a plug-in; save it "
                'without, or with complib="zlib"'
            )
    return node[()]


def _kind(node: Any) -> str:
    kind = node.attrs.get("kind", "")
    return kind.decode() if isinstance(kind, bytes) else str(kind)
