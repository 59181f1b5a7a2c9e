"""A slice of a long run: begun or gone on with, stopped after a while, its state kept for the next.

A run is told to stop by SIGINT, saves, and goes on from that step when its command is given again.
What that needs of a training on `metr_la_29` that is not at its end is committed, in
``benchmarks/state/peers``, as far as `LARGEST_BYTES` allow. The rest is under ``outputs/peers``
alone, and goes on where that is kept; so are searches, whose studies name folders.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from common import ROOT, last_words

from expt.files import replace_atomically

STATE = ROOT / "benchmarks" / "state" / "peers"
LARGEST_BYTES = 3 * 1000**2
"""Of all states together."""
NEEDED = ("checkpoints/last.pt", "checkpoints/best.pt")
"""Files of a run that going on needs."""
LOG = "output.log"
LOOK_SECONDS = 0.5


@dataclass(frozen=True)
class Slice:
    """What became of one: `interrupted` means that whoever runs the benchmark wants it to end."""

    cpu_seconds: float
    exit_code: int
    interrupted: bool = False

    @property
    def went_well(self) -> bool:
        """Whether it came to its end, or was stopped and saved."""
        return self.exit_code in (0, 128 + signal.SIGINT, -signal.SIGINT)


def run_slice(arguments: Sequence[str], folder: Path, cpu_seconds: float, until: float) -> Slice:
    """Run `python -m expt` for so much CPU time, and until a `time.monotonic()`.

    What it prints is added to `folder`'s log. One thread computes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [str(ROOT / "src"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    own = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    with (folder / LOG).open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "expt", *arguments],
            cwd=ROOT, stdout=log, stderr=log, env={**os.environ, **own},
            start_new_session=True,  # Ctrl-C is passed on once, by this process
        )  # fmt: skip
    used, told, interrupted = 0.0, False, False
    while process.poll() is None:
        try:
            time.sleep(LOOK_SECONDS)
            used = max(used, _cpu_seconds(process.pid))
        except KeyboardInterrupt:
            interrupted = True
        if not told and (interrupted or used >= cpu_seconds or time.monotonic() >= until):
            process.send_signal(signal.SIGINT)
            told = True
    return Slice(used, process.returncode, interrupted)


def what_it_said(folder: Path) -> str:
    """Return the last line of a slice's log, for a message."""
    return last_words((folder / LOG).read_text(encoding="utf-8", errors="replace"))


def _cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process and all that it started, also what has ended."""
    try:
        process = psutil.Process(pid)
        times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    except psutil.NoSuchProcess:  # one of them just ended
        return 0.0
    return float(sum(t.user + t.system + t.children_user + t.children_system for t in times))


def keep_state(name: str, folder: Path) -> bool:
    """Pack what going on needs, if all states leave it room; tell whether they did."""
    archive = STATE / f"{name}.zip"
    drop_state(name)
    files = [folder / part for part in NEEDED if (folder / part).exists()]
    if not files:
        return False
    STATE.mkdir(parents=True, exist_ok=True)

    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
            for file in files:
                packed.write(file, file.relative_to(folder))

    replace_atomically(archive, write)
    if sum(path.stat().st_size for path in STATE.glob("*.zip")) <= LARGEST_BYTES:
        return True
    archive.unlink()
    return False


def restore_state(name: str, folder: Path) -> bool:
    """Unpack a state where the run is not there any more; tell whether there is a run to go on."""
    archive = STATE / f"{name}.zip"
    if any((folder / part).exists() for part in NEEDED):
        return True
    if not archive.exists():
        return False
    with zipfile.ZipFile(archive) as packed:
        for part in set(NEEDED) & set(packed.namelist()):
            packed.extract(part, folder)
    return True


def drop_state(name: str) -> None:
    """Forget a state: its run has come to its end."""
    (STATE / f"{name}.zip").unlink(missing_ok=True)
