"""Real signals; those that would end the process are sent to another one."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from expt.training.interruption import SIGNALS, Interruption, Stopped


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
    with Interruption() as interruption:
        assert interruption.received is None
        os.kill(os.getpid(), number)
        assert interruption.received == number
    assert {n: signal.getsignal(n) for n in SIGNALS} == handlers


def test_the_handlers_come_back_after_an_error(handlers: dict[int, object]) -> None:
    with pytest.raises(ZeroDivisionError), Interruption():
        assert {n: signal.getsignal(n) for n in SIGNALS} != handlers
        _ = 1 / 0
    assert {n: signal.getsignal(n) for n in SIGNALS} == handlers


def test_a_second_signal_of_the_same_kind_acts_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.received == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("went on after the second signal")


def test_a_second_signal_of_the_other_kind_is_only_noted() -> None:
    with Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.received == signal.SIGTERM


def test_a_handler_of_the_callers_own_comes_back() -> None:
    seen: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    with Interruption():
        os.kill(os.getpid(), signal.SIGTERM)
        assert seen == []
    os.kill(os.getpid(), signal.SIGTERM)
    assert seen == [signal.SIGTERM]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_signal_stops_where_the_program_is(number: int) -> None:
    with pytest.raises(Stopped) as stopped, Interruption():
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        pytest.fail("went on after the second signal")
    assert stopped.value.exit_code == 128 + number


def test_in_another_thread_it_does_nothing(handlers: dict[int, object]) -> None:
    errors: list[BaseException] = []

    def body() -> None:
        try:
            with Interruption() as interruption:
                assert {n: signal.getsignal(n) for n in SIGNALS} == handlers
            assert interruption.received is None
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
