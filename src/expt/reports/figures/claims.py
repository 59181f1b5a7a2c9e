"""What a source says of a preset, beside what was predicted and measured of it here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expt.reports.figures.style import (
    BLUE,
    GREY,
    PALE,
    PURPLE,
    draw,
    label_direct,
    legend_above,
    plain_log,
)
from expt.reports.records import RunRecord
from expt.units import GIB, format_bytes, parse_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ABOUT_CLAIMS = "Claims are those of their source, of other data and other hardware."


@dataclass(frozen=True)
class Claim:
    """A claim of peak memory and of error in the source's own words, and of which settings."""

    preset: str
    peak: str
    error: str
    settings: Mapping[str, Any]

    @property
    def peak_bytes(self) -> int | None:
        """The claimed peak as a number, None if its words hold none."""
        found = re.search(r"\d[\d.]*\s*[A-Za-z]*", self.peak)
        try:
            return parse_bytes(found[0]) if found else None
        except ValueError:
            return None


@dataclass(frozen=True)
class Claimed:
    """A claim and the runs that it is about."""

    claim: Claim
    records: tuple[RunRecord, ...]


def claim_of(record: RunRecord, claims: Sequence[Claim]) -> Claim | None:
    """Return the claim about a run: of its preset, if it has all the settings that go with it."""
    for claim in claims:
        known = all(
            record.settings.get(name) == str(value) for name, value in claim.settings.items()
        )
        if claim.preset == record.preset and known:
            return claim
    return None


def claimed(records: Sequence[RunRecord], claims: Sequence[Claim]) -> list[Claimed]:
    """Return the claims that some run is about, in the order of the claims."""
    by_preset: dict[str, list[RunRecord]] = {}
    for record in records:
        if (claim := claim_of(record, claims)) is not None:
            by_preset.setdefault(claim.preset, []).append(record)
    return [
        Claimed(claim, tuple(by_preset[claim.preset]))
        for claim in claims
        if claim.preset in by_preset
    ]


def plot_claims(found: Sequence[Claimed], folder: Path) -> list[Path]:
    """Draw claimed, predicted and measured peaks by preset; return the files."""
    shown = [
        entry
        for entry in found
        if entry.claim.peak_bytes is not None
        and any(r.peak_allocated_bytes or r.predicted_peak_bytes for r in entry.records)
    ]
    if not shown:
        return []

    def onto(figure: Figure) -> None:
        axes = figure.subplots()
        for place, entry in enumerate(shown):
            said = entry.claim.peak_bytes or 0
            predicted = [r.predicted_peak_bytes for r in entry.records if r.predicted_peak_bytes]
            measured = [r.peak_allocated_bytes for r in entry.records if r.peak_allocated_bytes]
            every = [said, *predicted, *measured]
            axes.plot(
                [min(every) / GIB, max(every) / GIB], [place, place], color=PALE, linewidth=2,
                zorder=1, solid_capstyle="round",
            )  # fmt: skip
            first = place == 0
            axes.scatter(
                said / GIB, place, marker="D", s=44, facecolor="white", edgecolor=PURPLE,
                linewidth=1.4, zorder=3, label="claimed" if first else None,
            )  # fmt: skip
            axes.scatter(
                [count / GIB for count in measured], [place] * len(measured), s=46, color=BLUE,
                zorder=3, linewidth=0, label="measured" if first else None,
            )  # fmt: skip
            axes.scatter(
                [count / GIB for count in predicted], [place] * len(predicted), marker="|", s=150,
                color=GREY, linewidth=1.6, zorder=4, label="predicted" if first else None,
            )  # fmt: skip
            label_direct(
                axes, entry.claim.peak, (said / GIB, place), offset=(0, 8), ha="center",
                color=PURPLE,
            )  # fmt: skip
            if measured:
                label_direct(
                    axes, format_bytes(max(measured)), (max(measured) / GIB, place),
                    offset=(0, 8), ha="center", color=BLUE,
                )  # fmt: skip
        plain_log(axes, "x")
        axes.margins(x=0.12)
        axes.set_yticks(range(len(shown)), [entry.claim.preset for entry in shown])
        axes.set_ylim(len(shown) - 0.5, -0.6)
        axes.set_xlabel("peak memory (GiB, logarithmic)")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
        legend_above(axes)

    return draw(folder, "claims", 1.1 + 0.55 * len(shown), onto)
