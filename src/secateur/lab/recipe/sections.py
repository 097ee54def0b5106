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
from secateur._internal.registry import Registry, options_of
from secateur._internal.workload import Needs
from secateur.allocation.budget import Budget, budget_from, check_rounds
from secateur.allocation.contract import STRATEGIES
from secateur.auto import AUTO
from secateur.lab.data.registry import DATA
from secateur.lab.models.registry import MODELS
from secateur.lab.recipe.yaml_text import TypedFloat
from secateur.lab.training.optimizers.contract import OPTIMIZERS, Optimizer
from secateur.lab.training.schedule import SCHEDULES
from secateur.measure.backends import EAGER, check_backend
from secateur.methods.contract import METHODS, TRAINING_METHODS
from secateur.repair.contract import REPAIRS
from secateur.scoring.contract import CRITERIA


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
        options: keyword arguments of a factory.
    """

    name: str
    options: dict[str, Any] = {}
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


Seat = str | dict[str, Any]
"""Who sits there: a name (or ``package.module:Class``), or a mapping of a name and settings."""


DEFAULT_OPTIMIZER = "sgd"


class Tune(_Section):
    """Training of the cut network.

    Attributes:
        optimizer: a name in :mod:`secateur.lab.training.optimizers`, or a name and settings; one that prunes while it
            trains is for ``Train`` alone.
        epochs: passes over the training images.
        lr: learning rate at the schedule's 1.
        schedule: a name in ``secateur.lab.training.schedule``.
        label_smoothing: of the cross entropy, in [0, 1).
        channels_last: run in that memory format.
        compile: run through ``torch.compile``.
    """

    optimizer: Seat = DEFAULT_OPTIMIZER
    epochs: int = Field(ge=1)
    lr: float = Field(gt=0)
    schedule: str = "one_cycle"
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    channels_last: bool = False
    compile: bool = False

    @field_validator("schedule")
    @classmethod
    def _known(cls, schedule: str) -> str:
        return _one_of("schedule", schedule, SCHEDULES)

    @field_validator("optimizer")
    @classmethod
    def _named(cls, optimizer: Seat) -> Seat:
        """Settings without a name are those of the default."""
        return {"name": DEFAULT_OPTIMIZER, **optimizer} if isinstance(optimizer, dict) else optimizer

    @model_validator(mode="before")
    @classmethod
    def _below_their_optimizer(cls, given: Any) -> Any:
        """Where settings of an optimizer belong is told to whoever writes them beside it."""
        if isinstance(given, dict):
            name = name_of(given.get("optimizer", DEFAULT_OPTIMIZER))
            for key in [key for key in given if key not in cls.model_fields]:
                owners = [other for other in OPTIMIZERS if key in options_of(OPTIMIZERS.find(other))]
                if name in owners:
                    raise SecateurError(
                        f"{key} belongs to the optimizer: optimizer: {{name: {name}, {key}: {given[key]}}}, or "
                        f"optimizer.{key}={given[key]} as an override"
                    )
                if owners:
                    raise SecateurError(f"{key} is a setting of optimizer {' and '.join(owners)}, and this is {name}")
        return given

    @model_validator(mode="after")
    def _fits(self) -> Tune:
        if self.make_optimizer().prunes and not isinstance(self, Train):
            others = [name for name in OPTIMIZERS if not OPTIMIZERS.find(name).prunes]  # type: ignore[attr-defined]
            raise SecateurError(
                f"optimizer {name_of(self.optimizer)!r} prunes while it trains, which is for the train section "
                f"alone; here {', '.join(others)} are known"
            )
        return self

    def make_optimizer(self) -> Optimizer:
        """The settings of the optimizer."""
        found = made(OPTIMIZERS, self.optimizer, {})
        if not isinstance(found, Optimizer):
            raise SecateurError(
                f"optimizer {name_of(self.optimizer)!r}: a subclass of Optimizer in "
                "secateur.lab.training.optimizers.contract is expected"
            )
        return found


class Train(Tune):
    """Training of the network.

    Attributes:
        baseline: of an optimizer that prunes: also train the same network without pruning, same seed and schedule, as
            the "before".
    """

    baseline: bool = False

    @model_validator(mode="after")
    def _has_a_baseline(self) -> Train:
        if self.baseline and not self.make_optimizer().prunes:
            raise SecateurError(
                f"baseline: optimizer {name_of(self.optimizer)!r} prunes nothing and is its own baseline; leave it out"
            )
        return self


class Prune(_Section):
    """What goes: either criterion, strategy and repair, or a method that does it all.

    Attributes:
        budget: what may remain, as the arguments of :class:`secateur.Budget`.
        criterion: which channels matter least; ``auto``, a name, or a name and settings.
        strategy: how many every group keeps; likewise.
        repair: how what stays makes up for what goes; likewise, or a list of them.
        method: instead of these three, a method; with a ``train`` section one that prunes while the network trains on.
        train: the training during which such a method prunes, as a ``finetune`` section.
        exclude: patterns of group names or module paths that keep their channels.
        approximate: also cut groups whose removal changes more than the removed channels.
        batches: batches of training images that any step may use; ``None`` for all.
        rounds: reach the budget in so many rounds, each with a fine-tune, in equal factors.
    """

    budget: Limits | None = None
    criterion: Seat = AUTO
    strategy: Seat = AUTO
    repair: Seat | list[Seat] = AUTO
    method: Seat | None = None
    train: Tune | None = None
    exclude: list[str] = Field(default_factory=list)
    approximate: bool = False
    batches: int | None = Field(default=None, ge=1)
    rounds: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> Prune:
        given = self.changed()
        if self.method is None:
            if given - {"budget"} and self.budget is None:
                raise SecateurError(
                    f"{', '.join(sorted(given))} is given, but no budget: give one, for instance budget: {{macs: 0.5}}"
                )
            if self.train is not None:
                raise SecateurError("train: only a method trains; leave prune.train out (finetune comes after pruning)")
            self.make_criterion()
            self.make_strategy()
            self.make_repairs()
        else:
            wrong = given & {"criterion", "strategy", "approximate"}
            if wrong:
                raise SecateurError(
                    f"method {name_of(self.method)!r} decides itself what goes, but {' and '.join(sorted(wrong))} is "
                    "given: leave it out, or leave the method out"
                )
            method = self.make_method()
            for repair in self.make_repairs():
                if getattr(repair, "needs", Needs()).plan and not getattr(method, "plans", True):
                    raise SecateurError(
                        f"method {name_of(self.method)!r} removes no channels, which repair "
                        f"{getattr(repair, 'name', repair)!r} makes up for: leave it out"
                    )
            takes = getattr(method, "takes_budget", True)
            if takes and self.budget is None:
                raise SecateurError(
                    f"method {name_of(self.method)!r} needs a budget, for instance budget: {{macs: 0.5}}"
                )
            if not takes and (self.budget is not None or self.rounds > 1):
                raise SecateurError(f"method {name_of(self.method)!r} takes no budget and no rounds: leave them out")
            if self.train is not None and self.rounds > 1:
                raise SecateurError("rounds: a method that prunes while training takes one; leave rounds out")
        if self.budget is not None:
            budget = budget_from(self.budget)
            check_rounds(budget, self.rounds)
            if self.method is not None:
                budget.refuse_latency(f"method {name_of(self.method)!r}")
        return self

    @property
    def prunes(self) -> bool:
        """Whether anything is pruned."""
        return self.method is not None or self.budget is not None

    def make_budget(self) -> Budget | None:
        """The budget, if there is one."""
        return None if self.budget is None else budget_from(self.budget)

    def make_criterion(self, **more: Any) -> Any:
        """The criterion, or ``"auto"``; ``more`` are settings that the recipe may leave open, such as a seed."""
        return self.criterion if self.criterion == AUTO else made(CRITERIA, self.criterion, more)

    def make_strategy(self, **more: Any) -> Any:
        """The strategy, or ``"auto"``."""
        return self.strategy if self.strategy == AUTO else made(STRATEGIES, self.strategy, more)

    def make_repairs(self, **more: Any) -> list[Any]:
        """The repairs in their order; ``"auto"`` is one of them where nothing is said and no method is given."""
        if self.repair == AUTO:
            return [] if self.method is not None else [AUTO]
        listed = self.repair if isinstance(self.repair, list) else [self.repair]
        return [made(REPAIRS, repair, more) for repair in listed]

    def make_method(self, **more: Any) -> Any:
        """The method, if there is one: one that prunes at once, or, with a train section, while training."""
        if self.method is None:
            return None
        return made(METHODS if self.train is None else TRAINING_METHODS, self.method, more)


def name_of(seat: Any) -> str:
    """The name of who sits there."""
    return str(seat.get("name")) if isinstance(seat, dict) else str(seat)


def made(registry: Registry[Any], seat: Seat, more: dict[str, Any]) -> Any:
    """Settings, with those of ``more`` that they know and the recipe leaves open."""
    given = {"name": seat} if isinstance(seat, str) else dict(seat)
    if not isinstance(given.get("name"), str):
        return registry.make(given)  # which says so
    cls = registry.find(name_of(given))
    known = options_of(cls)
    for option, why in getattr(cls, "refused", {}).items():
        if option in given:
            raise SecateurError(f"{registry.kind} {name_of(given)!r} takes no {option}: {why}")
    return registry.make({**{key: value for key, value in more.items() if key in known}, **given})


METRIC_WORDS, BETTER = ("function", "name", "unit", "better"), ("higher", "lower")


class Measure(_Section):
    """How latency is measured, always on the CPU.

    Attributes:
        batch_sizes: images a forward.
        repeats: forwards whose median counts.
        threads: CPU threads.
        backends: what runs it: ``eager``, which is always timed, ``compile``, ``onnxruntime``.
        metric: ``package.module:function`` of a model and the batches of a split instead of accuracy, or a mapping of
            ``function``, ``name``, ``unit`` and ``better`` (``higher`` or ``lower``).
    """

    batch_sizes: list[int] = [1, 32]
    repeats: int = Field(default=50, ge=1)
    threads: int = Field(default=1, ge=1)
    backends: list[str] = [EAGER]
    metric: str | dict[str, str] | None = None

    @field_validator("metric")
    @classmethod
    def _metric(cls, metric: str | dict[str, str] | None) -> str | dict[str, str] | None:
        words = {"function": metric} if isinstance(metric, str) else metric or {"function": "a:b"}
        for key in words:
            if key not in METRIC_WORDS:
                raise unknown("key", key, METRIC_WORDS)
        if not is_import_string(words.get("function", "")):
            raise SecateurError(f"function {words.get('function')!r}: package.module:function is expected")
        if words.get("better", "higher") not in BETTER:
            raise SecateurError(f"better {words['better']!r}: {' or '.join(BETTER)} is expected")
        return metric

    @field_validator("backends")
    @classmethod
    def _backends(cls, backends: list[str]) -> list[str]:
        for backend in backends:
            check_backend(backend)
        return backends

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
        loss: of training, pruning and fine-tuning: ``cross_entropy``, ``mse``, ``model`` (its own), or
            ``package.module:function`` of outputs and targets; ``auto`` is the model's own where batches are dicts with
            labels, else the cross entropy.
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
    loss: str = AUTO
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
        wanted = getattr(self.prune.make_method(), "needs_optimizer", None)
        if wanted is not None and self.train is not None and name_of(self.train.optimizer) != wanted:
            raise SecateurError(
                f"method {name_of(self.prune.method or '')!r} needs optimizer {wanted!r}: "
                f"{name_of(self.train.optimizer)!r} "
                "leaves nothing that it could take"
            )
        smoothed = [s for s in (self.train, self.finetune, self.prune.train) if s is not None and s.label_smoothing]
        if smoothed and self.loss not in (AUTO, "cross_entropy"):
            raise SecateurError(f"label_smoothing is for loss cross_entropy, and loss is {self.loss}: leave it out")
        if self.finetune is not None and not self.prune.prunes:
            raise SecateurError("a finetune section needs a prune section: nothing is pruned")
        return self


def _one_of(kind: str, name: str, known: Any) -> str:
    if name not in known and not (kind in {"data", "model"} and is_import_string(name)):
        raise unknown(kind, name, known)
    return name
