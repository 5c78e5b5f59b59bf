"""The one way to write: an output appears whole or not at all, outputs that belong together appear together, one writer at a time.

What is being written lies beside its place under a hidden name, `.NAME.1f2e3d4c.part`. A killed process leaves that at most; whoever
next reserves the output clears it away.
"""

from __future__ import annotations

import ctypes
import errno
import math
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from loraclr.errors import WriteError

_REMEDIES = {
    errno.ENOSPC: "make room and run it again",
    errno.EDQUOT: "make room and run it again",
    errno.EROFS: "give a folder that can be written to",
    errno.EACCES: "give a folder that you may write to",
    errno.EPERM: "give a folder that you may write to",
    errno.EISDIR: "give another name",
    errno.ENOTDIR: "give another name",
}
# What goes where at the end of the outermost `together`; None is for what is to be gone.
_staged: ContextVar[dict[Path, Path | None] | None] = ContextVar("staged", default=None)


@contextmanager
def together() -> Iterator[None]:
    """Whatever is written or removed inside appears at the end, all of it, and after an error nothing has changed.

    Inside another one it joins that. A kill between two of the final renames, microseconds apart, can part them; each is whole even then.
    """
    if _staged.get() is not None:
        yield
        return
    staged: dict[Path, Path | None] = {}
    token = _staged.set(staged)
    try:
        yield
        _place(staged)
    finally:
        _staged.reset(token)
        for part in staged.values():
            _discard(part)


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """Gives the place to write a file or make a folder, with the same ending, that is at `path` afterwards, in one step.

    The caller has seen to it that a folder at `path` may be replaced. Raises WriteError for what the system refuses.
    """
    path = Path(path)
    part = _beside(path, "part")
    with together(), _told(path):
        try:
            yield part
            for file in part.rglob("*") if part.is_dir() else (part,):
                if file.is_file():
                    with file.open("rb+" if os.name == "nt" else "rb") as written:
                        os.fsync(written.fileno())
        except BaseException:
            _discard(part)
            raise
        _stage(path, part)


def write(path: str | Path, data: bytes | str) -> None:
    """The file at `path` with these bytes, or this text in UTF-8."""
    with whole(path) as part:
        part.write_bytes(data.encode() if isinstance(data, str) else data)


def plain(value: Any, *, digits: int | None = None) -> Any:
    """Mappings, sequences and numbers as JSON holds them, floats to `digits` significant digits: NaN, not measured, is None, and what is
    infinite the text `inf`."""
    if isinstance(value, Mapping):
        return {str(key): plain(part, digits=digits) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part, digits=digits) for part in value]
    if not isinstance(value, float):
        return value
    if not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value if digits is None else float(f"{value:.{digits}g}")


def remove(path: Path) -> None:
    """Takes the file at `path` away, as `whole` puts one there."""
    with together():
        _stage(path, None)


