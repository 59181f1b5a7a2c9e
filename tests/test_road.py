"""How long the road is from the command line to the training step; run with -s to see it."""

from __future__ import annotations

import subprocess
import sys
import traceback
from pathlib import Path

import expt as package
from expt.training.trainer import Trainer

ROOT = Path(package.__file__).parent
MOST_FRAMES, MOST_FILES = 10, 7
"""From `run_command` (which `__main__` calls) to `train_step`, both counted."""


def test_the_road_to_the_training_step_is_short(expt, monkeypatch) -> None:
    roads: list[list[traceback.FrameSummary]] = []
    step = Trainer.train_step

    def seen(self, samples):
        roads.append(traceback.extract_stack())
        return step(self, samples)

    monkeypatch.setattr(Trainer, "train_step", seen)
    assert expt()[0] == 0
    own = [frame for frame in roads[0] if Path(frame.filename).is_relative_to(ROOT)]
    names = [f"{Path(f.filename).relative_to(ROOT)}:{f.name}" for f in own] + ["train_step"]
    print("\n".join(names))
    assert names[0] == "config/command_line.py:run_command"
    assert len(names) <= MOST_FRAMES
    assert len({frame.filename for frame in own}) <= MOST_FILES


def test_a_plain_training_imports_a_bounded_part_of_the_package(home) -> None:
    program = (
        "import sys\n"
        "from expt.config.command_line import run_command\n"
        "code = run_command(['memory=minimal', 'debug=smoke', 'tracking=none', "
        "'trainer.progress=false'])\n"
        "names = [name for name in sys.modules if name.partition('.')[0] == 'expt']\n"
        "print('MODULES', code, len(names), *sorted(names))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    )
    line = next(line for line in ran.stdout.splitlines() if line.startswith("MODULES"))
    _, code, count, *names = line.split()
    print(count, names)
    assert code == "0"
    assert int(count) <= 139
    assert not [name for name in names if name.startswith(("expt.search", "expt.reports"))]
