"""Tiny models, tokenizers and rows for the tests of the core; nothing is downloaded and nothing is compiled here."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType

from jaxdistill import sharding, weights
from jaxdistill.data import packing
from jaxdistill.data.chat import Document
from jaxdistill.models import decoder, family
from jaxdistill.models.config import Config
from jaxdistill.train import step as train_step

# --- meshes ----------------------------------------------------------------------------------------------------------

ONE_DEVICE: dict[str, int] = dict.fromkeys(sharding.MESH_AXES, 1)


@contextlib.contextmanager
def mesh(**sizes: int) -> Iterator[jax.sharding.Mesh]:
    """Enters a mesh over the first devices that are needed; without sizes, over one device."""
    shape = tuple((ONE_DEVICE | sizes).values())
    made = jax.make_mesh(
        shape,
        sharding.MESH_AXES,
        axis_types=(AxisType.Explicit,) * len(shape),
        devices=jax.devices()[: int(np.prod(shape))],
    )
    with jax.set_mesh(made):
        yield made


# --- models ----------------------------------------------------------------------------------------------------------

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 700.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 700.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 700.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 8.0,  # the range between fast and slow must lie inside 8 pairs for the ramp to matter
        "beta_slow": 1.0,
    },
}


# What makes a family what it is, in sizes at which 200 positions feel it
_WINDOWED = {"sliding_window": 48, "layer_types": ["sliding_attention", "full_attention"]}
_GEMMA = {**_WINDOWED, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 24}
OF_FAMILY: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 48},
    "phi3": {"sliding_window": 48},
    "gemma2": {**_GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3_text": _GEMMA,
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "norm_topk_prob": True},
}


def hf_config(model_type: str, tied: bool = False, rope: str = "default", **changes: Any) -> dict[str, Any]:
    """A config.json, in transformers 5's schema."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    ropes: dict[str, Any] = dict(ROPES[rope])  # transformers may add to it
    if model_type == "gemma3_text":
        ropes = {"full_attention": ropes, "sliding_attention": {"rope_type": "default", "rope_theta": 300.0}}
    own = OF_FAMILY.get(model_type, {})
    if "layer_types" in own:
        own = {**own, "layer_types": [own["layer_types"][i % 2] for i in range(changes.get("num_hidden_layers", 2))]}
    return {
        "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]],
        "model_type": model_type,
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,  # not hidden_size / heads
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 256,
        "rope_parameters": ropes,
        "dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        **own,
        **changes,
    }


def config(model_type: str, **changes: Any) -> Config:
    """The architecture of `hf_config` as ours."""
    return family(model_type).config(hf_config(model_type, **changes))


def values(c: Config, seed: int = 0) -> Any:
    """Params of numpy arrays: matrices of unit gain, norm scales away from 1, biases away from 0."""
    generator = np.random.default_rng(seed)

    def one(w: weights.Declared) -> np.ndarray:
        if w.init == weights.ones:
            drawn = generator.uniform(0.5, 1.5, w.shape)
        elif w.init == weights.zeros:
            drawn = generator.normal(0, 0.5, w.shape)
        else:
            drawn = generator.normal(0, c.embed**-0.5, w.shape)
        return drawn.astype(np.float32)

    return jax.tree.map(one, decoder.template(c), is_leaf=weights.is_declared)


def put(host: Any, c: Config) -> decoder.Params:
    """Weights in storage layout on the current mesh."""
    layouts = jax.tree.map(lambda w: w.sharding, weights.abstract(decoder.template(c)))
    return jax.device_put(host, layouts)


# --- rows ------------------------------------------------------------------------------------------------------------


def document(name: str, length: int, vocab: int, prompt: int = 3, weight: float = 1.0, seed: int = 0) -> Document:
    """Random tokens; those of the prompt carry no loss."""
    generator = np.random.default_rng([seed, length, *name.encode()])
    tokens = generator.integers(3, vocab, length).astype(np.int32)
    return Document(name, tokens, np.arange(length) >= prompt, weight)


def documents(lengths: Sequence[int], vocab: int, seed: int = 0) -> list[Document]:
    """Documents of these lengths, with prompts of different lengths."""
    return [document(f"d{i}", n, vocab, prompt=1 + i % 5, seed=seed) for i, n in enumerate(lengths)]


