"""What a model costs, counted by running it: what was packed or rewritten counts as it is."""

from __future__ import annotations

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from secateur.modes import evaluating
from secateur.trace import call_model
from secateur.trace.tracer import Inputs


def counted(model: nn.Module, inputs: Inputs) -> dict[str, int]:
    """Multiply-accumulates of one forward in eval mode, as PyTorch counts them, and parameters (shared ones once)."""
    with evaluating(model), FlopCounterMode(display=False) as counter:
        call_model(model, inputs)
    return {"macs": counter.get_total_flops() // 2, "params": sum(p.numel() for p in model.parameters())}
