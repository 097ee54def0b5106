import copy
import json
import re
from pathlib import Path

import pytest
import yaml

import secateur as sc
from secateur.lab import recipe
from secateur.lab.recipe.shipped import read_named, shipped

BASE = """
name: small
data: {name: digits, batch_size: 64}
model: {name: digits_cnn, options: {width: 0.25}}
train: {optimizer: {name: sgd, momentum: 0.9}, epochs: 2, lr: 1e-1}
prune: {budget: {macs: 0.5}, criterion: taylor, strategy: global, repair: none, batches: 4}
finetune: {epochs: 1, lr: 0.01}
"""
SDPRUN = """
data: {name: digits}
model: {name: digits_cnn}
train: {optimizer: {name: sdprun, c: 0.02, mu: 0.6, weights: sqrt}, epochs: 2, lr: 0.1, baseline: true}
prune: {method: zero}
"""

UNPRUNED = SDPRUN[: SDPRUN.index("prune:")] + "prune: {}\n"


def written(folder: Path, text: str = BASE) -> Path:
    (folder / "r.yaml").write_text(text)
    return folder / "r.yaml"


@pytest.mark.parametrize("name", shipped())
def test_shipped_recipes_are_sound_and_named_as_their_files(name: str) -> None:
    found = recipe.read(shipped()[name])
    assert found.name == name and found.about


def test_there_are_shipped_recipes() -> None:
    assert {"digits-sdprun", "digits-taylor"} <= set(shipped())


def test_recipes_make_the_networks_of_the_measurements() -> None:
    index = Path(__file__).parents[3] / "bench" / "checkpoints" / "index.json"
    if not index.exists():
        pytest.skip("bench/checkpoints is not here")
    for entry in json.loads(index.read_text()):
        found = recipe.read(shipped()[f"{entry['data']}-{entry['model'].replace('_', '-')}"])
        settings = {**entry["optimizer"], **entry}
        optimizer = found.train.make_optimizer()
        named = (optimizer.name, found.model.name, found.prune.prunes)
        assert named == (entry["optimizer"]["name"], entry["model"], False)
        assert {s["seed"] for s in entry["seeds"]} == set(found.seeds)
        for section in (found, found.data, found.train, optimizer):
            for name in ("device", "threads", "batch_size", "augment", "validation", "epochs", "lr", "momentum",
                         "nesterov", "weight_decay", "schedule", "channels_last"):  # fmt: skip
                if hasattr(section, name):
                    assert getattr(section, name) == settings[name], name


@pytest.mark.parametrize("text", [BASE, SDPRUN, UNPRUNED], ids=["sgd", "sdprun", "unpruned"])
def test_dumped_and_read_again_it_is_the_same(tmp_path: Path, text: str) -> None:
    first = recipe.read(written(tmp_path, text))
    again = yaml.safe_dump(first.model_dump(mode="json"))  # all defaults written out
    assert recipe.read(written(tmp_path, again)).model_dump() == first.model_dump()


@pytest.mark.parametrize(
    ("override", "where", "value"),
    [
        ("train.epochs=3", ("train", "epochs"), 3),
        ("train.lr=1e-3", ("train", "lr"), 0.001),
        ("prune.budget.macs=0.25", ("prune", "budget"), {"macs": 0.25}),
        ("prune.budget.params=0.3", ("prune", "budget"), {"macs": 0.5, "params": 0.3}),
        ("prune.budget={channels: 0.5}", ("prune", "budget"), {"channels": 0.5}),
        ("prune.criterion.batches=3", ("prune", "criterion"), {"name": "taylor", "batches": 3}),
        ("seeds=[1, 2]", ("seeds",), [1, 2]),
        ("seeds=7", ("seeds",), [7]),
        ("finetune=null", ("finetune",), None),
        ("measure.threads=2", ("measure", "threads"), 2),
        ("model.options={}", ("model", "options"), {}),
    ],
)
def test_overrides(tmp_path: Path, override: str, where: tuple[str, ...], value: object) -> None:
    found = recipe.read(written(tmp_path), [override, override])  # twice the same is no contradiction
    for name in where:
        found = getattr(found, name)
    assert found == value


