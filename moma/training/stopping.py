"""SIGTERM and SIGINT: a run ends at its next step, with a checkpoint, and with a status that tells which."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(KeyboardInterrupt):
    """A signal has ended the run."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(text)
        self.status = 128 + number  # a shell's, 143 or 130


class Stop:
    """Notes the first signal; Ctrl-C a second time ends the process at once."""

    def __init__(self) -> None:
        self.signal = 0  # its number; 0 = none has come

    def __call__(self, number: int, frame: FrameType | None) -> None:
        # torchrun passes on a Ctrl-C that the terminal has sent to each rank already.
        if number == self.signal == signal.SIGINT and "RANK" not in os.environ:
            raise KeyboardInterrupt
        self.signal = self.signal or number


@contextmanager
def noted_signals() -> Iterator[Stop]:
    """Inside, both signals are only noted."""
    stop = Stop()
    with _handled(stop, SIGNALS):
        yield stop


@contextmanager
def raised_signals() -> Iterator[None]:
    """Inside, SIGTERM raises `Stopped`, so that what is half written is removed, as after Ctrl-C."""

    def end(number: int, frame: FrameType | None) -> NoReturn:
        raise Stopped(number, "stopped by SIGTERM; --resume continues from the newest checkpoint")

    with _handled(end, (signal.SIGTERM,)):
        yield


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], Any], numbers: tuple[int, ...]) -> Iterator[None]:
    """A handler for signals that are not ignored; only a main thread may have one."""
    here = threading.current_thread() is threading.main_thread()
    before = {n: signal.getsignal(n) for n in numbers if here}
    before = {n: old for n, old in before.items() if old not in (None, signal.SIG_IGN)}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
