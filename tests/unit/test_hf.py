"""Hugging Face folders: every tensor that does not fit is named, and an export never mixes with an older one."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tiny

from jaxdistill import hf, models
from jaxdistill.errors import UserError
from jaxdistill.models import FAMILIES
from jaxdistill.models.config import write_rope
from jaxdistill.models.context import ContextExtension

HF = tiny.hf_config("qwen2", tied=True)
C = tiny.config("qwen2", tied=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.write_folder(tmp_path / "model", HF, tiny.values(C), C, with_tokenizer=False)


def rewrite(folder: Path, **changes: np.ndarray | None) -> None:
    """Replaces, adds or (None) removes tensors; dots in a name are written as double underscores."""
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    for name, value in changes.items():
        name = name.replace("__", ".")
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    safetensors.numpy.save_file(tensors, path)


def load(folder: Path) -> Any:
    with tiny.mesh():
        return jax.device_get(hf.load(folder)[0])


def test_every_tensor_that_does_not_fit_is_named(folder: Path):
    rewrite(
        folder,
        model__norm__weight=None,
        model__layers__1__self_attn__q_proj__bias=None,
        model__layers__0__mlp__up_proj__weight=np.zeros((48, 31), np.float32),
        score__weight=np.zeros((2, 32), np.float32),
    )
    with pytest.raises(UserError) as caught:
        load(folder)
    for line in (
        "missing model.norm.weight [32]",
        "missing model.layers.1.self_attn.q_proj.bias [64]",
        "unexpected score.weight [2, 32]",
        "model.layers.0.mlp.up_proj.weight is [48, 31], expected [48, 32]",
    ):
        assert line in str(caught.value)


def test_tensors_that_repeat_what_is_known_are_passed_over(folder: Path):
    """The tied head written out, and the RoPE frequencies of old Llama exports."""
    expected = load(folder)
    rewrite(
        folder,
        lm_head__weight=expected.embed,
        model__layers__0__self_attn__rotary_emb__inv_freq=np.zeros(8, np.float32),
    )
    jax.tree.map(np.testing.assert_array_equal, load(folder), expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_files_are_read_and_written_exactly(folder: Path, tmp_path: Path, dtype: str):
    path = folder / "model.safetensors"
    kind = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[dtype]
    halves = {name: value.astype(kind) for name, value in safetensors.numpy.load_file(path).items()}
    safetensors.numpy.save_file(halves, path)
    with tiny.mesh():
        params, _ = hf.load(folder)
        assert all(w.dtype == np.float32 for w in jax.tree.leaves(params))
        hf.save(tmp_path / "export", params, HF, dtype)
    written = safetensors.numpy.load_file(tmp_path / "export" / "model.safetensors")
    assert json.loads((tmp_path / "export" / "config.json").read_text())["dtype"] == dtype
    assert written.keys() == halves.keys()
    assert all(written[name].tobytes() == value.tobytes() for name, value in halves.items())


@pytest.mark.parametrize(("before", "after"), [(10_000, 10**9), (10**9, 10_000), (10_000, 30_000)])
def test_export_replaces_an_older_one(folder: Path, tmp_path: Path, before: int, after: int):
    """An index that is left behind would hide the new weights; so would files that no index names."""
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "model-00009.partial").write_text("of an export that was cut off")
    with tiny.mesh():
        old, new = tiny.put(tiny.values(C, seed=1), C), tiny.put(tiny.values(C, seed=2), C)
        for params, size in ((old, before), (new, after)):
            hf.save(tmp_path / "export", params, HF, shard_bytes=size)
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "export"), jax.device_get(new))
    files = {path.name for path in (tmp_path / "export").glob("model*")}
    if after == 10**9:
        assert files == {"model.safetensors"}
    else:
        index = json.loads((tmp_path / "export" / "model.safetensors.index.json").read_text())
        assert files == {"model.safetensors.index.json", *index["weight_map"].values()}
        total = sum(w.nbytes for w in jax.tree.leaves(new))
        assert index["metadata"]["total_size"] == total


def test_weights_are_the_same_on_every_mesh(folder: Path, tmp_path: Path):
    expected = load(folder)
    with tiny.mesh(fsdp=4, tensor=2):
        params, _ = hf.load(folder)
        assert params.embed.sharding.spec == jax.P("tensor", ("fsdp", "context"))
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), expected)
        hf.save(tmp_path / "export", params, HF)
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "export"), expected)


def test_mesh_that_does_not_fit_the_model(folder: Path):
    with tiny.mesh(tensor=8), pytest.raises(UserError, match=r"N = 4 is not a multiple of 8 .tensor.; K = 2"):
        hf.load(folder)


def test_unknown_dtype(tmp_path: Path):
    with tiny.mesh(), pytest.raises(UserError, match="cannot write tensors as 'int8'; expected one of bfloat16"):
        hf.save(tmp_path / "export", tiny.put(tiny.values(C), C), HF, "int8")


# --- folders that are not what they should be ------------------------------------------------------------------------


def test_folder_without_config_or_weights(tmp_path: Path, folder: Path):
    with pytest.raises(UserError, match=r"config.json not found .there is no such folder.; expected a Hugging Face"):
        load(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"config.json not found .the folder exists."):
        load(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"neither model.safetensors nor model.safetensors.index.json"):
        load(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json is not valid JSON"),
        ("[]", "config.json holds a JSON list, expected an object"),
        (json.dumps({**HF, "model_type": "mamba"}), f"model_type 'mamba'; implemented are {', '.join(FAMILIES)}"),
        (json.dumps({"hidden_size": 3}), "config.json has no model_type"),
        (json.dumps({"model_type": "llama", "hidden_size": 3}), "vocab_size is missing; intermediate_size is missing"),
        (json.dumps({**HF, "hidden_act": "gelu"}), "hidden_act is 'gelu', implemented is 'silu'"),
        (json.dumps({**HF, "use_sliding_window": True}), "use_sliding_window is True, implemented is False"),
        (json.dumps({**HF, "rope_parameters": {"rope_type": "longrope", "factor": 2.0}}), "RoPE scaling 'longrope'"),
        (json.dumps({**HF, "rope_parameters": {"rope_type": "yarn"}}), "RoPE scaling 'yarn' needs a factor"),
    ],
)
def test_config_that_cannot_be_read(folder: Path, text: str, message: str):
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        load(folder)


def test_files_that_are_broken(folder: Path):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"not a readable safetensors file .*download it again"):
        load(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text("{")
    with pytest.raises(UserError, match=r"index.json is not valid JSON"):
        load(folder)
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(UserError, match=r"names files that are not there: model-00001-of-00002.safetensors"):
        load(folder)
    (folder / "model.safetensors").write_bytes(whole)
    names = [*safetensors.numpy.load(whole), "model.layers.2.mlp.up_proj.weight"]  # a name that the file lacks
    names.remove("model.norm.weight")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))
    with pytest.raises(UserError, match=r"missing model.norm.weight \[32\]$"):
        load(folder)


def test_companions_are_copied(folder: Path, tmp_path: Path):
    tiny.tokenizer().save_pretrained(str(folder))
    (folder / "generation_config.json").write_text("{}")
    (folder / "tokenizers").mkdir()
    target = tmp_path / "target"
    target.mkdir()
    hf.copy_companions(folder, target)
    copied = {path.name for path in target.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"} <= copied
    assert not copied & {"config.json", "model.safetensors", "tokenizers"}


def test_settings_of_a_family_that_transformers_fills_in():
    values = {key: value for key, value in tiny.hf_config("gemma3_text").items() if key not in _FILLED_IN}
    c = models.family("gemma3_text").config({**values, "num_hidden_layers": 8})
    assert c.windowed == (True, True, True, True, True, False, True, True)
    assert (c.window, c.rope.theta, c.score_scale, c.tied) == (4096, 1e6, 1 / 16, True)
    assert c.local_rope is not None
    assert c.local_rope.theta == 1e4
    mistral = {key: value for key, value in tiny.hf_config("mistral").items() if key != "sliding_window"}
    assert models.family("mistral").config(mistral).window == 4096
    assert models.family("mistral").config({**mistral, "sliding_window": None}).windowed == ()
    gemma2 = {key: value for key, value in tiny.hf_config("gemma2").items() if key not in _FILLED_IN}
    found = models.family("gemma2").config(gemma2)
    assert (found.score_cap, found.logit_cap, found.windowed) == (50.0, 30.0, (True, False))


_FILLED_IN = {
    "sliding_window",
    "layer_types",
    "query_pre_attn_scalar",
    "rope_parameters",
    "tie_word_embeddings",
    "attn_logit_softcapping",
    "final_logit_softcapping",
}


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("phi3", {"partial_rotary_factor": 0.75}, "partial_rotary_factor is 0.75, implemented is 1.0"),
        ("gemma2", {"layer_types": ["chunked", "full_attention"]}, "layer_types has .'chunked'."),
        ("gemma2", {"layer_types": ["full_attention"]}, "layer_types names 1 layers of 2"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0, implemented is None"),
        ("olmo2", {"attention_bias": True}, "attention_bias is True, implemented is False"),
    ],
)
def test_settings_that_a_family_does_not_have(family: str, changes: dict[str, Any], message: str):
    values = tiny.hf_config(family, **changes)
    values["rope_parameters"].pop("partial_rotary_factor", None)
    with pytest.raises(UserError, match=message):
        models.family(family).config(values)


def test_the_context_of_a_model_with_two_ropes_is_not_extended():
    with pytest.raises(UserError, match="'gemma3_text' has a RoPE for each kind of layer"):
        ContextExtension(positions=512, yarn=True).apply(tiny.hf_config("gemma3_text"))


@pytest.mark.parametrize("rope", tiny.ROPES)
def test_rope_is_written_in_both_schemas_from_either(rope: str):
    new = tiny.hf_config("llama", rope=rope)
    values = dict(new["rope_parameters"])
    theta, kind = values.pop("rope_theta"), values.pop("rope_type")
    old = {key: value for key, value in new.items() if key != "rope_parameters"}
    old |= {"rope_theta": theta, "rope_scaling": None if kind == "default" else {**values, "type": kind}}
    written = write_rope(new)
    assert written == write_rope(old) == write_rope(written)
    assert written["rope_parameters"] == new["rope_parameters"]
    assert written["rope_theta"] == theta


def test_the_host_holds_little_more_than_one_tensor_and_the_files_being_written(tmp_path: Path):
    """Of host arrays: on a CPU the model itself is in host memory too, and elsewhere in that of the devices."""
    layers = 32
    values = tiny.hf_config("qwen2", num_hidden_layers=layers, hidden_size=64, intermediate_size=2048)
    c = tiny.config("qwen2", num_hidden_layers=layers, hidden_size=64, intermediate_size=2048)
    source = tiny.write_folder(tmp_path / "source", values, tiny.values(c), c, with_tokenizer=False)
    largest = 4 * max(int(np.prod(shape)) for shape in hf.Tensors(source).shapes().values())
    with tiny.mesh():
        params, _ = hf.load(source)  # compiles
        hf.save(tmp_path / "copy", params, values, shard_bytes=4 * largest)
        held = {}
        for name, call in {
            "load": lambda: hf.load(source),
            "save": lambda: hf.save(tmp_path / "copy", params, values, shard_bytes=4 * largest),
        }.items():
            tracemalloc.start()
            call()
            held[name] = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
    of_all_layers = layers * largest
    assert held["load"] < 4 * largest < of_all_layers / 4, held
    assert held["save"] < 3 * 4 * largest < of_all_layers / 2, held
    assert len(list((tmp_path / "copy").glob("*.safetensors"))) > 4
