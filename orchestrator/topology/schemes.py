"""Which adapter serves which URL; read by brokers.py here and by orchestrator.brokers.registry."""

from __future__ import annotations

#: URL scheme -> adapter package. "embedded" is NATS; "memory" exists for orchestrator.testing.
SCHEMES = {
    "embedded": "nats",
    "nats": "nats",
    "tls": "nats",
    "kafka": "kafka",
    "redis": "redis",
    "rediss": "redis",
    "redis+sentinel": "redis",
    "redis+cluster": "redis",
    "memory": "memory",
}
