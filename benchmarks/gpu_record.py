"""What result files of a GPU hold: rows in groups by card and code, so that no two are mixed.

A group is named after the card, driver, CUDA, torch, and a checksum of `src`, `conf` and the
programs here that measure, so that a copy of the tree without its history is known as well; a
commit that changes none of these goes on with the same group. Every row says what it was measured
on. EXPT_COMMIT may name the commit where git cannot tell.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from common import ROOT, provenance, without_places

GIB = 1024**3
MEASURING = (
    "gpu_correctness", "gpu_memory", "gpu_sections", "gpu_steps", "gpu_trials", "gpu_waiting",
    "accuracy", "common", "foreign_models", "loop_times", "planned_steps", "prediction",
    "rival_loops",
)  # fmt: skip
"""Programs of this folder on which a figure depends."""
GROUPS = "groups"


def card(device: str) -> dict[str, Any]:
    """Return the card's name, memory, driver, CUDA, torch; on the CPU, of a smoke run.

    Makes a CUDA context: call it in a process that ends (`looked_up`).
    """
    import torch

    if device != "cuda":
        return {"name": "cpu", "total_bytes": 0, "torch": torch.__version__}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "total_bytes": properties.total_memory,
        "driver": driver(),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
    }


def looked_up(device: str) -> dict[str, Any]:
    """Return `card`, asked for in a process of its own: this one stays off the card."""
    done = subprocess.run(
        [sys.executable, __file__, device], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode != 0:
        sys.exit("the card could not be asked what it is; what Python says of it is above")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def driver() -> str | None:
    """Return the driver's version as nvidia-smi gives it, None without nvidia-smi."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout else None


def code() -> str:
    """Return a checksum of everything that a figure may depend on, ten digits."""
    total = hashlib.sha256()
    paths = [*(ROOT / "src").rglob("*.py"), *(ROOT / "conf").rglob("*.yaml")]
    paths += [ROOT / "benchmarks" / f"{name}.py" for name in MEASURING]
    for path in sorted(paths):
        total.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:10]


class Group:
    """Rows measured with one card and one code, in `record`, which holds others as well."""

    def __init__(self, record: dict[str, Any], card: Mapping[str, Any]) -> None:
        self.record, self.card, self.code = record, dict(card), code()
        parts = [card["name"], f"{card['total_bytes'] / GIB:.0f} GiB"]
        parts += [f"driver {card.get('driver')}", f"CUDA {card.get('cuda')}"]
        self.name = ", ".join([*parts, f"torch {card['torch']}", f"code {self.code}"])
        groups = record.setdefault(GROUPS, {})
        self.sections: dict[str, Any] = groups.setdefault(self.name, {})
        groups[self.name] = groups.pop(self.name)  # the last one is the one to show

    @property
    def folder(self) -> str:
        """The name of the folder for this group's trainings."""
        return re.sub(r"[^\w.]+", "-", self.name)

    def put(self, section: str, item: str, row: Mapping[str, Any]) -> None:
        """Enter a row, with what it was measured on."""
        self.sections["made"] = made = provenance(str(self.card["name"]))
        stamp = {"date": made["date"], "commit": made["commit"], "code": self.code}
        plain: dict[str, Any] = without_places(row)
        self.sections.setdefault(section, {})[item] = {**plain, **stamp, "card": self.card}


def last_group(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sections of the group that was measured last; empty if there is none."""
    groups: list[dict[str, Any]] = list(record.get(GROUPS, {}).values())
    return groups[-1] if groups else {}


if __name__ == "__main__":
    print(json.dumps(card(sys.argv[1])))
