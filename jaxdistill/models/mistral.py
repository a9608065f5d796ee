"""Mistral: Llama whose queries see a window of the latest keys, in the versions that have one."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxdistill.models.config import Config, read_config
from jaxdistill.models.llama import Block, block

__all__ = ["Block", "block", "config"]


def config(hf: Mapping[str, Any]) -> Config:
    """Reads config.json; where it does not mention a window, transformers takes 4,096."""
    c = read_config(hf, unsupported={"hidden_act": "silu"})
    window = hf.get("sliding_window", 4096)
    return dataclasses.replace(c, window=window, windowed=(True,) * c.layers) if window else c
