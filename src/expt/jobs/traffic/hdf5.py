"""HDF5 files: what pandas' ``to_hdf(format="fixed")`` writes (DCRNN's metr-la.h5), or plain arrays.

Read with h5py, which needs no PyTables. The layout of the fixed format, as in pandas'
``io/pytables.py`` (`BlockManagerFixed`): a group holds

    axis0            column names                       [N]
    axis1            row index, int64 times             [S]
    blockK_items     the column names of block K        [N_K]
    blockK_values    its cells                          [S, N_K]

and `axis1` has the attribute `kind`, ``datetime64`` (then in ns) or ``datetime64[us]``, and `tz`
where the times are of a zone. A frame whose rows are no times, of the sensors' places for example,
is passed over where there is another.

Letters: `S` time steps, `N` sensors.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from datetime import timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np

from expt.errors import DataError
from expt.jobs.traffic.arrays import OPTIONAL_KEYS, wanted_keys
from expt.jobs.traffic.choice import (
    SPEED_KEYS,
    Arrays,
    Choice,
    choice_note,
    one_channel,
    speed_rank,
)
from expt.jobs.traffic.clock import Times, local_clock, to_seconds
from expt.jobs.traffic.series import to_sensor_ids
from expt.jobs.traffic.source import translated
from expt.jobs.traffic.table import Column, Table
from expt.jobs.traffic.tables import to_arrays

_FRAME = ("axis0", "axis1", "block0_items", "block0_values")


@dataclass(frozen=True)
class _Candidate:
    """A series in the file: the frame that a group is, or one of the plain arrays in it."""

    group: Any
    key: str | None = None

    @property
    def name(self) -> str:
        path: str = self.group.name
        return path if self.key is None else f"{path.rstrip('/')}/{self.key}"

    def is_called(self, wanted: str) -> bool:
        """Whether this is the path, its last parts, or one of them, ``speed`` of /2018/speed/df."""
        return self.ends_in(wanted) or wanted.strip("/") in self.name.split("/")

    def ends_in(self, wanted: str) -> bool:
        """Whether the path ends in these parts."""
        return self.name.endswith(f"/{wanted.strip('/')}")

    def order(self, choice: Choice) -> tuple[bool, bool, bool, int, bool]:
        """Those asked for first, then those with times, then by their names, frames first."""
        if self.key is None:
            timed = _is_timed(self.group)
        else:
            timed = choice.start is not None or "timestamps" in self.group
        ranks = [rank for part in self.name.split("/") if (rank := speed_rank(part)) is not None]
        about = 99 + bool(re.search("meta|info|sensor|station|location", self.name))
        return (
            choice.key is not None and not self.ends_in(choice.key),
            choice.key is not None and not self.is_called(choice.key),
            not timed,
            min(ranks, default=about),
            self.key is not None,
        )


def read_hdf5(path: Path, choice: Choice | None = None) -> Arrays:
    """Read a pandas frame whose rows are times, or plain arrays; of several the one of speeds."""
    import h5py

    choice = choice or Choice()
    damaged = (OSError, RuntimeError, ValueError, KeyError, TypeError)
    with translated(path, "HDF5", *damaged), h5py.File(path, "r") as file:
        groups, datasets = [file], []

        def collect(name: str, node: Any) -> None:
            if isinstance(node, h5py.Group):
                groups.append(node)
            else:
                datasets.append(name)

        file.visititems(collect)
        candidates = [found for group in groups for found in _candidates(group, choice.key)]
        if not candidates and choice.key is None:
            raise DataError(
                f"has neither a pandas frame nor arrays named {', '.join(SPEED_KEYS)}; found "
                f"{', '.join(datasets[:12]) or 'nothing'}. A frame must be saved with "
                'frame.to_hdf(path, key="df", format="fixed")'
            )
        candidates.sort(key=lambda found: found.order(choice))
        if choice.key is not None and not (candidates and candidates[0].is_called(choice.key)):
            frames = [found.name for found in candidates if found.key is None]
            plain = [name for name in datasets if f"/{name}".rpartition("/")[0] not in frames]
            raise DataError(
                f"data.key={choice.key}: there is no such frame or array; found "
                f"{', '.join([*frames, *plain][:12]) or 'nothing'}"
            )
        chosen, *others = candidates
        if chosen.key is None:
            arrays = _read_frame(chosen.group, choice)
        else:
            arrays = _read_plain(chosen, choice)
        left = [other.name for other in others]
        if chosen.key is not None:
            steps = arrays["speed"].shape[:1]
            left += [name for name in _beside(chosen, steps) if name not in left]
        arrays.notes = (*choice_note(chosen.name, left), *arrays.notes)
        return arrays


def _candidates(group: Any, wanted: str | None) -> list[_Candidate]:
    import h5py

    if all(isinstance(group.get(name), h5py.Dataset) for name in _FRAME):
        return [_Candidate(group)]
    found = []
    for key, node in group.items():
        candidate = _Candidate(group, key)
        named = wanted is not None and candidate.ends_in(wanted)
        is_array = isinstance(node, h5py.Dataset) or "timestamps" in group
        if is_array and (named or speed_rank(key) is not None):
            found.append(candidate)
    return found


def _is_timed(frame: Any) -> bool:
    return (_kind(frame["axis1"]) or "datetime64").startswith("datetime64")


def _beside(chosen: _Candidate, steps: tuple[int, ...]) -> list[str]:
    """Return the names of the group's other arrays with as many rows."""
    used = (chosen.key, "timestamps", *OPTIONAL_KEYS)
    return [
        _Candidate(chosen.group, key).name
        for key, node in chosen.group.items()
        if key not in used and getattr(node, "shape", ())[:1] == steps
    ]


