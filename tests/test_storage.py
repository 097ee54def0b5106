import errno
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import secateur as sc
from secateur import storage as store
from secateur._internal import shards
from secateur._internal.errors import BadFile, SecateurWarning
from secateur.lab.models.registry import build


class Tied(nn.Module):
    """One matrix used twice, a buffer that is kept and one that is not."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.up = nn.Linear(4, width)
        self.first = nn.Linear(width, width, bias=False)
        self.second = nn.Linear(width, width, bias=False)
        self.second.weight = self.first.weight
        self.down = nn.Linear(width, 3)
        self.register_buffer("kept", torch.ones(3))
        self.register_buffer("made", torch.zeros(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.second(self.first(self.up(x)).relu()).relu()) * self.kept + self.made


def halved(model: nn.Module, inputs: Tensor) -> nn.Module:
    graph = sc.trace(model, inputs)
    return sc.cut(model, sc.allocate(graph, sc.score(model, graph), sc.Budget(channels=0.5)))


def full_at(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full when a file whose name has this in it is to be put in its place."""
    replace = os.replace

    def crash(source: str, target: str) -> None:
        if name in Path(target).name:
            raise OSError(errno.ENOSPC, "no space left")
        replace(source, target)

    monkeypatch.setattr(os, "replace", crash)


