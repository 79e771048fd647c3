"""NATS JetStream: streams, durable consumers pulled by hand, histories in a KV bucket, and the embedded server.

`internals` is the only file that leans on the inside of nats-py. No policy: when to retry is worker.policy's.
"""

from orchestrator.brokers.nats.connection import adapter

__all__ = ["adapter"]
