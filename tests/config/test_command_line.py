from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "target", ["os.system", "expt.run.train.TrainJob", "expt.commands.train", "my_lab.run"]
)
def test_nothing_but_our_tasks_is_called(expt, home, target) -> None:
    code, _, err = expt(f"task._target_={target}", "hydra.run.dir=run")
    assert code == 2
    assert f"task._target_={target} is no task of expt's" in err and "predict" in err
    assert not (home / "run").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_folder_whose_name_is_not_utf8_is_one_line(tmp_path) -> None:
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    ran = subprocess.run(
        [sys.executable, "-m", "expt", "task=plan"], cwd=folder, capture_output=True, timeout=60
    )
    assert ran.returncode == 2
    (line,) = ran.stderr.decode().splitlines()
    assert "caf\\xe9, is not UTF-8" in line and line.startswith("error: the current folder")
    argument = b"data.path=" + b"caf\xe9.npz"
    ran = subprocess.run(
        [sys.executable, "-m", "expt", argument], cwd=tmp_path, capture_output=True, timeout=60
    )
    assert ran.returncode == 2
    assert ran.stderr.decode().startswith("error: argument 1, data.path=caf\\xe9.npz, is not UTF-8")
