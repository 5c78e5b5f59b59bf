"""Laws of writing: whole or not at all, together or not at all, one writer at a time, and nothing left over."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from loraclr import disk
from loraclr.errors import WriteError


@pytest.fixture(params=[True, False], ids=["exchange", "two renames"])
def exchange(request, monkeypatch):
    """On a system that exchanges two names in one step, and on one that does not."""
    if not request.param:
        monkeypatch.setattr(disk, "_exchanged", lambda one, other: False)


def tree(folder) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


# ---- one output


def test_a_file_is_there_when_it_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    with disk.whole(path) as part:
        part.write_text("new")
        assert not path.exists() and part.suffix == ".txt" and part.name.startswith(".")
    assert tree(tmp_path) == {"a.txt": "new"}


@pytest.mark.usefixtures("exchange")
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("mine")])
def test_after_an_error_the_old_file_is_there_and_nothing_else(tmp_path, error):
    disk.write(tmp_path / "a.txt", "old")
    expected = WriteError if isinstance(error, OSError) else type(error)

    def fail():
        with disk.whole(tmp_path / "a.txt") as part:
            part.write_text("half")
            raise error

    with pytest.raises(expected):
        fail()
    assert tree(tmp_path) == {"a.txt": "old"}


@pytest.mark.usefixtures("exchange")
def test_a_folder_replaces_a_folder(tmp_path):
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "old").write_text("1")
    with disk.whole(tmp_path / "f") as part:
        part.mkdir()
        (part / "new").write_text("2")
    assert tree(tmp_path) == {"f/new": "2"}


def test_neither_a_folder_nor_a_file_replaces_the_other(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis").write_text("years of work")
    (tmp_path / "file").write_text("too")
    with pytest.raises(WriteError, match="folder: cannot be written .*give another name"):
        disk.write(tmp_path / "folder", "data")
    with pytest.raises(WriteError, match="file: cannot be written .*give another name"), disk.whole(tmp_path / "file") as part:
        part.mkdir()
    assert tree(tmp_path) == {"folder/thesis": "years of work", "file": "too"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


# ---- outputs that belong together


def test_together_they_appear_at_the_end(tmp_path):
    disk.write(tmp_path / "gone", "old")
    with disk.together():
        disk.write(tmp_path / "a", "1")
        with disk.together():
            disk.write(tmp_path / "b", "2")
            disk.remove(tmp_path / "gone")
        disk.write(tmp_path / "a", "3")  # the last one counts
        assert {name for name in tree(tmp_path) if not name.startswith(".")} == {"gone"}
    assert tree(tmp_path) == {"a": "3", "b": "2"}


@pytest.mark.usefixtures("exchange")
def test_if_the_last_cannot_be_placed_none_is(tmp_path):
    for name in ("a", "gone"):
        disk.write(tmp_path / name, "old")
    (tmp_path / "taken").mkdir()

    def write():
        with disk.together():
            disk.write(tmp_path / "a", "new")
            disk.write(tmp_path / "fresh", "new")
            disk.remove(tmp_path / "gone")
            disk.write(tmp_path / "taken", "new")

    with pytest.raises(WriteError, match="taken: cannot be written"):
        write()
    assert tree(tmp_path) == {"a": "old", "gone": "old"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "gone", "taken"]


# ---- one writer at a time

HOLD = "import sys; from loraclr import disk\nwith disk.reserved(sys.argv[1]): print('held', flush=True); sys.stdin.read()"


@pytest.fixture
def holder(tmp_path):
    """Another process that writes tmp_path/a, until it is killed or its input ends."""
    words = [sys.executable, "-c", HOLD, tmp_path / "a"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_the_other_process_is_told_and_a_killed_one_is_in_nobodys_way(holder, tmp_path):
    with pytest.raises(WriteError, match="a: another run is writing it; wait"), disk.reserved(tmp_path / "a"):
        pass
    with disk.reserved(tmp_path / "b"):
        pass
    holder.kill()
    holder.wait()
    assert (tmp_path / ".a.lock").exists()  # which means nothing
    with disk.reserved(tmp_path / "a"):
        disk.write(tmp_path / "a", "mine")
    assert tree(tmp_path) == {"a": "mine"}


def test_another_thread_is_told_the_same_one_goes_in_again(tmp_path):
    said = []

    def other():
        try:
            with disk.reserved(tmp_path / "a"):
                said.append("in")
        except WriteError as error:
            said.append(str(error))

    with disk.reserved(tmp_path / "a"):
        with disk.reserved(tmp_path / "a"):
            pass
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert "another run is writing it" in said[0]
    other()
    assert said[1:] == ["in"] and tree(tmp_path) == {}


def test_what_a_killed_process_left_is_cleared_away(tmp_path):
    for name in (".a.0123abcd.part.txt", ".a.0123abcd.old.txt", ".b.0123abcd.part.txt", ".a.b.0123abcd.part.txt", ".a.mine.txt"):
        (tmp_path / name).write_text("left")
    (tmp_path / "a.txt").write_text("whole")
    with disk.reserved(tmp_path / "a.txt"):
        pass
    assert set(tree(tmp_path)) == {"a.txt", ".b.0123abcd.part.txt", ".a.b.0123abcd.part.txt", ".a.mine.txt"}


def test_what_a_killed_process_had_moved_away_comes_back(tmp_path):
    (tmp_path / ".f.0123abcd.old").mkdir()
    (tmp_path / ".f.0123abcd.old" / "weights").write_text("earlier")
    with disk.reserved(tmp_path / "f"):
        assert tree(tmp_path / "f") == {"weights": "earlier"}


def test_a_folder_is_one_runs_at_a_time_and_leaves_no_trace_if_unused(tmp_path):
    with disk.folder(tmp_path / "out"):
        (tmp_path / "out" / ".x.0123abcd.part.png").write_text("half")
    with disk.folder(tmp_path / "out"):
        assert not (tmp_path / "out" / ".x.0123abcd.part.png").exists()
    (tmp_path / "out").rmdir()
    with disk.folder(tmp_path / "out"):
        assert (tmp_path / "out").is_dir()
    assert not (tmp_path / "out").exists()


def test_a_missing_folder_is_said(tmp_path):
    with pytest.raises(WriteError, match=r"there is no folder .*no; make it first"), disk.reserved(tmp_path / "no" / "a"):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux exchanges names")
def test_linux_exchanges_in_one_step(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    assert disk._exchanged(tmp_path / "a", tmp_path / "b")
    assert tree(tmp_path) == {"a": "b", "b": "a"}
    assert not disk._exchanged(tmp_path / "a", tmp_path / "none") and os.listdir(tmp_path)
