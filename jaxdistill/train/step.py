"""One optimizer step on packed rows: the state it carries, its loss, and the accumulation that does not change it."""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Int, PRNGKeyArray

from jaxdistill import compiler, optim_state, sharding, weights
from jaxdistill.data.packing import Batch
from jaxdistill.errors import UserError
from jaxdistill.loss import cross_entropy_sum
from jaxdistill.models import decoder, routing
from jaxdistill.models.attention import REFERENCE, Attention, Backend, ContextParallelism
from jaxdistill.models.config import Config
from jaxdistill.models.lora import LoraConfig, adapting, apply
from jaxdistill.models.quantized import MatmulDtype, projection_in
from jaxdistill.sharding import HOST_MEMORY
from jaxdistill.train import bad_steps
from jaxdistill.train.bad_steps import BAD_STEPS, BadStepsConfig

_ROUTED = "tokens of each expert"  # by layer, [L, E]
_DROPOUT = 2**31 - 2
_ROUNDING = 2**31 - 1  # folded into a step's key; pieces of a batch fold in their numbers


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepConfig:
    """How a step is computed; apart from noise, rounding and the balance of experts, none of it changes the result."""

    accumulate: int = 1  # pieces a batch is worked off in, to save memory
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of activations; of weights: optim.state_dtype
    matmul_dtype: MatmulDtype = "compute"  # of the layers' projections: float8 on H100, int8 on TPUs, with scales
    remat: decoder.Remat = "full"  # what the backward pass finds saved
    attention: Backend | None = None  # by default splash on TPUs, cudnn on GPUs, blockwise on CPUs
    context: ContextParallelism = "all_gather"  # how attention crosses mesh.context; ulysses within a node of GPUs
    offload_moments: bool = False  # the optimizer's state waits in the host's memory between updates
    neftune_alpha: float = 0.0  # noise on the embeddings (arXiv 2310.05914); 0 is none
    router_aux_loss_coef: float | None = None  # of a loss that balances experts; by default config.json's, if it
    # has output_router_logits, and else 0

    def __post_init__(self):
        if self.accumulate < 1:
            raise UserError(f"step.accumulate is {self.accumulate}; expected 1 or more")
        if self.neftune_alpha < 0:
            raise UserError(f"step.neftune_alpha is {self.neftune_alpha}; expected 0 (none) or more")
        if (coefficient := self.router_aux_loss_coef) is not None and coefficient < 0:
            raise UserError(f"step.router_aux_loss_coef is {coefficient}; expected 0 (none) or more")

    def balance(self, c: Config) -> float:
        """The coefficient of the loss that balances experts, where training this model adds it; else 0.

        Raises:
          UserError: it is asked for, and the model has no experts.
        """
        coefficient = self.router_aux_loss_coef
        if coefficient and not c.experts:
            raise UserError(
                f"step.router_aux_loss_coef is {coefficient}, but a {c.model_type} has no experts to balance; leave "
                "it out"
            )
        return c.router_aux_loss_coef if coefficient is None else coefficient


@struct.dataclass
class State:
    """All of a run that changes from step to step, apart from its place in the input.

    Leaves are arrays, or what stands in for them while Orbax compares trees: hence no array annotations.
    """

    step: Any  # int32 []
    params: Any  # decoder.Params, or the adapters that are trained in place of them
    opt_state: optax.OptState
    key: Any  # random key [], split by folding in the step
    average: Any = None  # Params: of the weights over the steps, where it is asked for
    usual_norm: Any = None  # float32 []: of gradients (bad_steps.usual_norm), where spikes of it are looked for

    @property
    def result_name(self) -> str:
        """The field that holds the weights which the phase hands on."""
        return "params" if self.average is None else "average"


def new_state(
    params: Any,
    optimizer: optax.GradientTransformation,
    seed: int,
    average: bool = False,
    offload_moments: bool = False,
    spikes: bool = False,
) -> State:
    """The state before the first step; every array is on the mesh, replicated where it is not a weight.

    The average is float32 whatever the weights are: what a step adds to it is smaller still than what it adds to them.
    """
    step, key = sharding.replicate(jnp.zeros((), jnp.int32)), sharding.replicate(jax.random.key(seed))
    opt_state = optim_state.init(optimizer, params, on_host=offload_moments)
    copy = jax.tree.map(lambda w: jnp.array(w, jnp.float32), params) if average else None
    norm = sharding.replicate(jnp.zeros((), jnp.float32)) if spikes else None
    return State(step=step, params=params, opt_state=opt_state, key=key, average=copy, usual_norm=norm)


