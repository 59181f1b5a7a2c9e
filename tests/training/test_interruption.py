"""Real signals; those that would end the process are sent to another one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from expt.training import interruption
from expt.training.interruption import SIGNALS, Interruption, Stopped, signals_held


@pytest.fixture(autouse=True)
def handlers() -> Iterator[dict[int, object]]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


def test_both_ways_to_stop_a_run_are_noted() -> None:
    assert set(SIGNALS) == {signal.SIGINT, signal.SIGTERM}


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_the_handlers_come_back(
    number: int, handlers: dict[int, object]
) -> None:
    with Interruption() as noted:
        assert noted.received is None
        os.kill(os.getpid(), number)
        assert noted.received == number
    assert {n: signal.getsignal(n) for n in SIGNALS} == handlers


def test_the_handlers_come_back_after_an_error(handlers: dict[int, object]) -> None:
    with pytest.raises(ZeroDivisionError), Interruption():
        assert {n: signal.getsignal(n) for n in SIGNALS} != handlers
        _ = 1 / 0
    assert {n: signal.getsignal(n) for n in SIGNALS} == handlers


def test_a_second_signal_of_the_same_kind_acts_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), Interruption() as noted:
        os.kill(os.getpid(), signal.SIGINT)
        assert noted.received == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("went on after the second signal")


def test_a_second_signal_of_the_other_kind_is_only_noted() -> None:
    with Interruption() as noted:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert noted.received == signal.SIGTERM


def test_a_handler_of_the_callers_own_comes_back() -> None:
    seen: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    with Interruption():
        os.kill(os.getpid(), signal.SIGTERM)
        assert seen == []
    os.kill(os.getpid(), signal.SIGTERM)
    assert seen == [signal.SIGTERM]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_signal_stops_where_the_program_is(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interruption, "SAME_SECONDS", 0.0)
    with pytest.raises(Stopped) as stopped, Interruption():
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        pytest.fail("went on after the second signal")
    assert stopped.value.exit_code == 128 + number


def test_a_sigterm_that_another_process_passes_on_is_the_same() -> None:
    with Interruption() as noted:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert noted.received == signal.SIGTERM


def test_what_is_started_with_signals_held_back_hears_them_when_it_asks_to() -> None:
    program = (
        "import os, signal; from expt.training.interruption import hear_signals\n"
        "os.kill(os.getpid(), signal.SIGTERM); print('held', flush=True); hear_signals()\n"
        "print('went on')"
    )
    with signals_held():
        started = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert (started.communicate()[0], started.returncode) == (b"held\n", -signal.SIGTERM)
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(SIGNALS)


def test_what_a_held_server_forks_can_be_ended() -> None:
    program = (
        "import multiprocessing, time; from multiprocessing import forkserver\n"
        "from expt.training.interruption import signals_held\n"
        "own = multiprocessing.get_context('forkserver')\n"
        "own.set_forkserver_preload(['expt.training.interruption'])\n"
        "with signals_held(): forkserver.ensure_running()\n"
        "other = own.Process(target=time.sleep, args=(60,)); other.start()\n"
        "other.terminate(); other.join(30); print(other.exitcode)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    assert done.stdout.split() == [b"-15"], done.stderr


def test_in_another_thread_it_does_nothing(handlers: dict[int, object]) -> None:
    errors: list[BaseException] = []

    def body() -> None:
        try:
            with Interruption() as noted:
                assert {n: signal.getsignal(n) for n in SIGNALS} == handlers
            assert noted.received is None
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert errors == []


@pytest.mark.parametrize(
    ("number", "name", "code"), [(signal.SIGINT, "SIGINT", 130), (signal.SIGTERM, "SIGTERM", 143)]
)
def test_stopped_knows_its_exit_code(number: int, name: str, code: int) -> None:
    stopped = Stopped(number)
    assert isinstance(stopped, KeyboardInterrupt)  # so that it ends a multirun too
    assert (str(stopped), stopped.exit_code) == (name, code)