BAD = {
    "train.epoch=3": "unknown key in train 'epoch': did you mean 'epochs'",
    "sede=3": "unknown key 'sede'.*known: about, data",
    "measure.thread=1": "did you mean 'threads'",
    "prune.criterion=tailor": "unknown criterion 'tailor': did you mean 'taylor'",
    "prune.strategy=globl": "unknown strategy 'globl': did you mean 'global'",
    "prune.repair=refti": "unknown repair 'refti': did you mean 'refit'",
    "prune.repair=[refit, recalibrat]": "unknown repair 'recalibrat': did you mean 'recalibrate'",
    "prune={method: increeg, budget: {macs: 0.5}, train: {epochs: 1, lr: 1}}": "did you mean 'increg'",
    "model.name=digits_cn": "unknown model 'digits_cn': did you mean 'digits_cnn'",
    "data.name=digit": "unknown data 'digit': did you mean 'digits'",
    "train.schedule=onecycle": "did you mean 'one_cycle'",
    "train.optimizer=sdg": "unknown optimizer 'sdg': did you mean 'sgd'",
    "finetune.optimizer=sdprun": "finetune: optimizer 'sdprun' prunes while it trains.*here adam, adamw, sgd are known",
    "prune.budget.mac=0.5": "unknown budget 'mac': did you mean 'macs'",
    "prune.budget.macs=0": "Budget.macs=0.*keeps nothing",
    "prune.budget.macs=-1": "Budget.macs=-1.*keeps nothing",
    "prune.budget.macs=1.5": "Budget.macs=1.5.*keeps more than everything",
    "prune.budget.macs=.nan": r"Budget.macs=\.nan.*not a number",
    "prune.budget.macs=nan": "Budget.macs='nan'.*not a number",
    "prune.budget={}": "nothing is limited",
    "prune.budget={macs: 0.5, macs: 0.3}": "override.*the key 'macs' is given twice",
    "prune.budget=null": "is given, but no budget",
    "prune=null": "prune=None must be",
    "prune.criterion.damping=1": "unknown option of criterion 'taylor' 'damping'",
    "prune={budget: {macs: 0.5}, criterion: {name: obs, dampin: 1}}": "did you mean 'damping'",
    "prune={budget: {macs: 0.5}, criterion: {damping: 1}}": "needs a name",
    "prune={method: eigendamage, budget: {macs: 0.5}, strategy: uniform}": "decides itself what goes, but strategy",
    "prune={method: eigendamage, budget: {macs: 0.5}, repair: refit}": "removes no channels, which repair 'refit'",
    "prune={method: eigendamage}": "needs a budget",
    "prune={method: increg, budget: {macs: 0.5}}": "unknown method 'increg'",
    "prune={method: spp, train: {epochs: 1, lr: 0.1}}": "method 'spp' needs a budget",
    "prune.train={epochs: 1, lr: 0.1}": "only a method trains",
    "prune={method: {name: increg, pick: 0.1}, budget: {macs: 0.5}, train: {epochs: 1, lr: 1.0}}": "'pick'",
    "prune={method: {name: increg, limit: 0}, budget: {macs: 0.5}, train: {epochs: 1, lr: 1.0}}": "above 0",
    "prune={method: {name: spp, limit: 1}, budget: {macs: 0.5}, train: {epochs: 1, lr: 1.0}}": "method 'spp' 'limit'",
    "prune={method: {name: increg, settle: -1}, budget: {macs: 0.5}, train: {epochs: 1, lr: 1.0}}": "from 0 on",
    "prune={budget: {macs: 0.5}, strategy: {name: bandit, evaluation: 9}}": "'evaluations'",
    "prune={budget: {macs: 0.5}, strategy: {name: bandit, minutes: -1}}": "minutes=-1",
    "prune={method: {name: pivot, keep: 0.5}, budget: {macs: 0.5}}": "takes no budget",
    "prune={method: {name: pivot, keep: 1.5}}": "in .0, 1.",
    "prune={method: {name: pivot, keep: 0.5, layout: diag}}": "did you mean 'diagonal'",
    "prune={method: {name: pivot, times: 2}}": "unknown option of method 'pivot' 'times'",
    "prune={budget: {macs: 0.5}, criterion: {name: obs, damping: -1}}": "from 0 on",
    "prune={budget: {macs: 0.5}, criterion: {name: obd, fisher: true}}": "'sampled'",
    "prune={budget: {macs: 0.5}, criterion: {name: obd, samples: 0}}": "from 1 on",
    "prune={budget: {macs: 0.5}, criterion: {name: magnitude, p: 3}}": "p=3: 1 or 2",
    "prune={budget: {macs: 0.5}, criterion: {name: kron_obd, positions: 0.5}}": "a whole number from 1",
    "prune={method: {name: eigendamage, ekfac: 1}, budget: {macs: 0.5}}": "true or false",
    "prune={method: {name: eigendamage, rule: threshhold}, budget: {macs: 0.5}}": "did you mean 'threshold'",
    "prune.rounds=0": "greater than or equal to 1",
    "prune={method: zero, rounds: 2}": "takes no budget and no rounds",
    "prune={method: zero, budget: {macs: 0.5}}": "takes no budget",
    "prune={criterion: taylor, budget: {macs: 0.5, at_least: 0.1}, rounds: 2}": "are others in every round",
    "prune={criterion: taylor, budget: {channels: 0.5}, rounds: 2}": "is none any more",
    "prune={budget: {macs: 0.5, at_least: 1.0}}": "at_least=1 is one channel, at_least='all' is every channel",
    "prune={method: {name: eigendamage, separable: true}, budget: {macs: 0.5}}": "known: cp, svd",
    "prune={}": "a finetune section needs a prune section",
    "prune={method: zero}": "'zero' needs optimizer 'sdprun'",
    "prune={budget: {macs: 0.5}, criterion: {name: directional, basis: exact, soft: true}}": "soft: basis 'exact' has",
    "prune={budget: {macs: 0.5}, criterion: {name: directional, k: 9}}": "k: basis 'kfe' has no such option",
    "prune={budget: {macs: 0.5}, criterion: 'nowhere_at_all:Mine'}": "cannot import 'nowhere_at_all'",
    "train.optimizer.name=sdprun": "optimizer 'sdprun' takes no momentum: it would break the sum of gradients",
    "train.optimizer.name=adam": "unknown option of optimizer 'adam' 'momentum': known: weight_decay",
    "train.optimizer.momentun=0.5": "did you mean 'momentum'",
    "train.optimizer.momentum=1": r"momentum=1: a number in \[0, 1\) is expected",
    "train.optimizer.weight_decay=-5e-4": "weight_decay=-5e-4: a number from 0 on",
    "train.optimizer=3": "train.optimizer",
    "train.optimizer=builtins:dict": "builtins:dict.*make",
    "train.momentum=0.90": "momentum belongs to the optimizer: optimizer: {name: sgd, momentum: 0.90}",
    "prune.train={epochs: 1, lr: 0.1, momentum: 0.9}": "prune.train: momentum belongs to the optimizer",
    "train.c=0.1": "c is a setting of optimizer sdprun, and this is sgd",
    "train.baseline=true": "baseline: optimizer 'sgd' prunes nothing",
    "finetune.optimizer.nesterov=true": "nesterov: true needs a momentum",
    "prune.train.epoch=3": "unknown key in prune.train 'epoch': did you mean 'epochs'",
    "train=null": "give either a train section or model.weights; neither is given",
    "model.weights=w.safetensors": "either a train section or model.weights; both",
    "train.epochs=0": "train.epochs=0 must be greater than or equal to 1",
    "train.epochs=yes": "train.epochs=True must be a valid integer",
    "train.lr=.nan": r"train.lr=\.nan must be a finite number",
    "train.lr=-1": "train.lr=-1 must be greater than 0",
    "train.lr=fast": "train.lr='fast' must be a valid number",
    "data.validation=1": "must be less than 1",
    "data=3": "data=3 must be a valid section",
    "finetune={lr: 0.1}": "finetune.epochs is missing",
    "seeds=[]": "different numbers from 0 on",
    "seeds=[1, 1]": "different numbers from 0 on",
    "measure.batch_sizes=[0]": "different numbers from 1 on",
    "device=gpu": "device='gpu' must be 'cpu' or 'auto'",
    "train.epochs": "key=value is expected",
    "train..epochs=1": "key=value is expected",
    "train.epochs=[1": "not YAML",
}


