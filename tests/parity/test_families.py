"""Every model family against transformers: logits of tiny random models, and the round trip through Hugging Face."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tiny

from jaxdistill import export_check, hf, models
from jaxdistill.errors import UserError
from jaxdistill.models import FAMILIES
from jaxdistill.models.config import Config, read_rope
from jaxdistill.models.context import ContextExtension
from jaxdistill.models.layers import inverse_frequencies

TRANSFORMERS4 = Path(__file__).parents[2] / ".tools" / "transformers4"
T = 200  # positions, over all of the original ones of the scaled RoPEs


@dataclasses.dataclass(frozen=True)
class Case:
    """One random model on disk."""

    model_type: str
    tied: bool
    rope: str
    dtype: str  # of the tensors
    sharded: bool  # several files with an index

    def __str__(self) -> str:
        head, files = "tied" if self.tied else "untied", "sharded" if self.sharded else "single"
        return f"{self.model_type}-{head}-{self.rope}-{self.dtype}-{files}"


PLAIN_ROPE = {"olmo2", "phi3"}  # the others are not read by transformers 4, or at all
EAGER = {"gemma2"}  # other kinds of attention leave out its soft cap in transformers

CASES = [
    case
    for model_type in FAMILIES
    for case in (
        Case(model_type, tied=False, rope="default", dtype="float32", sharded=True),
        Case(model_type, tied=True, rope="default", dtype="bfloat16", sharded=False),
        Case(model_type, tied=True, rope="llama3", dtype="float32", sharded=False),
        Case(model_type, tied=False, rope="yarn", dtype="bfloat16", sharded=True),
    )
    if case.rope == "default" or model_type not in PLAIN_ROPE
]


@pytest.fixture(scope="module", params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Path]:
    """Each model as transformers writes it, with random biases and norm scales."""
    import torch

    return {case: _write(case, tmp_path_factory.mktemp("models") / str(case), torch) for case in CASES}


def _write(case: Case, folder: Path, torch: Any) -> Path:
    import transformers

    values = tiny.hf_config(case.model_type, tied=case.tied, rope=case.rope)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**values))
    generator = torch.Generator().manual_seed(CASES.index(case))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                parameter.copy_(1 + 0.3 * noise)
            else:
                parameter.copy_(noise * (0.5 if name.endswith("bias") else parameter.shape[-1] ** -0.5))
    model.to(getattr(torch, case.dtype)).save_pretrained(folder, max_shard_size="20KB" if case.sharded else "1GB")
    assert (folder / "model.safetensors.index.json").is_file() == case.sharded
    return folder


TOKENS = np.random.default_rng(7).integers(0, 96, (1, T))


def theirs(folder: Path) -> np.ndarray:
    """Logits of transformers in float32."""
    import torch
    import transformers

    how = "eager" if json.loads((folder / "config.json").read_text())["model_type"] in EAGER else "sdpa"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=how)
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)).logits.numpy()


def ours(folder: Path, c: Config | None = None) -> np.ndarray:
    """Logits of this package in float32; `c` in place of the folder's own architecture."""
    with tiny.mesh():
        params, own = hf.load(folder)
        return export_check.logits(params, TOKENS, c or own)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Two threads that took torch's first steps together once gave logits off by 2e-4 in the half of one of them."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def expected(folders: dict[Case, Path]) -> dict[Case, np.ndarray]:
    return {case: theirs(folder) for case, folder in folders.items()}


