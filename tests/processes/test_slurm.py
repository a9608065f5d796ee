"""What `jaxdistill launch --target slurm` writes, on a real Slurm of one node: tasks join, save, are requeued, resume.

Needs root, and Debian's slurm-wlm and munge (`apt-get install --no-install-recommends slurm-wlm munge`).
"""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_hosts import STEPS, losses, write_recipe

from jaxdistill.launch.run import LaunchConfig, render

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort=16817
SlurmdPort=16818
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus}
PartitionName=main Nodes={host} Default=YES State=UP OverSubscribe=FORCE:4
"""


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """A cluster of this machine alone; gives a function that runs one of Slurm's commands."""
    needed = ("munged", "slurmctld", "slurmd")
    path = f"{os.environ['PATH']}:/usr/sbin"
    programs = [shutil.which(name, path=path) for name in needed]
    if os.geteuid() or None in programs:
        pytest.skip("needs root, slurm-wlm and munge")
    folder = tmp_path / "slurm"
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    conf = folder / "slurm.conf"
    conf.write_text(CONF.format(host=socket.gethostname(), folder=folder, cpus=os.cpu_count()))
    environment = os.environ | {"SLURM_CONF": str(conf), "PATH": path}

    def run(*words: str) -> str:
        return subprocess.run(words, env=environment, check=True, capture_output=True, text=True, timeout=60).stdout

    files = [f"--{name}={folder / 'munge'}.{end}" for name, end in MUNGE.items()]
    commands = [
        ["munged", "--foreground", "--force", f"--key-file={key}", *files],
        ["slurmctld", "-D", "-f", str(conf)],
        ["slurmd", "-D", "-f", str(conf)],
    ]
    running = []
    try:
        for command in commands:
            with (folder / f"{command[0]}.out").open("w") as out:
                running.append(subprocess.Popen(command, env=environment, stdout=out, stderr=out))
            time.sleep(1)
        yield run
    finally:
        for process in reversed(running):
            process.terminate()
        for process in running:
            process.wait(timeout=60)


MUNGE = {"socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}


def wait_until(what: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + 400
    while not what():
        assert time.monotonic() < deadline, log.read_text() if log.exists() else "no log"
        time.sleep(0.2)


@pytest.mark.soak
def test_a_job_of_two_tasks_saves_on_the_signal_is_requeued_and_goes_on(
    slurm: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe, workdir = write_recipe(tmp_path), tmp_path / "run"
    devices = "export JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=2"
    path = f"export PATH={Path(sys.executable).parent}:$PATH PYTHONPATH={Path(__file__).parents[2]}"
    config = LaunchConfig(
        target="slurm",
        recipe=recipe,
        hardware="cpu",
        name="two-tasks",
        arguments=f"--workdir {workdir}",
        setup=f"{devices}\n{path}",
    )
    script = tmp_path / "slurm.sbatch"
    script.write_text(render(config))
    monkeypatch.chdir(tmp_path)  # the job's log is written there
    job = slurm("sbatch", "--parsable", "--ntasks-per-node=2", "--overcommit", str(script)).strip()
    log = tmp_path / f"two-tasks-{job}.log"

    wait_until(lambda: len(losses(workdir / "second")) >= 3, log)
    slurm("scancel", "--signal=TERM", job)  # to the tasks, as Slurm does it --grace-s seconds before the time is up
    wait_until(lambda: "back into the queue" in log.read_text(), log)
    saved = losses(workdir / "second")[-1][0]
    assert saved < STEPS["second"]
    wait_until(lambda: "JobState=PENDING" in slurm("scontrol", "show", "job", job), log)
    slurm("scontrol", "update", f"JobId={job}", "StartTime=now")  # Slurm waits two minutes by itself
    wait_until(lambda: "JobState=COMPLETED" in slurm("scontrol", "show", "job", job), log)
    assert f"resumed from step {saved}" in log.read_text()
    assert [step for step, _ in losses(workdir / "second")] == list(range(1, STEPS["second"] + 1))
    assert "Restarts=1" in slurm("scontrol", "show", "job", job)
