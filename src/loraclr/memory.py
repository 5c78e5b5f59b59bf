"""How much memory a piece of work takes: above what was there before it, whatever ran before.

What a process has in memory is no measure of what it uses: allocators keep what was freed for the next who asks. So free pages are
given back first (glibc's `malloc_trim`), and the peak is the kernel's own (Linux: `VmHWM`, begun anew by `clear_refs`), which misses no
moment. What is left of earlier work is how the allocator's free space is cut up: on the toybox `regmean` took 36 to 45 MB in a process
that had done the like or nothing, 67 to 78 after `loraclr`, which takes 450. To the megabyte it is only in a process of its own, as in
benchmarks.
"""

from __future__ import annotations

import ctypes
import gc
import re
import sys
from pathlib import Path

PROC = Path("/proc/self")


class PeakMemory:
    """While it is entered: the most memory above what was in use on entry, in `megabytes`; NaN where the system does not tell.

    Pages of files, as of libraries used for the first time, do not count: the system may take them back. The first work of its kind still
    pays for what libraries set up once, a few megabytes. The process's peak begins anew on entry (also for `peak_memory`), so that these do
    not nest. Without `tidy` free pages stay where they are, for work that goes on.
    """

    megabytes = float("nan")

    def __init__(self, tidy: bool = True) -> None:
        self._tidy = tidy

    def __enter__(self) -> PeakMemory:
        self._measured = (not self._tidy or give_back()) and _begin_anew()
        self._before = _told()
        return self

    def __exit__(self, *_: object) -> None:
        after = _told()
        if self._measured and {"VmHWM", "VmRSS", "RssFile"} <= after.keys():
            read = max(after["RssFile"] - self._before["RssFile"], 0)
            self.megabytes = max(after["VmHWM"] - self._before["VmRSS"] - read, 0) / 1e6

    @property
    def held(self) -> float:
        """Megabytes of the whole process on entry; NaN where the system does not tell."""
        return self._before.get("VmRSS", float("nan")) / 1e6


def give_back() -> bool:
    """Drops what nobody refers to and hands free pages back to the system; False where the allocator cannot be asked to."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # not glibc; Windows has no CDLL(None)
        return False
    return True


def peak_memory() -> int | None:
    """The most bytes this process has had in memory, in all or since a `PeakMemory` began; None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _begin_anew() -> bool:
    try:
        (PROC / "clear_refs").write_text("5")
    except OSError:  # no /proc, or one that may not be written to
        return False
    return True


def _told() -> dict[str, int]:
    """Bytes by the kernel's names; nothing where there is no /proc."""
    try:
        text = (PROC / "status").read_text()
    except OSError:
        return {}
    return {name: int(count) * 1024 for name, count in re.findall(r"^(VmHWM|VmRSS|RssFile):\s+(\d+) kB$", text, re.M)}
