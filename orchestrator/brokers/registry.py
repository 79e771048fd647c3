"""Finds the adapter of a broker, importing its client library only when it is asked for."""

from __future__ import annotations

import importlib
from typing import cast

from orchestrator.brokers.base import Adapter
from orchestrator.errors import OrchestratorError
from orchestrator.topology.schemes import SCHEMES

__all__ = ["SCHEMES", "adapter"]

_EXTRAS = {"kafka": "confluent_kafka", "redis": "redis"}


def adapter(kind: str) -> Adapter:
    """The adapter for `kind` (nats, kafka, redis, memory).

    Raises OrchestratorError when the client library of an extra is not installed.
    """
    try:
        module = importlib.import_module(f"orchestrator.brokers.{kind}")
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] == _EXTRAS.get(kind):
            raise OrchestratorError(
                f"the client library for {kind} is not installed ({error.name})",
                hint=f"pip install 'orchestrator[{kind}]'",
            ) from None
        raise
    return cast(Adapter, module.adapter)
