"""How many requests a cache of pages decodes at once, against one that keeps room for the longest answer of each.

    .venv/bin/python benchmarks/concurrency.py

AIME: 30 problems x 64 samples; prompts of 80 to 300 tokens, outputs lognormal between 1k and 32k. The scheduler is the
engine's own; only the model is left out, so that a step takes no time and every request says as many tokens as drawn
for it. Concurrency is the mean number of decoding requests over the steps in which requests wait: the end of a run,
where slots stay empty for want of requests, tells nothing about the cache. Both caches hold the same positions.
"""

import dataclasses
import sys

import numpy as np

from jaxdistill.sample.request import Request, SamplingConfig
from jaxdistill.sample.schedule import Scheduler, Sequence, Shape

PROBLEMS, SAMPLES = 30, 64
LONGEST, PAGE, STEPS = 32_768, 128, 16
CACHES = (8, 16, 32)  # requests of the longest kind that the cache holds


@dataclasses.dataclass(frozen=True)
class Result:
    """One run through the workload."""

    concurrency: float  # mean
    steps: int
    preemptions: int
    read_again: float  # context tokens that preempted requests read again, over all output tokens


def workload(seed: int) -> list[tuple[Request, int]]:
    """Requests, and how many tokens each will say."""
    random = np.random.default_rng(seed)
    requests = []
    for problem in range(PROBLEMS):
        prompt = tuple(random.integers(0, 1 << 17, random.integers(80, 300)).tolist())
        outputs = np.exp(random.normal(np.log(7_000), 0.8, SAMPLES)).clip(1_000, LONGEST - 300).astype(int)
        for sample, output in enumerate(outputs):
            sampling = SamplingConfig(temperature=0.6, max_new_tokens=LONGEST)
            requests.append((Request(f"{problem}/{sample}", prompt, sampling, seed=sample), int(output)))
    return requests


def run(shape: Shape, requests: list[tuple[Request, int]]) -> Result:
    """Decodes the workload as the engine does, STEPS tokens a call."""
    schedule, lengths = Scheduler(shape), {request.id: length for request, length in requests}
    for request, _ in requests:
        schedule.add(request)
    decoding, calls, waiting_calls, read_again = 0, 0, 0, 0

    def over(sequence: Sequence) -> bool:
        return len(sequence.said) >= lengths[sequence.request.id]

    while schedule.waiting or schedule.running():
        while sequence := schedule.admit(0):
            read_again += len(sequence.context) - sequence.filled if sequence.said else 0
            schedule.read(sequence, len(sequence.context) - sequence.filled)
            sequence.decoding = True
            sequence.said.append(0)
        schedule.reserve(STEPS, preempt=True)
        running = schedule.running()
        calls += 1
        if schedule.waiting:
            waiting_calls += 1
            decoding += len(running)
        for sequence in running:
            sequence.said += [0] * min(STEPS, lengths[sequence.request.id] - len(sequence.said))
            if over(sequence):
                schedule.leave(sequence)
    return Result(
        decoding / waiting_calls,
        calls * STEPS,
        schedule.preemptions,
        read_again / sum(length for _, length in requests),
    )


def main() -> None:
    """Prints a table."""
    requests = workload(seed=0)
    total = sum(length for _, length in requests)
    print(f"{len(requests)} requests, {total:,} output tokens, mean {total / len(requests):,.0f}; pages of {PAGE}")
    print("| cache, positions | contiguous | paged | ratio | steps | preemptions | read again |")
    print("|---|---|---|---|---|---|---|")
    worst = np.inf
    for contiguous in CACHES:
        positions = contiguous * LONGEST
        shape = Shape(slots=1024, positions=LONGEST, page_tokens=PAGE, pages=positions // PAGE)
        found = run(shape, requests)
        ratio = found.concurrency / contiguous
        worst = min(worst, ratio)
        print(
            f"| {positions:,} | {contiguous} | {found.concurrency:.1f} | {ratio:.2f} | {found.steps:,} | "
            f"{found.preemptions} | {found.read_again:.1%} |"
        )
    print("ratio = mean requests decoding while others wait / requests of the longest kind that the positions hold")
    if worst < 3:
        sys.exit(f"the smallest ratio is {worst:.2f}; expected 3 or more")


if __name__ == "__main__":
    main()
