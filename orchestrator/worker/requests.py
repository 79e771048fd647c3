"""Request and reply: sends a message with `reply-to` and waits for the answer. Used by handlers and by Client."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from orchestrator.brokers.base import Connection, Outgoing
from orchestrator.errors import DecodeError, RequestTimeout
from orchestrator.event import AgentEvent


class Requests:
    """The open requests of one process. `connect` gives the connection to a broker by its name in the topology; the
    reply inbox on it is opened with the first request."""

    def __init__(self, connect: Callable[[str], Awaitable[Connection]]) -> None:
        self._connect = connect
        self._inboxes: dict[str, asyncio.Future[str]] = {}
        self._open: dict[str, tuple[str, asyncio.Future[AgentEvent]]] = {}  # event id -> correlation id, answer

    async def call(self, message: Outgoing, timeout: float) -> AgentEvent:
        """Raises RequestTimeout after `timeout` seconds, PublishRejected when the broker refuses the request."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[AgentEvent] = loop.create_future()

        def sent(error: BaseException | None) -> None:
            if error is not None and not answer.done():
                answer.set_exception(error)

        try:
            async with asyncio.timeout(timeout):
                connection = await self._connect(message.channel.broker)
                message.headers["reply-to"] = await self._inbox(message.channel.broker, connection)
                self._open[message.event_id] = (message.correlation_id, answer)
                producer = connection.producer()
                if not producer.ready:
                    await producer.wait_ready()
                producer.send(message, sent)
                return await answer
        except TimeoutError:
            raise RequestTimeout(
                f"no reply to {message.event_type} ({message.event_id}) within {timeout:g} s",
                hint="is an agent that reads this type running? `orchestrator status` says; or give a longer timeout",
            ) from None
        finally:
            self._open.pop(message.event_id, None)

    async def _inbox(self, broker: str, connection: Connection) -> str:
        """Opened once for each broker, however many ask at the same time."""
        opening = self._inboxes.get(broker)
        if opening is None:
            opening = self._inboxes[broker] = asyncio.ensure_future(connection.replies(self._receive))
        try:
            return await asyncio.shield(opening)
        except BaseException:
            if opening.done():
                self._inboxes.pop(broker, None)
            raise

    def _receive(self, body: bytes, headers: Mapping[str, str]) -> None:
        """Finds whose answer this is: by the request's id, which replies of ours name, else by the correlation id."""
        try:
            event = AgentEvent.from_bytes(body, event_type="reply", correlation_id=headers.get("correlation-id"))
        except DecodeError:
            return  # not an answer to anything: the asker's timeout says the rest
        found = self._open.get(str(event.metadata.get("causation_id")))
        if found is None:
            same = [entry for entry in self._open.values() if entry[0] == event.correlation_id]
            found = same[0] if len(same) == 1 else None
        if found is not None and not found[1].done():
            found[1].set_result(event)
