"""The numbers that define a decoder, read from a Hugging Face `config.json` of either schema."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from jaxdistill.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embedding; field names follow transformers' `rope_parameters`."""

    theta: float
    kind: Literal["default", "linear", "llama3", "yarn"] = "default"
    factor: float = 1.0  # context extension, new positions over old
    original_positions: int = 0  # positions before the extension
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float = 1.0  # yarn: multiplies cos and sin
    truncate: bool = True  # yarn: round the correction range to whole dimensions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Architecture of a decoder; letters of docs/shapes.md in the comments."""

    model_type: str  # Hugging Face's name, and the file of models/ that implements it
    vocab: int  # V
    embed: int  # D
    mlp: int  # F, or f of each expert
    layers: int  # L
    heads: int  # N
    kv_heads: int  # K
    head_dim: int  # H
    norm_eps: float
    rope: Rope
    tied: bool  # the embedding is the head too
    max_positions: int  # the longest document the model was made for
    experts: int = 0  # E, the MLPs that a layer chooses from for each token; 0: it has one, for all
    experts_per_token: int = 1  # that are chosen
    normed_choice: bool = False  # the chosen experts' probabilities are divided by their sum
    router_aux_loss_coef: float = 0.0  # of the loss that balances experts, where config.json has training add it
    windowed: tuple[bool, ...] = ()  # of each layer, whether its queries see `window` keys at most; empty: none
    window: int = 0  # keys, a query's own the last of them
    local_rope: Rope | None = None  # of windowed layers, where it is another
    score_scale: float | None = None  # of attention's products; head_dim ** -0.5 by default
    score_cap: float | None = None  # no score of attention is larger: cap * tanh(score / cap)
    logit_cap: float | None = None  # the same for logits
    embed_scale: float = 1.0  # embeddings are multiplied by it, rounded to their dtype
    offset_norms: bool = False  # norms multiply by 1 + scale, in float32

    def windows(self, positions: int) -> tuple[bool, ...]:
        """`windowed`, for rows of so many positions: empty where all of a row is within the window."""
        return self.windowed if any(self.windowed) and positions > self.window else ()

    def sizes(self) -> dict[str, int]:
        """Dimension sizes by letter."""
        return {
            "V": self.vocab,
            "D": self.embed,
            "M": self.embed,
            **({"E": self.experts, "f": self.mlp} if self.experts else {"F": self.mlp}),
            "L": self.layers,
            "N": self.heads,
            "K": self.kv_heads,
            "H": self.head_dim,
        }

    @property
    def active_mlp(self) -> int:
        """Hidden features of the MLP that a token sees, of all of its experts together."""
        return self.mlp * self.experts_per_token

    @property
    def matmul_weights(self) -> tuple[int, int]:
        """Weights that a token is multiplied with, its chosen experts' alone: of all layers, and of the head."""
        return self._matmul_weights(self.active_mlp)

    @property
    def stored_matmul_weights(self) -> tuple[int, int]:
        """As `matmul_weights`, but of all experts: what devices gather, and reduce gradients of."""
        return self._matmul_weights(self.mlp * max(self.experts, 1))

    def _matmul_weights(self, mlp: int) -> tuple[int, int]:
        attention = self.embed * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        per_layer = attention + self.embed * (3 * mlp + self.experts)
        return self.layers * per_layer, self.vocab * self.embed

    def forward_attention_flops(self, attended: Any) -> Any:
        """Scores and weighted values of one token that sits in a document of `attended` tokens; the causal half.

        In windowed layers, of the keys that are seen: w n - w^2 / 2 of them in place of n^2 / 2, for all n tokens.
        """
        seen = self.layers * attended
        if any(self.windowed):
            least = np.minimum(self.window, attended)
            short = least * (2 - least / np.maximum(attended, 1))
            seen = seen + sum(self.windowed) * (short - attended)
        return 2.0 * self.heads * self.head_dim * seen

    def flops_per_token(self, attended: Any, *, trains_all: bool = True) -> Any:
        """Training FLOPs of one token that sits in a document of `attended` tokens.

        6 x matmul weights (head included, embedding lookup not) + 6 x layers x heads x head_dim x document length:
        the causal half of 12 x layers x heads x head_dim x length. A number for a number, an array for an array.

        Args:
          trains_all: False where adapters are trained in place of these weights: 4 x, without the weights' gradients;
            the adapters' own products are not counted.
        """
        return (6.0 if trains_all else 4.0) * sum(self.matmul_weights) + 3 * self.forward_attention_flops(attended)


