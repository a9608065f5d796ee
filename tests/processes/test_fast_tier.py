"""Checkpoints on each host's own disk: which step two hosts go on from where one has lost or damaged its own."""

import os
import socket
import subprocess
import sys
from pathlib import Path

HOST = """
import shutil, sys
from pathlib import Path
import jax, numpy as np
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
me, address, shared, own = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])
jax.distributed.initialize(address, 2, me)
from jaxdistill.checkpoint_store import Checkpoints, restore_newest

mesh = jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
jax.set_mesh(mesh)
SPECS = {"replicated": jax.P(), "in_a_host": jax.P("fsdp"), "over_hosts": jax.P("data")}
SPECS["over_all"] = jax.P(("data", "fsdp"))

def state(step):
    found = {}
    for name, spec in SPECS.items():
        values = np.random.default_rng(step).random((8, 4), np.float32)
        place = jax.NamedSharding(mesh, spec)
        found[name] = jax.make_array_from_callback(values.shape, place, lambda index, values=values: values[index])
    key = jax.device_put(jax.random.key(step), jax.NamedSharding(mesh, jax.P()))
    return {**found, "key": key}

def places():
    return [Checkpoints(shared), Checkpoints(own, own=True)]

def newest():
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0))
    told, opened = [], places()
    step, found, position = restore_newest(opened, like, told.append)
    for place in opened:
        place.close()
    assert position == {"at": step}
    for name in SPECS:
        for shard in found[name].addressable_shards:
            expected = np.random.default_rng(step).random((8, 4), np.float32)[shard.index]
            np.testing.assert_array_equal(shard.data, expected)
    print("newest", step, len(told), flush=True)

opened = places()
for step in (10, 12, 14, 20, 22, 24):
    opened[step % 10 > 0].save(step, state(step), {"at": step})
    opened[step % 10 > 0].wait()
for place in opened:
    place.close()
newest()
if me:
    shutil.rmtree(own / "checkpoints" / "24")  # lost on one host
newest()
if not me:
    shutil.copytree(own / "checkpoints" / "22", own / "checkpoints" / "23")  # the first host alone was so far
    for file in (own / "checkpoints" / "22" / "state").rglob("*"):  # damaged on the other
        if file.is_file():
            file.write_bytes(b"")
newest()
if me:
    shutil.rmtree(own)  # a new host
newest()
again = Checkpoints(own, own=True)
again.save(21, state(21), {"at": 21})
again.close()
newest()
jax.distributed.shutdown()
"""


def test_the_newest_step_that_every_host_has_whole_is_gone_on_from(tmp_path: Path):
    (tmp_path / "shared").mkdir()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    hosts = []
    for i in range(2):
        command = [sys.executable, "-c", HOST, str(i), address, tmp_path / "shared", tmp_path / f"own{i}"]
        pipe = subprocess.PIPE
        hosts.append(
            subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env={**os.environ, "XLA_FLAGS": ""})
        )
    try:
        said = [host.communicate(timeout=60) for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    for host, (out, err) in zip(hosts, said, strict=True):
        assert host.returncode == 0, err
        assert [line for line in out.splitlines() if line.startswith("newest")] == [
            "newest 24 0",
            "newest 22 0",  # 24 is not on both hosts
            "newest 20 1",  # 22 is told of as damaged, on both
            "newest 20 0",
            "newest 21 0",  # although the first host has been further
        ]
