r"""The paper's general model: Qwen2.5-72B-Instruct on 10,750 Chinese and English queries with their responses.

    jaxdistill train configs/paper_general72b.py
    jaxdistill plan configs/paper_general72b.py --hardware v5p:4x8x8 --tokens 66060288
    jaxdistill plan configs/paper_general72b.py --hardware h100x128 --train.mesh.fsdp 32 --train.mesh.context 1 \
        --train.mesh.tensor 2 --documents 16 --tokens 66060288

Hardware: 256 TPU v5p chips (Google's v5p-512), or 128 H100 with the mesh of the last command (of `train`: --mesh.fsdp
32 and so on); planned, never run: its step is that of paper_math72b.py. The file mixes both languages, as the paper
does: reformatted and distilled chains beside their translations. Qwen2.5-72B-Instruct has 32,768 positions: no
extension.
"""

from pathlib import Path

from jaxdistill.optim import OptimConfig
from jaxdistill.sharding import MeshConfig
from jaxdistill.train.config import Phase, TrainConfig


def config() -> TrainConfig:
    """Rows of 32,768 tokens, 64 in a step: the 10,750 pairs are some ten steps an epoch."""
    return TrainConfig(
        workdir=Path("runs/paper_general72b"),
        model=Path("Qwen2.5-72B-Instruct"),
        phases=(
            Phase(
                name="bilingual",
                examples=Path("runs/bilingual/examples.jsonl"),
                epochs=3,
                optim=OptimConfig(peak_lr=1e-5, weight_decay=0.1),
            ),
        ),
        row_tokens=32_768,
        batch_rows=64,
        mesh=MeshConfig(fsdp=64, context=4),
    )
