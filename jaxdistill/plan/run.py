"""`jaxdistill plan`: whether a recipe fits hardware that is not here, how fast it would run and what it would cost."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from jaxdistill import manifest, sharding, sources
from jaxdistill.data import chat, loader
from jaxdistill.errors import RunError, UserError
from jaxdistill.models import quantized
from jaxdistill.models.config import Config
from jaxdistill.plan import ahead, decoding, hardware, measured, roofline, search
from jaxdistill.plan.collectives import Collective
from jaxdistill.plan.hardware import Hardware
from jaxdistill.plan.measured import Measured
from jaxdistill.plan.search import OptimizerState
from jaxdistill.sample.engine import EngineConfig
from jaxdistill.train.config import TrainConfig, read_architecture
from jaxdistill.train.trained import Trained

_GIB = 2**30
_LARGE_REDUCE = 8 * 2**20  # bytes: an all-reduce above this outside tensor parallelism should be a reduce-scatter


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """A recipe and the hardware to plan it for."""

    train: TrainConfig  # the recipe; of its model config.json is enough, and its data may be missing
    hardware: str = ""  # v5p:4x8x8, v5e:4x4, v6e:8x8, tpu7x:4x4x4, Google's names of them (v5p-512), h100x8
    tokens: int | None = None  # positions of all rows of all steps; by default the recipe's, where its data is here
    document_tokens: float | None = None  # document length averaged over tokens; by default the data's, or a row's
    documents: int | None = None  # of a row at most, its padding counted as one; memory of cudnn grows with them
    search: bool = False  # over meshes, remat policies, row lengths and optimizer states, instead of the recipe's own
    search_rows: tuple[int, ...] = ()  # tokens of rows to try, none below the longest document; else the recipe's
    search_states: tuple[OptimizerState, ...] = ("float32", "offloaded", "bfloat16")  # to try, the preferred first
    compiled: int = 3  # ways that a search is after: it compiles, as formulas rank them, until so many fit
    measured: Path | None = None  # folder of a run of this very recipe, whose steps are held against the plan
    decode: bool = False  # plan the sampler's decoding step on the recipe's mesh, not the training step
    engine: EngineConfig = EngineConfig()  # of the sampler
    positions: int | None = None  # longest prompt and output together when decoding; by default the model's
    live_tokens: float | None = None  # positions a slot holds on average when decoding; by default half of positions

    def __post_init__(self):
        for name in ("tokens", "document_tokens", "documents", "compiled", "positions", "live_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name} is {value}; expected 1 or more")
        if self.decode and (self.search or self.measured):
            raise UserError("decode does not go with search or measured: they are about training")
        if self.search and self.measured:
            raise UserError("search and measured do not go together: a run is held against the recipe's own way")

    @property
    def workdir(self) -> Path:
        """Where plans are written: beside the run that they foretell."""
        return self.train.workdir / "plan"


@dataclasses.dataclass(frozen=True)
class Work:
    """How much a recipe trains on."""

    tokens: int | None  # positions of all rows of all steps
    document_tokens: float
    source: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """One way to run a recipe, compiled."""

    config: TrainConfig
    sizes: dict[str, int]  # of the mesh
    step: ahead.Compiled | None  # None: the compiler found no way to fit it
    estimate: roofline.Estimate
    problem: str  # why it does not fit; empty if it does


def main(config: PlanConfig) -> list[Plan]:
    """Prints the plan and writes it to `plan/<hardware>.json` in the run folder; returns the ways that were compiled.

    Raises:
      UserError: the hardware is unknown, or cannot be compiled for here.
      RunError: nothing that was compiled fits.
    """
    console, target = Console(), hardware.parse(config.hardware)
    train = config.train
    base, c = read_architecture(train)
    console.print(f"{target}: {target.devices} devices of {target.device_memory / _GIB:.1f} GiB")
    console.print(f"model: {Trained(train, c)}")
    devices: Any = ahead.devices(target)
    if config.decode:
        return _plan_decoding(config, c, target, devices, console)
    quantized.check(train.step.matmul_dtype, devices[0])
    work = work_of(config, base, c)
    ran = measured.read(config.measured, train) if config.measured else None
    console.print(f"data: {work.source}")
    if config.search:
        found = search.candidates(
            train, c, target, devices[0], work.document_tokens, config.search_rows, config.search_states
        )
        ways, wanted = [(way.config, way.sizes) for way in found], config.compiled
        console.print(f"{len(ways)} ways fit by formula; compiling, best first, until {wanted} fit by the compiler")
    else:
        ways, wanted = [(train, train.mesh.sizes(devices))], 1
    plans: list[Plan] = []
    for way, sizes in ways:
        plans.append(_plan(way, c, target, sizes, devices, work, config.documents))
        console.print(_line(plans[-1], target))
        if sum(not plan.problem for plan in plans) == wanted:
            break
    plans.sort(key=lambda plan: (plan.problem != "", plan.estimate.step_s))
    best = plans[0]
    manifest.write_json(config.workdir / f"{config.hardware.replace(':', '-')}.json", _record(plans, target, work, ran))
    if best.problem or best.step is None:
        remedy = "use more chips, shorter rows or a leaner state" if config.search else "--search tries other ways"
        raise RunError(f"{target}: {best.problem}; {remedy}")
    for renderable in _report(best, best.step, c, target, work):
        console.print(renderable)
    if ran:
        console.print(
            f"measured: {ran.step_s:.3f} s a step, the median of {ran.steps} in {ran.run}; predicted "
            f"{best.estimate.step_s:.3f}, {best.estimate.step_s / ran.step_s:.2f} of it"
        )
    return plans


def _plan_decoding(config: PlanConfig, c: Config, target: Hardware, devices: Any, console: Console) -> list[Plan]:
    """Prints and writes the plan of the decoding step; there are no ways of training to return."""
    mesh, positions = config.train.mesh.build(devices), config.positions or c.max_positions
    sharding.check_divisible(c.sizes(), dict(mesh.shape))
    live_tokens = config.live_tokens or positions / 2
    try:
        found = decoding.compile_decoding(c, target, mesh, config.engine, positions, live_tokens)
    except ahead.DoesNotFitError as error:
        raise RunError(f"{target}: {error}; use more chips, fewer engine.slots or positions, or 8 bits") from None
    memory = Table("memory of a device", "GiB")
    for name in ("weights", "cache", "temporaries", "total"):
        memory.add_row(name, f"{getattr(found, name) / _GIB:.2f}")
    console.print(memory)
    console.print(_collectives(found.collectives))
    console.print(
        f"{found.slots} slots, {live_tokens:,.0f} positions live in each, the cache holds {found.cache_positions:,}: "
        f"{found.read / _GIB:.2f} GiB read a step, {1e3 * found.step_s:.2f} ms ({1e3 * found.roofline_s:.2f} by the "
        f"memory's roofline), {found.tokens_per_s:,.0f} tokens/s; compiled in {found.compile_s:.0f} s"
    )
    console.print(f"{decoding.FORMULA}. Shares assumed: {roofline.EFFICIENCY[target.chip.platform]._asdict()}")
    record = {
        "hardware": str(target),
        "jax": jax.__version__,
        "mesh": dict(mesh.shape),
        "engine": dataclasses.asdict(config.engine),
        "formula": decoding.FORMULA,
        **dataclasses.asdict(found),
    }
    manifest.write_json(config.workdir / f"{config.hardware.replace(':', '-')}-decode.json", record)
    limit = search.USABLE * target.device_memory
    if found.total > limit:
        raise RunError(
            f"{target}: decoding needs {found.total / _GIB:.1f} GiB a device, usable are {limit / _GIB:.1f}; use more "
            "chips, fewer engine.slots or positions, or 8 bits (engine.cache_dtype, engine.weight_dtype)"
        )
    return []


def work_of(config: PlanConfig, base: Path, c: Config) -> Work:
    """The recipe's data where it is here, else what the configuration says of it."""
    train = config.train
    if config.tokens is None and not any(sources.wrong(phase.examples) for phase in train.phases):
        cache = train.prepared or config.workdir / "prepared"
        tokenizer = chat.load_tokenizer(base)
        how = tokenizer, train.row_tokens, c.vocab, cache
        sets = [loader.prepare(phase.examples, *how, bad_rows=train.bad_rows) for phase in train.phases]
        pairs = zip(train.phases, sets, strict=True)
        steps = sum(phase.optimizer_steps(len(rows), train.batch_rows) for phase, rows in pairs)
        attended = config.document_tokens or max(rows.attended_tokens for rows in sets)
        source = f"{steps} steps by the recipe's files, {attended:,.0f} tokens a document"
        return Work(steps * train.batch_rows * train.row_tokens, attended, source)
    attended = config.document_tokens or float(train.row_tokens)
    told = "as given" if config.tokens else "unknown, as the recipe's files are not here (--tokens)"
    of_documents = "as given" if config.document_tokens else "one a row, the dearest case (--document-tokens)"
    return Work(config.tokens, attended, f"tokens {told}; documents {of_documents}")


