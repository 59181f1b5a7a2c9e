"""Real processes, of a second or so; the server that forks them is shared by all tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from expt.files import write_json
from expt.run import process as processes
from expt.run.process import (
    LOG_NAME,
    PROCESS_NAME,
    TrialProcess,
    Worker,
    WorkerError,
    identity,
    is_alive,
    kill_leftover,
    visible_devices,
)

PROGRAM = """
import os, signal, subprocess, sys, time

def run(arguments):
    what = arguments[0]
    print("told to", what, flush=True)
    if what == "environment":
        print(os.environ["CUDA_VISIBLE_DEVICES"], os.getsid(0) == os.getpid())
        print("LAB is", os.environ.get("LAB"))
    if what == "hang":
        subprocess.Popen(["sleep", "60"])
        time.sleep(60)
    if what == "save":
        signal.signal(signal.SIGTERM, lambda *rest: sys.exit(143))
        print("ready", flush=True)
        time.sleep(60)
    if what == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("ready", flush=True)
        time.sleep(60)
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "raise":
        raise ValueError("as it goes")
    return 3 if what == "refuse" else 0

def double(number):
    return 2 * number

def stop_dead():
    os._exit(1)

def own_pid():
    return os.getpid()

def variable(name):
    return os.environ.get(name)
