"""The metrics file, and the FLOPs that MFU counts."""

import struct
import sys

import jax.numpy as jnp
import pytest
import tiny
from tensorboardX.proto import event_pb2

from jaxdistill import metrics, tracking
from jaxdistill.errors import UserError
from jaxdistill.metrics import MetricsLog


def test_last_row_of_a_step_counts(tmp_path):
    log = MetricsLog(tmp_path)
    for step, value in ((1, 5.0), (2, 4.0)):
        log.write(step, loss=value)
    log.close()
    again = MetricsLog(tmp_path)
    again.write(2, loss=4.5)
    again.write(2, heldout_loss=6.0)
    again.close()
    rows = metrics.read(tmp_path)
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 5.0), (2, 4.5)]
    assert rows[1]["heldout_loss"] == 6.0
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_tensorboard_has_every_number_and_a_restart_writes_over_none(tmp_path):
    for start in (1, 3):
        log = MetricsLog(tmp_path)
        for step in (start, start + 1):
            log.write(step, loss=5.0 - step, grad_norm=float(step))
        log.close()
    found = {}
    for path in sorted((tmp_path / "tensorboard").iterdir()):
        content, at = path.read_bytes(), 0
        while at < len(content):  # TFRecord: length, its checksum, the event, its checksum
            (length,) = struct.unpack_from("<Q", content, at)
            event = event_pb2.Event.FromString(content[at + 12 : at + 12 + length])  # type: ignore[attr-defined]
            found |= {(event.step, value.tag): value.simple_value for value in event.summary.value}
            at += 16 + length
    assert found == {
        (step, name): value for step in range(1, 5) for name, value in (("loss", 5.0 - step), ("grad_norm", step))
    }


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_refused(name: tracking.Name, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=f"track: {name} is not installed here"):
        tracking.check(("tensorboard", name))


def test_line_cut_by_a_kill_does_not_spoil_the_next(tmp_path):
    log = MetricsLog(tmp_path)
    log.write(1, loss=5.0)
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 2, "lo')
    assert [row["step"] for row in metrics.read(tmp_path)] == [1]
    again = MetricsLog(tmp_path)
    again.write(2, loss=4.0)
    again.close()
    assert [(row["step"], row["loss"]) for row in metrics.read(tmp_path)] == [(1, 5.0), (2, 4.0)]


def test_flops_follow_the_printed_formula():
    c = tiny.config("llama")  # D 32, F 48, N 4, K 2, H 16, L 2, V 96
    matmul = 2 * (32 * 64 + 2 * 32 * 32 + 64 * 32 + 3 * 32 * 48) + 96 * 32
    assert c.flops_per_token(0.0) == 6 * matmul
    assert c.flops_per_token(100.0) - c.flops_per_token(0.0) == 6 * 2 * 4 * 16 * 100
    assert c.flops_per_token(0.0) == tiny.config("llama", tied=True).flops_per_token(0.0), "a tied head multiplies too"


@pytest.mark.parametrize("sizes", [{}, {"fsdp": 2, "tensor": 2}], ids=str)
def test_peak_of_a_device_without_data_sheet_is_measured(sizes: dict[str, int]):
    with tiny.mesh(**sizes):
        peak, source = metrics.peak_flops(jnp.float32)
    assert peak > 1e8
    assert source == "measured 2048x2048 float32 product"
