"""Folders that processes and threads save to: one saver at a time, and at every moment one whole state to load."""

import errno
import fcntl
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
WORK = ".prefixattn-saving"  # inside the folder, while somebody saves: the lock, and files that are not whole yet
LOCK = "lock"
UNLOCKABLE = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)
HANDOVERS = 10_000  # from saver to saver, while one waits
TRIES = 50  # of a reader that meets savers

_held: set[tuple[int, str]] = set()  # thread and folder
_reading = threading.local()


class Saver:
    """Writes the files of one state, and then puts each in its place by a rename."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._work = folder / WORK

    def write(self, name: str, chunks: Iterable[Any]) -> None:
        with open(self._work / name, "xb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())

    def place(self, name: str) -> None:
        os.replace(self._work / name, self.folder / name)

    def remove(self, name: str) -> None:
        if (self.folder / name).exists():
            self._sync()
            (self.folder / name).unlink()

    def tidy(self, stale: Callable[[str], bool]) -> None:
        """Removes what no reader looks at any more, once what replaces it is on the disk; what stays harms nobody."""
        self._sync()
        for path in self.folder.iterdir():
            if stale(path.name):
                with suppress(OSError):
                    path.unlink()

    def _sync(self) -> None:
        """Renames so far reach the disk before what comes next, if its file system can say so."""
        with suppress(OSError):
            directory = os.open(self.folder, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)


@contextmanager
def saver(folder: Path) -> Iterator[Saver]:
    """The one saver at work in `folder`, which is made; the others wait.

    What a saver that was killed left behind is removed. OSError, in words, if `folder` cannot be written to.
    """
    key = threading.get_ident(), os.path.realpath(folder)
    if key in _held:  # it would wait for itself
        raise RuntimeError(
            f"{folder} is being saved to by this very thread (this is a signal handler?): not saved again"
        )
    _held.add(key)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _lock(folder)
        try:
            _clean(folder / WORK)
            yield Saver(folder)
        finally:
            _clean(folder / WORK)
            with suppress(OSError):
                (folder / WORK / LOCK).unlink(missing_ok=True)
                (folder / WORK).rmdir()
            with suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_UN)  # a forked process may have it open too
            os.close(lock)
    except OSError as error:
        why = "it is a file, expected a folder" if folder.is_file() else error.strerror or str(error)
        raise OSError(error.errno, f"{folder}: not saved, and what was there is as it was ({why})") from error
    finally:
        _held.discard(key)


def _lock(folder: Path) -> int:
    """The open lock file, which is removed with its folder after each save: so is it still the one that others see?"""
    path = folder / WORK / LOCK
    for _ in range(HANDOVERS):
        with suppress(FileExistsError):
            os.mkdir(path.parent)
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            continue
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in UNLOCKABLE:
                    raise
                words = (
                    f"{folder}: its file system has no locks ({error.strerror}); let one process at a time save to it"
                )
                warnings.warn(words, stacklevel=6)
                return lock
            if path.exists() and os.path.samestat(os.fstat(lock), path.stat()):
                return lock
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)
    raise OSError(errno.EDEADLK, f"the lock {path} is never there when it is taken")


def _clean(work: Path) -> None:
    with suppress(OSError):
        for path in work.iterdir():
            if path.name != LOCK:
                path.unlink()


def stamp(folder: Path, names: Iterable[str]) -> list[tuple[int, ...] | None]:
    """Changes whenever one of these files is replaced."""
    found: list[tuple[int, ...] | None] = []
    for name in names:
        try:
            s = os.stat(folder / name)
            found.append((s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns))
        except OSError:
            found.append(None)
    return found


def whole(folder: Path, names: Iterable[str], read: Callable[[], T]) -> T:
    """What `read` returns; tried again where it fails while somebody saves to `folder`, whose state `names` are."""
    if getattr(_reading, "now", False):  # a part of what is read: all of it is tried again
        return read()
    _reading.now = True
    try:
        return _whole(folder, tuple(names), read)
    finally:
        _reading.now = False


def _whole(folder: Path, names: tuple[str, ...], read: Callable[[], T]) -> T:
    for left in reversed(range(TRIES)):
        before = stamp(folder, names)
        try:
            return read()
        except (ValueError, OSError):
            if not left or (stamp(folder, names) == before and not _at_work(folder)):
                raise
            time.sleep(0.02)
    raise AssertionError


def _at_work(folder: Path) -> bool:
    """True if somebody is saving to `folder` now; the lock of one who was killed is free."""
    with suppress(OSError), open(folder / WORK / LOCK, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