def abstract_state(
    template: Any,
    optimizer: optax.GradientTransformation,
    dtype: Any,
    average: bool = False,
    offload_moments: bool = False,
    spikes: bool = False,
) -> State:
    """What `new_state` returns for weights of this dtype on the current mesh, without data."""
    params = weights.abstract(template, dtype)
    made = jax.eval_shape(lambda params: new_state(params, optimizer, 0, average, spikes=spikes), params)
    state = weights.on_mesh(made)
    return dataclasses.replace(state, opt_state=optim_state.abstract(optimizer, params, offload_moments))


def check_memory(config: StepConfig, memories: Collection[str]) -> None:
    """Refuses what needs the host's memory where the devices cannot reach it.

    Args:
      memories: the kinds of memory of a device, by jax's names.

    Raises:
      UserError: they lack the host's.
    """
    asked = ["step.offload_moments"] * config.offload_moments
    asked += [f"step.remat {config.remat}"] * config.remat.startswith("offload")
    if asked and HOST_MEMORY not in memories:
        raise UserError(
            f"{' and '.join(asked)}: the host's memory {HOST_MEMORY} was expected, but these devices reach "
            f"{', '.join(sorted(memories))}; keep everything on them"
        )


def loss_sum(
    params: decoder.Params,
    batch: Batch,
    c: Config,
    dtype: Any,
    remat: decoder.Remat,
    noise: Any,
    attention: Attention = REFERENCE,
    matmul_dtype: MatmulDtype = "compute",
) -> Array:
    """Weighted negative log-likelihood of packed rows [B, T], summed over tokens."""
    return loss_sum_and_routing(params, batch, c, dtype, remat, noise, attention, matmul_dtype)[0]


def loss_sum_and_routing(
    params: decoder.Params,
    batch: Batch,
    c: Config,
    dtype: Any,
    remat: decoder.Remat,
    noise: Any,
    attention: Attention,
    matmul_dtype: MatmulDtype,
) -> tuple[Array, Any]:
    """`loss_sum`, and what `decoder.hidden` says of a mixture's routers."""
    rows = batch.tokens, batch.positions, batch.segments
    project = adapting(projection_in(matmul_dtype))
    x, routing = decoder.hidden(params, *rows, c, dtype, remat, noise, attention, project)
    return cross_entropy_sum(x, decoder.head(params), batch.targets, batch.weights, c.logit_cap), routing


def neftune_noise(key: PRNGKeyArray, lengths: Int[Array, "B T"], alpha: float, c: Config, dtype: Any) -> Any:
    """Uniform noise of scale alpha / sqrt(document length x D), as in arXiv 2310.05914, section 2."""
    shape, layout = (*lengths.shape, c.embed), sharding.spec("BTD")
    uniform = jax.random.uniform(key, shape, dtype, -1.0, 1.0, out_sharding=layout)
    shards = jax.sharding.get_abstract_mesh().shape["context"]
    if shards > 1:  # the same noise for a position wherever it stands
        whole = jax.sharding.reshard(uniform, sharding.spec("BSD"))
        uniform = whole.at[:, sharding.row_order(shape[1], shards)].get(out_sharding=layout)
    return uniform * (alpha * jax.lax.rsqrt(jnp.maximum(lengths, 1) * float(c.embed)))[..., None].astype(dtype)


