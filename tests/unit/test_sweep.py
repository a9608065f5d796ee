"""A grid's runs have names of their own values, take their part of the data, and are written as jobs of many tasks."""

import dataclasses
import json
import os
import runpy
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from jaxdistill import cli, lineage, manifest, records
from jaxdistill.errors import UserError
from jaxdistill.evaluate.config import EvaluateConfig
from jaxdistill.launch.run import Job
from jaxdistill.records import Example
from jaxdistill.sweep import fit, one, table
from jaxdistill.sweep.config import SweepConfig, Variant
from jaxdistill.sweep.grid import chosen, runs_of
from jaxdistill.sweep.run import main
from jaxdistill.train.config import Phase, TrainConfig

ROOT = Path(__file__).parents[2]
FIRST, SECOND = (Phase(name=name, examples=Path(f"{name}.jsonl")) for name in ("first", "second"))


def sweep(workdir: Path = Path("sweep"), **axes: Any) -> SweepConfig:
    return SweepConfig(
        workdir=workdir,
        train=TrainConfig(workdir=workdir, model=Path("model"), phases=(FIRST, SECOND)),
        evaluate=EvaluateConfig(workdir=workdir, model=(Path("model"),), task="problems", path=Path("p.jsonl")),
        **axes,
    )


def test_a_grid_is_every_combination_and_a_name_is_that_of_its_own_values():
    config = sweep(data_sizes=(100, 200), peak_lrs=(1e-3, 2e-5), epochs=(1, 3), seeds=(0, 1))
    runs = {run.name: run for run in runs_of(config)}
    assert len(runs) == 16
    run = runs["n200-lr2e-05-e3-s1"]
    assert run.settings == {"data_size": 200, "peak_lr": 2e-5, "epochs": 3, "seed": 1}
    assert [phase.optim.peak_lr for phase in run.train.phases] == [2e-5, 2e-5]
    assert [phase.epochs for phase in run.train.phases] == [1, 3]
    assert run.train.phases[0].examples == Path("first.jsonl")
    assert run.train.phases[1].examples == run.folder / "data" / "examples.jsonl"
    assert run.evaluate.model == (run.folder / "train" / "second",)
    assert run.train.seed == run.evaluate.seed == 1
    grown = dataclasses.replace(config, data_sizes=(50, 100, 200), seeds=(0, 1, 2))
    assert runs.keys() < {run.name for run in runs_of(grown)}


def test_variants_models_and_lengths_are_axes():
    alone = Variant(name="no_phase_1", phases=(SECOND,))
    config = sweep(variants=(alone,), models=(Path("a/small"), Path("b/large")), chain_tokens=(64,), seeds=(7,))
    names = [run.name for run in runs_of(config)]
    assert names == ["no_phase_1-small-t64-s7", "no_phase_1-large-t64-s7"]
    run = chosen(dataclasses.replace(config, run=names[1]))
    assert (run.train.model, run.train.phases[0].name, run.chain_tokens) == (Path("b/large"), "second", 64)
    assert (run.settings["variant"], run.settings["model"]) == ("no_phase_1", "large")
    with pytest.raises(UserError, match="this sweep has 2 runs, such as no_phase_1-small-t64-s7"):
        chosen(dataclasses.replace(config, run="n5"))


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"data_sizes": (0,)}, "expected numbers above 0"),
        ({"seeds": ()}, "seeds are none"),
        ({"seeds": (1, 1)}, "each of them once"),
        ({"models": (Path("a/m"), Path("b/m"))}, "they name the runs"),
        (
            {"variants": (Variant(name="v", phases=(Phase(name="p", examples=Path("e"), steps=3),)),), "epochs": (1,)},
            "steps",
        ),
        ({"at_once": -1}, "at_once is -1"),
    ],
)
def test_what_is_no_grid_is_refused(axes: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        sweep(**axes)
    with pytest.raises(UserError, match="a variant is named 'a/b'"):
        Variant(name="a/b", phases=(FIRST,))


def test_a_part_is_drawn_by_seed_and_size_and_its_lineage_goes_on(tmp_path: Path):
    rows = [
        Example(id=f"e{i}", messages=({"role": "user", "content": "?"}, {"role": "assistant", "content": str(i)}))
        for i in range(40)
    ]
    source = tmp_path / "all" / "second.jsonl"
    records.write_jsonl(source, rows)
    manifest.write_manifest(source.parent, "examples", [], {"examples": 40})
    phase = dataclasses.replace(SECOND, examples=source)
    config = sweep(
        tmp_path / "sweep", variants=(Variant(name="v", phases=(phase,)),), data_sizes=(10, 41), seeds=(0, 1)
    )
    parts = []
    runs = runs_of(config)
    for run in runs[:2]:
        one._take_part(run)
        part = list(records.read_jsonl(run.train.phases[-1].examples, Example))
        assert len(part) == 10
        assert part == [row for row in rows if row in part]  # in their order
        parts.append([row.id for row in part])
    assert parts[0] != parts[1]
    found = lineage.trace([runs[0].folder])
    assert [stage.command for stage in found.stages.values()] == ["examples", "part"]
    with pytest.raises(UserError, match="has 40 examples, but v-n41-s0 takes 41"):
        one._take_part(runs[2])


def test_a_folder_with_a_run_of_other_settings_is_refused(tmp_path: Path):
    (run,) = runs_of(sweep(tmp_path))
    manifest.write_json(run.folder / "run.json", run.identity())
    assert one.result_of(run) is None
    manifest.write_json(run.folder / "result.json", {"run": run.name})
    assert one.result_of(run) == {"run": run.name}
    config = sweep(tmp_path)
    (other,) = runs_of(dataclasses.replace(config, train=dataclasses.replace(config.train, batch_rows=4)))
    with pytest.raises(UserError, match=r"another train\.batch_rows 8 \(now 4\)"):
        one.result_of(other)
    elsewhere = dataclasses.replace(run, folder=tmp_path / "other")
    assert one.result_of(elsewhere) is None


RECIPE = "configs/sweep_data_size.py"


@pytest.fixture
def missing_but_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[SweepConfig, list[str]]:
    """A sweep of four runs whose second one is done, and the words that ask for it."""
    monkeypatch.chdir(ROOT)
    words = [RECIPE, "--workdir", str(tmp_path / "sweep"), "--data-sizes", "100", "200", "--seeds", "0", "1"]
    config = runpy.run_path(RECIPE)["config"]()
    changes: dict[str, Any] = {"workdir": tmp_path / "sweep", "data_sizes": (100, 200), "seeds": (0, 1)}
    config = dataclasses.replace(config, **changes, material=None)
    run = runs_of(config)[1]
    manifest.write_json(run.folder / "run.json", run.identity())
    line = {"run": run.name, **run.settings, "heldout_loss": None, "accuracy": 0.5, "low": 0.4, "high": 0.6}
    manifest.write_json(run.folder / "result.json", line | {"error": 0.5, "average_tokens": 3.0, "wall_s": 1.0})
    return config, words


def test_what_is_missing_is_written_as_a_slurm_array(missing_but_one: tuple[SweepConfig, list[str]], tmp_path: Path):
    config, words = missing_but_one
    here = Job(hardware="h100x4", setup="source .venv/bin/activate", partition="gpu")
    config = dataclasses.replace(config, target="slurm", launch=here, at_once=2)
    main(
        config,
        [*words, "--target", "slurm", "--launch.hardware", "h100x4", "--at-once", "2", "--evaluate.samples", "4"],
    )
    text = (config.workdir / "job" / "slurm.sbatch").read_text()
    assert "#SBATCH --array=0-2%2\n" in text
    assert "#SBATCH --gpus-per-node=4\n" in text
    assert "  n100-s0\n  n200-s0\n  n200-s1\n" in text
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "srun").write_text(f'#!/bin/bash\necho "$*" > {folder}/called\n')
    (folder / "srun").chmod(0o755)
    script = text.replace("source .venv/bin/activate", "")
    environment = os.environ | {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "SLURM_ARRAY_TASK_ID": "1",
        "SLURM_JOB_ID": "8",
    }
    subprocess.run(["bash"], input=script, text=True, check=True, env=environment)
    expected = " ".join(["jaxdistill sweep", *words, "--evaluate.samples 4 --run n200-s0"])
    assert (folder / "called").read_text().strip().endswith(expected)


