"""Kaiming initialisation (arXiv 1502.01852), once for all built-in networks."""

from __future__ import annotations

from torch import nn


def kaiming(model: nn.Module) -> nn.Module:
    """Initialise convolutions (fan out) and linear layers (fan in) for ReLU, biases to 0; return the model."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    return model
