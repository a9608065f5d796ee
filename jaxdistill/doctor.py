"""`jaxdistill doctor`: what jax finds here, which attention and products run on it; or what a teacher's API does."""

import dataclasses
import os
from typing import Any, get_args

import jax

from jaxdistill import manifest
from jaxdistill.collect import check
from jaxdistill.errors import RunError
from jaxdistill.models import quantized
from jaxdistill.models.attention import Backend, backends
from jaxdistill.sample import attention


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """What works on this machine, or, with a teacher's name, what works at its API."""

    teacher: str | None = None  # model to call once, cheaply; its API is the one whose profile knows the model
    base_url: str | None = None  # another API
    api_key_env: str | None = None  # environment variable with the key; None takes the profile's


def main(config: DoctorConfig) -> None:
    """Prints what it finds.

    Raises:
      RunError: jax finds no device (the versions were printed before), or the teacher gives no answer.
    """
    if config.teacher is not None:
        check.check(check.config_of(config.teacher, config.base_url, config.api_key_env))
        return
    for package, version in manifest.versions().items():
        print(f"{package:20} {version}")
    try:
        devices = jax.local_devices()
    except (RuntimeError, AssertionError) as error:  # the second where JAX_PLATFORMS names one whose library fails
        raise RunError(f"jax finds no device {error}; set JAX_PLATFORMS=cpu to run without one") from error
    print(f"\n{len(devices)} x {devices[0].device_kind} ({devices[0].platform}), {_memory(devices[0])}\n")
    own = backends.OWN.get(devices[0].platform)
    for backend in get_args(Backend):
        reason = backends.unavailable(backend, devices[0])
        state = f"not available: {reason}" if reason else f"available{', the default here' * (backend == own)}"
        print(f"step.attention {backend:10} {state}")
    for kernel in get_args(attention.Kernel):
        reason = attention.unavailable(kernel, devices[0])
        print(f"engine.attention {kernel:8} {f'not available: {reason}' if reason else 'available'}")
    for matmul_dtype in get_args(quantized.MatmulDtype):
        reason = quantized.unavailable(matmul_dtype, devices[0])
        state = f"not available: {reason}" if reason else f"available: {quantized.describe(matmul_dtype, devices[0])}"
        print(f"step.matmul_dtype {matmul_dtype:7} {state}")
    if own and not backends.unavailable(own, devices[0]):
        print(f"\nattention here: {backends.describe(own)}")


def _memory(device: Any) -> str:
    """GiB that programs can use on a device, or that the host has where the device does not say."""
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return f"{stats['bytes_limit'] / 2**30:.1f} GiB each"
    return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB of host memory"
