"""Progress where no terminal shows it: lines, not too many, and the last one always."""

import io

import pytest
from rich.console import Console

from jaxdistill import progress


def lines(monkeypatch: pytest.MonkeyPatch, every_s: float, steps: int = 4) -> list[str]:
    monkeypatch.setattr(progress, "_EVERY_S", every_s)
    out = io.StringIO()
    with progress.Progress(console=Console(file=out, force_terminal=False, width=20)) as bar:
        task = bar.add_task("train", total=steps, note="")
        for step in range(1, steps + 1):
            bar.update(task, completed=step, note=f"loss {1 / step:.2f}  [B, T]")
    return out.getvalue().splitlines()


def test_every_half_minute_and_at_the_end(monkeypatch: pytest.MonkeyPatch):
    assert lines(monkeypatch, 3600.0) == ["train 4/4  loss 0.25  [B, T]"]


def test_a_line_says_how_far_and_how_long(monkeypatch: pytest.MonkeyPatch):
    first, *_, last = found = lines(monkeypatch, 0.0)
    assert len(found) == 4
    assert first.startswith("train 1/4  loss 1.00  [B, T]")
    assert any(line.endswith(" left") for line in found[:-1])
    assert last == "train 4/4  loss 0.25  [B, T]"
