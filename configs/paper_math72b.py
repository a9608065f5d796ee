r"""The paper's mathematics model: Qwen2.5-Math-72B in two phases, reformatted solutions and then distilled chains.

    jaxdistill train configs/paper_math72b.py
    jaxdistill plan configs/paper_math72b.py --hardware v5p:4x8x8
    jaxdistill plan configs/paper_math72b.py --hardware h100x128 --train.mesh.fsdp 32 --train.mesh.context 1 \
        --train.mesh.tensor 2 --documents 16

Hardware: 256 TPU v5p chips (Google's v5p-512), or 128 H100 with the mesh of the last command (of `train`: --mesh.fsdp
32 and so on); planned, never run: 24.0 GiB of 95 and MFU 53%, or 68.6 GiB of 79.1 and MFU 45%. Qwen2.5-Math has 4,096
positions and the paper's answers average 8,016 tokens, so the context is extended to 32,768 with the RoPE base that
Qwen2.5 uses for that length. The inputs are what `jaxdistill refine reformat`, `jaxdistill collect` and `jaxdistill
examples` write. The paper gives neither learning rate nor epochs: these follow common practice.
"""

from pathlib import Path

from jaxdistill.models.context import ContextExtension
from jaxdistill.optim import OptimConfig
from jaxdistill.sharding import MeshConfig
from jaxdistill.train.config import Phase, TrainConfig

OPTIM = OptimConfig(peak_lr=1e-5, weight_decay=0.1)


def config() -> TrainConfig:
    """Rows of 32,768 tokens, 64 in a step: 2.1 million tokens."""
    return TrainConfig(
        workdir=Path("runs/paper_math72b"),
        model=Path("Qwen2.5-Math-72B"),
        context=ContextExtension(positions=32_768, rope_theta=1_000_000.0),
        phases=(
            Phase(name="reformatted", examples=Path("runs/reformatted/examples.jsonl"), epochs=2, optim=OPTIM),
            Phase(name="distilled", examples=Path("runs/examples/examples.jsonl"), epochs=3, optim=OPTIM),
        ),
        row_tokens=32_768,
        batch_rows=64,
        mesh=MeshConfig(fsdp=64, context=4),
    )
