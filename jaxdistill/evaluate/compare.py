"""Two models on the same problems with the same seeds: who is better, by how much, and whether chance explains it."""

import dataclasses
from collections.abc import Sequence

from jaxdistill.evaluate.grade import by_item, points
from jaxdistill.evaluate.results import Result
from jaxdistill.evaluate.statistics import PairedDifference, PairedTest, mcnemar, paired_difference


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """The second model less the first; samples are paired by problem and index, that is by seed."""

    first: str
    second: str
    difference: PairedDifference  # of avg@n
    solved: PairedTest  # problems of which more than half of the samples are right
    gained: int  # samples that only the second has right; of ratings: that it has higher
    lost: int  # that only the first has right, or higher
    both: int  # both right; of ratings: rated alike
    neither: int
    verdict: str  # all of it in a sentence


def compare(first: Result, second: Result, seed: int = 0) -> Comparison:
    """Compares two results on the problems that both have.

    Raises:
      ValueError: they share no problem, or not its number of samples.
    """
    one, two = (by_item(r.completions, r.scores) for r in (first, second))
    worth = [[[points(score) for _, score in own[item]] for item in one if item in two] for own in (one, two)]
    rated = first.scores[0].verdict.label == "rated" or second.scores[0].verdict.label == "rated"
    shares = [[sum(samples) / len(samples) for samples in own] for own in worth]
    difference = paired_difference(*shares, seed=seed)
    if rated:
        solved = mcnemar(*([a > b for a, b in zip(x, y, strict=True)] for x, y in (shares, shares[::-1])))
    else:
        solved = mcnemar(*([share > 0.5 for share in own] for own in shares))
    pairs = [pair for a, b in zip(*worth, strict=True) for pair in zip(a, b, strict=True)]
    return Comparison(
        first=first.name,
        second=second.name,
        difference=difference,
        solved=solved,
        gained=sum(b > a for a, b in pairs),
        lost=sum(a > b for a, b in pairs),
        both=sum(a == b and (rated or a == 1) for a, b in pairs),
        neither=sum(a == b == 0 and not rated for a, b in pairs),
        verdict=_sentence(first.name, second.name, difference, solved, rated),
    )


def _sentence(first: str, second: str, difference: PairedDifference, solved: PairedTest, rated: bool) -> str:
    words = ("rated higher", "lower (sign test") if rated else ("newly solved", "no longer (McNemar")
    change = f"{second} against {first}: {difference}; {solved.second_only} problems {words[0]}, "
    change += f"{solved.first_only} {words[1]} p = {solved.p_value:.2g}): "
    if not difference.in_noise:
        return change + f"{second} is {'better' if difference.value > 0 else 'worse'} by more than chance explains."
    width = 50 * (difference.high - difference.low)
    return change + (
        f"inside the noise. With these {difference.n_problems} problems a difference under about {width:.1f} points "
        "cannot be told from chance; take more problems or more samples."
    )


def compare_all(results: Sequence[Result], seed: int = 0) -> list[Comparison]:
    """Every model against the first under the same budget, and its budgets against none.

    Results without a problem in common are left out.
    """
    found = []
    for other in results[1:]:
        alike = next(result for result in results if result.plan.budget == other.plan.budget)
        own = next(result for result in results if result.plan.source == other.plan.source)
        base = own if alike is other else alike
        if {c.item_id for c in base.completions} & {c.item_id for c in other.completions}:
            found.append(compare(base, other, seed))
    return found
