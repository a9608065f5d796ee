"""The training step itself, `train_step.make_step`, on one device: seconds, tokens/s, memory, and a profile."""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import profile_steps
import shapes

from jaxdistill import chips, optim, sharding, weights
from jaxdistill.models import decoder
from jaxdistill.models.attention import Attention, backends
from jaxdistill.optim import OptimConfig
from jaxdistill.train import step as train_step
from jaxdistill.train.step import State, StepConfig

_SEGMENTS = 17  # of a row: 16 documents and padding, so that one program serves all rows of a length
_TIMED = 5


def main() -> None:
    parser = shapes.parser(__doc__)
    parser.add_argument("--profile", type=Path, help="folder for a trace of the row with 4 documents")
    options = parser.parse_args()
    device = jax.devices()[0]
    chip = chips.of_device(device.device_kind)
    case = shapes.case(options.model, options.row, options.memory_gib * shapes.GIB)
    with jax.set_mesh(sharding.MeshConfig().build([device])):
        run = _Run(case, device.platform)
        found = [run.measure(documents, chip) for documents in shapes.DOCUMENTS]
        if options.profile:
            found[1]["profile"] = run.profile(options.profile, found[1]["seconds"])
    options.out.write_text(json.dumps(found))


class _Run:
    """A compiled step and its state."""

    def __init__(self, case: shapes.Case, platform: str):
        self.case, self.c = case, case.architecture()
        template = decoder.template(self.c)
        optimizer = optim.make(OptimConfig(peak_lr=1e-5, state_dtype="bfloat16"), 1000, template)
        config = StepConfig(remat=case.remat)
        attention = Attention(backend=backends.choose(None, platform), segments=_SEGMENTS)
        self.state: State = train_step.new_state(random_weights(template), optimizer, seed=0)
        batch = self._batch(1)
        started = time.perf_counter()
        step: Any = train_step.make_step(config, attention, self.c, optimizer)
        self.step = step.lower(self.state, batch).compile()
        self.compile_s = time.perf_counter() - started

    def _batch(self, documents: int) -> Any:
        return train_step.place(shapes.row(self.c, self.case.row_tokens, documents), 1)

    def _advance(self, batch: Any) -> float:
        started = time.perf_counter()
        self.state, values = self.step(self.state, batch)
        loss = float(values["loss"])  # waits for the step
        assert np.isfinite(loss), f"the loss is {loss}"
        return time.perf_counter() - started

    def measure(self, documents: int, chip: chips.Chip | None) -> dict[str, Any]:
        """The median of some steps."""
        batch, tokens = self._batch(documents), self.case.row_tokens
        self._advance(batch)
        seconds = float(np.median([self._advance(batch) for _ in range(_TIMED)]))
        flops = self.c.flops_per_token(shapes.attended(tokens, documents))
        stats, planned = jax.devices()[0].memory_stats() or {}, self.step.memory_analysis()
        return {
            **dataclasses.asdict(self.case),
            "documents": documents,
            "seconds": seconds,
            "tokens_per_s": tokens / seconds,
            "tflops": flops * tokens / seconds / 1e12,
            "mfu": flops * tokens / seconds / chip.bf16_flops if chip else None,
            "compile_s": self.compile_s,
            "planned_gib": (planned.argument_size_in_bytes + planned.temp_size_in_bytes) / shapes.GIB,
            "peak_gib": stats.get("peak_bytes_in_use", 0) / shapes.GIB,
        }

    def profile(self, folder: Path, seconds: float) -> dict[str, Any]:
        """Where the time of a step goes, kernel by kernel."""
        batch = self._batch(shapes.DOCUMENTS[1])
        with jax.profiler.trace(str(folder)):
            self._advance(batch)
        return profile_steps.read(folder, seconds)


def random_weights(template: Any) -> Any:
    """Weights in bfloat16, drawn on the device: on the host those of 8B take minutes."""

    def one(w: weights.Declared, key: jax.Array) -> jax.Array:
        draw: Callable[..., jax.Array] = jax.jit(
            lambda key: (w.init.mean + w.init.stddev * jax.random.normal(key, w.shape)).astype(jnp.bfloat16),
            out_shardings=jax.NamedSharding(jax.sharding.get_mesh(), sharding.spec(w.dims, sharding.STORAGE)),
        )
        return draw(key)

    leaves, tree = jax.tree.flatten(template, is_leaf=weights.is_declared)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return tree.unflatten(one(w, key) for w, key in zip(leaves, keys, strict=True))


if __name__ == "__main__":
    main()
