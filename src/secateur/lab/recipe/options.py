"""What the pruning methods take beside what all of them take, and what values are allowed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from secateur._internal.errors import SecateurError, unknown
from secateur.allocation.budget import Budget
from secateur.curvature.damped_inverse import check_damping
from secateur.curvature.hessian_products import MATRICES
from secateur.curvature.layers import FORMS
from secateur.curvature.losses import Pass
from secateur.curvature.null_space import BASES
from secateur.methods.eigendamage import EIGENDAMAGE, check_rule
from secateur.methods.increg import RULES
from secateur.methods.rank_schedule import RANK_SCHEDULES
from secateur.repair.directed import check_mode, check_shift
from secateur.surgery.blocks.pivots import PIVOT, check_pivot
from secateur.surgery.low_rank.separable import check_how

_PASS = ("fisher", "samples")
OPTIONS: dict[str, tuple[str, ...]] = {
    "magnitude": ("p", "normalize"),
    "obd": _PASS,
    "kron_obd": (*_PASS, "positions"),
    "obs": (*_PASS, "positions", "damping"),
    "kron_obs": (*_PASS, "positions", "damping"),
    "directional": (*_PASS, "basis", "share", "soft", "ekfac", "form", "k", "matrix", "mode", "shift", "damping"),
    "increg": ("rule", "rate", "limit", "pick", "settle", "exclude", "increment", "every"),
    "spp": ("rate", "exclude", "increment", "every"),
    PIVOT: ("keep", "layout", "blocks", "exclude", "every", "times"),
    EIGENDAMAGE: (*_PASS, "rule", "limit", "ekfac", "layers", "train_rotations", "separable"),
}
"""The names of each method's options."""
_OF_BASIS = {"kfe": {*_PASS, "soft", "ekfac", "form"}, "lanczos": {"k", "matrix"}, "exact": {"matrix"}}


def check_options(method: str, options: Mapping[str, Any], budget: Budget | None = None) -> None:
    """Raise if a method has no such option, an option no such value, or a budget that does not go with them."""
    known = OPTIONS.get(method, ())
    for name in options:
        if name not in known:
            raise unknown(f"option of method {method!r}", name, known)
    for name, value in options.items():
        check = _CHECKS.get(f"{name}_of_{method}", _CHECKS.get(name))
        if check is not None and value is not None:
            check(name, value)
    if method == "directional":
        basis = options.get("basis", "kfe")
        for name in options:
            if name not in _OF_BASIS[basis] and any(name in own for own in _OF_BASIS.values()):
                raise SecateurError(f"{name}: basis {basis!r} has no such option; it takes {_listed(_OF_BASIS[basis])}")
    rule = options.get("rule", "increg")
    if method == "increg":
        for name, of in (("increment", ("increg",)), ("pick", ("greg2",))):
            if name in options and rule not in of:
                raise SecateurError(f"{name}: rule {rule!r} has no such option; it is of {of[0]!r}")
    if method == PIVOT and "keep" in options:
        check_pivot(options["keep"], options.get("layout", "bundles"), options.get("blocks"))
    Pass(**{name: options[name] for name in _PASS if name in options})
    if method == EIGENDAMAGE and set(options) & {"rule", "limit"}:
        check_rule(options.get("rule", "lagrangian"), options.get("limit", 0.95), budget)


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names))


def _truth(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise SecateurError(f"{name}={value!r}: true or false is expected")


def _norm(name: str, value: object) -> None:
    if isinstance(value, bool) or value not in (1, 2):
        raise SecateurError(f"{name}={value!r}: 1 or 2 is expected")


def _count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SecateurError(f"{name}={value!r}: a whole number from 1 on is expected")


def _steps(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise SecateurError(f"{name}={value!r}: a whole number from 0 on is expected")


def _positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise SecateurError(f"{name}={value!r}: a number above 0 is expected")


def _share(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
        raise SecateurError(f"{name}={value!r}: a number in (0, 1) is expected")


def _one_of(known: tuple[str, ...]) -> Callable[[str, Any], None]:
    def check(name: str, value: object) -> None:
        if value not in known:
            raise unknown(name, str(value), known)

    return check


def _names(what: str) -> Callable[[str, Any], None]:
    def check(name: str, value: object) -> None:
        if not isinstance(value, list) or not value or not all(isinstance(path, str) for path in value):
            raise SecateurError(f"{name}={value!r}: a list of the {what} is expected")

    return check


_CHECKS: dict[str, Callable[[str, Any], None]] = {
    "p": _norm,
    "normalize": _truth,
    "ekfac": _truth,
    "soft": _truth,
    "k": _count,
    "share": _share,
    "shift": lambda _, value: check_shift(value),
    "basis": _one_of(BASES),
    "form": _one_of(FORMS),
    "matrix": _one_of(MATRICES),
    "mode": lambda _, value: check_mode(value),
    "train_rotations": _truth,
    "positions": _count,
    "layers": _names("layers' paths"),
    "exclude": _names("groups' names"),
    "exclude_of_pivot": _names("layers' paths"),
    "times": _count,
    "rule_of_increg": _one_of(RULES),
    "increment": _one_of(tuple(RANK_SCHEDULES)),
    "rate": _positive,
    "limit_of_increg": _positive,
    "pick": _positive,
    "settle": _steps,
    "every": _count,
    "damping": lambda _, value: check_damping(value),
    "separable": lambda _, value: check_how(value),
}
