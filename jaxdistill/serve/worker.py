"""The thread that steps the engine, and the way there and back from the server's event loop."""

import asyncio
import queue
import threading
from collections.abc import Callable, Iterable

import jax

from jaxdistill.sample.engine import Engine
from jaxdistill.sample.request import Event, Request

Deliver = Callable[[Event | None], None]  # None: the engine failed, nothing more will come


class Worker:
    """The only one that touches the engine once it is started; all methods belong to the event loop's thread.

    Args:
      room: requests that may be unfinished at once.
    """

    def __init__(self, engine: Engine, mesh: jax.sharding.Mesh, room: int):
        self.engine, self._mesh, self.room = engine, mesh, room
        self.error: BaseException | None = None  # what the engine raised
        self.failed: Callable[[], None] = lambda: None  # called on the event loop when it does
        self._tell: dict[str, Deliver] = {}  # by id of the unfinished request
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def unfinished(self) -> int:
        """Requests that were submitted and neither finished nor left."""
        return len(self._tell)

    def start(self) -> None:
        """Begins; call it on the event loop that the answers go to."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def close(self) -> None:
        """Ends the thread after the call that is under way."""
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)

    def submit(self, requests: Iterable[Request]) -> "asyncio.Queue[Event | None]":
        """Has requests sampled until they finish or `leave` is called.

        Returns:
          Where their events arrive, None if the engine fails.
        """
        events: asyncio.Queue[Event | None] = asyncio.Queue()
        if self.error:
            events.put_nowait(None)
        for request in requests:
            self._tell[request.id] = events.put_nowait
            self._inbox.put(lambda request=request: self.engine.submit(request))
        return events

    def leave(self, ids: Iterable[str]) -> int:
        """Frees the slots of requests that nobody wants to hear of any more; counts those that were unfinished."""
        unfinished = [id_ for id_ in ids if self._tell.pop(id_, None)]
        for id_ in unfinished:
            self._inbox.put(lambda id_=id_: self.engine.cancel(id_))
        return len(unfinished)

    # --- the engine's thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with jax.set_mesh(self._mesh):
                while self._take_orders():
                    if events := self.engine.step():
                        self._call(lambda events=events: self._hand_over(events))
        except BaseException as error:
            self.error = error
            self._call(self._give_up)

    def _take_orders(self) -> bool:
        """Does what was asked for, waiting while there is nothing to sample; false when it is time to end."""
        while True:
            try:
                order = self._inbox.get(block=not self.engine.busy)
            except queue.Empty:
                return True
            if order is None:
                return False
            order()

    def _call(self, what: Callable[[], None]) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(what)

    # --- back on the event loop --------------------------------------------------------------------------------------

    def _hand_over(self, events: list[Event]) -> None:
        for event in events:
            if tell := self._tell.get(event.id):
                tell(event)
                if event.finish_reason:
                    del self._tell[event.id]

    def _give_up(self) -> None:
        for tell in self._tell.values():
            tell(None)
        self._tell.clear()
        self.failed()
