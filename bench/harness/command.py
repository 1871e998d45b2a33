"""How a long command ends: whatever ends it says so in one line, and how to go on; its own processes end with it."""

import errno
import signal
import sys
from collections.abc import Callable
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGHUP)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
AGAIN = "the same command goes on from the last checkpoint"
NOTHING = "nothing was written; the same command starts anew"
interrupted: list[str] = []  # under pytest, where fixtures end as after a whole run: what stopped it


class Refusal(ValueError):
    """Bad input that one line explains; the command line prints it and exits with status 1."""


class Stopped(BaseException):
    """One of SIGNALS came."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _stop(number: int, _: FrameType | None) -> None:
    raise Stopped(number)


def command(name: str, work: Callable[[], int | None], again: str = AGAIN) -> int:
    """Runs `work` and returns the exit status: its own, 1 after a refusal or an error of files, 128 + a signal.

    `again` says in words what is kept of a run that is stopped.
    """
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if handler == signal.SIG_DFL:  # nohup ignores SIGHUP
            signal.signal(number, _stop)
    try:
        return work() or 0
    except OSError as error:
        return _say(name, f"{error}; {again}" if error.errno in FULL else str(error), 1)
    except Refusal as error:
        return _say(name, str(error), 1)
    except KeyboardInterrupt:
        return _say(name, f"stopped; {again}", 130, "\n")
    except Stopped as stopped:
        return _say(name, f"stopped by {signal.Signals(stopped.number).name}; {again}", 128 + stopped.number, "\n")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(name: str, words: str, status: int, ahead: str = "") -> int:
    print(f"{ahead}{name}: {words}", file=sys.stderr)  # ahead: a line of progress may be unfinished
    return status


def leave_signals_to_the_parent() -> None:
    """In a process that a command started: it ends at once, on Ctrl-C by its parent's hand, and the parent tells."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in SIGNALS:
        if signal.getsignal(number) == _stop:
            signal.signal(number, signal.SIG_DFL)
