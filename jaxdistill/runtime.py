"""What a process does before its first array: the compilation cache."""

import os
from pathlib import Path

import jax


def start() -> None:
    """Prepares JAX; call once, before the first array.

    Compiled programs are kept in ~/.cache/jaxdistill/xla (or $JAX_COMPILATION_CACHE_DIR), so that a restart does
    not compile again.
    """
    if not jax.config.values["jax_compilation_cache_dir"]:
        base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        jax.config.update("jax_compilation_cache_dir", str(base / "jaxdistill" / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
