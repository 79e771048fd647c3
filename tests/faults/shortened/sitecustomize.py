"""Found first on PYTHONPATH by the processes of one test: leases of SHORT_LEASE seconds, so that one can run out."""

import os

import orchestrator.brokers.nats.resources as nats

nats.ACK_WAIT = float(os.environ["SHORT_LEASE"])  # before anything takes it from there

import orchestrator.brokers.redis.consumer as redis  # noqa: E402

redis.LEASE = float(os.environ["SHORT_LEASE"])
