"""Models by name: built-in ones, and a user's own as ``package.module:factory``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from secateur._internal import built_in
from secateur._internal import importing as factory
from secateur._internal.errors import SecateurError, unknown
from secateur.lab.models import elsewhere, resnet, small, transformer, vgg


@dataclass(frozen=True)
class Entry:
    """A built-in network.

    Attributes:
        make: builds it; keyword arguments are the model's options.
        image: channels, height and width of the images it was made for.
    """

    make: Callable[..., nn.Module]
    image: tuple[int, int, int]


MODELS: dict[str, Entry] = {
    "lenet_300_100": Entry(small.lenet_300_100, (1, 28, 28)),
    "lenet5": Entry(small.lenet5, (1, 28, 28)),
    "digits_cnn": Entry(small.digits_cnn, (1, 8, 8)),
    "small_vit": Entry(transformer.small_vit, (1, 28, 28)),
    "vgg16_bn": Entry(vgg.vgg16_bn, (3, 32, 32)),
    "vgg19_bn": Entry(vgg.vgg19_bn, (3, 32, 32)),
    "resnet8": Entry(resnet.resnet8, (3, 32, 32)),
    "resnet20": Entry(resnet.resnet20, (3, 32, 32)),
    "resnet32": Entry(resnet.resnet32, (3, 32, 32)),
    "resnet56": Entry(resnet.resnet56, (3, 32, 32)),
    "wrn_28_10": Entry(resnet.wrn_28_10, (3, 32, 32)),
}


def build(name: str, **options: Any) -> nn.Module:
    """A freshly initialised model, from the global random state.

    The model remembers its name and options, and :func:`secateur.save` writes them down.

    Args:
        name: a key of ``MODELS``, ``package.module:factory``, or ``torchvision:``, ``timm:`` or ``hf:`` and a name
            there.
        options: what the factory takes: ``classes``, ``in_channels``, and ``width`` where it makes sense.

    Raises:
        SecateurError: unknown name or option, a factory that cannot be imported or returns no ``nn.Module``.
    """
    if elsewhere.is_elsewhere(name):
        model = elsewhere.build(name, **options)
        built_in.set_origin(model, name, options)
        return model
    make = factory.import_string("model", name) if factory.is_import_string(name) else _entry(name).make
    for option, value in options.items():
        _check(name, make, option, value)
    _check_complete(name, make, options)
    try:
        model = make(**options)
    except SecateurError:
        raise
    except Exception as error:  # whatever a user's factory raises
        if name in MODELS:
            raise
        raise SecateurError(f"model {name!r}: its factory fails ({type(error).__name__}: {error})") from error
    if not isinstance(model, nn.Module):
        raise SecateurError(f"model {name!r}: the factory returned a {type(model).__name__}, not an nn.Module")
    built_in.set_origin(model, name, options)
    return model


for _name in MODELS:
    built_in.register(_name, partial(build, _name))


def example_input(name: str, **options: Any) -> tuple[int, int, int, int]:
    """The shape [1, channels, height, width] of one example input of a built-in model.

    Raises:
        SecateurError: a model of the user's own, whose inputs nobody here knows.
    """
    if factory.is_import_string(name):
        raise SecateurError(
            f"model {name!r}: only built-in models know their input shape; give example inputs, on the command line "
            "--input 1,3,32,32"
        )
    channels, height, width = _entry(name).image
    return (1, options.get("in_channels", channels), height, width)


def _entry(name: str) -> Entry:
    if name not in MODELS:
        raise unknown("model", name, MODELS)
    return MODELS[name]


def _check(name: str, make: Callable[..., Any], option: str, value: Any) -> None:
    parameters = inspect.signature(make).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    if option not in parameters:
        raise unknown(f"option of model {name!r}", option, parameters)
    if name not in MODELS:
        return
    whole = option != "width"
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not 0 < value < float("inf"):
        raise SecateurError(
            f"model {name!r}: {option}={value!r}: a positive {'integer' if whole else 'number'} is expected"
        )


def _check_complete(name: str, make: Callable[..., Any], options: dict[str, Any]) -> None:
    """Raise if a factory of the user's own needs more than it is given."""
    try:
        inspect.signature(make).bind(**options)
    except TypeError as error:
        raise SecateurError(f"model {name!r}: its factory cannot be called with these options: {error}") from error
    except ValueError:  # something written in C does not tell
        pass