def read_config(hf: Mapping[str, Any], unsupported: Mapping[str, Any], rope: Rope | None = None) -> Config:
    """Reads the fields that Llama-like configs share.

    Args:
      hf: parsed config.json.
      unsupported: key -> the only value this family implements; another value is refused.
      rope: where the family has a spelling of its own for it.

    Raises:
      UserError: a key is missing, or asks for something the family does not implement; all are named at once.
    """
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    problems = [f"{key} is missing" for key in needed if key not in hf]
    for key, only in unsupported.items():
        if hf.get(key, only) not in (only, None):
            problems.append(f"{key} is {hf[key]!r}, implemented is {only!r}")
    if problems:
        raise UserError(f"config.json of model_type {hf.get('model_type')!r}: {'; '.join(problems)}")
    heads, positions = hf["num_attention_heads"], hf.get("max_position_embeddings", 2048)
    rope = rope or read_rope(hf, positions)
    if rope.kind == "yarn":  # Qwen's own instructions add YaRN and leave max_position_embeddings at the old length
        positions = max(positions, int(rope.factor * rope.original_positions))
    return Config(
        model_type=hf["model_type"],
        vocab=hf["vocab_size"],
        embed=hf["hidden_size"],
        mlp=hf["intermediate_size"],
        layers=hf["num_hidden_layers"],
        heads=heads,
        kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        rope=rope,
        tied=bool(hf.get("tie_word_embeddings", False)),
        max_positions=positions,
    )


def read_rope(hf: Mapping[str, Any], positions: int) -> Rope:
    """Reads RoPE from `rope_parameters` (transformers 5) or from `rope_theta` and `rope_scaling` (transformers 4)."""
    values = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    if "rope_local_base_freq" in hf or "full_attention" in values:
        raise UserError(f"config.json of model_type {hf.get('model_type')!r} has a RoPE for each kind of layer")
    theta = values.get("rope_theta", hf.get("rope_theta", _DEFAULT_THETA))
    kind = values.get("rope_type", values.get("type", "default"))
    if kind == "default":
        return Rope(theta=float(theta))
    if kind not in ("linear", "llama3", "yarn"):
        raise UserError(
            f"config.json asks for RoPE scaling {kind!r}; implemented are 'default', 'linear', 'llama3' and 'yarn'"
        )
    if "factor" not in values:
        raise UserError(f"config.json: RoPE scaling {kind!r} needs a factor, found the keys {sorted(values)}")
    numbers = {key: float(values[key]) for key in _ROPE_NUMBERS if values.get(key) is not None}
    original = int(values.get("original_max_position_embeddings") or positions)
    if kind == "yarn":
        numbers.setdefault("attention_factor", _yarn_attention_factor(values))
    truncate = bool(values.get("truncate", True))
    return Rope(theta=float(theta), kind=kind, original_positions=original, truncate=truncate, **numbers)


_DEFAULT_THETA = 10_000.0  # of transformers; Llama 2 checkpoints leave theta out
_ROPE_NUMBERS = ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor")


def _yarn_attention_factor(values: Mapping[str, Any]) -> float:
    """Equation 22 of the YaRN paper (arXiv 2309.00071), with DeepSeek's mscale where a config has it."""

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(values["factor"]) + 1.0 if values["factor"] > 1 else 1.0

    if values.get("mscale") and values.get("mscale_all_dim"):
        return mscale(values["mscale"]) / mscale(values["mscale_all_dim"])
    return mscale(1.0)


def write_rope(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The config with RoPE spelled in both schemas, so that transformers 4 and 5 read the same theta."""
    values = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    theta = values.pop("rope_theta", hf.get("rope_theta", _DEFAULT_THETA))
    kind = values.setdefault("rope_type", values.pop("type", "default"))
    written = {key: value for key, value in hf.items() if key not in ("rope_parameters", "rope_scaling", "rope_theta")}
    written["rope_theta"] = theta
    written["rope_parameters"] = {**values, "rope_theta": theta}
    written["rope_scaling"] = None if kind == "default" else values
    return written