@pytest.fixture(scope="module")
def exports(folders: dict[Case, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Path]:
    """Each model read by us and written back."""
    written = {}
    with tiny.mesh():
        for case, folder in folders.items():
            params, _ = hf.load(folder)
            written[case] = tmp_path_factory.mktemp("exports") / str(case)
            hf.save(written[case], params, hf.read_config(folder)[1], shard_bytes=20_000 if case.sharded else 10**9)
            hf.copy_companions(folder, written[case])
    return written


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def test_logits_equal_those_of_transformers(case: Case, folders: dict[Case, Path], expected: dict[Case, np.ndarray]):
    found = ours(folders[case])
    assert np.abs(expected[case]).max() > 1, "the random model says something"
    assert np.abs(found - expected[case]).max() < 1e-4 * np.abs(expected[case]).max()
    off = np.abs(log_softmax(found) - log_softmax(expected[case]))
    assert np.median(off) < 1e-5
    assert off.max() < 1e-3


def tensors(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a folder as it lies in the files."""
    from safetensors.numpy import load_file

    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def test_round_trip_is_bit_exact(case: Case, folders: dict[Case, Path], exports: dict[Case, Path]):
    before, after = tensors(folders[case]), tensors(exports[case])
    assert before.keys() == after.keys()
    kind = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}[case.dtype]
    for name, value in before.items():
        assert after[name].dtype == value.dtype == kind
        assert after[name].shape == value.shape
        assert after[name].tobytes() == value.tobytes(), name
    files = sorted(path.name for path in exports[case].glob("model*"))
    if case.sharded:
        assert len(files) > 3
        weight_map = json.loads((exports[case] / "model.safetensors.index.json").read_text())["weight_map"]
        assert weight_map.keys() == before.keys()
        assert set(weight_map.values()) == {name for name in files if name.endswith(".safetensors")}
    else:
        assert files == ["model.safetensors"]


def test_export_in_transformers_5(case: Case, exports: dict[Case, Path], expected: dict[Case, np.ndarray]):
    np.testing.assert_array_equal(theirs(exports[case]), expected[case])


READ_BY_4 = """
import json, sys, warnings
warnings.simplefilter("ignore")
import numpy as np, torch, transformers
from pathlib import Path
assert transformers.__version__.startswith("4."), transformers.__version__
tokens = torch.from_numpy(np.load(sys.argv[1]))
found = {}
for folder in map(Path, sys.argv[2:]):
    how = "eager" if "gemma2" in folder.name else "sdpa"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, torch_dtype=torch.float32, attn_implementation=how
    )
    with torch.no_grad():
        np.save(folder / "logits4.npy", model(tokens).logits.numpy())
    found[folder.name] = [model.config.rope_theta, model.config.rope_scaling]
print(json.dumps(found))
"""


def logits_of_4(folders: Mapping[Any, Path], scratch: Path) -> dict[str, Any]:
    """RoPE of every folder as transformers 4 reads it; its logits are left in the folders."""
    if not TRANSFORMERS4.is_dir():
        pytest.skip(f"{TRANSFORMERS4} is absent; `make test` installs transformers 4 there")
    path = scratch / "tokens.npy"
    np.save(path, TOKENS)
    environment = {**os.environ, "PYTHONPATH": str(TRANSFORMERS4), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", READ_BY_4, str(path), *map(str, folders.values())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def read_by_4(exports: dict[Case, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return logits_of_4(exports, tmp_path_factory.mktemp("tokens"))


def test_export_in_transformers_4(
    case: Case, exports: dict[Case, Path], expected: dict[Case, np.ndarray], read_by_4: dict[str, Any]
):
    theta, scaling = read_by_4[str(case)]
    assert theta == tiny.ROPES[case.rope]["rope_theta"]
    wanted = {key: value for key, value in tiny.ROPES[case.rope].items() if key != "rope_theta"}
    assert scaling == (None if case.rope == "default" else wanted)
    found = np.load(exports[case] / "logits4.npy")
    assert np.abs(found - expected[case]).max() < 1e-5 * np.abs(expected[case]).max()


def test_config_of_transformers_4_is_read(folders: dict[Case, Path]):
    """`rope_theta` and `rope_scaling`, with the old key `type`: what most folders on the Hub look like."""
    for case, folder in folders.items():
        _, values = hf.read_config(folder)
        rope = dict(values.pop("rope_parameters"))
        if case.model_type == "gemma3_text":
            rope, local = dict(rope["full_attention"]), rope["sliding_attention"]
            values["rope_local_base_freq"] = local["rope_theta"]
        old = {**values, "rope_theta": rope.pop("rope_theta")}
        kind = rope.pop("rope_type")
        rope.pop("partial_rotary_factor", None)
        old["rope_scaling"] = None if kind == "default" else {**rope, "type": kind}
        assert models.family(case.model_type).config(old) == hf.read_config(folder)[0]


EXTENSIONS = {
    "theta": ContextExtension(positions=256, rope_theta=9_000.0),
    "yarn": ContextExtension(positions=256, yarn=True),
    "both": ContextExtension(positions=256, rope_theta=9_000.0, yarn=True),
    "yarn, positions as they were": ContextExtension(positions=256, yarn=True),  # as Qwen's model cards tell people to
}


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Exports of a model of 64 positions whose context was extended to 256; the tokens run past 64."""
    folders = {}
    hf_config = tiny.hf_config("qwen2", max_position_embeddings=64)
    c = tiny.config("qwen2", max_position_embeddings=64)
    for name, extension in EXTENSIONS.items():
        folders[name] = tmp_path_factory.mktemp("extended") / name
        kept = {"max_position_embeddings": 64} if "as they were" in name else {}
        with tiny.mesh():
            hf.save(folders[name], tiny.put(tiny.values(c), c), extension.apply(hf_config) | kept)
    return folders


@pytest.mark.parametrize("name", EXTENSIONS)
def test_logits_past_the_old_limit_equal_those_of_transformers(name: str, extended: dict[str, Path]):
    wanted, found = theirs(extended[name]), ours(extended[name])
    assert hf.read_config(extended[name])[0].max_positions == 256
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()
    plain = tiny.config("qwen2", max_position_embeddings=64)
    assert np.abs(ours(extended[name], plain) - found)[:, 100:].max() > 0.01 * np.abs(wanted).max(), "RoPE has changed"


def test_extended_exports_in_transformers_4(extended: dict[str, Path], tmp_path: Path):
    for name, (theta, scaling) in logits_of_4(extended, tmp_path).items():
        assert theta == (EXTENSIONS[name].rope_theta or tiny.ROPES["default"]["rope_theta"])
        assert (scaling or {}).get("factor") == (4.0 if EXTENSIONS[name].yarn else None)
        wanted, found = theirs(extended[name]), np.load(extended[name] / "logits4.npy")
        assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize(
    ("settings", "values", "message"),
    [
        ({"positions": 512}, {}, "expected context.rope_theta, context.yarn, or both"),
        ({"positions": 256, "yarn": True}, {}, "context.positions is 256; expected more than the model's own 256"),
        ({"positions": 512, "rope_theta": 100.0}, {}, "context.rope_theta is 100.0; expected more than .* 700.0"),
        (
            {"positions": 512, "yarn": True},
            {"rope_parameters": tiny.ROPES["llama3"]},
            "extended already .RoPE 'llama3'",
        ),
    ],
)
def test_extensions_that_make_no_sense(settings: dict[str, Any], values: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        ContextExtension(**settings).apply(tiny.hf_config("llama", **values))


# theta, head size, and RoPE of models that people train
REAL = {
    "SmolLM2-135M": (1e5, 64, {}),
    "Llama-3.1-8B": (
        5e5,
        128,
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "Qwen2.5-Math-7B": (1e4, 128, {}),
    "Qwen2.5-7B, YaRN": (1e6, 128, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}),
}


@pytest.mark.parametrize("name", REAL)
def test_rope_frequencies_are_those_of_transformers(name: str):
    """To one unit in the last place: half a unit is 1e-4 radians at position 4,096."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    theta, head_dim, scaling = REAL[name]
    rope = {"rope_type": "default", **scaling, "rope_theta": theta}
    positions = int(scaling.get("original_max_position_embeddings", 4096) * scaling.get("factor", 1))
    sizes = {"hidden_size": head_dim * 2, "num_attention_heads": 2, "max_position_embeddings": positions}
    config = LlamaConfig(**sizes, rope_parameters=rope)
    theirs = LlamaRotaryEmbedding(config)
    ours = read_rope({"rope_parameters": rope}, positions)
    np.testing.assert_array_max_ulp(inverse_frequencies(ours, head_dim), np.asarray(theirs.inv_freq), maxulp=1)
    assert ours.attention_factor == pytest.approx(theirs.attention_scaling)