def make_step(
    config: StepConfig,
    attention: Attention,
    c: Config,
    optimizer: optax.GradientTransformation,
    average_decay: float = 0.0,
    lora: LoraConfig | None = None,
    bad: BadStepsConfig = BAD_STEPS,
) -> Callable[..., tuple[State, dict[str, Array]]]:
    """The jitted training step for the current mesh. Batches are [accumulate, B, T]; the old state's memory is reused.

    The loss is the mean over the global batch's weighted tokens: pieces are summed and divided once. What balances
    experts is a product of two means, over a piece's real tokens on all devices: those of the whole batch are known
    only after its last piece, when the gradients of the first are made. So pieces are averaged, by their tokens.

    Args:
      attention: as config asks for it, with the platform's backend where it leaves that open.
      average_decay: of the state's average, where it has one.
      lora: the state's params are adapters; the step takes the model's own weights, which stay, as a third argument.
      bad: which steps are bad, and whether those are taken all the same.
    """
    dtype, balance = jnp.dtype(config.compute_dtype), config.balance(c)

    def piece_loss(
        params: Any, piece: Batch, key: PRNGKeyArray, total: Array, real: Array, frozen: decoder.Params | None
    ) -> tuple[Array, dict[str, Array]]:
        """What is differentiated, and a piece's part of what the step reports; total weight and real tokens of all."""
        alpha = config.neftune_alpha
        noise = neftune_noise(key, piece.lengths, alpha, c, dtype) if alpha else None
        if lora is not None:
            assert frozen is not None
            params = apply(frozen, params, lora, jax.random.fold_in(key, _DROPOUT))
        how = dtype, config.remat, noise, attention, config.matmul_dtype
        loss_of_tokens, routed = loss_sum_and_routing(params, piece, c, *how)
        loss = loss_of_tokens / total
        if routed is None:
            return loss, {"loss": loss}
        uneven, tokens = routing.balance_loss(routed, c)
        uneven *= jnp.sum(piece.segments > 0) / real
        return loss + balance * uneven if balance else loss, {"loss": loss, "router_aux_loss": uneven, _ROUTED: tokens}

    def step(state: State, batch: Batch, frozen: decoder.Params | None = None) -> tuple[State, dict[str, Array]]:
        total = jnp.maximum(jnp.sum(batch.weights), 1e-6)
        real = jnp.maximum(jnp.sum(batch.segments > 0), 1)
        key = jax.random.fold_in(state.key, state.step)
        gradients = jax.grad(piece_loss, has_aux=True)

        def piece(carry: Any, item: tuple[Batch, Array]) -> tuple[Any, None]:
            rows, i = item
            found = gradients(state.params, rows, jax.random.fold_in(key, i), total, real, frozen)
            return jax.tree.map(jnp.add, carry, found), None

        if config.accumulate == 1:
            rows = jax.tree.map(lambda a: a[0], batch)
            grads, said = gradients(state.params, rows, key, total, real, frozen)
        else:
            shapes = {"loss": ()} | ({"router_aux_loss": (), _ROUTED: (c.layers, c.experts)} if c.experts else {})
            nothing = {name: jnp.zeros(shape) for name, shape in shapes.items()}
            zero = (jax.tree.map(lambda w: jnp.zeros_like(w, jnp.float32), state.params), nothing)
            (grads, said), _ = jax.lax.scan(piece, zero, (batch, jnp.arange(config.accumulate)))
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        loss, norm = said["loss"], optax.tree.norm(grads)
        good = bad_steps.is_good(bad, loss, norm, state.usual_norm, state.step)
        accept = good if bad.policy == "skip" else None
        rounding_key = jax.random.fold_in(key, _ROUNDING)
        params, opt_state = optim_state.apply(optimizer, grads, state.opt_state, state.params, rounding_key, accept)
        average = state.average
        if average is not None:  # over all steps so far, until those are as many as the decay remembers
            share = jnp.maximum(1 - average_decay, 1 / (state.step + 1))
            average = optax.incremental_update(params, average, share)
        new = dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state, average=average)
        if c.experts:
            routed = said.pop(_ROUTED)
            said["expert_load_max"] = jnp.max(jnp.max(routed, axis=-1) / jnp.maximum(jnp.mean(routed, axis=-1), 1e-6))
        said |= {"grad_norm": norm, "loss_tokens": total, "good": good}
        if state.usual_norm is not None:
            said["usual_norm"] = state.usual_norm
            new = dataclasses.replace(new, usual_norm=bad_steps.usual_norm(state.usual_norm, norm, good, state.step))
        return new, said

    options = compiler.options(jax.sharding.get_mesh().devices.flat[0])
    return jax.jit(step, donate_argnums=0, compiler_options=options)


def make_heldout_loss(
    config: StepConfig, attention: Attention, c: Config
) -> Callable[[decoder.Params, Batch], tuple[Array, Array]]:
    """The jitted (loss sum, weight sum) of one batch [B, T]; in compute dtype throughout, as the export is used."""
    dtype = jnp.dtype(config.compute_dtype)

    def sums(params: decoder.Params, batch: Batch) -> tuple[Array, Array]:
        return loss_sum(params, batch, c, dtype, "none", None, attention), jnp.sum(batch.weights)

    return jax.jit(sums)


def place(batch: Batch, accumulate: int | None = None) -> Batch:
    """A host batch [rows, T] on the mesh, cut into [accumulate, B, T] if asked; positions as `sharding.row_order`."""
    order = sharding.row_order(batch.tokens.shape[-1], jax.sharding.get_mesh().shape["context"])

    def put(x: Any) -> jax.Array:
        x = x[..., order]
        if accumulate is None:
            return sharding.put(x, "BT")
        return sharding.put(x.reshape(accumulate, -1, x.shape[-1]), "ABT")

    return jax.tree.map(put, batch)
