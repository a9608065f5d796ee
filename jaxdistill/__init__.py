"""Distil reasoning models in JAX: teacher API -> verified chains -> long-context SFT -> evaluation -> Hugging Face."""

__version__ = "0.1.0"