@pytest.mark.parametrize("override", BAD)
def test_bad_settings_are_told_in_one_line(tmp_path: Path, override: str) -> None:
    with pytest.raises(sc.SecateurError, match=BAD[override]) as caught:
        recipe.read(written(tmp_path), [override])
    assert "\n" not in str(caught.value) and "pydantic" not in str(caught.value)


@pytest.mark.parametrize(
    "pair",
    [
        ("train.lr=0.1", "train.lr=0.2"),
        ("prune.budget={macs: 0.5}", "prune.budget.macs=0.3"),
        ("prune.budget.macs=0.5", "prune.budget.macs=0.3"),
        ("prune.budget.macs=0.3", "prune={criterion: random, budget: {macs: 0.3}}"),
    ],
)
def test_two_overrides_that_contradict(tmp_path: Path, pair: tuple[str, str]) -> None:
    with pytest.raises(sc.SecateurError, match="contradicts"):
        recipe.read(written(tmp_path), pair)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SDPRUN.replace("mu: 0.6", "momentum: 0.9"), "takes no momentum: it would break the sum"),
        (SDPRUN.replace("mu: 0.6", "weight_decay: 0.1"), "takes no weight_decay"),
        (SDPRUN.replace("sqrt", "root"), "unknown weights 'root'"),
        (SDPRUN.replace("mu: 0.6", "mu: 2"), "train: mu=2: a number in .0, 1. is expected"),
        (SDPRUN + "name: a\nname: b\n", "the key 'name' is given twice"),
        ("model: {name: lenet5}\n", "data is missing; train|data is missing"),
        ("- a\n- b\n", "keys and values are expected"),
        ("", "keys and values are expected"),
        ("a: [", "not YAML"),
        ("a: !!python/object/apply:os.getcwd []", "not YAML"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(sc.SecateurError, match=message):
        recipe.read(written(tmp_path, text))


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(sc.SecateurError, match=r"train.lr=-1 must.*; unknown key in train 'epoch'"):
        recipe.read(written(tmp_path), ["train.epoch=3", "train.lr=-1"])


def test_a_number_is_told_as_it_was_typed(tmp_path: Path) -> None:
    """0.10 is not 0.1 to whoever looks for it in the command that was typed, and 1e-3 is not 0.001."""
    path = written(tmp_path)
    told = {
        ("train.lr=0.10", "train.lr=0.20"): "override 'train.lr=0.20' contradicts 'train.lr=0.10'",
        ("train.lr=-1e-3",): "train.lr=-1e-3 must be greater than 0",
        ("train.epochs=1e3",): "train.epochs=1e3 must be a valid integer",
        ("prune.budget.macs=1.50",): "macs=1.50",
        ("prune={budget: {macs: 0.5}, criterion: {name: obs, damping: -1e-3}}",): "damping=-1e-3",
    }
    for overrides, message in told.items():
        with pytest.raises(sc.SecateurError, match=re.escape(message)):
            recipe.read(path, overrides)
    found = recipe.read(path, ["train.lr=0.10", "prune.budget.macs=0.50"])
    assert (repr(found.train.lr), repr(found.prune.budget["macs"])) == ("0.10", "0.50")
    assert (found.train.lr, found.prune.budget["macs"]) == (0.1, 0.5)
    assert json.dumps(found.model_dump(mode="json")) == json.dumps(
        recipe.read(path, ["train.lr=0.1", "prune.budget.macs=0.5"]).model_dump(mode="json")
    )
    assert type(copy.deepcopy(found.train.lr)) is float and type(found.train.lr + 0) is float


def test_paths_in_a_recipe_are_relative_to_its_file_and_overrides_to_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "elsewhere").mkdir()
    text = BASE.replace("digits,", "mnist, root: ../sets,").replace("width: 0.25}", "width: 0.25}, weights: 'w-{seed}'")
    written(tmp_path / "recipes", text[: text.index("train:")])
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = recipe.read("../recipes/r.yaml")
    assert Path(found.model.weights.replace("{seed}", "0")).resolve() == (tmp_path / "recipes" / "w-0").resolve()
    assert Path(found.data.root).is_absolute() and Path(found.data.root).resolve() == (tmp_path / "sets").resolve()
    for override in ("model.weights=mine", "model={name: digits_cnn, weights: mine}"):
        found = recipe.read("../recipes/r.yaml", [override, "data.root=~/sets"])
        assert found.model.weights == str(tmp_path / "elsewhere" / "mine")
        assert found.data.root == str(Path.home() / "sets")
    shipped_one = read_named("mnist-lenet5-pivot")
    assert shipped_one.model.weights.startswith(str(tmp_path / "elsewhere" / "bench"))


def test_a_recipe_is_a_file_or_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_named("digits-taylor").name == "digits-taylor"
    (tmp_path / "digits-taylor").write_text(BASE)
    assert read_named("digits-taylor").name == "small"
    for given, message in {"r.yaml": "no such file", "a/b": "no such file", "digits-tailor": "'digits-taylor'"}.items():
        with pytest.raises(sc.SecateurError, match=message):
            read_named(given)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"], ids=["missing", "not text"])
def test_unreadable_files(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "r.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(sc.SecateurError, match="cannot be read"):
        recipe.read(path)
