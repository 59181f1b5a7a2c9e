"""What to change in a run, from what the memory manager has seen of it."""

from __future__ import annotations

from collections.abc import Sequence

from expt.memory.diagnosis import advice
from expt.memory.diagnosis.forecast import Forecast
from expt.memory.diagnosis.trend import Trend
from expt.units import GIB

ROOMY = 0.5
"""Peak, as a part of the device, below which a larger batch would fit."""
NOT_WORTH = GIB // 100
"""Growth in a run so far that nobody has to look at."""


def suggest(
    trend: Trend,
    ahead: Forecast | None,
    over: Sequence[str],
    peak_fraction: float | None,
    on_gpu: bool,
) -> list[str]:
    """Return sentences, the most urgent first.

    Args:
        trend: the verdict over the first device.
        ahead: its forecast, if there is one.
        over: names of the devices above their threshold now.
        peak_fraction: the first device's peak, as a part of its memory.
        on_gpu: whether that device is a GPU.

    """
    found = []
    if ahead is not None and ahead.action != "none":
        found.append(
            f"Memory runs out within {ahead.horizon_steps:g} steps with a probability of "
            f"{ahead.risk:.0%}: {ahead.advice}"
        )
    if trend.verdict == "leak" and trend.growth_bytes > NOT_WORTH:
        found.append(f"A leak ({trend.evidence[0]}). {advice.LEAK[0]}. {advice.LEAK[1]}")
    elif trend.verdict == "fragmentation":
        found.append(f"Fragmentation ({trend.evidence[0]}). {advice.FRAGMENTATION[0]}")
    elif trend.verdict == "other_process":
        found.append(f"Another process grows ({trend.evidence[0]}). {advice.OTHER_PROCESS[0]}")
    for name in over:
        if name == "host":
            found.append(f"The host's memory is above its threshold. {advice.HOST[0]}")
        elif trend.verdict == "steady":
            found.append(f"{name} is above its threshold. {advice.SMALLER_BATCH}")
    if on_gpu and not found and peak_fraction is not None and 0 < peak_fraction < ROOMY:
        found.append(
            f"The peak takes {peak_fraction:.0%} of the device: a larger data.batch_size, or fewer "
            "parts (memory.gradient_accumulation), would fit and train faster"
        )
    return found