@contextmanager
def reserved(path: str | Path, *beside: Path) -> Iterator[None]:
    """Nobody else writes `path`, nor the files `beside` it, meanwhile; what a killed process left of them is cleared away.

    Raises WriteError if another process or thread has it, or if the folder is missing or cannot be written to. The lock is the
    system's own on a file `.NAME.lock`, so it ends with its process, however that ends.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise WriteError(f"{path}: there is no folder {path.parent}; make it first")
    with _locked(path, path.parent.resolve() / f".{path.name}.lock") as first:
        if first:
            for one in (path, *beside):
                _clear(one.parent.iterdir(), re.escape(one.stem), re.escape(one.suffix))
        yield


def make_folder(path: Path) -> None:
    """The folder `path` and those it lies in, where they are missing."""
    with _told(path):
        path.mkdir(parents=True, exist_ok=True)


@contextmanager
def folder(path: str | Path) -> Iterator[Path]:
    """The folder `path`, made if missing, in which nobody else works meanwhile: `reserved` for all that is in it.

    If it was made here and nothing was put into it, it is gone afterwards.
    """
    path = Path(path)
    made = not path.exists()
    make_folder(path)
    try:
        with _locked(path, path.resolve() / ".lock") as first:
            if first:
                _clear(path.rglob(".*"), ".+?", r"(\.\w+)?")
            yield path
    finally:
        if made:
            with suppress(OSError):
                path.rmdir()


@contextmanager
def _locked(path: Path, at: Path) -> Iterator[bool]:
    """Whether this is the first of the holders, all of them in one thread."""
    lock = FileLock(at, timeout=0, is_singleton=True)
    try:
        with _told(path):
            lock.acquire()
    except Timeout as error:
        raise WriteError(f"{path}: another run is writing it; wait for that, or give another name") from error
    first = lock.lock_counter == 1
    try:
        yield first
    finally:
        if first:  # removed while it is held: whoever waits for the removed file notices, and makes a new one
            with suppress(OSError):  # Windows does that itself
                at.unlink()
        lock.release()


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except Timeout:
        raise
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "check the path")
        raise WriteError(f"{path}: cannot be written ({error.strerror or error}); {remedy}") from error


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.stem}.{secrets.token_hex(4)}.{kind}{path.suffix}")


def _stage(path: Path, part: Path | None) -> None:
    staged = _staged.get()
    assert staged is not None
    _discard(staged.get(path))
    staged[path] = part


def _discard(part: Path | None) -> None:
    if part is not None and part.is_dir():
        shutil.rmtree(part, ignore_errors=True)
    elif part is not None:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def _place(staged: dict[Path, Path | None]) -> None:
    back: list[Callable[[], object]] = []
    old: list[Path] = []
    try:
        for path, part in sorted(staged.items(), key=lambda entry: entry[1] is None):  # a kill leaves rather too much than too little
            with _told(path):
                if part is None:
                    away = _beside(path, "part")
                    os.replace(path, away)
                    old.append(away)
                    back.append(partial(os.replace, away, path))
                elif not os.path.lexists(path):
                    os.rename(part, path)
                    back.append(partial(os.rename, path, part))
                else:
                    _swap(part, path)
                    back.append(partial(_swap, part, path))
    except BaseException:
        try:
            for step in reversed(back):
                step()
        except OSError:
            staged.clear()  # what cannot be put back stays beside its place: it is not to be thrown away
        raise
    for away in old:
        _discard(away)


def _swap(part: Path, path: Path) -> None:
    """What is at `path` goes to `part` and the reverse. One step on Linux; elsewhere a folder is absent for a moment, a file never."""
    if part.is_dir() != path.is_dir():
        raise OSError(errno.EISDIR if path.is_dir() else errno.ENOTDIR, f"is a {'folder' if path.is_dir() else 'file'}")
    if _exchanged(part, path):
        return
    away = _beside(path, "old")
    if path.is_dir():
        os.rename(path, away)
    else:
        try:
            os.link(path, away, follow_symlinks=False)
        except OSError:  # file systems without links
            shutil.copy2(path, away, follow_symlinks=False)
    try:
        os.replace(part, path)
    except BaseException:
        if path.exists():
            _discard(away)
        else:
            os.rename(away, path)
        raise
    os.rename(away, part)


def _exchanged(one: Path, other: Path) -> bool:
    """By Linux's renameat2. False where the system or the file system has no such thing."""
    if not sys.platform.startswith("linux"):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return bool(call(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)


def _clear(candidates: Iterator[Path], stem: str, suffix: str) -> None:
    """Removes parts; what a killed process had moved away and not replaced goes back."""
    name = re.compile(rf"\.({stem})\.[0-9a-f]{{8}}\.(part|old)({suffix})")
    for found in sorted(candidates):
        match = name.fullmatch(found.name)
        if match is None:
            continue
        path = found.with_name(match[1] + match[3])
        if match[2] == "old" and not os.path.lexists(path):
            os.rename(found, path)
        else:
            _discard(found)
