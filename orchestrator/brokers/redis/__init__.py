"""Redis Streams, 6.2 and newer: a channel is a stream, a subscription a consumer group, and whatever must happen
together is one Lua script (docs/adr/0004). Only this package imports redis.
"""

from __future__ import annotations

from orchestrator.brokers.redis.connection import adapter

__all__ = ["adapter"]
