"""The demo's student before it has learnt anything: a tokenizer trained on texts, and a small random Qwen2."""

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

from jaxdistill import hf, sharding, weights
from jaxdistill.models import decoder, qwen2

POSITIONS = 4096  # the longest row and the longest answer
_END, _START = "<|im_end|>", "<|im_start|>"
_SCALE = 4.0  # standard deviation 0.08: from 0.02 a student this narrow needs twice the steps to begin to learn
_CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{- message['content'] + '<|im_end|>' }}{%- endgeneration %}
{%- else %}
{{- message['content'] + '<|im_end|>' }}
{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""


def write(folder: Path, texts: Iterable[str], seed: int, vocab: int = 512, **architecture: Any) -> None:
    """Writes a Hugging Face folder with a fresh tokenizer and random weights.

    Args:
      texts: what the tokenizer is trained on.
      architecture: fields of Qwen2's config.json that replace the defaults.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _train_tokenizer(texts, vocab)
    tokenizer.save_pretrained(str(folder))
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": -(-len(tokenizer) // 64) * 64,  # a multiple that every mesh can split
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": POSITIONS,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "use_sliding_window": False,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.02 * _SCALE,
        "dtype": "float32",
        **architecture,
    }
    with jax.set_mesh(sharding.MeshConfig().build()):
        params = weights.init(decoder.template(qwen2.config(config)), seed, scale=_SCALE)
        hf.save(folder, params, config)


def _train_tokenizer(texts: Iterable[str], vocab: int) -> Any:
    """Qwen2's own tokenizer, retrained: every digit stands alone.

    Not a pipeline of our own: transformers 5 builds the tokenizer of a `qwen2` folder from its Qwen2 class whatever
    tokenizer.json says, so that another one would read the same text differently after export.
    """
    import transformers

    special = [_START, _END]
    roles = ["user\n", "assistant\n"] * 1000  # often enough to become tokens
    tokenizer = transformers.Qwen2Tokenizer().train_new_from_iterator(
        itertools.chain(texts, roles), vocab, new_special_tokens=special
    )
    tokenizer.eos_token = _END
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer
