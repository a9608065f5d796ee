"""Between the host's sequences and the devices' arrays, both ways."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from jaxdistill.sample.choose import Counts, Features, Logprobs, Parameters
from jaxdistill.sample.programs import Slots
from jaxdistill.sample.request import STOP_TOKENS, Logprob, SamplingConfig
from jaxdistill.sample.schedule import Sequence
from jaxdistill.sharding import spec

_NEUTRAL = SamplingConfig()


def put(tree: Any) -> Any:
    """Host arrays on the devices of the current mesh, rows split as those of a batch, other dimensions whole."""
    return jax.device_put(tree, jax.sharding.NamedSharding(jax.sharding.get_mesh(), spec("B")))


def features(sequences: Iterable[Sequence]) -> Features:
    """What a step has to do for these."""
    found = Features()
    for request in (sequence.request for sequence in sequences):
        c = request.sampling
        penalties = (c.repetition_penalty, c.presence_penalty, c.frequency_penalty) != (1, 0, 0)
        filters = c.temperature > 0 and (c.top_k > 0 or c.top_p < 1 or c.min_p > 0)
        found |= Features(c.temperature > 0, filters, penalties, request.logprobs)
    return found


def slots(count: int, members: dict[int, Sequence], model_stops: tuple[int, ...], vocab: int, penalties: bool) -> Slots:
    """Slots as their sequences stand before the next token is drawn; rows without one are inactive."""
    settings = [members[row].request.sampling if row in members else _NEUTRAL for row in range(count)]
    parameters = {
        field.name: np.array(
            [getattr(c, field.name) for c in settings], np.int32 if field.name == "top_k" else np.float32
        )
        for field in dataclasses.fields(Parameters)
    }
    token, position, produced, limit, seed = np.zeros((5, count), np.int32)
    active, stops = np.zeros(count, np.bool_), np.full((count, STOP_TOKENS), -1, np.int32)
    prompted, said = np.zeros((2, count, vocab if penalties else 0), np.int32)
    for row, sequence in members.items():
        request = sequence.request
        position[row], produced[row] = len(sequence.context) - 1, len(sequence.said)
        limit[row], seed[row], active[row] = sequence.limit, request.seed, True
        own = (*model_stops, *request.stop_tokens)
        stops[row, : len(own)] = own
        if penalties:
            prompted[row] = np.bincount(request.prompt, minlength=vocab)
            said[row] = np.bincount(np.array(sequence.said, np.int32), minlength=vocab)
    return Slots(
        token=token,
        position=position,
        produced=produced,
        limit=limit,
        active=active,
        seed=seed,
        stops=stops,
        parameters=Parameters(**parameters),
        counts=Counts(prompted=prompted > 0, said=said) if penalties else None,
    )


def logprobs(found: Logprobs, tokens: Iterable[int], rows: Any) -> tuple[Logprob, ...]:
    """Log-probabilities of these tokens, which stand at `rows` of what a call found."""
    chosen, top, names = (np.asarray(x)[rows] for x in (found.chosen, found.top, found.tokens))
    return tuple(
        Logprob(token, float(one), tuple(zip(map(int, ids), map(float, values), strict=True)))
        for token, one, values, ids in zip(tokens, chosen, top, names, strict=True)
    )
