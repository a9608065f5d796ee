"""Many clients at once, some of which leave: every call is answered or refused with a 429, and memory stays flat."""

import asyncio
import collections
import random
import time
from pathlib import Path

import httpx2
import pytest
from test_serve import HEADERS, QUESTION, metric, model, serving, wait_until_idle

__all__ = ["model"]  # a fixture


def memory_bytes(pid: int) -> int:
    """Resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


async def load(url: str, clients: int, seconds: float, seed: int) -> collections.Counter[str]:
    """What became of the calls that this many clients make in this time, each one call after the other."""
    found: collections.Counter[str] = collections.Counter()
    end = time.monotonic() + seconds

    async def one(http: httpx2.AsyncClient, chance: random.Random) -> None:
        body = {
            "model": "tiny",
            "messages": QUESTION,
            "max_tokens": chance.randint(1, 60),
            "seed": chance.getrandbits(31),
        }
        body["stream"] = chance.random() < 0.5
        leaves = body["stream"] and chance.random() < 0.2
        async with http.stream("POST", f"{url}/chat/completions", json=body, headers=HEADERS) as response:
            if response.status_code != 200:
                found[str(response.status_code)] += 1
                await response.aread()
                await asyncio.sleep(0.2 + chance.random())
                return
            if leaves:
                async for _ in response.aiter_bytes():
                    break
                found["left"] += 1
                return
            text = (await response.aread()).decode()
        whole = text.endswith("data: [DONE]\n\n") if body["stream"] else '"usage"' in text
        found["answered" if whole else f"torn: {text[-200:]}"] += 1

    async def client(http: httpx2.AsyncClient, number: int) -> None:
        chance = random.Random(f"{seed}/{number}")
        while time.monotonic() < end:
            await one(http, chance)

    async with httpx2.AsyncClient(timeout=300, limits=httpx2.Limits(max_connections=None)) as http:
        await asyncio.gather(*(client(http, number) for number in range(clients)))
    return found


@pytest.mark.soak
def test_nothing_is_lost_under_load(model: Path, tmp_path: Path, full_size: bool):
    clients, seconds = (1000, 300.0) if full_size else (150, 20.0)
    with serving(model, tmp_path / "errors", queue=clients // 4) as (url, process):
        first = asyncio.run(load(url, clients, seconds / 5, seed=0))
        before = memory_bytes(process.pid)
        found = first + asyncio.run(load(url, clients, seconds, seed=1))
        print(dict(found))
        assert set(found) <= {"answered", "left", "429"}
        assert found["answered"] > clients / 10
        assert found["429"] > 0
        assert found["left"] > 0
        wait_until_idle(url)
        assert metric(url, "unfinished_samples") == 0
        assert memory_bytes(process.pid) < before * 1.05 + (64 << 20)
    assert "Traceback" not in (tmp_path / "errors").read_text()
