"""The engine's thread: what becomes of the calls when the engine fails."""

import asyncio

import jax
import pytest
import tiny

from jaxdistill.errors import RunError
from jaxdistill.sample.engine import Engine, EngineConfig
from jaxdistill.sample.request import Event, Request
from jaxdistill.serve import run
from jaxdistill.serve.app import Server
from jaxdistill.serve.gate import Limits
from jaxdistill.serve.worker import Worker

REQUEST = Request("r", (1, 2))


C = tiny.config("qwen3")


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Worker:
    """Its engine's second step fails, as when a device is lost."""
    with tiny.mesh():
        config = EngineConfig(slots=1, page_tokens=8, compute_dtype="float32")
        engine = Engine(tiny.put(tiny.values(C), C), C, (), positions=8, config=config)
        steps = iter([[Event("r", (5,))]])

        def step() -> list[Event]:
            for events in steps:
                return events
            raise RuntimeError("the device is lost")

        monkeypatch.setattr(engine, "step", step)
        return Worker(engine, jax.sharding.get_mesh(), room=4)


def test_every_call_hears_of_a_failure(faulty: Worker):
    async def calls() -> None:
        failed = asyncio.Event()
        faulty.failed = failed.set
        faulty.start()
        events = faulty.submit([REQUEST])
        assert await events.get() == Event("r", (5,))
        assert await events.get() is None
        await failed.wait()
        assert isinstance(faulty.error, RuntimeError)
        assert faulty.unfinished == 0
        assert await faulty.submit([Request("later", (1,))]).get() is None
        await faulty.close()

    asyncio.run(calls())


def test_the_command_ends_with_the_failure(faulty: Worker):
    """Before anything is asked: the engine fails by itself, and the server, which has nothing to finish, ends."""
    faulty.engine.submit(REQUEST)
    with (
        run.listen("127.0.0.1", 0) as listener,
        pytest.raises(RunError, match="the engine failed: RuntimeError: the dev"),
    ):
        run.serve(Server(faulty, None, "m", "f", Limits()), listener, drain_s=5)
