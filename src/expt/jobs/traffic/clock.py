"""Times on the clock: of what a file holds, in zones, and where clocks go back in autumn.

Letters: `S` time steps.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import numpy.typing as npt

from expt.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

Times = npt.NDArray[np.datetime64]
"""Clock times [S], ``datetime64[s]``."""

_HOUR = 3600
_NO_TIME = np.iinfo(np.int64).min
"""A missing time as a whole number."""
_YEAR_1980 = int(np.datetime64("1980-01-01", "s").astype(np.int64))
_YEAR_2100 = int(np.datetime64("2100-01-01", "s").astype(np.int64))
_FORMS = ("YYYYMMDDHHmmss", "YYYYMMDDHHmm", "YYYYMMDDHH", "YYMMDDHHmm", "YYYYMMDD")
_PARTS = {
    "YYYY": (1980, 2100), "YY": (0, 99), "MM": (1, 12), "DD": (1, 31), "HH": (0, 23),
    "mm": (0, 59), "ss": (0, 59),
}  # fmt: skip
_UTC_NOTE = (
    "the times {} UTC and are read so: a model sees UTC's time of day and day of the week; with "
    "local ones, times.tz_convert(ZONE), it knows the rush hours better"
)
_ZONE = r":\d\d(?:\.\d+)?\s*(?:Z|[+-]\d\d:?(?:\d\d)?)\s*$"
"""The end of a time with its distance to UTC."""
_NIGHT = range(4)
"""Hours of the day in which clocks go back somewhere."""
_SUNDAY = 6


def local_clock(times: pd.DatetimeIndex) -> tuple[Times, tuple[str, ...]]:
    """Return the time on the clock, without the zone, and a note where there was one."""
    clock = times.tz_localize(None).to_numpy().astype("datetime64[s]")
    if times.tz is None:
        return clock, ()
    zone = str(times.tz)
    if zone.upper() in ("UTC", "ETC/UTC", "TZUTC()", "GMT"):
        return clock, (_UTC_NOTE.format("are in"),)
    return clock, (f"the times are those of the clock in {zone}",)


def to_clock(raw: npt.NDArray[Any], name: str = "timestamps") -> tuple[Times, tuple[str, ...]]:
    """Return what an array or a column holds as times on the clock, and a note about their zone.

    Of text with a distance to UTC, what the clock showed there; of whole numbers, which count since
    1970, UTC's. ISO 8601 only: 01/03/2012 is January to some and March to others.

    Args:
        raw: datetime64, ISO 8601 text, or whole numbers, whose unit is the one that puts the first
            between 1980 and 2100; the units are a thousandfold apart, so at most one does.
        name: of where they come from, for the message.

    Raises:
        DataError: it holds anything else, or text in several zones.

    """
    if raw.dtype.kind == "M":
        return raw.astype("datetime64[s]"), ()
    if raw.dtype.kind in "SUO":
        return _clock_of_text(raw, name)
    if raw.dtype.kind == "f" and not (raw[~np.isnan(raw)] % 1).any():
        raw = np.where(np.isnan(raw), _NO_TIME, raw).astype(np.int64)
    if raw.dtype.kind not in "iu":
        raise DataError(
            f"the times in {name} are of type {raw.dtype}; expected datetime64 or ISO 8601 text "
            "such as 2012-03-01T00:05:00"
        )
    known = raw[raw != _NO_TIME]
    first = int(known[0]) if known.size else _YEAR_1980
    if (form := _written_form(known)) is not None:
        raise DataError(
            f"the times in {name} are whole numbers like {first}, which may be written as {form}; "
            "expected ISO 8601 text, such as 2012-03-01T00:05:00"
        )
    for unit, per_second in (("s", 1), ("ms", 10**3), ("us", 10**6), ("ns", 10**9)):
        if _YEAR_1980 <= first // per_second < _YEAR_2100:
            times = raw.astype(np.int64).astype(f"datetime64[{unit}]").astype("datetime64[s]")
            return times, (_UTC_NOTE.format("count since 1970 in"),)
    raise DataError(
        f"the times in {name} are whole numbers, the first {first}, which is no time between 1980 "
        "and 2100 in s, ms, us or ns since 1970; expected datetime64, or ISO 8601 text"
    )


def to_seconds(raw: npt.NDArray[Any]) -> Times:
    """Return the times of `to_clock`."""
    return to_clock(raw)[0]


def _clock_of_text(raw: npt.NDArray[Any], name: str) -> tuple[Times, tuple[str, ...]]:
    import pandas as pd

    listed = raw.reshape(-1).tolist()
    if raw.dtype.kind == "S":
        listed = [text.decode("utf-8", errors="replace") for text in listed]
    texts = pd.Series(listed, dtype=object)
    try:
        times = pd.to_datetime(texts, errors="coerce", format="ISO8601")
    except ValueError as error:
        _refuse_zones(texts, name, error)
    bad = np.flatnonzero(times.isna())
    if bad.size:
        raise DataError(
            f"the times in {name} are not all in ISO 8601, such as 2012-03-01T00:05:00: row "
            f"{bad[0]} (counted from 0) is {listed[bad[0]]!r}"
        )
    clock, notes = local_clock(pd.DatetimeIndex(times))
    return clock.reshape(raw.shape), notes


def _refuse_zones(texts: pd.Series[Any], name: str, error: ValueError) -> NoReturn:
    """Say of times in several zones, which pandas does not read, what is wrong with them."""
    zoned = texts.astype(str).str.contains(_ZONE)
    without = np.flatnonzero(~zoned & texts.notna())
    if zoned.any() and without.size:
        row = int(without[0])
        raise DataError(
            f"the times in {name} cannot be read: some have a zone, like "
            f"{texts[zoned].iloc[0]!r}, and others none, the first {texts.iloc[row]!r} in row "
            f"{row} (counted from 0); write all in the same way"
        ) from error
    raise DataError(
        f"the times in {name} cannot be read: their distance to UTC changes, as where "
        "clocks are changed; write standard time throughout, or all of them in UTC"
    ) from error


def _written_form(numbers: npt.NDArray[Any]) -> str | None:
    """Return the form in which all the numbers are dates, though they do not count since 1970."""
    for form in _FORMS:
        digits = len(form)
        if numbers.size and 10 ** (digits - 2) <= numbers.min() and numbers.max() < 10**digits:
            rest, fits = np.unique(numbers).astype(np.int64), True
            for part in reversed(re.findall("YYYY|..", form)):
                rest, found = np.divmod(rest, 10 ** len(part))
                least, most = _PARTS[part]
                fits = fits and bool(((found >= least) & (found <= most)).all())
            if fits:
                return form.upper()
    return None


def are_plausible(times: Times) -> bool:
    """Whether all times, of those that are there, are between 1980 and 2100."""
    seconds = times[~np.isnat(times)].astype(np.int64)
    return bool(((seconds >= _YEAR_1980) & (seconds < _YEAR_2100)).all())


def is_called_time(name: str) -> bool:
    """Whether a column of this name may be of times: ``timestamp``, ``Date``, ``t``, no name."""
    word = name.lower()
    is_called = re.search("time|date|stamp|epoch|unix", word) is not None
    return is_called or word.strip() in ("", "t", "ts")


def order_advice(times: Times) -> str:
    """Return what to do about times that do not increase."""
    hour = repeated_hour(times)
    if hour is not None:
        return repeated_hour_advice(hour)
    if len(times) >= 1.5 * len(np.unique(times)):
        return (
            f"{len(times):,} rows have {len(np.unique(times)):,} different times, like a long "
            "table (time, sensor, value); expected a row per time and a column per sensor, "
            "frame.pivot(index=TIME, columns=SENSOR, values=SPEED); of rows that are the same "
            "throughout keep one"
        )
    return "sort by time and drop repeated rows"


def repeated_hour_advice(hour: np.datetime64) -> str:
    """Return what to do about an hour that occurs twice."""
    return (
        f"the hour from {hour} on occurs twice, as where clocks go back in autumn, and both are "
        "real: keep all rows and write standard time throughout, "
        'times.tz_convert("Etc/GMT+8").tz_localize(None) for UTC-8; times without a zone are given '
        'theirs before that, times.tz_localize(ZONE, ambiguous="infer")'
    )


def repeated_hour(times: Times) -> np.datetime64 | None:
    """Return the first hour that occurs twice at a change of clocks; None for another fault.

    Its rows follow each other (01:55, 01:00), or are sorted (01:00, 01:00).
    """
    if len(times) < 2:
        return None
    falls = np.flatnonzero(np.diff(times).astype(np.int64) < 0) + 1
    unique, counts = np.unique(times, return_counts=True)
    twice = unique[counts == 2] if counts.max() == 2 else unique[:0]
    begins = times[falls] if falls.size else twice
    if not begins.size or len(unique) < 2:
        return None
    steps, frequent = np.unique(np.diff(unique).astype(np.int64), return_counts=True)
    step = int(steps[frequent.argmax()])
    for day in np.unique(begins.astype("datetime64[D]")):
        today = twice[twice.astype("datetime64[D]") == day]
        back = falls[times[falls].astype("datetime64[D]") == day]
        hours = np.unique(np.concatenate((today, times[back])).astype("datetime64[h]"))
        at_night = (hours[0] - day).astype(int) in _NIGHT and len(hours) == 1
        lengths = (times[back - 1] - times[back]).astype(np.int64)
        one_hour = len(back) <= 1 and (lengths <= _HOUR).all()
        most_of_it = len(today) * step > _HOUR / 2 or (lengths >= _HOUR / 2).any()
        on_sunday = (day.astype(int) + 3) % 7 == _SUNDAY
        if not (at_night and one_hour and most_of_it and (on_sunday or len(today) > 1)):
            return None
    first: np.datetime64 = begins.min().astype("datetime64[h]").astype("datetime64[m]")
    return first