def stack(rows: Sequence[packing.Batch]) -> packing.Batch:
    """Rows [T] as one batch [B, T]."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)


def packed(lengths: Sequence[int], vocab: int, rows: int, row_tokens: int, seed: int = 0) -> packing.Batch:
    """Documents of these lengths packed into exactly `rows` rows, the last of them perhaps empty."""
    texts = documents(lengths, vocab, seed)
    fitted = packing.best_fit([packing.positions_used(d) for d in texts], row_tokens)
    made = [packing.make_row([texts[i] for i in row], row_tokens) for row in fitted]
    assert len(made) <= rows, f"{len(made)} rows are needed"
    return stack(made + [packing.empty_row(row_tokens)] * (rows - len(made)))


def place(batch: packing.Batch) -> packing.Batch:
    """A host batch [B, T] on the current mesh."""
    return train_step.place(batch)


# --- tokenizers ------------------------------------------------------------------------------------------------------

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The part of Qwen3's template that matters here: the last answer shows its thoughts, earlier ones lose theirs
QWEN3 = (
    "{% set last = namespace(user=-1) %}"
    "{% for message in messages %}{% if message.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}"
    "{% endfor %}"
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}"
    "{% set content = message.content %}{% set thoughts = message.reasoning_content or '' %}"
    "{% if '</think>' in content %}"
    "{% set thoughts = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > last.user and (loop.last or thoughts) %}"
    "{{ '<|im_start|>assistant\n<think>\n' + thoughts.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}"
    "{% else %}{{ '<|im_start|>assistant\n' + content }}{% endif %}{{ '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def tokenizer(
    template: str = CHATML,
    merges: Sequence[tuple[str, str]] = (("h", "e"), ("l", "l"), ("Ġ", "Ġ"), ("Ċ", "Ċ")),
    more_special: Sequence[str] = (),
    trim_offsets: bool = False,
    named: dict[str, str] | None = None,
) -> Any:
    """A byte-level BPE tokenizer like SmolLM2's: pad and eos are both <|im_end|>.

    Args:
      named: the named special tokens (eos_token and so on), instead of SmolLM2's.
    """
    import transformers
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    words = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    made = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=list(merges)))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in (*SPECIAL, *more_special)])
    names = {"bos_token": SPECIAL[1], "eos_token": SPECIAL[2], "pad_token": SPECIAL[2]} if named is None else named
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names)
    fast.chat_template = template
    return fast


def write_folder(folder: Path, hf: dict[str, Any], params: decoder.Params, c: Config, with_tokenizer: bool) -> Path:
    """Writes a Hugging Face folder without going through hf.py."""
    import safetensors.numpy
    from einops import rearrange

    folder.mkdir(parents=True)
    tensors = {}
    declared = jax.tree.leaves(decoder.template(c), is_leaf=weights.is_declared)
    for w, value in zip(declared, jax.tree.leaves(params), strict=True):
        levels = w.hf_name.count("{}")  # layers, experts
        for index in np.ndindex(value.shape[:levels]):
            host = rearrange(value[index], f"{w.tensor_dims} -> {w.hf_dims}")
            name = w.hf_name.format(*index)
            beside = [tensors[name]] if name in tensors else []  # Phi-3's, one after another
            tensors[name] = np.ascontiguousarray(np.concatenate([*beside, host]))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(hf))
    if with_tokenizer:
        tokenizer().save_pretrained(str(folder))
    return folder


def of_each_expert(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors as files have them, where transformers holds those of all experts as one in memory."""
    found = {}
    for name, values in tensors.items():
        before, fused, kind = name.partition(".experts.")
        if not fused:
            found[name] = values
            continue
        parts = {kind: values}
        if kind == "gate_up_proj":
            parts = dict(zip(("gate_proj", "up_proj"), np.split(values, 2, axis=1), strict=True))
        for part, of_all in parts.items():
            found |= {f"{before}.experts.{i}.{part}.weight": one for i, one in enumerate(of_all)}
    return found


def largest_relative_difference(found: Any, expected: Any) -> float:
    """Largest absolute difference over the largest absolute value expected."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-30))


def assert_trees_close(found: Any, expected: Any, tolerance: float) -> None:
    """Compares leaf by leaf, each by its own largest value; names every leaf that differs."""
    pairs = zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True)
    off = {jax.tree_util.keystr(path): largest_relative_difference(a, b) for (path, a), b in pairs}
    bad = {name: value for name, value in off.items() if not value <= tolerance}
    assert not bad, f"differ by more than {tolerance}: {bad}"


def write_examples(path: Path, count: int, words: int = 4, **changes: Any) -> Path:
    """Sums in ChatML."""
    lines = []
    for i in range(count):
        answer = " ".join(str(i + k) for k in range(words + i % 4))
        messages = [{"role": "user", "content": f"{i}+{i}"}, {"role": "assistant", "content": answer}]
        lines.append({"id": f"e{i}", "messages": messages, **changes})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_array_records(path: Path, rows: Sequence[bytes], options: str = "group_size:1") -> Path:
    """Rows as ArrayRecord."""
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), options)
    for row in rows:
        writer.write(row)
    writer.close()
    return path
