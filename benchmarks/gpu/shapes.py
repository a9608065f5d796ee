"""The models and rows that are measured on one GPU, and how each is made to fit."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from jaxdistill.data import packing
from jaxdistill.data.chat import Document
from jaxdistill.models import family
from jaxdistill.models.config import Config
from jaxdistill.models.remat import Remat

GIB = 2**30
DOCUMENTS = (1, 4, 16)
ROWS = (8_192, 32_768, 131_072)
_STATE_BYTES = 8  # a parameter: weights, both moments and the gradient in bfloat16

_QWEN2 = {"model_type": "qwen2", "tie_word_embeddings": True, "vocab_size": 151_936, "num_key_value_heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "8B": {  # Qwen3-8B
        "model_type": "qwen3",
        "tie_word_embeddings": False,
        "vocab_size": 151_936,
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "3B": _QWEN2  # Qwen2.5-3B
    | {"hidden_size": 2048, "intermediate_size": 11_008, "num_hidden_layers": 36, "num_attention_heads": 16},
    "1.5B": _QWEN2  # Qwen2.5-1.5B
    | {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
}
SMOKE = {
    "model_type": "qwen3",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options of a program that measures one model at one row length."""
    found = argparse.ArgumentParser(description=description)
    found.add_argument("--out", type=Path, required=True)
    found.add_argument("--model", required=True)
    found.add_argument("--row", type=int, required=True)
    found.add_argument("--memory-gib", type=float, required=True, help="of the device")
    return found


@dataclasses.dataclass(frozen=True)
class Case:
    """One model at one row length."""

    model: str
    row_tokens: int
    layers: int
    remat: Remat

    def hf(self) -> dict[str, Any]:
        """Its config.json."""
        values = MODELS.get(self.model, SMOKE)
        return values | {
            "num_hidden_layers": self.layers,
            "max_position_embeddings": self.row_tokens,
            "rope_theta": 1e6,
            "rms_norm_eps": 1e-6,
            "hidden_act": "silu",
        }

    def architecture(self) -> Config:
        return family(self.hf()["model_type"]).config(self.hf())


def case(model: str, row_tokens: int, memory: float) -> Case:
    """The model with as many layers as fit, and the policy that recomputes least: the projections saved if all fit.

    Args:
      memory: bytes of the device.
    """
    layers = MODELS.get(model, SMOKE)["num_hidden_layers"]
    fewest = min(layers, 12)
    remats: tuple[Remat, ...] = ("matmuls", "attention", "full")
    for least in (layers, fewest):  # rather fewer layers than all of them again
        for remat in remats:
            for count in range(layers, least - 1, -1):
                found = Case(model, row_tokens, count, remat)
                if _needed(found) < 0.85 * memory:
                    return found
    return Case(model, row_tokens, fewest, "full")


def _needed(case: Case) -> float:
    """Bytes of state, of what is saved, and of what a layer and the loss hold on their way."""
    c = case.architecture()
    width = {
        "matmuls": 2 * c.embed + 2 * (c.heads + c.kv_heads) * c.head_dim + 2 * c.mlp,
        "attention": c.embed + c.heads * c.head_dim,
    }.get(case.remat, c.embed)
    parameters = sum(c.stored_matmul_weights) + (0 if c.tied else c.vocab * c.embed)
    in_layer = 2 * case.row_tokens * (10 * c.embed + 4 * min(1.0, 32_768 / case.row_tokens) * c.mlp)
    return _STATE_BYTES * parameters + 2 * c.layers * case.row_tokens * width + in_layer + 3 * GIB


def lengths(row_tokens: int, documents: int) -> list[int]:
    """Positions of each document: unequal ones, which fill the row."""
    shares = np.linspace(1, 2, documents) / np.linspace(1, 2, documents).sum()
    found = (shares * row_tokens).astype(int)
    found[-1] += row_tokens - found.sum()
    return found.tolist()


def row(c: Config, row_tokens: int, documents: int) -> packing.Batch:
    """A batch of one row [1, T] of random tokens, all of them in the loss."""
    generator = np.random.default_rng(documents)
    texts = [
        Document(f"d{i}", generator.integers(0, c.vocab, n + 1).astype(np.int32), np.ones(n + 1, bool), 1.0)
        for i, n in enumerate(lengths(row_tokens, documents))
    ]
    made = packing.make_row(texts, row_tokens)
    return packing.Batch(*(getattr(made, f.name)[None] for f in dataclasses.fields(made)))


def attended(row_tokens: int, documents: int) -> float:
    """Length of the document that a position sits in, averaged over positions."""
    return sum(n * n for n in lengths(row_tokens, documents)) / row_tokens
