"""Folder -> checkpoint -> folder: bit for bit, whatever wrote the checkpoint, with a tensor or a file in memory."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
import tiny

from jaxdistill import checkpoint, checkpoint_store, checkpoint_tensors, export, export_check, hf, import_model
from jaxdistill.errors import RunError, UserError
from jaxdistill.hf_tensors import Tensors
from jaxdistill.import_model import ImportConfig

VOCAB = 320  # over that of the tokenizer


def source(folder: Path, model_type: str = "phi3", dtype: str = "float32") -> Path:
    c = tiny.config(model_type, vocab_size=VOCAB)
    tiny.write_folder(
        folder, tiny.hf_config(model_type, dtype=dtype, vocab_size=VOCAB), tiny.values(c), c, with_tokenizer=True
    )
    if dtype == "bfloat16":
        path = folder / "model.safetensors"
        halves = {name: value.astype(jax.numpy.bfloat16) for name, value in safetensors.numpy.load_file(path).items()}
        safetensors.numpy.save_file(halves, path)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {name: value.tobytes() for name, value in safetensors.numpy.load_file(folder / "model.safetensors").items()}


@pytest.mark.parametrize(
    ("model_type", "dtype"), [("phi3", "float32"), ("phi3", "bfloat16"), ("qwen3_moe", "bfloat16")]
)
def test_there_and_back_again(tmp_path: Path, model_type: str, dtype: str):
    folder = source(tmp_path / "hf", model_type, dtype)
    import_model.main(ImportConfig(workdir=tmp_path / "imported", model=folder))
    written = json.loads((tmp_path / "imported" / "manifest.json").read_text())
    assert (written["command"], written["verified"]) == ("import", True)
    export.main(export.ExportConfig(workdir=tmp_path / "out", model=tmp_path / "imported", verify_tokens=8))
    assert files(tmp_path / "out") == files(folder)


def test_an_imported_model_is_a_phase_on_any_mesh(tmp_path: Path):
    folder = source(tmp_path / "hf", "qwen3")
    import_model.main(ImportConfig(workdir=tmp_path / "imported", model=folder))
    with tiny.mesh(fsdp=4, tensor=2):
        found, c = checkpoint.load_model(tmp_path / "imported")
        wanted, _ = hf.load(folder)
        assert c == tiny.config("qwen3", vocab_size=VOCAB)
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(wanted))
    assert checkpoint.fingerprint(tmp_path / "imported").startswith("step 0 sha256:")


def test_tensors_of_a_checkpoint_that_a_mesh_wrote(tmp_path: Path):
    """Eight devices' parts, and an average that the phase hands on in place of the weights."""
    c = tiny.config("phi3", vocab_size=VOCAB)
    checkpoint.keep_base(source(tmp_path / "hf"), tmp_path)
    with tiny.mesh(fsdp=2, context=2, tensor=2):
        other, average = (tiny.put(tiny.values(c, seed), c) for seed in (1, 2))
        written = checkpoint_store.Checkpoints(tmp_path)
        written.save(3, {"params": other, "average": average}, {"result": "average"})
        written.close()
    assert len(list((tmp_path / "checkpoints" / "3").rglob("*"))) > 8
    expected = tmp_path / "expected"
    tiny.write_folder(expected, tiny.hf_config("phi3", vocab_size=VOCAB), tiny.values(c, 2), c, with_tokenizer=False)
    with checkpoint_tensors.open_model(tmp_path) as (found, of), Tensors(expected) as tensors:
        assert of == c
        assert found.shapes() == tensors.shapes()
        for name in tensors.shapes():
            np.testing.assert_array_equal(found[name], tensors[name])
            np.testing.assert_array_equal(found.rows(name, 3, 9), tensors[name][3:9])
    with (
        pytest.raises(UserError, match=r"no checkpoint of step 4; found \[3\]"),
        checkpoint_tensors.open_model(tmp_path, 4),
    ):
        pass


def test_a_layer_of_a_checkpoint_is_a_chunk_of_its_own(tmp_path: Path):
    c = tiny.config("qwen3", vocab_size=VOCAB)
    state = {"params": tiny.values(c)}
    args = checkpoint_store.save_args(state)["params"]
    assert args.blocks.w_q.shard_axes == (0,)
    assert (args.embed.shard_axes, args.blocks.attn_norm.shard_axes) == ((), ())


@pytest.mark.parametrize("model_type", ["qwen2", "gemma2", "gemma3_text"])
def test_logits_of_a_layer_at_a_time_are_those_of_the_whole(tmp_path: Path, model_type: str):
    folder = source(tmp_path / "hf", model_type)
    with tiny.mesh(fsdp=2, context=2, tensor=2), Tensors(folder) as tensors:
        params, c = hf.load(folder)
        at, ids = (
            np.arange(200, dtype=np.int32),
            np.random.default_rng(0).integers(0, c.vocab, (2, 200)).astype(np.int32),
        )
        hidden = export_check._hidden(tensors, c, ids, at)
        found = np.concatenate(list(export_check._logits(tensors, c, hidden)), axis=-1)
        expected = export_check.logits(params, ids, c)
        assert tiny.largest_relative_difference(found, expected) < 1e-5
        longer = dataclasses.replace(c, rope=dataclasses.replace(c.rope, theta=c.rope.theta + 1))
        error, positions = export_check.logit_error((tensors, c), (tensors, longer), 16, 8192)
        assert error > 1e-4
        assert positions == 256


def test_text_is_compared_where_the_model_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = source(tmp_path / "hf")
    monkeypatch.setattr(export_check, "_free_bytes", lambda: 1e5)
    export.main(export.ExportConfig(workdir=tmp_path / "out", model=folder, verify_tokens=8))
    check = json.loads((tmp_path / "out" / "manifest.json").read_text())["check"]
    assert "no text compared (sampling needs 0.0 GB a device, more than 70% of what is free)" in check
    monkeypatch.undo()
    answers = iter([((5,), "a"), ((6,), "b")])
    monkeypatch.setattr(export_check, "_greedy", lambda *_: next(answers))
    with pytest.raises(RunError, match="goes on with other words"):
        export.main(export.ExportConfig(workdir=tmp_path / "out", model=folder, verify_tokens=8))


def test_an_import_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = source(tmp_path / "hf")
    with pytest.raises(UserError, match="is not empty; name a new folder"):
        import_model.main(ImportConfig(workdir=folder, model=folder))
    monkeypatch.setattr(import_model, "differing", lambda *_: ["model.norm.weight"])
    with pytest.raises(RunError, match=r"these tensors differ from .*hf: model.norm.weight; do not use it"):
        import_model.main(ImportConfig(workdir=tmp_path / "a", model=folder))
    import_model.main(ImportConfig(workdir=tmp_path / "b", model=folder, verify=False))
    assert json.loads((tmp_path / "b" / "manifest.json").read_text())["verified"] is False
