"""Which channels live and die together: one look at a model's forward names every position of every tensor."""

from __future__ import annotations

from secateur.trace.api import trace
from secateur.trace.graph import Axis, ChannelGraph, ChannelGroup, Frozen, fingerprint
from secateur.trace.tracer import call_model

__all__ = ["Axis", "ChannelGraph", "ChannelGroup", "Frozen", "call_model", "fingerprint", "trace"]