def test_what_is_missing_is_written_as_a_jobset_of_single_pods(missing_but_one: tuple[SweepConfig, list[str]]):
    config, words = missing_but_one
    where = Job(hardware="v5e-8", image="example.com/jaxdistill:latest", claim="runs")
    main(dataclasses.replace(config, target="jobset", launch=where), words)
    values = yaml.safe_load((config.workdir / "job" / "jobset.yaml").read_text())
    job = values["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["completions"], job["parallelism"], job["backoffLimitPerIndex"]) == (3, 3, 100)
    command = job["template"]["spec"]["containers"][0]["command"][-1]
    script = command.replace("exec jaxdistill", "echo jaxdistill")
    said = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, check=True, env={"JOB_COMPLETION_INDEX": "2"}
    )
    assert said.stdout.strip() == " ".join(["jaxdistill sweep", *words, "--run n200-s1"])
    models = pytest.importorskip("kubeflow_trainer_api.models")
    read = models.JobsetV1alpha2JobSet.from_dict(values)
    assert read is not None
    assert read.to_dict() == values


def test_more_than_a_host_or_no_recipe_is_refused(missing_but_one: tuple[SweepConfig, list[str]]):
    config, words = missing_but_one
    with pytest.raises(UserError, match="on 2 hosts; runs of a sweep are one process each"):
        main(dataclasses.replace(config, target="slurm", launch=Job(nodes=2)), words)
    with pytest.raises(UserError, match="needs a recipe"):
        main(dataclasses.replace(config, target="slurm"), words[1:])


def test_gathering_runs_nothing_and_the_table_is_read_by_fit(
    missing_but_one: tuple[SweepConfig, list[str]], capsys: pytest.CaptureFixture[str]
):
    config, words = missing_but_one
    (line,) = main(dataclasses.replace(config, gather=True), words)
    assert "1 of 4 runs" in capsys.readouterr().err
    folder = config.workdir
    assert fit.read_table(folder / "table.jsonl") == [line]
    assert fit.read_table(folder / "table.csv") == [line]
    assert json.loads((folder / "manifest.json").read_text())["counts"] == {"runs": 4, "done": 1}


def write_table(path: Path) -> None:
    sizes = [n for n in (100, 200, 400, 800, 1600) for _ in range(2)]
    noise = (0.99, 1.01)
    lines = [
        {"model": model, "examples": n, "accuracy": 1 - (0.1 + n**-0.5 * scale * noise[i % 2]), "right": float(n)}
        for model, scale in {"small": 2.0, "large": 1.0}.items()
        for i, n in enumerate(sizes)
    ]
    table.write(path, lines)


def test_fit_says_what_a_table_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_table(tmp_path)
    cli.main(["fit", str(tmp_path / "table.csv"), "--y", "accuracy", "--by", "model", "--extrapolate", "6400"])
    said = capsys.readouterr()
    assert "without the runs at 1600, it predicts" in said.err
    assert "1 - accuracy = floor + scale" in " ".join(said.out.split())
    found = json.loads((tmp_path / "fit_accuracy_examples" / "fit.json").read_text())["laws"]
    assert found.keys() == {"small", "large"}
    assert found["large"]["exponent"]["low"] < 0.5 < found["large"]["exponent"]["high"]
    (far,) = found["small"]["predictions"]
    assert far["law"]["low"] < 0.1 + 2 / 80 < far["law"]["high"]
    assert found["small"]["without_the_largest"]["holds"]
    figure = (tmp_path / "fit_accuracy_examples" / "fit.svg").read_text()
    assert figure.startswith("<svg xmlns=")
    assert "--series-1" in figure


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--x", "size"], "has no column 'size'; it has model, examples, accuracy, right"),
        (["--y", "model"], "no run has numbers for examples and model"),
        (["--resamples", "5"], "resamples is 5"),
        (["--y", "right"], "right grows with examples, and the law falls; fit what falls"),
    ],
)
def test_fits_of_nothing_are_refused(
    tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    write_table(tmp_path)
    with pytest.raises(SystemExit) as ended:
        cli.main(["fit", str(tmp_path / "table.jsonl"), *words])
    assert ended.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
