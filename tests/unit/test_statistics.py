"""Estimates against brute force, closed forms and scipy."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from jaxdistill.evaluate.statistics import (
    avg_at_n,
    best_of_k,
    estimate,
    maj_at_k,
    mcnemar,
    paired_difference,
    pass_at_k,
)


def test_one_sample_a_problem_gives_wilson() -> None:
    """The paper's headline 13/30 has the interval 27.4-60.8%."""
    result = avg_at_n([[True]] * 13 + [[False]] * 17)
    assert (result.value, result.n_problems, result.n_samples) == (13 / 30, 30, 30)
    assert (round(result.low, 3), round(result.high, 3)) == (0.274, 0.608)
    assert str(result) == "43.3% [27.4, 60.8]"


def test_several_samples_give_a_bootstrap_over_problems() -> None:
    """Half the problems always solved, half never, 10 samples each: as wide as 40 samples, not as 400."""
    clustered = avg_at_n([[True] * 9 + [False]] * 20 + [[False] * 9 + [True]] * 20)
    assert clustered.value == pytest.approx(0.5)
    half_width = 1.96 * 0.4 / math.sqrt(40)
    assert clustered.high - clustered.low == pytest.approx(2 * half_width, rel=0.1)
    assert clustered == avg_at_n([[True] * 9 + [False]] * 20 + [[False] * 9 + [True]] * 20)  # fixed seed


def test_the_bootstrap_agrees_with_scipy() -> None:
    values = np.random.default_rng(1).beta(0.5, 1.0, size=50)
    ours = estimate(list(values), 50)
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.01)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("problems", [1, 7])
def test_no_spread_is_not_certainty(share: float, problems: int) -> None:
    result = estimate([share] * problems, 10 * problems)
    assert result.low <= result.value <= result.high
    assert result.high - result.low > 0.3


def test_the_interval_covers_the_truth_about_95_times_in_100() -> None:
    random = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        chance = random.beta(1, 2, size=60)
        result = avg_at_n([list(map(bool, random.random(4) < p)) for p in chance])
        hits += result.low <= 1 / 3 <= result.high
    assert 180 <= hits <= 199


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.data())
def test_pass_at_k_is_the_mean_over_all_subsets(samples: list[bool], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(samples)))
    subsets = list(itertools.combinations(samples, k))
    assert pass_at_k([samples], k).value == pytest.approx(sum(map(any, subsets)) / len(subsets))


def _plurality(subset: tuple[str | None, ...], ties: str) -> float:
    counts = Counter(answer for answer in subset if answer is not None)
    best = [answer for answer, count in counts.items() if count == max(counts.values())]
    return (1 / len(best) if ties == "expected" or len(best) == 1 else 0.0) if "right" in best else 0.0


@pytest.mark.parametrize("ties", ["expected", "strict"])
@given(samples=st.lists(st.sampled_from(["right", "a", "b", "c", None]), min_size=1, max_size=8), data=st.data())
def test_maj_at_k_is_the_mean_over_all_subsets(ties, samples: list[str | None], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(samples)))
    subsets = list(itertools.combinations(samples, k))
    expected = sum(_plurality(subset, ties) for subset in subsets) / len(subsets)
    assert maj_at_k([samples], ["right"], k, ties=ties).value == pytest.approx(expected)


def test_maj_at_k_of_many_samples_is_cheap_and_exact() -> None:
    """64 samples of distinct wrong answers: with k = 1 the share of right ones; with k = n the right class wins."""
    samples = ["right"] * 4 + [str(i) for i in range(60)]
    assert maj_at_k([samples], ["right"], 1).value == pytest.approx(4 / 64)
    assert maj_at_k([samples], ["right"], 64).value == 1
    assert 4 / 64 < maj_at_k([samples], ["right"], 32).value < 1


def test_mcnemar_gives_the_published_p_values() -> None:
    """WildSafety of the paper: 18 changes one way and 7 back, p = 0.043; Flames 5 and 8, p = 0.58."""
    for first_only, second_only, p_value in [(18, 7, 0.043), (5, 8, 0.58)]:
        first = [True] * first_only + [False] * second_only + [True, False]
        second = [False] * first_only + [True] * second_only + [True, False]
        result = mcnemar(first, second)
        assert (result.first_only, result.second_only) == (first_only, second_only)
        assert result.p_value == pytest.approx(p_value, abs=0.005)
    assert mcnemar([True], [True]).p_value == 1


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3)), min_size=1, max_size=7), st.data())
def test_best_of_k_is_the_mean_over_all_subsets(samples: list[tuple[bool, int]], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(samples)))

    def best(subset: tuple[tuple[bool, int], ...]) -> float:
        group = [ok for ok, score in subset if score == max(score for _, score in subset)]
        return sum(group) / len(group)

    subsets = list(itertools.combinations(samples, k))
    expected = sum(map(best, subsets)) / len(subsets)
    right, scores = zip(*samples, strict=True)
    assert best_of_k([right], [list(map(float, scores))], k).value == pytest.approx(expected)


def test_a_paired_difference_of_single_samples_has_mcnemars_p() -> None:
    first, second = [1.0] * 18 + [0.0] * 7 + [1.0] * 40, [0.0] * 18 + [1.0] * 7 + [1.0] * 40
    found = paired_difference(first, second)
    solved = mcnemar([x > 0.5 for x in first], [x > 0.5 for x in second])
    assert found.p_value == solved.p_value
    assert found.value == pytest.approx(-11 / 65)
    assert found.low < found.value < found.high < 0
    assert not found.in_noise
    assert str(found).startswith("-16.9 points [")


def test_pairing_sees_what_two_intervals_hide() -> None:
    """Every problem a little better: far inside each model's own interval, and still no chance."""
    random = np.random.default_rng(0)
    hardness = random.random(40) * 0.8
    better = hardness + 0.05 + 0.1 * random.random(40)
    found = paired_difference(list(hardness), list(better))
    assert found.low > 0.05
    assert found.p_value < 0.001
    alone = [estimate(list(values), 40) for values in (hardness, better)]
    assert alone[0].high > alone[1].low


def test_the_paired_interval_covers_the_truth_about_95_times_in_100() -> None:
    random, hits, false_alarms = np.random.default_rng(0), 0, 0
    for _ in range(100):
        chance = random.beta(1, 2, size=50)
        first, second = [(random.random((50, 4)) < chance[:, None]).mean(axis=1).tolist() for _ in range(2)]
        found = paired_difference(first, second)
        hits += found.low <= 0 <= found.high
        false_alarms += not found.in_noise
    assert 88 <= hits <= 100
    assert false_alarms <= 10


def test_equal_results_are_no_certainty() -> None:
    same = paired_difference([1.0, 0.0] * 5, [1.0, 0.0] * 5)
    assert (same.value, same.p_value, same.in_noise) == (0, 1, True)
    assert same.low < -0.2
    assert same.high > 0.2
    two = paired_difference([0.0, 0.0], [1.0, 1.0])  # both better, which two coins do one time in two
    assert two.p_value == 0.5
    assert two.in_noise
    with pytest.raises(ValueError, match="expected as many of both"):
        paired_difference([1.0], [])


def test_bad_k_and_no_problems_are_refused() -> None:
    with pytest.raises(ValueError, match="k is 3, but the problem with the fewest samples has 2"):
        pass_at_k([[True, False], [True, False, True]], 3)
    with pytest.raises(ValueError, match="expected 1 <= k"):
        avg_at_n([])
    with pytest.raises(ValueError, match="no problems"):
        estimate([], 0)
