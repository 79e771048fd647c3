"""NATS JetStream: streams, durable consumers pulled by hand, and histories in a KV bucket.

`client` is one connection; `resources` (pure) and `streams` are what `apply` makes; `producer` sends; `lane` pulls,
`vigil` keeps it going, `consumer` hands out and settles; `connection` is the entry, and what operators ask.
`internals` is the only file that leans on the inside of nats-py. No policy: when to retry is worker.policy's.
"""

from orchestrator.brokers.nats.connection import adapter

__all__ = ["adapter"]
