"""A connection whose request does not arrive in time is given up: uvicorn limits idle connections, not slow ones."""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

_TOO_SLOW = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


def limited(headers_s: float) -> type[H11Protocol]:
    """uvicorn's protocol, which answers 408 and closes where a request's headers take longer than so many seconds."""

    class Limited(H11Protocol):
        _limit: asyncio.TimerHandle | None = None  # set while a request's headers are awaited

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._limit = self.loop.call_later(headers_s, self._give_up)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state is not h11.IDLE:
                self._drop_limit()
            elif self._limit is None:  # the beginning of a further request
                self._limit = self.loop.call_later(headers_s, self._give_up)

        def connection_lost(self, exc: Exception | None) -> None:
            self._drop_limit()
            super().connection_lost(exc)

        def _drop_limit(self) -> None:
            if self._limit is not None:
                self._limit.cancel()
                self._limit = None

        def _give_up(self) -> None:
            self._limit = None
            self.transport.write(_TOO_SLOW)
            self.transport.close()

    return Limited
