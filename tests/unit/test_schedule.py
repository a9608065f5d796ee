"""Pages and slots: nothing is held twice or lost, prompts are shared by what they hold, the youngest gives way."""

import collections

import numpy as np
import pytest

from jaxdistill.sample.pages import Pool, prompt_keys
from jaxdistill.sample.request import Request, SamplingConfig
from jaxdistill.sample.schedule import Scheduler, Sequence, Shape

PAGE = 4


def request(name: str, prompt: list[int], tokens: int) -> Request:
    return Request(name, tuple(prompt), SamplingConfig(max_new_tokens=tokens))


def test_keys_name_whole_pages_by_all_that_precedes_them():
    keys = prompt_keys([1, 2, 3, 4, 5, 6, 7, 8, 9], PAGE)
    assert len(keys) == 2
    assert prompt_keys([1, 2, 3, 4, 5, 6, 7, 0], PAGE) == [keys[0], prompt_keys([1, 2, 3, 4, 5, 6, 7, 0], PAGE)[1]]
    assert keys[1] not in prompt_keys([0, 2, 3, 4, 5, 6, 7, 8], PAGE)


def test_pages_that_nobody_holds_are_found_until_their_room_is_needed():
    pool = Pool(3, PAGE)
    old, new = b"old", b"new"
    first, second = pool.take(2) or []
    pool.publish(old, first)
    pool.publish(new, second)
    pool.release([first])
    pool.release([second])
    assert pool.available == 3
    assert pool.share([new, b"other", old]) == [second], "as many in a row as there are"
    pool.release([second])
    taken = pool.take(2)
    assert taken is not None
    assert pool.share([old]) == [], "the page that was idle longest went first"
    assert pool.share([new]) == [second]
    assert pool.take(1) is None
    pool.release([*taken, second])
    assert pool.available == 3


def test_a_held_page_outlives_one_of_its_holders():
    pool = Pool(1, PAGE)
    [page] = pool.take(1) or []
    pool.publish(b"key", page)
    assert pool.share([b"key"]) == [page]
    pool.release([page])
    assert pool.available == 0
    pool.release([page])
    assert pool.available == 1


def read_all(schedule: Scheduler, sequence: Sequence) -> None:
    """As the engine does it: the context is read, and one token is drawn and read."""
    schedule.read(sequence, len(sequence.context) - sequence.filled)
    sequence.decoding = True
    sequence.said.append(7)


def test_samples_hold_the_whole_pages_of_their_prompt_together():
    schedule = Scheduler(Shape(slots=3, positions=32, page_tokens=PAGE, pages=20))
    prompt = list(range(10))
    for i in range(3):
        schedule.add(request(f"{i}", prompt, 5))
    sequences = []
    for _ in range(3):
        sequence = schedule.admit(0)
        assert sequence is not None
        assert sequence.filled == (8 if sequences else 0), "what others read need not be read again"
        read_all(schedule, sequence)
        sequences.append(sequence)
    assert schedule.pools[0].available == 20 - 2 - 3, "two pages together, one of each one's own"
    for sequence in sequences:
        schedule.leave(sequence)
    assert schedule.pools[0].available == 20


def test_the_youngest_gives_way_and_goes_on_where_it_was():
    schedule = Scheduler(Shape(slots=3, positions=20, page_tokens=PAGE, pages=5))
    for i in range(3):
        schedule.add(request(f"{i}", [i] * 4, 16))
    old, young = schedule.admit(0), schedule.admit(0)
    assert old is not None
    assert young is not None
    assert schedule.admit(0) is not None
    late = schedule.running()[-1]
    for sequence in (old, young, late):
        read_all(schedule, sequence)
    assert not schedule.reserve(8, preempt=False)
    assert schedule.reserve(8, preempt=True)
    assert schedule.running() == [old]
    assert schedule.preemptions == 2
    assert [s.request.id for s in schedule.waiting] == ["1", "2"], "in the order of their arrival"
    assert young.said == [7]
    assert schedule.admit(0) is None, "no room, and no turning to those who came later"
    schedule.leave(old)
    assert schedule.admit(0) is young


def test_a_request_that_cannot_grow_keeps_no_room_to_grow_into():
    schedule = Scheduler(Shape(slots=3, positions=4 * PAGE, page_tokens=PAGE, pages=9))
    for i in range(3):
        schedule.add(request(f"{i}", [i] * (3 * PAGE + 1), 1 if i == 2 else PAGE))
    assert schedule.admit(0) is not None
    assert schedule.admit(0) is not None, "the first has all pages that it can fill"
    assert schedule.admit(0) is None


@pytest.mark.parametrize("seed", range(6))
def test_every_request_ends_whatever_happens(seed: int):
    """Random prompts, some of them the same, lengths and cancellations, on two shards with too few pages."""
    random = np.random.default_rng(seed)
    shape = Shape(slots=8, positions=40, page_tokens=PAGE, pages=14, shards=2)
    schedule = Scheduler(shape)
    prompts = [random.integers(0, 9, random.integers(1, 20)).tolist() for _ in range(5)]
    left = {f"{i}": schedule.add(request(f"{i}", prompts[i % 5], int(random.integers(1, 25)))) for i in range(40)}
    for _ in range(2_000):
        if not left:
            break
        for shard in range(2):
            while sequence := schedule.admit(shard):
                read_all(schedule, sequence)
        oldest = min(schedule.running(), key=lambda s: s.arrival)
        schedule.reserve(3, preempt=True)
        assert oldest.slot is not None, "the oldest never gives way"
        check(schedule)
        for sequence in schedule.running():
            sequence.said += [7] * min(3, sequence.left)
            if not sequence.left or random.random() < 0.02:
                schedule.leave(sequence)
                del left[sequence.request.id]
    assert not left
    assert schedule.preemptions > 0
    assert [pool.available for pool in schedule.pools] == [14, 14]


def check(schedule: Scheduler) -> None:
    """A page of two sequences holds the same whole page of the same prompt; each has the pages its next steps fill."""
    for shard in range(2):
        holders = collections.defaultdict(list)
        for sequence in schedule.running(shard):
            assert sequence.slot is not None
            assert list(schedule.tables[sequence.slot, : len(sequence.pages)]) == sequence.pages
            assert len(sequence.pages) * PAGE >= len(sequence.context) + min(3, sequence.left) - 1
            for number, page in enumerate(sequence.pages):
                holders[page].append((number, sequence.request.prompt[: (number + 1) * PAGE]))
        for found in holders.values():
            assert len(found) == 1 or (len(set(found)) == 1 and len(found[0][1]) == (found[0][0] + 1) * PAGE)
