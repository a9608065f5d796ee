"""Adapters: what they add and what stays, on every mesh, through training, merging, and PEFT's format."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
import tiny

from jaxdistill import export, export_check, hf, lora, metrics, optim, sharding, weights
from jaxdistill.checkpoint import keep_base, load_model
from jaxdistill.checkpoint_tensors import open_model
from jaxdistill.errors import UserError
from jaxdistill.hf_tensors import Stacked
from jaxdistill.models import decoder
from jaxdistill.models import lora as models_lora
from jaxdistill.models.context import ContextExtension
from jaxdistill.models.lora import LoraConfig
from jaxdistill.sharding import MeshConfig
from jaxdistill.train import run as train
from jaxdistill.train.config import Phase, TrainConfig
from jaxdistill.train.step import StepConfig, loss_sum
from jaxdistill.train.trained import Trained

SIZES: dict[str, Any] = {"vocab_size": 264, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
HF, C = tiny.hf_config("qwen2", **SIZES), tiny.config("qwen2", **SIZES)
LORA = LoraConfig(rank=4, alpha=8.0)


def adapters_of(c: LoraConfig, seed: int = 5) -> Any:
    """Random ones, b too, on the current mesh."""
    declared = models_lora.template(c, decoder.template(C))
    random = weights.Initializer(0.0, 0.3)
    changed = jax.tree.map(lambda w: dataclasses.replace(w, init=random), declared, is_leaf=weights.is_declared)
    return weights.init(changed, seed)


# --- the mathematics -------------------------------------------------------------------------------------------------


def test_which_weights_are_adapted():
    template = decoder.template(C)
    assert set(models_lora.template(LORA, template)) == {"w_q", "w_k", "w_v", "w_o", "w_gate", "w_up", "w_down"}
    some = models_lora.template(dataclasses.replace(LORA, weights=("*.q_proj", "model.layers.{}.mlp.*")), template)
    assert set(some) == {"w_q", "w_gate", "w_up", "w_down"}
    assert (some["w_q"].a.dims, some["w_q"].b.dims, some["w_q"].b.hf_shape) == ("LDr", "LrNH", (64, 4))
    assert some["w_q"].a.hf_name == "base_model.model.model.layers.{}.self_attn.q_proj.lora_A.weight"
    with pytest.raises(UserError, match=r"lora.weights: \*.qkv names no matrix; they are model.layers"):
        models_lora.template(dataclasses.replace(LORA, weights=("*.qkv",)), template)


@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2, "context": 2}], ids=str)
def test_loss_and_gradients_are_those_of_the_merged_weights(sizes: dict[str, int]):
    batch = tiny.packed([40, 23, 60], C.vocab, rows=4, row_tokens=64)
    with tiny.mesh(**sizes), jax.default_matmul_precision("highest"):
        params, adapters, rows = tiny.put(tiny.values(C), C), adapters_of(LORA), tiny.place(batch)

        def loss(adapters: Any, params: Any) -> Any:
            return loss_sum(models_lora.apply(params, adapters, LORA), rows, C, jnp.float32, "none", None)

        found, gradients = jax.jit(jax.value_and_grad(loss))(adapters, params)
        merged = lora.merge(params, adapters, LORA)
        plain = jax.jit(jax.value_and_grad(lambda p: loss_sum(p, rows, C, jnp.float32, "none", None)))
        expected, of_weights = plain(merged)
        assert float(found) == pytest.approx(float(expected), rel=1e-5)
        found, adapters, of_weights = jax.device_get((gradients, adapters, of_weights))
    for field, adapter in adapters.items():  # d a = scale dW b^T, d b = scale a^T dW
        w = getattr(of_weights.blocks, field)
        for i in range(C.layers):
            into = adapter.a[i].ndim - 1
            a, b = adapter.a[i].reshape(-1, LORA.rank), adapter.b[i].reshape(LORA.rank, -1)
            dw = w[i].reshape(a.shape[0], b.shape[1])
            assert into in (1, 2)
            da, db = found[field].a[i].reshape(a.shape), found[field].b[i].reshape(b.shape)
            assert tiny.largest_relative_difference(da, LORA.scale * dw @ b.T) < 1e-4, field
            assert tiny.largest_relative_difference(db, LORA.scale * a.T @ dw) < 1e-4, field


def test_dropout_leaves_out_a_share_and_is_drawn_anew():
    c = dataclasses.replace(LORA, dropout=0.4)
    with tiny.mesh(fsdp=2):
        x = sharding.put(np.ones((4, 64, 16), np.float32), "BTD")
        keys = [jax.random.key_data(jax.random.key(i)) for i in range(2)]
        of = [
            np.asarray(models_lora._dropped(x, "BTD", models_lora.Adapted(0, 0, 0, key, 2.0, c.dropout)))
            for key in keys
        ]
    assert not np.array_equal(of[0], of[1])
    for values in of:
        assert set(np.unique(values)) == {np.float32(0), np.float32(1 / 0.6)}
        assert values.mean() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": -1}, "lora.rank is -1"),
        ({"alpha": 0.0}, "lora.alpha is 0.0"),
        ({"dropout": 1.0}, "lora.dropout is 1.0"),
    ],
)
def test_settings_that_make_no_sense(changes: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        LoraConfig(**changes)


# --- a run -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_folder(tmp_path_factory.mktemp("model") / "hf", HF, tiny.values(C), C, with_tokenizer=True)


def run(workdir: Path, model: Path, **changes: Any) -> TrainConfig:
    examples = tiny.write_examples(workdir.with_name("examples.jsonl"), 24)
    phase = Phase(name="sft", examples=examples, steps=6, optim=optim.OptimConfig(peak_lr=1e-2))
    config = TrainConfig(
        workdir=workdir,
        model=model,
        phases=(phase, dataclasses.replace(phase, name="second", steps=1)),
        lora=dataclasses.replace(LORA, dropout=0.1),
        heldout=examples,
        row_tokens=128,
        batch_rows=8,
        mesh=MeshConfig(data=2, fsdp=4),
        step=StepConfig(compute_dtype="float32"),
        save_every=2,
    )
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, model: Path) -> TrainConfig:
    config = run(tmp_path_factory.mktemp("lora") / "run", model)
    train.main(config)
    return config


def test_only_adapters_are_trained_and_kept(trained: TrainConfig, model: Path):
    rows = metrics.read(trained.workdir / "sft")
    assert rows[-1]["heldout_loss"] < 0.95 * rows[0]["heldout_loss"]
    second = metrics.read(trained.workdir / "second")
    assert second[0]["heldout_loss"] == pytest.approx(rows[-1]["heldout_loss"], rel=1e-5), (
        "it starts from merged weights"
    )
    state = trained.workdir / "sft" / "checkpoints" / "6" / "state"
    with ocp.PyTreeCheckpointer() as reader:
        kept = reader.metadata(state).item_metadata.tree
    assert set(kept["params"]) == {"w_q", "w_k", "w_v", "w_o", "w_gate", "w_up", "w_down"}
    of_adapters = weights.count(models_lora.template(trained.lora, decoder.template(C)))
    sizes = [
        int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(kept["opt_state"], is_leaf=lambda x: hasattr(x, "shape"))
    ]
    assert sum(sizes) < 2 * of_adapters + 10
    with tiny.mesh():
        merged, base = (jax.device_get(load_model(path)[0]) for path in (trained.workdir / "sft", model))
    np.testing.assert_array_equal(merged.embed, base.embed)
    np.testing.assert_array_equal(merged.blocks.b_q, base.blocks.b_q)
    assert not np.array_equal(merged.blocks.w_q, base.blocks.w_q)


def test_a_run_goes_on_where_it_was(trained: TrainConfig, tmp_path: Path):
    """From adapters on disk and weights of the model, to the same losses; with other adapters it does not."""
    config = dataclasses.replace(trained, workdir=tmp_path / "run", phases=trained.phases[:1], heldout=None)
    shutil.copytree(trained.workdir / "sft", config.workdir / "sft")
    shutil.rmtree(config.workdir / "sft" / "checkpoints" / "6")
    with pytest.raises(UserError, match="lora"):
        train.main(dataclasses.replace(config, lora=dataclasses.replace(config.lora, alpha=9.0)))
    train.main(config)
    of = [{row["step"]: row.get("loss") for row in metrics.read(c.workdir / "sft")} for c in (config, trained)]
    assert [of[0][step] for step in (5, 6)] == [of[1][step] for step in (5, 6)]


def test_the_merged_model_is_exported_tensor_by_tensor(trained: TrainConfig, model: Path, tmp_path: Path):
    phase = trained.workdir / "second"  # of adapters on a phase of adapters
    with tiny.mesh(), open_model(phase) as (tensors, c):
        whole = jax.device_get(load_model(phase)[0])
        streamed = jax.device_get(hf.load_tensors(tensors, decoder.template(c)))
        jax.tree.map(np.testing.assert_array_equal, streamed, whole)
    assert export.main(export.ExportConfig(workdir=tmp_path / "out", model=phase, verify_tokens=8)) == 0.0
    with tiny.mesh():
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(hf.load(tmp_path / "out")[0]), whole)
    moved = tmp_path / "moved"
    model.rename(moved)
    try:
        with (
            tiny.mesh(),
            pytest.raises(UserError, match=r"holds adapters of .*, which is not there; put the model back"),
        ):
            load_model(trained.workdir / "sft")
    finally:
        moved.rename(model)


# --- PEFT ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(trained: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peft") / "adapters"
    export.main(export.ExportConfig(workdir=folder, model=trained.workdir / "sft", adapters=True))
    return folder


def test_adapters_of_an_extended_context_are_exported_merged_alone(trained: TrainConfig, model: Path, tmp_path: Path):
    """With the old RoPE they would load without a word, and be wrong."""
    phase, out = tmp_path / "phase", tmp_path / "out"
    shutil.copytree(trained.workdir / "sft", phase)
    keep_base(model, phase, ContextExtension(positions=512, rope_theta=5000.0))
    with pytest.raises(UserError, match=r"phase was trained for 512 positions .*made for 256: .* export the merged"):
        export.main(export.ExportConfig(workdir=out, model=phase, adapters=True))
    assert not out.exists()
    export.main(export.ExportConfig(workdir=out, model=phase, verify=False))
    assert json.loads((out / "config.json").read_text())["max_position_embeddings"] == 512


TOKENS = np.random.default_rng(3).integers(3, C.vocab, (1, 50)).astype(np.int32)


def _by_peft(adapters: Path, model: Path) -> np.ndarray:
    """Logits of TOKENS as PEFT computes them."""
    peft = pytest.importorskip("peft", reason="peft reads what we write")
    import torch
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, adapters).eval()
    with torch.no_grad():
        return theirs(torch.from_numpy(TOKENS).long()).logits.numpy()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, about how peft asks it
def test_peft_loads_ours(trained: TrainConfig, exported: Path, model: Path):
    wanted = _by_peft(exported, model)
    with tiny.mesh():
        found = export_check.logits(*_first(load_model(trained.workdir / "sft"), TOKENS))
    assert tiny.largest_relative_difference(found, wanted) < 1e-4


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_adapters_on_another_phase_name_a_model_that_peft_can_open(trained: TrainConfig, tmp_path: Path):
    phase, base = trained.workdir / "second", tmp_path / "base"
    how = export.ExportConfig(workdir=tmp_path / "out", model=phase, adapters=True)
    with pytest.raises(
        UserError, match=r"belong to .*sft, a phase of training, which PEFT cannot open; .*adapters-base"
    ):
        export.main(how)
    assert not how.workdir.exists()
    with pytest.raises(UserError, match="expected with --adapters alone"):
        dataclasses.replace(how, adapters=False, adapters_base="x")
    export.main(export.ExportConfig(workdir=base, model=trained.workdir / "sft", verify=False))
    export.main(dataclasses.replace(how, adapters_base=str(base)))
    assert json.loads((how.workdir / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    with tiny.mesh():
        found = export_check.logits(*_first(load_model(phase), TOKENS))
    assert tiny.largest_relative_difference(found, _by_peft(how.workdir, base)) < 1e-4


def _first(opened: Any, tokens: np.ndarray) -> Any:
    return opened[0], tokens, opened[1]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, about how peft asks it
def test_we_load_those_of_peft(model: Path, tmp_path: Path):
    peft = pytest.importorskip("peft", reason="we read what peft writes")
    import torch
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(base, settings).eval()
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(TOKENS).long()).logits.numpy()
    config = dataclasses.replace(LORA, weights=("*.q_proj", "*.down_proj"))
    with tiny.mesh():
        params, c = hf.load(model)
        adapters = lora.load(tmp_path, decoder.template(c), config)
        found = export_check.logits(lora.merge(params, adapters, config), TOKENS, c)
    assert tiny.largest_relative_difference(found, wanted) < 1e-4


def test_training_starts_from_adapters(trained: TrainConfig, exported: Path, model: Path):
    config = dataclasses.replace(trained, lora=dataclasses.replace(trained.lora, start=exported))
    with tiny.mesh(fsdp=2):
        start = Trained(config, C)
        start.read(model)
        first = start.first(model, np.float32)
        merged = jax.device_get(start.merged(first))
        jax.tree.map(np.testing.assert_array_equal, merged, jax.device_get(load_model(trained.workdir / "sft")[0]))


def test_adapters_that_do_not_fit(exported: Path, model: Path, tmp_path: Path):
    template = decoder.template(C)
    with tiny.mesh():
        with pytest.raises(UserError, match=r"r is 4, expected 8; lora_alpha is 8.0, expected 16.0"):
            lora.load(exported, template, LoraConfig(rank=8))
        with pytest.raises(UserError, match=r"unexpected base_model.*k_proj.lora_A.weight"):
            lora.load(exported, template, dataclasses.replace(LORA, weights=("*.q_proj",)))
        with pytest.raises(UserError, match=r"adapter_config.json not found; expected a folder in PEFT's format"):
            lora.load(model, template, LORA)
        values = json.loads((exported / "adapter_config.json").read_text())
        (tmp_path / "adapter_config.json").write_text(json.dumps({**values, "use_dora": True}))
        with pytest.raises(UserError, match="use_dora is True, which is not implemented"):
            lora.load(tmp_path, template, LORA)
    with pytest.raises(UserError, match=r"has no adapters; expected a phase that was trained with lora.rank"):
        export.main(export.ExportConfig(workdir=tmp_path / "out", model=model, adapters=True))
    assert len(safetensors.numpy.load_file(exported / "adapter_model.safetensors")) == 2 * 2 * 7
    fused = models_lora.template(LORA, decoder.template(tiny.config("phi3")))
    with pytest.raises(UserError, match=r"keeps several weights in one tensor.*export the merged model"):
        lora.save(tmp_path / "phi3", Stacked(fused, lambda *_: np.zeros(0)), fused, LORA, "phi3")
    with pytest.raises(UserError, match=r"keeps several weights in one tensor.*merge those adapters into the model"):
        lora.load(exported, decoder.template(tiny.config("phi3")), LORA)
    apart = models_lora.template(
        dataclasses.replace(LORA, weights=("*.o_proj", "*.down_proj")), decoder.template(tiny.config("phi3"))
    )
    assert set(lora._tensors(apart, "")) == set(Stacked(apart, lambda *_: np.zeros(0)).shapes())
