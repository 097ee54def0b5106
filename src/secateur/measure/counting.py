"""What a model costs, counted by running it: what was packed or rewritten counts as it is."""

from __future__ import annotations

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from secateur._internal.batches import Inputs, call_model
from secateur._internal.state import eval_mode


def counted(model: nn.Module, inputs: Inputs) -> dict[str, int]:
    """Multiply-accumulates of one forward in eval mode, as PyTorch counts them, and parameters (shared ones once)."""
    with eval_mode(model), FlopCounterMode(display=False) as counter:
        call_model(model, inputs)
    return {"macs": counter.get_total_flops() // 2, "params": sum(p.numel() for p in model.parameters())}
