"""Names of accelerators: how many chips each stands for."""

import pytest

from jaxdistill.errors import UserError
from jaxdistill.plan import hardware


@pytest.mark.parametrize(
    ("name", "chip", "shape", "chips"),
    [
        ("v5p-8", "v5p", (2, 2, 1), 4),  # v4 and v5p count TensorCores
        ("v5p-512", "v5p", (4, 8, 8), 256),
        ("v5p:4x8x8", "v5p", (4, 8, 8), 256),
        ("v4-128", "v4", (4, 4, 4), 64),
        ("v5litepod-16", "v5e", (4, 4), 16),  # these count chips
        ("v5e-256", "v5e", (16, 16), 256),
        ("v6e-64", "v6e", (8, 8), 64),
        ("v6e:8x8", "v6e", (8, 8), 64),
        ("h100", "h100", (1, 1), 1),
        ("h100x8", "h100", (1, 8), 8),
        ("h100x128", "h100", (16, 8), 128),
    ],
)
def test_names(name: str, chip: str, shape: tuple[int, ...], chips: int):
    found = hardware.parse(name)
    assert (found.chip.name, found.shape, found.chips, found.devices) == (chip, shape, chips, chips)


def test_a_tpu7x_chip_is_two_devices():
    found = hardware.parse("tpu7x:4x4x4")
    assert (found.chips, found.devices) == (64, 128)
    assert str(found) == "tpu7x 4x4x4, 64 chips"


@pytest.mark.parametrize("name", hardware.ACCELERATOR_TYPES)
def test_slices_hold_what_their_names_count(name: str):
    per_chip = 2 if name in ("v4", "v5p") else 1
    for size in hardware.ACCELERATOR_TYPES[name]:
        assert hardware.parse(f"{name}-{size}").chips * per_chip == size


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a100x8", "'a100x8' is no hardware; expected a topology"),
        ("v9-8", "v9-8 is no accelerator known here"),
        ("v5p-24", "no slice of that size; expected v5p-8, v5p-16"),
        ("v5p:4x4", "v5p has 3 dimensions"),
        ("v5e:4x0", "v5e has 2 dimensions"),
        ("h100x12", "12 GPUs are no whole nodes; expected a multiple of 8"),
        ("h100x0", "h100x0: expected a topology"),
    ],
)
def test_names_of_nothing(name: str, message: str):
    with pytest.raises(UserError, match=message):
        hardware.parse(name)
