"""Columns that are no speeds, by their scale and their names: ids, flow, occupancy beside speed.

Letters: `S` time steps, `N` columns.
"""

from __future__ import annotations

import re

import numpy as np

from expt.jobs.traffic.series import Series
from expt.units import counted

SPEED_UNITS = ("mph", "km/h", "kmh", "kph", "kmph", "m/s")
LARGEST_TYPICAL = 150
"""A typical reading above it is no speed, whatever the unit."""
LARGEST_READING = 500
"""A single reading above it is none."""
APART = 8
"""Typical speeds of two sensors differ by less than this factor, jams and motorways included."""
NAMED = 6
"""Columns that are named at most."""
_SAMPLED = 4000
_OTHER = re.compile(
    "flow|volume|vol|count|vehicles|occupancy|occ|density|lane|lanes|lat|latitude|lon|lng|"
    "longitude|id|no|index|limit|second|minute|hour|day|dow|weekday|week|month|year|slot|interval|"
    "holiday|samples|observed|quality|headway"
)


def scale_warnings(series: Series, unit: str) -> list[str]:
    """Return a line about columns that differ too much from the others, and about their size."""
    values = series.values[:: max(1, len(series.values) // _SAMPLED)]
    typical = np.array([_typical(column) for column in values.T])
    is_speed = unit.strip().lower() in SPEED_UNITS
    seen = typical[typical > 0]
    if not seen.size:
        return []
    likely = seen[seen <= LARGEST_TYPICAL] if is_speed else seen
    middle = float(np.median(likely if likely.size else seen))
    apart = is_speed & (typical > 0) & ((typical > APART * middle) | (typical < middle / APART))
    if is_speed and likely.size:
        apart |= (typical > LARGEST_TYPICAL) & (typical > 2 * middle)
    called = np.array([_is_called_otherwise(name) for name in series.sensor_ids])
    if not called.all():
        apart |= called
    warnings = []
    if apart.any() and not apart.all():
        rest = typical[~apart & (typical > 0)]
        about = f"{np.median(rest):.3g}" if rest.size else "missing"
        warnings.append(
            f"{counted(int(apart.sum()), 'column')} of another kind than the others: "
            f"{_listed(series, typical, apart)}; typical of the others is {about}. Errors are over "
            "all columns alike: leave out those that are no speeds, or read a single column, "
            "data.channel=NAME"
        )
    elif is_speed and (usual := float(np.median(seen))) > LARGEST_TYPICAL:
        warnings.append(
            f"a typical reading is {usual:.3g} {unit}: if these are no speeds, say what they are "
            "in, data.unit=…, or read another array or channel, data.key=…, data.channel=…"
        )
    high = (series.values.max(axis=0) > LARGEST_READING) & ~apart
    if is_speed and high.any() and middle <= LARGEST_TYPICAL:
        warnings.append(
            f"readings above {LARGEST_READING} {unit}: "
            f"{_listed(series, series.values.max(axis=0), high, 'up to ')}; if they stand for "
            "missing ones, write 0 or NaN"
        )
    return warnings


def _typical(column: np.ndarray) -> float:
    observed = column[column > 0]
    return float(np.median(observed)) if observed.size else 0.0


def _is_called_otherwise(name: str) -> bool:
    words = re.sub("([a-z])([A-Z])", r"\1 \2", name).lower()
    parts = re.split("[^a-z]+", words)
    return not {"speed", "velocity"} & set(parts) and any(_OTHER.fullmatch(p) for p in parts)


def _listed(series: Series, figures: np.ndarray, chosen: np.ndarray, word: str = "") -> str:
    places = np.flatnonzero(chosen)
    shown = ", ".join(
        f"{series.sensor_ids[place]} ({word}{figures[place]:.3g})" for place in places[:NAMED]
    )
    return shown + (", …" if len(places) > NAMED else "")
