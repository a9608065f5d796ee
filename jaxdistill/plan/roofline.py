"""How long a step takes, from formulas: FLOPs, bytes through memory and bytes over the wire against a chip's limits.

The compiler's own cost analysis is not used: it counts the body of a loop once, and kernels not at all.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from jaxdistill.models.config import Config
from jaxdistill.models.quantized import MatmulDtype
from jaxdistill.models.remat import Remat
from jaxdistill.plan.collectives import Collective
from jaxdistill.plan.hardware import GPUS_PER_NODE, Hardware


class Efficiency(NamedTuple):
    """Shares of the data sheet's peaks that real kernels reach: assumed, until runs on this hardware say better."""

    matmul: float  # of the FLOP/s
    attention: float  # of the FLOP/s
    memory: float  # of the memory bandwidth
    wire: float  # of the link and network bandwidth


EFFICIENCY: Mapping[str, Efficiency] = {
    "tpu": Efficiency(matmul=0.80, attention=0.50, memory=0.80, wire=0.80),
    "cuda": Efficiency(matmul=0.70, attention=0.50, memory=0.80, wire=0.70),
}

# What the backward pass computes again, as a share of the forward pass: (matrix products of the layers, attention)
RECOMPUTED: Mapping[Remat, tuple[float, float]] = {
    "full": (1, 1),
    "attention": (1, 0),
    "offload": (1, 0),
    "offload_inputs": (1, 1),
    "matmuls": (0, 0),
    "none": (0, 0),
}