def _plan(
    way: TrainConfig,
    c: Config,
    target: Hardware,
    sizes: dict[str, int],
    devices: Any,
    work: Work,
    documents: int | None,
) -> Plan:
    try:
        step = ahead.compile_step(way, c, way.mesh.build(devices), documents)
    except ahead.DoesNotFitError as error:
        return Plan(way, sizes, None, search.of(way, c, target, sizes, work.document_tokens), str(error))
    estimate = roofline.estimate(
        c,
        target,
        sizes,
        way.step.remat,
        way.batch_rows * way.row_tokens,
        work.document_tokens,
        step.memory.weights + step.memory.optimizer,
        step.collectives,
        way.step.matmul_dtype,
        search.host_bytes(c, way, sizes),
        trains_all=not way.lora.rank,
    )
    limit, host_limit = search.USABLE * target.device_memory, target.device_host_memory
    problem = ""
    if step.memory.total > limit:
        problem = f"needs {step.memory.total / _GIB:.1f} GiB a device, usable are {limit / _GIB:.1f}"
    elif step.memory.host > host_limit:
        problem = f"needs {step.memory.host / _GIB:.1f} GiB of host memory a device, there are {host_limit / _GIB:.0f}"
    return Plan(way, sizes, step, estimate, problem)


def _line(plan: Plan, target: Hardware) -> str:
    """One way in one line, with what bounds it."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.sizes.items() if size > 1) or "one device"
    config, step = plan.config, plan.config.step
    state = config.phases[0].optim.state_dtype + (" with moments on the host" if step.offload_moments else "")
    way = f"{mesh}, rows of {config.row_tokens:,}, accumulate {step.accumulate}, remat {step.remat}, state {state}"
    if plan.step is None:
        return f"{way}: {plan.problem}"
    estimate, memory = plan.estimate, plan.step.memory
    held = f"memory {memory.total / _GIB:.1f} of {target.device_memory / _GIB:.2f} GiB"
    if memory.host:
        held += f" and {memory.host / _GIB:.1f} of {target.device_host_memory / _GIB:.0f} on the host"
    speed = f"{estimate.step_s:.2f} s a step, MFU {estimate.mfu:.0%}"
    bound = f"{estimate.bound}-bound ({getattr(estimate, f'{estimate.bound}_s'):.2f} s)"
    return f"{way}: {speed}, {bound}, {held}; compiled in {plan.step.compile_s:.0f} s" + (
        f"; does not fit: {plan.problem}" if plan.problem else ""
    )


def _report(plan: Plan, step: ahead.Compiled, c: Config, target: Hardware, work: Work) -> Iterable[Any]:
    """The best way in full."""
    memory, estimate = Table("memory of a device", "GiB"), plan.estimate
    for field in dataclasses.fields(ahead.Memory):
        memory.add_row(field.name, f"{getattr(step.memory, field.name) / _GIB:.2f}")
    memory.add_row("total, without host", f"{step.memory.total / _GIB:.2f}")
    yield memory
    yield _collectives(step.collectives)
    yield from _warnings(step.collectives, plan.sizes)
    chip = target.chip
    if chip.platform == "tpu" and (warning := sharding.reduced_whole(c.sizes(), plan.sizes, chip.name)):
        yield f"warning: {warning}"
    seconds = Table("of a step", "seconds")
    for name in ("matmul_s", "attention_s", "memory_s", "wire_s", "host_s", "fastest_s", "slowest_s", "step_s"):
        seconds.add_row(name, f"{getattr(estimate, name):.3f}")
    yield seconds
    rate = estimate.tokens_per_s
    yield f"{rate:,.0f} tokens/s, {rate / target.chips:,.0f} a chip; MFU {estimate.mfu:.1%}"
    yield from _cost(estimate, target, work)
    shares = roofline.EFFICIENCY[target.chip.platform]
    yield f"{roofline.FORMULA}. Shares assumed, not measured: {shares._asdict()}"


def _collectives(found: list[Collective]) -> Table:
    """Collectives by kind, type and group, the most bytes first."""
    table = Table("collective", "type", "devices", "times", "largest, MiB", "sent by a device, MiB")
    groups: dict[tuple[str, str, int], list[Collective]] = {}
    for one in found:
        groups.setdefault((one.kind, one.dtype, one.group), []).append(one)
    for (kind, dtype, group), some in sorted(groups.items(), key=lambda item: -sum(c.wire_bytes for c in item[1])):
        sent, largest = sum(c.wire_bytes for c in some), max(c.payload_bytes for c in some)
        times = sum(c.times for c in some)
        table.add_row(kind, dtype, f"{group}", f"{times}", f"{largest / 2**20:,.1f}", f"{sent / 2**20:,.1f}")
    return table


def _warnings(found: list[Collective], sizes: Mapping[str, int]) -> Iterable[str]:
    """What the compiler reduces whole although each device keeps a part alone."""
    large = [
        one.payload_bytes
        for one in found
        if one.kind == "all-reduce"
        and one.payload_bytes > _LARGE_REDUCE
        and one.group not in (sizes["tensor"], sizes["data"])  # Megatron's sums, and those of a device's own part
    ]
    if large:
        yield (
            f"warning: {len(large)} all-reduces of up to {max(large) / 2**20:,.0f} MiB where a reduce-scatter would do"
        )


def _cost(estimate: roofline.Estimate, target: Hardware, work: Work) -> Iterable[str]:
    hours = (work.tokens or 1e9) / estimate.tokens_per_s / 3600
    price = target.chip.usd_per_hour
    dollars = f", ${hours * target.chips * price:,.0f} at ${price:.2f} a chip and hour" if price else ""
    yield f"{'the recipe' if work.tokens else 'a billion tokens'}: {hours:,.1f} hours{dollars}"


def _record(plans: list[Plan], target: Hardware, work: Work, ran: Measured | None) -> dict[str, Any]:
    """What is kept of a plan, and of the run that it was held against."""
    held = ran and {**dataclasses.asdict(ran), "predicted_over_measured": plans[0].estimate.step_s / ran.step_s}
    return {
        "hardware": str(target),
        "jax": jax.__version__,
        "work": dataclasses.asdict(work),
        "efficiency": roofline.EFFICIENCY[target.chip.platform]._asdict(),
        "formula": roofline.FORMULA,
        "measured": held,
        "plans": [
            {
                "mesh": plan.sizes,
                "step": dataclasses.asdict(plan.config.step),
                "batch_rows": plan.config.batch_rows,
                "row_tokens": plan.config.row_tokens,
                "state_dtype": plan.config.phases[0].optim.state_dtype,
                "problem": plan.problem,
                "memory": dataclasses.asdict(plan.step.memory) if plan.step else None,
                "collectives": [dataclasses.asdict(one) for one in plan.step.collectives] if plan.step else None,
                "estimate": {
                    **dataclasses.asdict(plan.estimate),
                    **{name: getattr(plan.estimate, name) for name in ("step_s", "tokens_per_s", "mfu", "bound")},
                },
            }
            for plan in plans
        ],
    }
