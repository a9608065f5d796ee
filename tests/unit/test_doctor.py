"""`jaxdistill doctor`: what it prints on a CPU, and where jax finds nothing at all."""

import jax
import pytest

from jaxdistill import cli


def test_what_a_cpu_can_do(capsys: pytest.CaptureFixture[str]):
    cli.main(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    assert f"{'jax':20} {jax.__version__}" in lines
    assert any(line.startswith("8 x cpu (cpu), ") and line.endswith("GiB of host memory") for line in lines)
    assert "step.attention splash     not available: splash runs on TPUs, found cpu" in lines
    assert "step.attention blockwise  available, the default here" in lines
    assert "engine.attention xla      available" in lines
    assert "engine.attention triton   not available: triton runs on GPUs, found cpu" in lines
    assert "step.matmul_dtype compute available: the compute dtype" in lines
    assert any(
        line.startswith("step.matmul_dtype float8  available: float8, emulated: the numbers are") for line in lines
    )
    assert lines[-1] == "attention here: blockwise"


def test_no_device(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def fail() -> None:
        raise RuntimeError("Unable to initialize backend 'tpu'")

    monkeypatch.setattr(jax, "local_devices", fail)
    with pytest.raises(SystemExit) as caught:
        cli.main(["doctor"])
    printed = capsys.readouterr()
    assert caught.value.code == 1
    assert "jaxlib" in printed.out
    assert "jax finds no device Unable to initialize backend 'tpu'; set JAX_PLATFORMS=cpu" in printed.err