_BACKWARD_ATTENTION = 2.5  # products of scores-sized matrices, 5 against the forward pass's 2


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds of a step by what they are spent on, and what follows."""

    matmul_s: float
    attention_s: float
    memory_s: float  # norms, gates and the optimizer's update: bytes through the device's memory
    wire_s: float  # collectives
    host_s: float  # to the host's memory and back
    tokens: int  # positions in a step
    model_flops: float  # of a step, as MFU counts them
    peak_flops: float  # FLOP/s of all chips

    @property
    def busy_s(self) -> float:
        return self.matmul_s + self.attention_s + self.memory_s

    @property
    def fastest_s(self) -> float:
        """With collectives and transfers hidden behind all else, as far as they are shorter."""
        return max(self.busy_s, self.wire_s, self.host_s)

    @property
    def slowest_s(self) -> float:
        """With nothing hidden."""
        return self.busy_s + self.wire_s + self.host_s

    @property
    def step_s(self) -> float:
        """Half-way between the two: compilers hide a part."""
        return (self.fastest_s + self.slowest_s) / 2

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.step_s

    @property
    def mfu(self) -> float:
        return self.model_flops / self.step_s / self.peak_flops

    @property
    def bound(self) -> str:
        """What takes the most time."""
        return max(("matmul", "attention", "memory", "wire", "host"), key=lambda part: getattr(self, f"{part}_s"))


FORMULA = (
    "matmul_s = tokens x (6 + 2 if recomputed) x matmul weights / (chips x peak x share), where all but 2 of the "
    "layers' 6 or 8 have the peak of step.matmul_dtype, and of weights beside adapters 2 are left out, by MFU too, "
    "which counts against the peak of bfloat16; "
    "attention_s = tokens x (7 + 2 if recomputed) x layers x heads x head_dim x document length / (chips x peak x "
    "share); memory_s = (2 x state + gradients + activations read and written) / (bandwidth x share); wire_s = ring "
    "bytes of every collective / (bandwidth of its links x share); host_s = what is kept on the host, there and back / "
    "its bandwidth; step_s is half-way between all collectives and transfers hidden and none"
)


def estimate(
    c: Config,
    hardware: Hardware,
    mesh: Mapping[str, int],
    remat: Remat,
    tokens: int,
    document_tokens: float,
    state_bytes: float,
    wire: Iterable[Collective],
    matmul_dtype: MatmulDtype = "compute",
    host_bytes: float = 0.0,
    *,
    trains_all: bool = True,
) -> Estimate:
    """The step of a run on this hardware.

    Args:
      tokens: positions of all rows in a step.
      document_tokens: length of the document that a token sits in, averaged over tokens.
      state_bytes: of what is trained and its optimizer on one device.
      host_bytes: between one device and its host in a step, both ways together.
      trains_all: False where adapters are trained beside the model's weights, which then have no gradients.
    """
    chip, share = hardware.chip, EFFICIENCY[hardware.chip.platform]
    again, attention_again = RECOMPUTED[remat]
    peak = hardware.chips * chip.bf16_flops
    layers, head = c.matmul_weights
    # The gradient of the layers' weights is not multiplied in 8 bits, nor is anything of the head
    of_gradients = 2 * trains_all
    matmul = tokens * (of_gradients * (layers + head) + 4 * head), tokens * (4 + 2 * again) * layers
    speedup = chip.flops(matmul_dtype) / chip.bf16_flops
    attention = tokens * c.forward_attention_flops(document_tokens) * (1 + _BACKWARD_ATTENTION + attention_again)
    per_device = tokens / (hardware.devices / mesh["tensor"])
    # A norm reads and writes x, the residual stream is read and written, the gate reads two and writes one; the
    # backward pass does twice that, and the forward pass again where it is recomputed
    elementwise = per_device * c.layers * (8 * c.embed + 3 * c.active_mlp / mesh["tensor"]) * 2 * (3 + again)
    if matmul_dtype != "compute":  # what is multiplied, and in the backward pass its gradients, are read and rounded
        inputs = 2 * c.embed + (c.heads * c.head_dim + c.active_mlp) / mesh["tensor"]
        outputs = 2 * c.embed + ((c.heads + 2 * c.kv_heads) * c.head_dim + 2 * c.active_mlp) / mesh["tensor"]
        elementwise += per_device * c.layers * (2 + 1) * ((1 + again) * inputs + outputs)
    bandwidth = chip.memory_bandwidth / chip.devices * share.memory
    return Estimate(
        matmul_s=(matmul[0] + matmul[1] / speedup) / (peak * share.matmul),
        attention_s=attention / (peak * share.attention),
        memory_s=(2.5 * state_bytes + elementwise) / bandwidth,
        wire_s=sum((s.wire_bytes / (wire_bandwidth(hardware, mesh, s.group) * share.wire) for s in wire), 0.0),
        host_s=host_bytes / (chip.host_bandwidth / chip.devices),
        tokens=tokens,
        model_flops=tokens * c.flops_per_token(document_tokens, trains_all=trains_all),
        peak_flops=peak,
    )


def wire_bandwidth(hardware: Hardware, mesh: Mapping[str, int], group: int) -> float:
    """Bytes/s that one device sends when groups of so many devices run a ring collective.

    On a torus a group has the links of as many dimensions as it takes to hold it. Within a node of GPUs it has the
    links of the node; across nodes every member on the same node brings its own network card.
    """
    chip = hardware.chip
    if chip.platform == "tpu":
        held, used = chip.devices, 0
        for size in sorted(hardware.shape, reverse=True):
            if held >= group:
                break
            held, used = held * size, used + 1
        return chip.link_bandwidth / chip.devices * max(used, 1) / len(hardware.shape)
    together = max(1, min(group, GPUS_PER_NODE // _stride(mesh, group)))
    return chip.link_bandwidth if together == group else chip.network_bandwidth * together


def _stride(mesh: Mapping[str, int], group: int) -> int:
    """Distance between neighbours of a group: of the first run of mesh axes, from the last, that has its size."""
    sizes = list(mesh.values())
    for end in range(len(sizes), 0, -1):
        for start in range(end - 1, -1, -1):
            if math.prod(sizes[start:end]) == group:
                return math.prod(sizes[end:])
    return 1


def expected_collectives(
    c: Config,
    mesh: Mapping[str, int],
    remat: Remat,
    tokens: int,
    matmul_dtype: MatmulDtype = "compute",
    *,
    scatters_over_all: bool = True,
    trains_all: bool = True,
) -> list[Collective]:
    """What a step should send by the design of the sharding, for ranking meshes before any is compiled.

    Weights are gathered for the forward and the backward pass, a device's part over context and those over fsdp, in
    bfloat16 or those of the layers in 8 bits; gradients come back the other way in bfloat16;
    tensor parallelism reduces each layer's two outputs in both directions, and the first again where it is recomputed;
    context parallelism gathers keys and values, and scatters their gradients. Of a mixture all experts are gathered;
    over tensor, which splits them, so are the router's scores, and the gradients of the shares of experts are reduced.

    Args:
      trains_all: False where adapters are trained: no gradients of the weights come back.
      scatters_over_all: False where gradients are reduced whole in a group of all devices (`sharding.reduced_whole`).
    """
    fsdp, context, tensor = mesh["fsdp"], mesh["context"], mesh["tensor"]
    local = tokens // (mesh["data"] * fsdp)  # positions of a device's rows, whole
    weights, again = sum(c.stored_matmul_weights) // tensor * 2, RECOMPUTED[remat][0]
    in_8_bits = c.stored_matmul_weights[0] // tensor * (matmul_dtype != "compute")
    found = []
    for share, group in ((1, fsdp), (fsdp, context)):
        if group > 1:
            found.append(Collective("all-gather", (weights - 2 * in_8_bits) // share, group, "bf16", 2))
            if in_8_bits:
                found.append(Collective("all-gather", in_8_bits // share, group, matmul_dtype, 2))
            if not trains_all:
                continue
            whole = group == math.prod(mesh.values()) and not scatters_over_all
            kind = "all-reduce" if whole else "reduce-scatter"
            found.append(Collective(kind, weights // share, group, "bf16", 1))
    if mesh["data"] > 1 and trains_all:
        found.append(Collective("all-reduce", weights // (fsdp * context), mesh["data"], "bf16", 1))
    if tensor > 1:
        x = local // context * c.embed * 2
        found.append(Collective("all-reduce", x, tensor, "bf16", int(c.layers * (4 + again))))
        if c.experts:  # no token travels: devices of a tensor group have the same ones
            positions = local // context
            found.append(
                Collective("all-gather", positions * c.experts * 2, tensor, "bf16", int(c.layers * (1 + again)))
            )
            found.append(Collective("all-reduce", positions * c.experts_per_token * 4, tensor, "f32", c.layers))
    if context > 1:
        keys = local * 2 * c.kv_heads // min(tensor, c.kv_heads) * c.head_dim * 2
        found.append(Collective("all-gather", keys, context, "bf16", int(c.layers * (2 + again))))
    return found
