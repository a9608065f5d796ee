"""Packing documents into rows: nothing is lost, nothing runs over, and no document notices its neighbours."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdistill import metrics
from jaxdistill.data import loader, packing, prepared
from jaxdistill.data.dealing import Deal
from jaxdistill.data.loader import PackedSet
from jaxdistill.models import decoder
from jaxdistill.train import step as train_step

LENGTHS = st.lists(st.integers(1, 50), max_size=60)


@given(LENGTHS)
def test_best_fit_places_each_item_once_and_wastes_little(lengths: list[int]):
    rows = packing.best_fit(lengths, 50)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    filled = [sum(lengths[i] for i in row) for row in rows]
    assert all(0 < used <= 50 for used in filled)
    # Best fit opens a row only where nothing else has room: no two rows would go into one
    assert all(a + b > 50 for i, a in enumerate(filled) for b in filled[:i])
    assert len(rows) <= 2 * -(-sum(lengths) // 50), "at most twice what a perfect packing could do with"


@given(LENGTHS)
def test_best_fit_takes_the_fullest_row(lengths: list[int]):
    """Against the definition, written slowly."""
    rows: list[list[int]] = []
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        room = [(50 - sum(lengths[i] for i in row), at) for at, row in enumerate(rows)]
        fitting = [pair for pair in room if pair[0] >= lengths[item]]
        if fitting:
            rows[min(fitting)[1]].append(item)
        else:
            rows.append([item])
    assert packing.best_fit(lengths, 50) == rows


def test_best_fit_refuses_what_is_longer_than_a_row():
    with pytest.raises(ValueError, match="an item of 51 tokens does not fit a row of 50"):
        packing.best_fit([3, 51], 50)


@given(st.lists(st.integers(2, 12), min_size=1, max_size=5))
def test_row_holds_each_document_shifted_by_one(lengths: list[int]):
    documents = tiny.documents(lengths, vocab=96)
    row = packing.make_row(documents, row_tokens=64)
    at = 0
    for segment, d in enumerate(documents, start=1):
        n = len(d.tokens) - 1
        here = slice(at, at + n)
        assert row.tokens[here].tolist() == d.tokens[:-1].tolist()
        assert row.targets[here].tolist() == d.tokens[1:].tolist()
        assert row.positions[here].tolist() == list(range(n))
        assert set(row.segments[here].tolist()) == {segment}
        assert set(row.lengths[here].tolist()) == {n}
        assert row.weights[here].tolist() == d.trained[1:].astype(np.float32).tolist()
        at += n
    assert all(not np.asarray(leaf)[at:].any() for leaf in jax.tree.leaves(row)), "padding is zero and weighs nothing"


def packed_set(folder: Path, count: int) -> PackedSet:
    prepared.write_part(folder / "part", tiny.documents([8 + i % 3 for i in range(count)], vocab=96))
    documents = prepared.Documents([folder / "part"])
    items, stops = loader.row_after_row(packing.best_fit(documents.lengths.tolist(), 10))
    return PackedSet(documents=documents, items=items, stops=stops, row_tokens=10, dropped=[], wrong=[], sha256="")


def test_batches_deal_every_row_once_an_epoch_in_another_order(tmp_path: Path):
    rows = packed_set(tmp_path, 10)
    dealt = list(loader.batches(rows, batch_rows=4, epochs=2, seed=3))
    assert [one.batch.tokens.shape for one in dealt] == [(4, 10)] * 5
    ids = [name for one in dealt for name in one.ids]
    first, second = ids[:10], ids[10:]
    assert sorted(first) == sorted(second) == sorted(d.id for d in rows.documents)
    assert first != second
    other = [name for one in loader.batches(rows, batch_rows=4, epochs=1, seed=4) for name in one.ids]
    assert sorted(other) == sorted(first)
    assert other != first


def test_last_batch_is_filled_with_padding(tmp_path: Path):
    dealt = list(loader.batches(packed_set(tmp_path, 5), batch_rows=4, epochs=1, seed=0))
    last, names = dealt[-1].batch, dealt[-1].ids
    assert last.tokens.shape == (4, 10)
    assert len(names) == 1
    assert not last.weights[1:].any()
    assert not last.segments[1:].any()


@pytest.mark.parametrize("taken", [0, 1, 3, 5])
def test_position_in_the_input_is_restored(taken: int, tmp_path: Path):
    rows = packed_set(tmp_path, 10)
    whole = [one.ids for one in loader.batches(rows, batch_rows=4, epochs=2, seed=3)]
    iterator = loader.batches(rows, batch_rows=4, epochs=2, seed=3)
    for _ in range(taken):
        next(iterator)
    again = loader.batches(rows, batch_rows=4, epochs=2, seed=3)
    again.set_state(iterator.get_state())
    assert [one.ids for one in again] == whole[taken:]


def test_a_process_reads_the_rows_of_its_own_devices(tmp_path: Path):
    rows = packed_set(tmp_path, 10)
    whole = list(loader.batches(rows, batch_rows=4, epochs=1, seed=3))
    for own in ({0, 1}, {2, 3}, {3}):
        for all_, mine in zip(whole, loader.batches(rows, batch_rows=4, epochs=1, seed=3, own=own), strict=True):
            assert (mine.ids, mine.tokens, mine.squares.tolist()) == (all_.ids, all_.tokens, all_.squares.tolist())
            for i in range(4):
                expected = all_.batch.tokens[i] if i in own else np.zeros(10)
                np.testing.assert_array_equal(mine.batch.tokens[i], expected)
    one = whole[0]
    assert one.tokens == np.count_nonzero(one.batch.segments)
    np.testing.assert_allclose(one.squares, one.batch.lengths.sum(-1))


# --- dealing ---------------------------------------------------------------------------------------------------------


def imbalance(deal: Deal, costs: np.ndarray, rows: int) -> float:
    return float(np.mean([metrics.flop_imbalance(costs[step][None]) for step in deal if len(step) == rows]))


@given(st.integers(1, 40), st.integers(1, 7), st.integers(1, 3), st.integers(1, 6), st.integers(0, 9))
def test_deal_gives_every_row_once_an_epoch_near_its_place(count: int, rows: int, epochs: int, window: int, seed: int):
    costs = np.random.default_rng(seed).uniform(size=count)
    deal, plain = (list(Deal(costs, rows, epochs, seed, w)) for w in (window, 1))
    assert [len(step) for step in deal[:-1]] == [rows] * (len(deal) - 1)
    for first in range(0, len(deal), window):  # each window holds what the plain shuffle would deal there
        here = slice(first, first + window)
        assert sorted(np.concatenate(deal[here])) == sorted(np.concatenate(plain[here]))
    stream = np.concatenate(plain)
    for epoch in range(epochs):
        assert sorted(stream[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_rows_of_a_step_cost_alike_and_steps_come_in_random_order():
    costs = np.random.default_rng(0).lognormal(size=4_096)
    found = imbalance(Deal(costs, 64, 1, 0, window=16), costs, 64)
    assert found < 0.5 * imbalance(Deal(costs, 64, 1, 0, window=1), costs, 64)
    means = [costs[step].mean() for step in Deal(costs, 64, 1, 0, window=16)]
    assert 20 < np.sum(np.diff(means) > 0) < 44, "not from cheap to dear"


def test_any_step_can_be_asked_for_first():
    costs = np.arange(100.0)
    whole = list(Deal(costs, 3, 2, 5, window=4))
    for step in (60, 0, 17, -1):
        assert Deal(costs, 3, 2, 5, window=4)[step].tolist() == whole[step].tolist()
    with pytest.raises(IndexError):
        Deal(costs, 3, 2, 5, window=4)[len(whole)]


# --- what the model sees ---------------------------------------------------------------------------------------------

LENGTH = 64  # of a row


@pytest.fixture(scope="module")
def model():
    """(loss sum and gradient of a batch, architecture), on one device in float32."""
    c = tiny.config("qwen2")
    with tiny.mesh(), jax.default_matmul_precision("highest"):
        params = tiny.put(tiny.values(c), c)

        def loss(params: decoder.Params, batch: packing.Batch):
            return train_step.loss_sum(params, batch, c, np.float32, "none", None)

        compiled = jax.jit(jax.value_and_grad(loss))
        yield lambda batch: compiled(params, tiny.place(batch)), c


def alone(d, weight: float = 1.0) -> packing.Batch:
    """A document in a row of its own."""
    return tiny.stack([packing.make_row([d], LENGTH), packing.empty_row(LENGTH)])


def test_packed_row_equals_its_documents_alone(model):
    loss_and_gradient, c = model
    documents = tiny.documents([17, 23, 9, 12], vocab=c.vocab)
    row = packing.make_row(documents, LENGTH)
    each = [loss_and_gradient(alone(d)) for d in documents]
    # One document's loss within the row: the others' targets weigh nothing
    for segment, (expected, gradient) in enumerate(each, start=1):
        weight = np.where(row.segments == segment, row.weights, 0).astype(np.float32)
        only = dataclasses.replace(row, weights=weight)
        loss, found = loss_and_gradient(tiny.stack([only, packing.empty_row(LENGTH)]))
        np.testing.assert_allclose(loss, expected, rtol=2e-6)
        tiny.assert_trees_close(found, gradient, 1e-5)
    loss, found = loss_and_gradient(tiny.stack([packing.empty_row(LENGTH), row]))
    np.testing.assert_allclose(loss, sum(value for value, _ in each), rtol=2e-6)
    tiny.assert_trees_close(found, jax.tree.map(lambda *g: sum(g), *[gradient for _, gradient in each]), 1e-5)


def test_weight_of_a_document_scales_its_loss(model):
    loss_and_gradient, c = model
    light, heavy = (tiny.document("d", 20, c.vocab, weight=weight) for weight in (1.0, 2.5))
    other = tiny.document("o", 30, c.vocab)
    loss, gradient = loss_and_gradient(alone(light))
    scaled, scaled_gradient = loss_and_gradient(alone(heavy))
    np.testing.assert_allclose(scaled, 2.5 * loss, rtol=1e-6)
    tiny.assert_trees_close(scaled_gradient, jax.tree.map(lambda g: 2.5 * g, gradient), 1e-6)
    both, _ = loss_and_gradient(tiny.stack([packing.make_row([heavy, other], LENGTH), packing.empty_row(LENGTH)]))
    np.testing.assert_allclose(both, scaled + loss_and_gradient(alone(other))[0], rtol=2e-6)


def test_prompts_and_padding_carry_no_loss(model):
    loss_and_gradient, c = model
    d = tiny.document("d", 20, c.vocab, prompt=7)
    loss, _ = loss_and_gradient(alone(d))
    batch = alone(d)
    batch.targets[:, :6] = 5  # targets of the prompt: token 7 is the first that is trained
    batch.targets[:, 19:] = 5
    batch.tokens[:, 19:] = 5
    assert loss_and_gradient(batch)[0] == loss


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(2, 40), min_size=1, max_size=4), st.integers(0, 1000))
def test_loss_does_not_depend_on_how_documents_are_packed(model, lengths: list[int], seed: int):
    loss_and_gradient, c = model
    documents = tiny.documents(lengths, c.vocab, seed)
    expected = sum(float(loss_and_gradient(alone(d))[0]) for d in documents)
    fitted = packing.best_fit([packing.positions_used(d) for d in documents], LENGTH)
    rows = [packing.make_row([documents[i] for i in row], LENGTH) for row in fitted]
    rows += [packing.empty_row(LENGTH)] * (len(rows) % 2)
    found = sum(float(loss_and_gradient(tiny.stack(rows[i : i + 2]))[0]) for i in range(0, len(rows), 2))
    np.testing.assert_allclose(found, expected, rtol=5e-6)
