"""Networks of other packages by name, where these are installed: ``torchvision:``, ``timm:`` and ``hf:``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from secateur._internal.errors import SecateurError
from secateur._internal.importing import package


def _torchvision(name: str, **options: Any) -> Any:
    return _package("torchvision").models.get_model(name, **options)


def _timm(name: str, **options: Any) -> Any:
    return _package("timm").create_model(name, **options)


def _hf(name: str, **options: Any) -> Any:
    """The class that the configuration names, with its weights; else the model without a head."""
    transformers = _package("transformers")
    config = transformers.AutoConfig.from_pretrained(name)
    kind = next(iter(getattr(config, "architectures", None) or ()), "AutoModel")
    return getattr(transformers, kind, transformers.AutoModel).from_pretrained(name, **options)


SOURCES: dict[str, Callable[..., Any]] = {"torchvision": _torchvision, "timm": _timm, "hf": _hf}
"""What comes before the colon, and what makes the network of the name behind it."""


def is_elsewhere(name: str) -> bool:
    """Whether a name is one of another package's networks."""
    source, colon, rest = name.partition(":")
    return bool(colon and rest) and source in SOURCES


def build(name: str, **options: Any) -> nn.Module:
    """A network of another package.

    Args:
        name: ``torchvision:resnet18``, ``timm:resnet18``, ``hf:PATH_OR_NAME``.
        options: keyword arguments of what makes it there.

    Raises:
        SecateurError: the package is not here, or does not make it.
    """
    source, _, own = name.partition(":")
    try:
        model = SOURCES[source](own, **options)
    except SecateurError:
        raise
    except Exception as error:  # whatever another package raises
        first = next(iter(str(error).strip().splitlines()), "no reason given")
        raise SecateurError(f"model {name!r}: {source} does not make it ({type(error).__name__}: {first})") from error
    if not isinstance(model, nn.Module):
        raise SecateurError(f"model {name!r}: {source} made a {type(model).__name__}, not an nn.Module")
    return model


def _package(name: str) -> Any:
    return package(name, f"a model of {name}")