"""


@pytest.fixture
def program(home, monkeypatch):
    (home / "program_of_a_test.py").write_text(PROGRAM)
    monkeypatch.syspath_prepend(str(home))
    import importlib

    sys.modules.pop("program_of_a_test", None)
    yield importlib.import_module("program_of_a_test")
    sys.modules.pop("program_of_a_test", None)


def ended(process: TrialProcess, seconds: float = 20.0) -> int:
    until = time.monotonic() + seconds
    while (code := process.poll()) is None:
        assert time.monotonic() < until, "it did not end"
        time.sleep(0.01)
    return code


def until_it_says(folder: Path, word: str) -> None:
    until = time.monotonic() + 20
    while word not in ((folder / LOG_NAME).read_text() if (folder / LOG_NAME).exists() else ""):
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("what", "code", "output"),
    [
        ("nothing", 0, "told to nothing"),
        ("refuse", 3, "told to refuse"),
        ("die", -signal.SIGKILL, "told to die"),
        ("raise", 1, "ValueError: as it goes"),
    ],
)
def test_an_exit_code_and_the_output_are_kept(program, home, what, code, output):
    process = TrialProcess(program.run, [what], home / "trial")
    assert ended(process) == code
    assert output in (home / "trial" / LOG_NAME).read_text()
    assert not (home / "trial" / PROCESS_NAME).exists()


def test_it_leads_a_session_and_has_the_device_it_was_given(program, home):
    environment = {"CUDA_VISIBLE_DEVICES": "3"}
    assert ended(TrialProcess(program.run, ["environment"], home / "trial", environment)) == 0
    assert "3 True" in (home / "trial" / LOG_NAME).read_text()
    assert os.environ.get("CUDA_VISIBLE_DEVICES") != "3"


def test_the_environment_is_ours_and_not_that_of_when_the_server_began(program, home, monkeypatch):
    device = {"CUDA_VISIBLE_DEVICES": "3"}
    for value in ("north", "south", None):  # the first of them may start the server
        monkeypatch.setenv("LAB", value) if value else monkeypatch.delenv("LAB")
        assert ended(TrialProcess(program.run, ["environment"], home / str(value), device)) == 0
        assert f"LAB is {value}" in (home / str(value) / LOG_NAME).read_text()
        worker = Worker()
        assert worker.call(program.variable, "LAB", seconds=20) == value
        worker.close()


def test_output_is_appended_to_what_is_there(program, home):
    for _ in range(2):
        ended(TrialProcess(program.run, ["nothing"], home / "trial"))
    assert (home / "trial" / LOG_NAME).read_text().count("told to nothing") == 2


def test_what_is_asked_to_stop_may_save(program, home):
    process = TrialProcess(program.run, ["save"], home / "trial")
    until_it_says(home / "trial", "ready")
    process.stop()
    assert ended(process) == 143


def test_what_does_not_hear_is_killed(program, home, monkeypatch):
    monkeypatch.setattr(processes, "GRACE_SECONDS", 0.2)
    process = TrialProcess(program.run, ["deaf"], home / "trial")
    until_it_says(home / "trial", "ready")
    process.stop()
    assert ended(process) == -signal.SIGKILL


def test_a_kill_takes_what_it_started_along(program, home):
    process = TrialProcess(program.run, ["hang"], home / "trial")
    until_it_says(home / "trial", "told to hang")
    session = process._process.pid
    until = time.monotonic() + 20
    while len(members(session)) < 2:
        assert time.monotonic() < until, "it started nothing"
        time.sleep(0.02)
    assert len(members(session)) == 2
    process.kill()
    assert ended(process) == -signal.SIGKILL
    until = time.monotonic() + 5
    while members(session):
        assert time.monotonic() < until
        time.sleep(0.02)


def members(session: int) -> list[str]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            after = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if after[3] == str(session) and after[0] != "Z":
            found.append(stat.parent.name)
    return found


def test_nothing_outlives_the_process_that_asked_for_it(program, home):
    """Killed without a word, it takes the trial along, and what the trial started."""
    script = home / "asker.py"
    script.write_text(
        "import sys, time\n"
        f"sys.path.insert(0, {str(home)!r})\n"
        "from pathlib import Path\n"
        "import program_of_a_test\n"
        "from expt.run.process import TrialProcess\n"
        "if __name__ == '__main__':\n"
        "    process = TrialProcess(program_of_a_test.run, ['hang'], Path('trial'))\n"
        "    time.sleep(60)\n"
    )
    asker = subprocess.Popen([sys.executable, str(script)], cwd=home)
    try:
        until_it_says(home / "trial", "told to hang")
        import json

        process = json.loads((home / "trial" / PROCESS_NAME).read_text())
        assert is_alive(process)
    finally:
        asker.kill()
        asker.wait()
    until = time.monotonic() + 10
    while is_alive(process) or members(process["pid"]):
        assert time.monotonic() < until, "it outlived the one that asked for it"
        time.sleep(0.02)


def test_a_leftover_is_killed_by_what_it_wrote_down(program, home):
    process = TrialProcess(program.run, ["hang"], home / "trial")
    until_it_says(home / "trial", "told to hang")
    kill_leftover(home / "trial")
    assert ended(process) == -signal.SIGKILL


def test_a_later_process_with_the_same_number_is_left_alone(home):
    write_json(home / PROCESS_NAME, {**identity(), "started": "1"})
    kill_leftover(home)  # or this test would not end
    write_json(home / PROCESS_NAME, {**identity(), "host": "elsewhere"})
    kill_leftover(home)


def test_a_worker_is_kept_and_begun_anew_after_a_crash(program):
    worker = Worker()
    try:
        assert worker.call(program.double, 4, seconds=20) == 8
        pid = worker.call(program.own_pid, seconds=20)
        assert worker.call(program.own_pid, seconds=20) == pid
        with pytest.raises(WorkerError, match="its process died"):
            worker.call(program.stop_dead, seconds=20)
        assert worker.call(program.own_pid, seconds=20) != pid
        with pytest.raises(WorkerError, match=r"took more than 0\.2 s"):
            worker.call(time.sleep, 30, seconds=0.2)
        with pytest.raises(WorkerError, match="TypeError"):
            worker.call(program.double, seconds=20)
        assert worker.call(program.double, 1, seconds=20) == 2
    finally:
        worker.close()


@pytest.mark.parametrize(
    ("value", "devices"),
    [("2,3", ["2", "3"]), ("", []), ("-1", []), ("MIG-a,MIG-b", ["MIG-a", "MIG-b"])],
)
def test_trials_may_use_the_devices_that_we_may_use(value, devices):
    assert visible_devices({"CUDA_VISIBLE_DEVICES": value}) == devices


def test_without_a_variable_it_is_all_devices(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert visible_devices({}) == ["0", "1"]


HELD = """
import os, signal, sys, time
from multiprocessing import forkserver
from expt.run.process import Worker
from expt.run.server import start_server, stop_server
if __name__ == "__main__":
    began = start_server(["slow_to_import"])
    server = forkserver._forkserver._forkserver_pid
    while not os.path.exists("begun"):
        time.sleep(0.01)
    os.kill(server, signal.SIGINT)  # as Ctrl-C at the terminal does
    worker = Worker()
    held = worker.call(signal.pthread_sigmask, signal.SIG_BLOCK, (), seconds=30)
    print(began, start_server([]), worker.call(os.getppid, seconds=30) == server, held)
    stop_server()
    print(os.path.exists(f"/proc/{server}"), worker.call(os.getppid, seconds=30) == server)
    worker.close()
"""


def test_ctrl_c_does_not_reach_the_server_while_it_imports(home):
    (home / "slow_to_import.py").write_text("import time; open('begun', 'w'); time.sleep(0.3)")
    (home / "asker.py").write_text(HELD)
    ran = subprocess.run(
        [sys.executable, "asker.py"], cwd=home, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert ran.stderr == ""
    first, second = ran.stdout.splitlines()
    assert first == "True False True set()", "its processes hear Ctrl-C"
    assert second == "False False", "it is gone, and another one has begun"
