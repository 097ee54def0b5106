"""Which groups are left alone: those that the user excludes, and those of layers that are not trained.

An excluded module keeps all its output channels: every group that one of its parameters (or of the modules in it)
writes, with all that is tied to it, stays whole. Its inputs may still become fewer, since they are the output channels
of other modules.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from secateur._internal.errors import SecateurError, unknown
from secateur.tracing.graph import ChannelGraph, ChannelGroup, fingerprint

Named = str | nn.Module | type[nn.Module]
"""A glob pattern of group names or module paths (``*`` also matches dots), a module, or a type of modules."""
Exclude = Named | Iterable[Named]
"""One of these, or several."""


def excluded(model: nn.Module, graph: ChannelGraph, exclude: Exclude = (), *, frozen: bool = True) -> dict[str, str]:
    """The groups that are left alone.

    Args:
        model: the traced model.
        graph: its graph.
        exclude: what stays whole: ``"head"``, ``"layers.0.*"``, ``model.head``, ``nn.Embedding``, or several of these.
        frozen: whether groups that a parameter writes which does not require gradients are left alone too, unless no
            parameter of the model does.

    Returns:
        Group name to the reason, in the order of the graph's groups.

    Raises:
        SecateurError: a pattern, a module or a type that nothing in the model is; the graph is another model's.
    """
    if fingerprint(model) != graph.fingerprint:
        raise SecateurError("exclude: the graph was traced from another model; trace this one")
    layer_of = {name: name.rpartition(".")[0] or name for name, _ in model.named_parameters()}
    reasons: dict[str, str] = {}
    for given in [exclude] if isinstance(exclude, (str, nn.Module, type)) else exclude:
        names, parameters = _meant(model, graph, given)
        for group in graph.groups:
            written = _written(group, parameters)
            if group.name in names:
                reasons.setdefault(group.name, f"excluded by {_words(model, given)}")
            elif written:
                layer = layer_of[written[0]]
                reasons.setdefault(group.name, f"excluded by {_words(model, given)}: its layer {layer} stays whole")
    if frozen:
        wanted = {name: p.requires_grad for name, p in model.named_parameters()}
        # a model of which nothing is trained any more says nothing of its single layers
        still = {name for name, wants in wanted.items() if not wants} if any(wanted.values()) else set()
        for group in graph.groups:
            for name in _written(group, still)[:1]:
                reasons.setdefault(group.name, f"its layer {layer_of[name]} does not require gradients")
    return {group.name: reasons[group.name] for group in graph.groups if group.name in reasons}


def _written(group: ChannelGroup, parameters: set[str]) -> list[str]:
    """Those of the parameters that write a group."""
    return [axis.name for axis in group.producers if axis.name in parameters]


def _meant(model: nn.Module, graph: ChannelGraph, given: Named) -> tuple[set[str], set[str]]:
    """The names of the groups, and of the parameters, that are meant."""
    if isinstance(given, str):
        paths = dict(model.named_modules(remove_duplicate=False))
        groups = {group.name for group in graph.groups if fnmatchcase(group.name, given)}
        modules = [module for path, module in paths.items() if fnmatchcase(path, given)]
        if not groups and not modules:
            raise unknown("group or module in exclude", given, [g.name for g in graph.groups], also=set(paths) - {""})
        return groups, _parameters(model, modules)
    every = list(model.modules())
    if isinstance(given, nn.Module):
        if not any(module is given for module in every):
            raise SecateurError(f"exclude: this {type(given).__name__} is no module of the model: give one of its own")
        return set(), _parameters(model, [given])
    if isinstance(given, type) and issubclass(given, nn.Module):
        modules = [module for module in every if isinstance(module, given)]
        if not modules:
            raise unknown("type of module in exclude", given.__name__, {type(module).__name__ for module in every})
        return set(), _parameters(model, modules)
    raise SecateurError(
        f"exclude: patterns of group names or module paths, modules or types of modules are expected, not {given!r}"
    )


def _parameters(model: nn.Module, modules: Iterable[nn.Module]) -> set[str]:
    """The names of all parameters of some modules, shared ones under the name that the graph has for them."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)] for module in modules for p in module.parameters()}


def _words(model: nn.Module, given: Named) -> str:
    """What was excluded, as the user would say it."""
    if isinstance(given, str):
        return repr(given)
    if isinstance(given, type):
        return given.__name__
    return next((path for path, module in model.named_modules() if module is given), "") or "the model"
