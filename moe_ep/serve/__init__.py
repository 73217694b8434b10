"""Serving: an engine that completes requests, and generation from a checkpoint."""

from moe_ep.serve.engine import Engine, EngineStatistics
from moe_ep.serve.request import Completion, QueueFull, Refused, Request, Update
from moe_ep.serve.size import EngineSize

__all__ = ["Completion", "Engine", "EngineSize", "EngineStatistics", "QueueFull", "Refused", "Request", "Update"]
