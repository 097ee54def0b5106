"""The sections of a recipe, and what must hold in each and between them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

from secateur._internal.errors import SecateurError, unknown
from secateur._internal.importing import is_import_string
from secateur.allocation.budget import Budget, budget_from, check_rounds
from secateur.allocation.search.search import check_search
from secateur.allocation.strategies import BANDIT, STRATEGIES
from secateur.lab.data.registry import DATA
from secateur.lab.models.registry import MODELS
from secateur.lab.recipe.options import check_options
from secateur.lab.recipe.yaml_text import TypedFloat
from secateur.lab.training.schedule import SCHEDULES
from secateur.methods import GENTLE
from secateur.methods.eigendamage import EIGENDAMAGE
from secateur.methods.sdprun import WEIGHTS
from secateur.pruning import DEAD, FACTORED
from secateur.scoring.api import CRITERIA
from secateur.surgery.blocks.pivots import PIVOT

METHODS = (*CRITERIA, EIGENDAMAGE, *GENTLE, PIVOT, DEAD, "none")
OPTIMIZERS = {  # the settings each takes beside the learning rate
    "sgd": ("momentum", "nesterov", "weight_decay"),
    "adam": ("weight_decay",),
    "adamw": ("weight_decay",),
    "sdprun": ("c", "mu", "weights", "exclude", "budget", "baseline"),
}
_OWN = sorted({setting for settings in OPTIMIZERS.values() for setting in settings})


def _sound(given: dict[str, Any]) -> dict[str, Any]:
    budget_from(given)
    return given


Limits = Annotated[dict[str, Any], AfterValidator(_sound)]
"""The arguments of a budget, which has been made once to see that it can be."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    @field_validator("*", mode="wrap")
    @classmethod
    def _as_typed(cls, value: Any, check: ValidatorFunctionWrapHandler) -> Any:
        """A number that remembers how it was written goes on remembering it."""
        checked = check(value)
        return value if isinstance(value, TypedFloat) and checked == value else checked

    def changed(self) -> set[str]:
        """The settings that are not at their defaults: only those can contradict others."""
        defaults = {
            name: field.get_default(call_default_factory=True) for name, field in type(self).model_fields.items()
        }
        return {name for name in self.model_fields_set if getattr(self, name) != defaults[name]}


class Data(_Section):
    """What is trained and tested on.

    Attributes:
        name: built-in, or ``package.module:factory``.
        root: the folder that holds it; ``None`` to look where ``secateur.lab.data.load`` looks.
        batch_size: images a step.
        augment: random crops and mirror images while training.
        validation: share of the training images held out, to choose settings by.
    """

    name: str
    root: str | None = None
    batch_size: int = Field(default=128, ge=1)
    augment: bool = False
    validation: float = Field(default=0.0, ge=0, lt=1)

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        return _one_of("data", name, DATA)


class Model(_Section):
    """The network.

    Attributes:
        name: built-in, or ``package.module:factory``.
        options: keyword arguments of its factory.
        weights: begin with these instead of training: a safetensors file of its state, or a directory that secateur
            saved; ``{seed}`` stands for the seed.
    """

    name: str
    options: dict[str, Any] = {}
    weights: str | None = None

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        return _one_of("model", name, MODELS)


