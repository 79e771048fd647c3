"""NATS JetStream: streams, durable consumers pulled by hand, and histories in a KV bucket.

`internals` is the only file that leans on the inside of nats-py. No policy: when to retry is worker.policy's.
"""

from orchestrator.brokers.nats.connection import adapter

__all__ = ["adapter"]
