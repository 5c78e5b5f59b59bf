"""Room on disk for what does not fit into memory: moments and rows are written once and read back when they are asked for. What is lent
room gives it back.

What is read back equals what was written to the last bit. The file has no name where the system allows that, so that it is gone when
the process is, however it ends; elsewhere it goes on `close`.
"""

from __future__ import annotations

import math
import tempfile
from bisect import bisect
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO

import torch
from torch import Tensor

from loraclr import linalg
from loraclr.errors import WriteError
from loraclr.statistics import Moments

MEMORY = 64 << 20  # bytes that stay in memory before the disk is used

Read = Callable[[], Tensor]


class Scratch:
    """Keeps tensors: the first `memory` bytes as they are, the others in a nameless file in `folder` (the system's for such files)."""

    def __init__(self, folder: str | Path | None = None, *, memory: int = MEMORY) -> None:
        """Raises WriteError where `folder` is no folder that can be written to, before any work."""
        self._open: IO[bytes] | None = None
        self.folder, self.left, self.written = folder, memory, 0
        self._gaps: list[tuple[int, int]] = []  # where and how many bytes, given back
        if folder is not None:
            _ = self._file

    @property
    def _file(self) -> IO[bytes]:
        """The system's own folder is not asked for before it is needed."""
        if self._open is None:
            try:
                self._open = tempfile.TemporaryFile(dir=self.folder, prefix="loraclr-", buffering=0)  # noqa: SIM115
            except OSError as error:
                where = "the folder for temporary files" if self.folder is None else self.folder
                advice = "give a folder with space as scratch, or as TMPDIR"
                raise WriteError(f"no scratch file in {where} ({error.strerror}); {advice}") from error
        return self._open

    @property
    def place(self) -> str | Path:
        """The folder that it is in."""
        return tempfile.gettempdir() if self.folder is None else self.folder

    def __enter__(self) -> Scratch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Gives the space back. What was written cannot be read any more."""
        if self._open is not None:
            with suppress(OSError):  # a full disk is told of once, by whoever wrote
                self._open.close()

    def __del__(self) -> None:
        self.close()

    def tensor(self, tensor: Tensor) -> Read:
        """What returns this tensor. Raises WriteError when the disk is full."""
        size = tensor.numel() * tensor.element_size()
        if size <= self.left:
            self.left -= size
            return lambda: tensor
        return self.lend(tensor).read

    def lend(self, tensor: Tensor) -> Lent:
        """Room on disk for this tensor until it is given back. Raises WriteError when the disk is full."""
        return Lent(self, self._write(tensor), tuple(tensor.shape), tensor.dtype)

    def moments(self, seen: Mapping[str, Moments]) -> dict[str, Moments]:
        """The same moments by layer. Layers that share theirs share the space, too."""
        kept: dict[int, Moments] = {}
        for moments in seen.values():
            if id(moments) not in kept:
                kept[id(moments)] = self._moments(moments)
        return {name: kept[id(moments)] for name, moments in seen.items()}

    def _moments(self, moments: Moments) -> Moments:
        rows = moments.rows
        tensor = moments.half() if rows is None else rows
        size = tensor.numel() * tensor.element_size()
        if size <= self.left:
            self.left -= size
            return moments
        if rows is None:
            return StoredMoments(moments, partial(_whole, self.tensor(tensor), moments.width))
        single = rows.float()  # exact: features are collected in float32
        return StoredMoments(moments, self.tensor(single if torch.equal(single.double(), rows) else rows))

    def _place(self, size: int) -> int:
        """The first gap that holds so many bytes, else the end, with a gap that is there."""
        for number, (start, length) in enumerate(self._gaps):
            if length >= size:
                self._gaps[number : number + 1] = [(start + size, length - size)] if length > size else []
                return start
        if self._gaps and sum(self._gaps[-1]) == self.written:
            return self._gaps.pop()[0]
        return self.written

    def _give_back(self, start: int, size: int) -> None:
        """Neighbouring gaps are one."""
        gaps, end, at = self._gaps, start + size, bisect(self._gaps, (start,))
        if at < len(gaps) and gaps[at][0] == end:
            end += gaps.pop(at)[1]
        if at and sum(gaps[at - 1]) == start:
            at, start = at - 1, gaps.pop(at - 1)[0]
        gaps.insert(at, (start, end - start))

    def _write(self, tensor: Tensor) -> int:
        data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
        start = self._place(len(data))
        try:
            self._file.seek(start)
            done = 0
            while done < len(data):
                done += self._file.write(data[done:])
        except OSError as error:
            if (gap := min(len(data), self.written - start)) > 0:
                self._give_back(start, gap)
            raise WriteError(
                f"statistics cannot be written to {self.place} ({error.strerror}) after {start / 1e9:.1f} GB; "
                "free some space, or give a larger folder as scratch, or as TMPDIR"
            ) from error
        self.written = max(self.written, start + len(data))
        return start

    def _read(self, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        tensor = torch.empty(shape, dtype=dtype)
        data = tensor.view(-1).view(torch.uint8).numpy().data
        self._file.seek(start)
        done = 0
        while done < len(data) and (more := self._file.readinto(data[done:])):  # type: ignore[attr-defined]
            done += more
        if done < len(data):
            raise WriteError("the scratch file came back short; check the disk that it is on, or give another folder as scratch")
        return tensor


@dataclass(frozen=True, eq=False)
class Lent:
    """A tensor in a scratch file that has its place for a while."""

    scratch: Scratch
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        return self.scratch._read(self.start, self.shape, self.dtype)

    def give_back(self) -> None:
        """What comes next may take the place; nothing can be read from here any more."""
        self.scratch._give_back(self.start, self.size)


class StoredMoments(Moments):
    """Moments that are read when they are asked for, each time anew: a model's worth of them takes no memory."""

    def __init__(self, moments: Moments, read: Read) -> None:
        for name in ("width", "count", "sketched"):
            object.__setattr__(self, name, getattr(moments, name))
        object.__setattr__(self, "_few", moments.few)
        object.__setattr__(self, "_kept", moments.kept)
        object.__setattr__(self, "_stored", read)
        self._few: bool
        self._kept: int
        self._stored: Read

    @property
    def few(self) -> bool:
        return self._few

    @property
    def kept(self) -> int:
        return self._kept

    @property
    def rows(self) -> Tensor | None:
        return self._stored().double() if self._few else None

    @property
    def square(self) -> Tensor | None:
        return None if self._few else self._stored()

    def loaded(self) -> Moments:
        return Moments(self.width, self.count, self.rows, self.square, self.sketched)


class Sample(Mapping[str, Tensor]):
    """Rows by concept, read when they are asked for: at most `count` of each part, and `limit` in all."""

    def __init__(self, parts: Mapping[str, list[Read]], counts: list[int], limit: int) -> None:
        self._parts, self._counts, self._limit = parts, counts, limit

    def __getitem__(self, concept: str) -> Tensor:
        parts = self._parts[concept]
        return torch.cat([read()[:count] for read, count in zip(parts, self._counts, strict=True)])[: self._limit]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


def _whole(read: Read, width: int) -> Tensor:
    return linalg.whole(read(), width)