def _read_plain(chosen: _Candidate, choice: Choice) -> Arrays:
    choice.refuse_columns()
    keys = wanted_keys(chosen.group.keys(), replace(choice, key=chosen.key))
    arrays = Arrays({name: _read(chosen.group[key]) for name, key in keys.items()})
    return one_channel(arrays, chosen.name, choice)


def _read_frame(group: Any, choice: Choice) -> Arrays:
    """Read a frame; its index is the column `index`, where its rows are times."""
    names = _read_names(group["axis0"])
    cells: dict[str, Column] = dict.fromkeys(names, np.arange(0))
    blocks = sorted(key.removesuffix("_items") for key in group if key.endswith("_items"))
    rows = group["axis1"].shape[0]
    for block in blocks:
        items = _read_names(group[f"{block}_items"])
        values = group[f"{block}_values"]
        if values.shape != (rows, len(items)) or values.dtype.kind not in "biuf":
            raise DataError(
                f"{block}_values of {group.name} holds {values.dtype} of shape {values.shape}; "
                f"expected numbers, {rows} time steps x {len(items)} sensors"
            )
        if unknown := [name for name in items if name not in cells]:
            raise DataError(f"{block}_items names {unknown[0]!r}, which axis0 does not have")
        cells.update(zip(items, _read(values).T, strict=True))
    if absent := [name for name in names if len(cells[name]) != rows]:
        raise DataError(f"axis0 of {group.name} names {absent[0]!r}, which no block has")
    times, notes = {}, {}
    if choice.columns is None or _is_timed(group):
        times["index"], notes["index"] = _read_times(group["axis1"])
    table = Table([*times.items(), *((name, cells[name]) for name in names)], notes)
    return to_arrays(table, choice)


def _read_names(node: Any) -> tuple[str, ...]:
    if _kind(node) == "object":
        raise DataError(
            f"{node.name} holds pickled column names, which are not read; make them text, "
            "frame.columns = frame.columns.astype(str), and save again"
        )
    return to_sensor_ids(_read(node))


def _read_times(node: Any) -> tuple[Times, tuple[str, ...]]:
    raw, kind = _read(node), _kind(node)
    if not (kind or "datetime64").startswith("datetime64") or raw.dtype.kind not in "iu":
        raise DataError(
            f"has no timestamps: the row index {node.name} is of kind {kind or raw.dtype}; "
            "expected times, frame.index = pandas.to_datetime(frame.index)"
        )
    unit = kind.removeprefix("datetime64")
    times = to_seconds(raw.astype(np.int64).view(f"datetime64{unit}") if unit else raw)
    return (times, ()) if "tz" not in node.attrs else _in_zone(times, node)


def _in_zone(times: Times, node: Any) -> tuple[Times, tuple[str, ...]]:
    """Return what a clock in the frame's zone showed; pandas stores UTC and the zone's name."""
    import pandas as pd

    raw = node.attrs["tz"]
    zone = raw.decode("latin1") if isinstance(raw, bytes) else str(raw)
    try:
        return local_clock(pd.DatetimeIndex(times).tz_localize("UTC").tz_convert(_zone(zone)))
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(
            f"the row index {node.name} is stored in UTC for a time zone that is not known here, "
            f"{zone[:40]!r}; expected local clock times, frame.index = "
            "frame.index.tz_localize(None), saved again"
        ) from error


def _zone(text: str) -> str | timezone:
    """Return the zone that PyTables wrote: its name, or a pickle (protocol 0), which is not run."""
    if "\n" not in text:
        return text
    distance = re.search(r"timedelta\n.*?\(I(-?\d+)\nI(\d+)\n", text, re.DOTALL)
    if distance is not None:  # before any name, which may be another than UTC's, like UTC-8
        return timezone(timedelta(days=int(distance[1]), seconds=int(distance[2])))
    named = re.search(r"(?<=[V'_])UTC(?![\w/+-])|(?<=[V'])[A-Z][a-z]\w*/[\w/+-]+", text)
    return text if named is None else named[0]


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