def same(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(
        t.dtype == theirs[n].dtype and torch.equal(t, theirs[n]) for n, t in ours.items()
    )


@pytest.fixture
def small() -> nn.Module:
    torch.manual_seed(0)
    return halved(build("digits_cnn", width=0.25), torch.zeros(1, 1, 8, 8))


@pytest.fixture
def saved(small: nn.Module, tmp_path: Path) -> Path:
    store.save(small, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("times", [0, 1, 2], ids=["whole", "cut", "cut twice"])
def test_a_built_in_model_comes_back_without_its_builder(times: int, tmp_path: Path) -> None:
    inputs = torch.randn(2, 1, 8, 8)
    model = build("digits_cnn", width=0.5)
    for _ in range(times):
        model = halved(model, inputs)
    store.save(model, tmp_path)
    back = sc.load(tmp_path)
    assert same(model, back)
    assert sc.record(back) == sc.record(model) and len(sc.record(back)) == times
    assert torch.equal(model.eval()(inputs), back.eval()(inputs))
    assert sc.trace(back, inputs).macs() == sc.trace(model, inputs).macs()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_shared_tensors_stay_shared_and_types_stay(dtype: torch.dtype, tmp_path: Path) -> None:
    model = halved(Tied().to(dtype), torch.zeros(1, 4, dtype=dtype))
    store.save(model, tmp_path)
    back = store.load(tmp_path, Tied)
    assert same(model, back)
    assert back.second.weight is back.first.weight
    assert len(list(back.parameters())) == len(list(model.parameters()))


def test_nothing_is_changed_by_saving_and_loading(small: nn.Module, tmp_path: Path) -> None:
    before = {name: t.clone() for name, t in small.state_dict().items()}
    small.eval()
    state = torch.get_rng_state()
    store.save(small, tmp_path)
    store.load(tmp_path)
    assert torch.equal(state, torch.get_rng_state())
    assert not small.training and all(torch.equal(t, before[n]) for n, t in small.state_dict().items())


def test_memory_layout_does_not_matter(small: nn.Module, tmp_path: Path) -> None:
    store.save(small.to(memory_format=torch.channels_last), tmp_path)
    assert same(small, store.load(tmp_path))


def test_notes_and_foreign_files_stay(saved: Path, small: nn.Module) -> None:
    (saved / "README").write_text("mine")
    store.save(small, saved, notes={"accuracy": 0.5})
    assert store.read_head(saved)["notes"] == {"accuracy": 0.5}
    assert (saved / "README").read_text() == "mine"
    assert same(small, store.load(saved))
    assert len(list(saved.glob("*.safetensors"))) == 1  # the earlier weights are gone


def test_a_crash_while_saving_again_leaves_the_old_save(
    saved: Path, small: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = {name: t.clone() for name, t in small.state_dict().items()}
    replace = os.replace

    def crash(source: str, target: str) -> None:
        if Path(target).name == store.FILE:
            raise OSError("no space left")
        replace(source, target)

    monkeypatch.setattr(os, "replace", crash)
    with torch.no_grad():
        small.head.weight.add_(1)
    with pytest.raises(sc.SecateurError, match=r"cannot be written.*no space left"):
        store.save(small, saved)
    monkeypatch.undo()
    assert all(torch.equal(t, old[n]) for n, t in store.load(saved).state_dict().items())


def test_a_model_changed_by_other_hands_is_not_called_built_in(tmp_path: Path) -> None:
    model = build("digits_cnn", width=0.25)
    model.head = nn.Linear(16, 3)
    store.save(model, tmp_path)
    with pytest.raises(sc.SecateurError, match="does not begin with a built-in model"):
        store.load(tmp_path)


def test_values_that_are_not_finite_warn(small: nn.Module, tmp_path: Path) -> None:
    with torch.no_grad():
        small.head.bias[0] = float("nan")
    with pytest.warns(UserWarning, match="head.bias"):
        store.save(small, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.load(tmp_path).head.bias.isnan().any()


class Remembers(nn.Linear):
    """State that is not a tensor."""

    def get_extra_state(self) -> dict[str, int]:
        return {"a": 1}


@pytest.mark.parametrize(
    ("model", "message"),
    [(nn.Linear(2, 2).to("meta"), "meta device"), (Remembers(2, 2), "'_extra_state'.*is a dict, not a tensor")],
    ids=["meta", "extra state"],
)
def test_what_cannot_be_saved_leaves_nothing(tmp_path: Path, model: nn.Module, message: str) -> None:
    with pytest.raises(sc.SecateurError, match=message):
        store.save(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_notes_must_be_json(small: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(sc.SecateurError, match="notes"):
        store.save(small, tmp_path / "x", notes={"a": object()})
    assert not (tmp_path / "x").exists()


def test_a_file_is_in_the_way(small: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(sc.SecateurError, match="cannot be written"):
        store.save(small, tmp_path / "x")


def edited(**changes: object):
    def edit(folder: Path) -> None:
        head = json.loads((folder / store.FILE).read_text())
        head.update(changes)
        (folder / store.FILE).write_text(json.dumps({k: v for k, v in head.items() if v != "gone"}))

    return edit


def cut_short(name: str):
    def spoil(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return spoil


def flipped(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)


def other_plan(folder: Path) -> None:
    """A record whose plan removes something else."""
    head = json.loads((folder / store.FILE).read_text())
    plan = json.loads(head["record"][0]["cut"])
    name = next(iter(plan["slices"]))
    plan["slices"][name] = {d: positions[:-1] for d, positions in plan["slices"][name].items()}
    edited(record=[{"cut": json.dumps(plan)}])(folder)


CASES = {
    "no JSON file": (lambda f: (f / store.FILE).unlink(), "not a directory that secateur saved"),
    "JSON cut short": (cut_short(store.FILE), "secateur.json is damaged"),
    "JSON of somebody else": (lambda f: (f / store.FILE).write_text('{"a": 1}'), "was not written by secateur"),
    "a list": (lambda f: (f / store.FILE).write_text("[]"), "was not written by secateur"),
    "later version": (edited(secateur=2), "version 2.*newer"),
    "an entry is gone": (edited(record="gone"), "damaged: record is missing"),
    "a path out of the directory": (edited(weights={"file": "../x.safetensors", "sha256": ""}), "damaged"),
    "weights gone": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors, are missing"),
    "weights cut short": (cut_short("model.safetensors"), "cut short"),
    "one bit flipped": (flipped, "checksum"),
    "unknown model": (edited(model={"name": "digits_cn", "options": {}}), "did you mean 'digits_cnn'"),
    "damaged model entry": (edited(model={"name": "digits_cnn"}), "damaged: model is missing or not as expected"),
    "a model without a name": (edited(model={"name": ["os"], "options": {}}), "damaged: model is missing"),
    "options of another kind": (edited(model={"name": "digits_cnn", "options": {"width": "a"}}), "positive number"),
    "nested without end": (lambda f: (f / store.FILE).write_text("[" * 100_000), "cannot be read as JSON"),
    "another final": (edited(final="0" * 16), "other shapes than were saved"),
    "another plan": (other_plan, "the plan is damaged|replaying its record gives other shapes"),
    "unknown step": (edited(record=[{"cutt": ""}]), "unknown step.*did you mean 'cut'"),
    "no step": (edited(record=["cut"]), "not one kind of step"),
    "damaged step": (edited(record=[{"cut": "{}"}]), "cannot be replayed"),
    "a step that is no text": (edited(record=[{"cut": {"a": 1}}]), "cannot be replayed"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_damaged_or_foreign_says_so(case: str, saved: Path) -> None:
    spoil, message = CASES[case]
    spoil(saved)
    with pytest.raises(BadFile, match=message):
        store.load(saved)


def test_a_file_that_names_code_does_not_have_it_run(saved: Path) -> None:
    edited(model={"name": "os:abort", "options": {}})(saved)
    with pytest.raises(sc.SecateurError, match=r"made by os:abort.*no code that a file names is run"):
        store.load(saved)


def test_a_save_of_another_original_is_not_taken_for_this_one(saved: Path) -> None:
    edited(original="0" * 16)(saved)
    with pytest.raises(sc.SecateurError, match="saved from another model"):
        store.load(saved)


JUNK = ("", "{}", "[]", "null", "5", '{"fingerprint": 3}', '{"fingerprint": "F", "layers": {"conv1": [1e400, 1]}}',
        '{"fingerprint": "F", "layers": {"conv1": [-1, 1]}}', '{"fingerprint": "F", "layers": {"": [1, 1]}}',
        '{"form": 1, "fingerprint": "F", "layers": {"conv1": {}}, "patterns": {}, "unused": [], "ms": {}}',
        '{"fingerprint": "F", "patterns": {"conv1": {"rows": [[0]], "columns": [[0]]}}, "skipped": {}}',
        '{"secateur_plan": 1, "fingerprint": "F", "removed": {}, "slices": {"conv1.weight": {"7": [0]}}}')  # fmt: skip


@pytest.mark.parametrize("kind", store.REPLAY)
@pytest.mark.parametrize("junk", JUNK)
def test_a_step_that_somebody_has_spoiled_is_a_bad_file(kind: str, junk: str, tmp_path: Path) -> None:
    model = build("digits_cnn", width=0.25)
    store.save(model, tmp_path)
    own = json.loads((tmp_path / store.FILE).read_text())["final"]
    edited(record=[{kind: junk.replace("F", own)}], final="0" * 16)(tmp_path)
    with pytest.raises(BadFile):
        store.load(tmp_path)


def test_no_such_directory(tmp_path: Path) -> None:
    with pytest.raises(sc.SecateurError, match="no such directory"):
        store.load(tmp_path / "x")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build("digits_cnn"), "saved from another model"),
        (lambda: build("lenet5"), "saved from another model"),
        (lambda: halved(build("digits_cnn", width=0.25), torch.zeros(1, 1, 8, 8)), "cut already"),
        (lambda: 3, "made a int"),
        (lambda: build("digits_cnn", width=0.25).to("meta"), "meta device"),
        ("digits_cn", "did you mean"),
        (build("digits_cnn", width=0.25), "a DigitsCNN that is made already|a Sequential that is made already"),
        (lambda width: build("digits_cnn", width=width), "called without arguments, and missing.*'width'"),
        (3, "a function that makes the model.*not a int"),
        ("nowhere_at_all:make", "cannot import"),
    ],
    ids=[
        "other width",
        "other model",
        "cut already",
        "no module",
        "meta",
        "unknown name",
        "a module",
        "a function of one argument",
        "a number",
        "no such module",
    ],
)
def test_the_wrong_builder_is_refused(saved: Path, make, message: str) -> None:
    with pytest.raises(sc.SecateurError, match=message):
        store.load(saved, make)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("head.bias"), "missing: head.bias"),
        (lambda t: t.update(more=torch.zeros(1)), "too many: more"),
        (lambda t: t.update({"head.bias": torch.zeros(11)}), r"head.bias \[11\] where \[10\]"),
    ],
    ids=["missing", "extra", "shape"],
)
def test_weights_that_do_not_fit(tmp_path: Path, change, message: str) -> None:
    tensors = build("digits_cnn").state_dict()
    change(tensors)
    save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(sc.SecateurError, match=message):
        store.load_weights(tmp_path / "w.safetensors", lambda: build("digits_cnn"))


def test_plain_weights_and_saved_directories_are_weights(saved: Path, small: nn.Module, tmp_path: Path) -> None:
    model = build("digits_cnn")
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    assert same(model, store.load_weights(tmp_path / "w.safetensors", lambda: build("digits_cnn")))
    assert same(small, store.load_weights(saved, lambda: build("digits_cnn", width=0.25)))
    with pytest.raises(sc.SecateurError, match="no such file"):
        store.load_weights(tmp_path / "none", lambda: build("digits_cnn"))
    (tmp_path / "w.safetensors").write_bytes(b"not weights")
    with pytest.raises(sc.SecateurError, match="not a readable safetensors file"):
        store.load_weights(tmp_path / "w.safetensors", lambda: build("digits_cnn"))


def averaged(model: nn.Module) -> nn.Module:
    return torch.optim.swa_utils.AveragedModel(model)


WRAPPERS = {
    "compiled": torch.compile,
    "data parallel": nn.DataParallel,
    "averaged": averaged,
    "averaged and compiled": lambda model: torch.compile(averaged(model)),
}


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # by what torch.compile imports
@pytest.mark.parametrize("wrap", WRAPPERS)
def test_of_a_wrapped_model_the_model_inside_is_saved(wrap: str, small: nn.Module, tmp_path: Path) -> None:
    if "averaged" in wrap:
        with pytest.warns(SecateurWarning, match="n_averaged"):
            store.save(WRAPPERS[wrap](small), tmp_path)
    else:
        store.save(WRAPPERS[wrap](small), tmp_path)
    back = store.load(tmp_path)
    assert type(back) is type(small) and same(small, back) and sc.record(back) == sc.record(small)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(sc.SecateurError, match=r"an nn\.Module is expected, a OrderedDict"):
        store.save(build("digits_cnn").state_dict(), tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("full", ["open", "fsync"])
def test_a_full_disk_is_one_message_and_leaves_the_old_save(
    full: str, saved: Path, small: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says where, how much, and how to go on; and what was half written takes up no room."""
    old, files = {n: t.clone() for n, t in small.state_dict().items()}, sorted(saved.iterdir())
    no_room = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fails(*_: object, **__: object) -> None:
        raise no_room

    if full == "fsync":
        monkeypatch.setattr(os, "fsync", fails)
    else:
        plain = open
        monkeypatch.setattr("builtins.open", lambda path, mode="r", **k: fails() if "w" in mode else plain(path, mode))
    with torch.no_grad():
        small.head.weight.add_(1)
    with pytest.raises(BadFile) as caught:
        store.save(small, saved)
    monkeypatch.undo()
    told = str(caught.value)
    assert "\n" not in told and str(saved) in told and "No space left on device" in told
    assert re.search(r"[\d,]+ bytes are to be written, [\d,]+ are free", told) and "run the same again" in told
    assert sorted(saved.iterdir()) == files
    assert all(torch.equal(t, old[n]) for n, t in store.load(saved).state_dict().items())


def test_weights_that_nothing_refers_to_do_not_stay_on_a_full_disk(
    saved: Path, small: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = sorted(saved.iterdir())
    full_at(store.FILE, monkeypatch)
    with pytest.raises(BadFile):
        store.save(small, saved)
    assert sorted(saved.iterdir()) == files


def test_the_folder_of_a_whole_run_says_where_the_saves_are(saved: Path) -> None:
    with pytest.raises(BadFile, match=rf"it has no secateur.json; these below it are: {saved}"):
        store.load(saved.parent)


def test_files_of_others_stay_and_earlier_weights_go(tmp_path: Path) -> None:
    others = {"model.safetensors": b"weights of another tool", "model-2.safetensors": b"also", "notes.txt": b"text"}
    for name, content in others.items():
        (tmp_path / name).write_bytes(content)
    for _ in range(4):
        sc.save(build("digits_cnn", width=0.25), tmp_path)
        sc.load(tmp_path)
        assert {name: (tmp_path / name).read_bytes() for name in others} == others
        assert len(list(tmp_path.iterdir())) == len(others) + 3  # the weights, what was done, and the page about it


class Shifted(nn.Module):
    """Subtracts a mean that no file holds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)
        self.register_buffer("mean", torch.full((4,), 0.5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x - self.mean).relu())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_no_file_holds_keeps_its_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    x = torch.randn(2, 4).to(dtype)
    small = halved(Shifted().to(dtype), x)
    sc.save(small, tmp_path)
    loaded = sc.load(tmp_path, build=Shifted)
    assert loaded.mean.dtype == dtype and torch.equal(loaded(x), small(x))
    head = json.loads((tmp_path / store.FILE).read_text())
    for dtypes, message in ((5, "dtypes"), ({"mean": "load"}, None)):
        (tmp_path / store.FILE).write_text(json.dumps(head | {"dtypes": dtypes}))
        if message is None:
            assert sc.load(tmp_path, build=Shifted).mean.dtype == torch.float32  # not a dtype: nothing is guessed
        else:
            with pytest.raises(sc.SecateurError, match=message):
                sc.load(tmp_path, build=Shifted)


def wide() -> nn.Module:
    """A model of five tensors and a shared one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 40), nn.Linear(40, 3, bias=False))
    model.tied = model[2].weight
    return model


@pytest.mark.parametrize("most", [1, 1500, 6500, 10**9])
def test_large_models_are_in_several_files_with_an_index(
    most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD", most)
    graph = sc.trace(wide(), torch.zeros(1, 8))
    small = sc.cut(wide(), sc.make_plan(graph, {"0": range(10), "2": range(7)}))
    for _ in range(2):  # again over the first
        store.save(small, tmp_path)
        files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
        head = json.loads((tmp_path / store.FILE).read_text())
        index = tmp_path / "model.safetensors.index.json"
        assert (len(files) > 1) == index.exists() == ("files" in head["weights"])
        if index.exists():
            said = json.loads(index.read_text())
            assert sorted(set(said["weight_map"].values())) == files
            tensors = {}
            for file in files:
                part = load_file(tmp_path / file)
                assert len(part) == 1 or sum(t.nbytes for t in part.values()) <= most
                assert all(said["weight_map"][name] == file for name in part)
                tensors |= part
            assert said["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
            again = store.load_weights(
                index, lambda: sc.cut(wide(), sc.make_plan(graph, {"0": range(10), "2": range(7)}))
            )
            assert same(small, again)
        assert same(small, store.load(tmp_path, wide))
    store.save(wide(), tmp_path, notes={})
    if most > 1500:
        files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
        monkeypatch.setattr(shards, "SHARD", 10**9)
        store.save(wide(), tmp_path)
        assert len(list(tmp_path.glob("*.safetensors"))) == 1
        assert not (tmp_path / "model.safetensors.index.json").exists()


def test_one_of_several_files_that_is_damaged_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD", 1500)
    store.save(wide(), tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    content = bytearray(files[1].read_bytes())
    content[-1] ^= 1
    files[1].write_bytes(content)
    with pytest.raises(BadFile, match=rf"{files[1].name} is damaged"):
        store.load(tmp_path, wide)
    files[0].unlink()
    with pytest.raises(BadFile, match=rf"its weights, {files[0].name}, are missing"):
        store.load(tmp_path, wide)
    (tmp_path / "index.json").write_text("[]")
    with pytest.raises(BadFile, match="no index of safetensors files"):
        store.load_weights(tmp_path / "index.json", wide)


def test_a_full_disk_in_the_middle_of_several_files_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD", 1500)
    full_at("00003", monkeypatch)
    with pytest.raises(BadFile, match="no space left"):
        store.save(wide(), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read as Linux tells it")
def test_no_more_than_a_file_is_in_memory_beside_the_model(tmp_path: Path) -> None:
    """Eight layers of 16 MiB, in files of 20 MB: saving and loading take a file's bytes more."""
    code = """
import resource, sys, torch
from torch import nn
import secateur as sc
from secateur import storage
from secateur._internal import shards
shards.SHARD = 20 * 10**6
make = lambda: nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(8)))
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
model = make()
if sys.argv[1] == "save":
    storage.save(nn.Sequential(nn.Linear(2, 2)), "warm")
    before = peak(); storage.save(model, "large"); print(peak() - before)
else:
    storage.load("warm", lambda: nn.Sequential(nn.Linear(2, 2)))
    before = peak(); storage.load("large", lambda: model); print(peak() - before)
"""
    for verb, most in (("save", 45), ("load", 60)):  # two layers are not in one file; of 128 MiB
        run = subprocess.run(
            [sys.executable, "-c", code, verb], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        assert float(run.stdout) < most, (verb, run.stdout)


def test_a_page_says_what_a_save_is(saved: Path, small: nn.Module, tmp_path: Path) -> None:
    page = (saved / "README.md").read_text()
    whole = sum(p.numel() for p in build("digits_cnn", width=0.25).parameters())
    now = sum(p.numel() for p in small.parameters())
    assert f"| parameters | {whole:,} | {now:,} ({now / whole:.1%}) |" in page
    assert 'sc.load(".")' in page
    assert "build=" not in page
    assert "secateur export . --out model.onnx\n" in page
    store.save(small, saved, notes={"before": {"macs": 1000}, "after": {"macs": 250}})
    assert "| MACs | 1,000 | 250 (25.0%) |" in (saved / "README.md").read_text()
    graph = sc.trace(wide(), torch.zeros(1, 8))
    store.save(sc.cut(wide(), sc.make_plan(graph, {"0": [1]})), tmp_path / "own")
    page = (tmp_path / "own" / "README.md").read_text()
    assert 'sc.load(".", build=make_model)' in page
    assert "--build package.module:make_model" in page
    (saved / "README.md").write_text("# Mine\n")
    store.save(small, saved)
    assert (saved / "README.md").read_text() == "# Mine\n"


def test_a_full_disk_at_the_last_file_leaves_the_old_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD", 1500)
    store.save(wide(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    full_at(store.FILE, monkeypatch)
    with pytest.raises(BadFile):
        store.save(wide(), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
