"""Some of the faults of `make faults`, each tried once; kills have tests of their own."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_full_disk_a_changed_bit_broken_connections_and_a_jumping_clock_lose_nothing_that_was_saved():
    command = [sys.executable, "benchmarks/faults.py", "--times", "1", "--only", "full", "bit", "connection", "clock"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {
        words: said for words, *_, said in (line.split(" | ") for line in done.stdout.splitlines() if " | " in line)
    }
    assert len(rows) == 4, done.stdout
    disk = rows.pop("the disk is full at a checkpoint")
    assert "the disk is full: free space at" in disk or "needs root" in disk
    assert "is not what was saved: params/embed" in rows["one bit of the newest checkpoint changes in storage"]
    assert "not tried" not in "".join(rows.values())
