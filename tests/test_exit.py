"""How the process ends: with its code, after what is registered for an exit, at once."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("code", [0, 2, 143])
def test_what_is_registered_is_done_and_the_code_is_the_commands(tmp_path, code) -> None:
    program = (
        "import atexit, sys\n"
        "import expt.__main__ as door\n"
        f"door.run_command = lambda arguments: {code}\n"
        "class Slow:\n"
        "    def __del__(self): print('taken apart')\n"
        "kept = Slow()\n"
        "atexit.register(lambda: print('at exit'))\n"
        "print('last line')\n"
        "door.main()\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == code
    assert ran.stdout.splitlines() == ["last line", "at exit"]


def test_a_thread_that_must_be_waited_for_is(tmp_path) -> None:
    program = (
        "import threading, time\n"
        "import expt.__main__ as door\n"
        "door.run_command = lambda arguments: 0\n"
        "threading.Thread(target=lambda: (time.sleep(0.3), print('done'))).start()\n"
        "door.main()\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert (ran.returncode, ran.stdout) == (0, "done\n")
