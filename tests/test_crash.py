"""A short run of what `make crash` does at length, in a process of its own: forks of one with threads may hang."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_command_leaves_whole_files_and_runs_again():
    script = Path(__file__).with_name("crashing.py")
    done = subprocess.run([sys.executable, "-W", "ignore", script, "8"], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "killed" in done.stdout