class Tune(_Section):
    """Training of the cut network.

    Attributes:
        optimizer: ``sgd``, ``adam`` or ``adamw``; for ``Train`` also ``sdprun``.
        epochs: passes over the training images.
        lr: learning rate at the schedule's 1.
        schedule: a name in ``secateur.lab.training.schedule``.
        momentum: of sgd.
        nesterov: of sgd.
        weight_decay: of all but sdprun.
        label_smoothing: of the cross entropy, in [0, 1).
        channels_last: run in that memory format.
        compile: run through ``torch.compile``.
    """

    optimizer: str = "sgd"
    epochs: int = Field(ge=1)
    lr: float = Field(gt=0)
    schedule: str = "one_cycle"
    momentum: float = Field(default=0.0, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: float = Field(default=0.0, ge=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    channels_last: bool = False
    compile: bool = False

    @field_validator("schedule")
    @classmethod
    def _known(cls, schedule: str) -> str:
        return _one_of("schedule", schedule, SCHEDULES)

    @model_validator(mode="after")
    def _fits(self) -> Tune:
        known = OPTIMIZERS if isinstance(self, Train) else [name for name in OPTIMIZERS if name != "sdprun"]
        _one_of("optimizer", self.optimizer, known)
        for setting in _OWN:
            if setting in self.changed() and setting not in OPTIMIZERS[self.optimizer]:
                why = " (either breaks the sum of gradients it keeps)" if self.optimizer == "sdprun" else ""
                raise SecateurError(
                    f"optimizer {self.optimizer!r} takes no {setting}{why}; it takes lr, "
                    + ", ".join(OPTIMIZERS[self.optimizer])
                )
        if self.nesterov and not self.momentum:
            raise SecateurError("nesterov: true needs a momentum above 0")
        return self


class Train(Tune):
    """Training of the network: what ``Tune`` has, and the settings of sdprun.

    Attributes:
        c: strength of sdprun's pruning.
        mu: growth of its threshold in time.
        weights: ``none`` or ``sqrt``: how its threshold depends on a channel's size.
        exclude: names of groups that it leaves alone (``secateur inspect`` shows them).
        budget: what may remain, as the arguments of :class:`secateur.Budget`; once met, its threshold stands still.
        baseline: also train the same network by plain SGD, same seed and schedule, as the "before".
    """

    c: float = Field(default=5e-4, ge=0)
    mu: float = Field(default=0.6, gt=0, le=1)
    weights: str = "none"
    exclude: list[str] = Field(default_factory=list)
    budget: Limits | None = None
    baseline: bool = False

    @field_validator("weights")
    @classmethod
    def _known_weights(cls, weights: str) -> str:
        return _one_of("weights", weights, WEIGHTS)


class Prune(_Section):
    """What goes.

    Attributes:
        method: a criterion; ``eigendamage``; ``increg`` or ``spp``, which prune while the network trains on; ``pivot``
            for dense blocks, at once or while it trains on; ``dead`` for what sdprun has driven to zero; ``none``.
        budget: what may remain, as the arguments of :class:`secateur.Budget`.
        strategy: how the budget is shared among the groups; ``bandit`` tries widths on the training images.
        search: settings of ``bandit``: ``evaluations``, ``minutes``, ``start``, ``ratios``, ``radius``, ``dueling``,
            ``norms``.
        approximate: also cut groups whose removal changes more than the removed channels.
        recalibrate: re-estimate batch-norm statistics after the cut.
        batches: batches of training images for scores and recalibration; ``None`` for all.
        compensate: what stays makes up for what goes (``obs``, ``kron_obd``, ``kron_obs``).
        refit: fit the smaller model's layers to what the original computes, and re-estimate batch-norm statistics.
        train: the training during which ``increg``, ``spp`` and ``pivot`` prune, as a ``finetune`` section.
        rounds: reach the budget in so many rounds, each with a fine-tune, in equal factors.
        options: the method's own, see :data:`secateur.lab.recipe.options.OPTIONS`.
    """

    method: str = "none"
    budget: Limits | None = None
    strategy: str = "global"
    approximate: bool = False
    recalibrate: bool = False
    batches: int | None = Field(default=None, ge=1)
    compensate: bool = False
    refit: bool = False
    train: Tune | None = None
    search: dict[str, Any] = Field(default_factory=dict)
    rounds: int = Field(default=1, ge=1)
    options: dict[str, Any] = Field(default_factory=dict)

    @field_validator("method")
    @classmethod
    def _known_method(cls, method: str) -> str:
        return _one_of("method", method, METHODS)

    @field_validator("strategy")
    @classmethod
    def _known_strategy(cls, strategy: str) -> str:
        return _one_of("strategy", strategy, (*STRATEGIES, BANDIT))

    @model_validator(mode="after")
    def _fits(self) -> Prune:
        given = self.changed() - {"method"}
        if self.method == "none" and given:
            raise SecateurError(f"method 'none' prunes nothing, but {', '.join(sorted(given))} is given; leave it out")
        wrong = given & {"budget", "strategy", "rounds"}
        if self.method == DEAD and wrong:
            raise SecateurError(
                f"method 'dead' takes what training has driven to zero, but {' and '.join(sorted(wrong))} is given: "
                "leave it out, or use another method"
            )
        wrong = given & {"strategy", "approximate", "refit"}
        if self.method == EIGENDAMAGE and wrong:
            raise SecateurError(
                f"method 'eigendamage' removes no channels, but {' and '.join(sorted(wrong))} is given: leave it out"
            )
        wrong = given & {"approximate", "refit", "compensate", "batches", "rounds"}
        if self.method in GENTLE and (wrong or self.train is None):
            what = f"{' and '.join(sorted(wrong))} is given: leave it out" if wrong else "it has no train section"
            raise SecateurError(
                f"method {self.method!r} prunes while the network trains on, and the cut is exact, but {what}"
                + ("" if wrong else ", such as train: {epochs: 2, lr: 0.01, momentum: 0.9}")
            )
        wrong = given & {"budget", "strategy", "rounds", "approximate", "refit", "compensate", "batches"}
        if self.method == PIVOT and (wrong or "keep" not in self.options):
            raise SecateurError(
                "method 'pivot' leaves dense blocks of every layer, "
                + (
                    f"but {' and '.join(sorted(wrong))} is given: leave it out"
                    if wrong
                    else "but how much stays is not "
                )
                + ("" if wrong else "given, for instance options: {keep: 0.25}")
            )
        if self.method == PIVOT and self.train is None and {"every", "times"} & set(self.options):
            raise SecateurError("method 'pivot' without a train section prunes at once: leave every and times out")
        if self.method not in {*GENTLE, PIVOT} and self.train is not None:
            raise SecateurError(
                f"method {self.method!r} does not train: leave prune.train out; finetune comes after it"
            )
        if self.strategy == BANDIT and self.method not in CRITERIA:
            raise SecateurError(
                f"strategy 'bandit': the methods {', '.join(CRITERIA)} score channels, {self.method!r} does not"
            )
        if self.search and self.strategy != BANDIT:
            raise SecateurError(f"search: strategy {self.strategy!r} searches nothing; leave it out")
        check_search(self.search)
        if self.compensate and self.method not in FACTORED:
            raise SecateurError(f"compensate: the methods {', '.join(FACTORED)} have factors, {self.method!r} has none")
        check_options(self.method, self.options, self.make_budget())
        if self.method in {*CRITERIA, EIGENDAMAGE, *GENTLE} and self.budget is None:
            raise SecateurError(f"method {self.method!r} needs a budget, for instance budget: {{macs: 0.5}}")
        if self.budget is not None:
            check_rounds(budget_from(self.budget), self.rounds)
            if self.method not in CRITERIA:
                budget_from(self.budget).refuse_latency(f"method {self.method!r}")
        return self

    def make_budget(self) -> Budget | None:
        """The budget, if there is one."""
        return None if self.budget is None else budget_from(self.budget)


class Measure(_Section):
    """How latency is measured, always on the CPU.

    Attributes:
        batch_sizes: images a forward.
        repeats: forwards whose median counts.
        threads: CPU threads.
    """

    batch_sizes: list[int] = [1, 32]
    repeats: int = Field(default=50, ge=1)
    threads: int = Field(default=1, ge=1)

    @field_validator("batch_sizes")
    @classmethod
    def _sizes(cls, sizes: list[int]) -> list[int]:
        if not sizes or min(sizes) < 1 or len(set(sizes)) < len(sizes):
            raise SecateurError(f"{sizes}: different numbers from 1 on are expected")
        return sizes


class Recipe(_Section):
    """A run: train or load, prune, fine-tune, measure, save, for every seed.

    Attributes:
        name: of the run, for its table.
        about: what it shows, in a line.
        seeds: one run each; a number stands for a list of one.
        device: ``cpu``, or ``auto`` for a GPU where there is one.
        threads: CPU threads for training; results depend on it in the last bits. ``None`` for PyTorch's choice.
        data: section.
        model: section.
        train: section; left out where ``model.weights`` is given.
        prune: section.
        finetune: section.
        measure: section.
    """

    name: str = "run"
    about: str = ""
    seeds: list[int] = [0]
    device: Literal["cpu", "auto"] = "auto"
    threads: int | None = Field(default=None, ge=1)
    data: Data
    model: Model
    train: Train | None = None
    prune: Prune = Field(default_factory=Prune)
    finetune: Tune | None = None
    measure: Measure = Field(default_factory=Measure)

    @field_validator("seeds", mode="before")
    @classmethod
    def _listed(cls, seeds: Any) -> Any:
        return [seeds] if isinstance(seeds, int) and not isinstance(seeds, bool) else seeds

    @field_validator("seeds")
    @classmethod
    def _different(cls, seeds: list[int]) -> list[int]:
        if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
            raise SecateurError(f"{seeds}: different numbers from 0 on are expected")
        return seeds

    @model_validator(mode="after")
    def _fits(self) -> Recipe:
        if (self.train is None) == (self.model.weights is None):
            state = "neither" if self.train is None else "both"
            raise SecateurError(f"give either a train section or model.weights; {state} is given")
        pruned_in_training = self.train is not None and self.train.optimizer == "sdprun"
        if self.prune.method == DEAD and self.train is not None and not pruned_in_training:
            raise SecateurError(f"method 'dead' needs optimizer 'sdprun': {self.train.optimizer!r} leaves no zeros")
        if self.finetune is not None and self.prune.method == "none":
            raise SecateurError("a finetune section needs a prune section: nothing is pruned")
        return self


SECTIONS: dict[str, type[_Section]] = {
    "data": Data,
    "model": Model,
    "train": Train,
    "prune": Prune,
    "finetune": Tune,
    "measure": Measure,
}


def _one_of(kind: str, name: str, known: Any) -> str:
    if name not in known and not (kind in {"data", "model"} and is_import_string(name)):
        raise unknown(kind, name, known)
    return name
