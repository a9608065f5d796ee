"""Which options a device's programs are compiled with."""

from types import SimpleNamespace

import jax

from jaxdistill import chips, compiler


def test_every_generation_of_the_table_is_a_tpu():
    assert all(chips.CHIPS[name].platform == "tpu" for name in compiler.OPTIONS)


def test_options_are_those_of_the_devices_generation():
    v5p = SimpleNamespace(device_kind="TPU v5", platform="tpu")
    assert compiler.options(v5p) == compiler.OPTIONS["v5p"]
    assert compiler.options(SimpleNamespace(device_kind="TPU v5 lite", platform="tpu")) == {}
    assert compiler.options(SimpleNamespace(device_kind="NVIDIA H100", platform="gpu")) == {}
    assert compiler.options(jax.devices()[0]) == {}
