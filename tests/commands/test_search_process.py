"""What the server of a search's processes has done before it forks them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from hydra_plugins.expt_sweeper.sweeper import PRELOADED, PRELOADED_FOR_TRACKING

PROGRAM = """
import json, os, sys, threading
sys.path.insert(0, os.getcwd())
import torch
asked = []
for name in ("is_available", "device_count", "init"):
    # The driver cannot be used by a forked process once it was asked anything in its parent.
    setattr(torch.cuda, name, lambda name=name: asked.append(name) or 0)
for name in sys.argv[1:]:
    __import__(name)
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
before = set(sys.modules)
print("FOUND", json.dumps({
    "threads": [thread.name for thread in threading.enumerate()],
    "native": len(os.listdir("/proc/self/task")) if sys.platform == "linux" else 1,
    "cuda": torch.cuda.is_initialized() or asked,
    "plugins": Plugins in Singleton._instances,
    "hydra": GlobalHydra.instance().is_initialized(),
    "users": "model_of_a_user" in sys.modules,
}))
from expt.config.command_line import run_command
code = run_command(["debug=smoke", "memory=minimal", "tracking=none", "trainer.progress=false"])
print("FOUND", json.dumps({"code": code, "imported": sorted(set(sys.modules) - before)}))
"""


def test_it_leaves_nothing_that_a_forked_process_would_have_half_of(tmp_path):
    (tmp_path / "model_of_a_user.py").write_text("")
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, *PRELOADED, *PRELOADED_FOR_TRACKING], cwd=tmp_path,
        capture_output=True, text=True, check=True, timeout=120,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip
    lines = [line for line in ran.stdout.splitlines() if line.startswith("FOUND")]
    before, after = (json.loads(line.removeprefix("FOUND ")) for line in lines)
    assert before == {
        "threads": ["MainThread"], "native": 1, "cuda": [],
        "plugins": False, "hydra": False, "users": False,
    }  # fmt: skip
    assert after["code"] == 0
    big = {name.partition(".")[0] for name in after["imported"]} & {
        "torch", "scipy", "matplotlib", "pydantic", "numpy", "lightning_fabric",
    }  # fmt: skip
    few = [name for name in after["imported"] if name.partition(".")[0] in big]
    assert len(few) < 40, f"a trial would import these each time: {few}"


FORKED = """
import os, numpy, scipy.linalg
one = numpy.ones((400, 400))
(one @ one, scipy.linalg.inv(one + numpy.eye(400)))
if (pid := os.fork()) == 0:
    (one @ one, scipy.linalg.inv(one + numpy.eye(400)))
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
"""


def test_the_threads_of_openblas_are_no_loss_to_a_forked_process():
    """Were they, the product would wait for them without an end."""
    variables = {**os.environ, "OPENBLAS_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", FORKED], check=True, timeout=60, env=variables)
