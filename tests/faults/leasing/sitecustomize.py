"""Found first on PYTHONPATH by the processes of one test: leases of LEASE seconds, that run out soon or not at all."""

import os

import orchestrator.brokers.nats.resources as nats

nats.ACK_WAIT = float(os.environ["LEASE"])  # before anything takes it from there

import orchestrator.brokers.redis.consumer as redis  # noqa: E402

redis.LEASE = float(os.environ["LEASE"])
