"""Data sets by name: fixed splits, nothing shared between them, and clear words where something is missing."""

import io
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from secateur._internal.errors import SecateurError
from secateur.lab.data import registry as data_registry
from secateur.lab.data.dataset import Dataset, Split, stratified
from secateur.lab.data.registry import DATA, load


def own() -> Dataset:
    """A user's own data set."""
    split = Split(torch.zeros(4, 1, 2, 2), torch.tensor([0, 1, 0, 1]))
    return Dataset("own", split, None, split, 2)


@pytest.fixture
def small_mnist(tmp_path, monkeypatch):
    """A folder with a tiny MNIST, and an empty working directory."""
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SECATEUR_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "elsewhere" / "mnist"
    folder.mkdir(parents=True)
    for split, n in (("train", 40), ("test", 20)):
        stream = io.BytesIO()
        Image.fromarray(np.zeros((28, 28), dtype=np.uint8)).save(stream, "PNG")
        images = [{"bytes": stream.getvalue(), "path": ""}] * n
        pq.write_table(pa.table({"image": images, "label": [i % 10 for i in range(n)]}), folder / f"{split}.parquet")
    return folder.parent


@pytest.fixture
def offline(monkeypatch):
    """No local data beside the repository, and no network."""
    monkeypatch.setattr(data_registry, "__file__", "/nowhere/a/b/c/d.py")

    def fail(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)


def test_digits_are_split_once_and_for_all():
    a, b = load("digits"), load("digits")
    sizes = [len(a.split(name)) for name in ("train", "validation", "test")]
    assert sum(sizes) == 1797
    assert sizes[2] == pytest.approx(1797 / 5, abs=5)
    assert sizes[1] == pytest.approx((1797 - sizes[2]) / 10, abs=5)
    for name in ("train", "validation", "test"):
        assert torch.equal(a.split(name).images, b.split(name).images)
        assert torch.equal(a.split(name).labels, b.split(name).labels)
    assert a.image == (1, 8, 8)
    whole = load("digits", validation=0)
    assert torch.equal(whole.test.images, a.test.images), "the test split depends on the validation split"
    assert len(whole.train) == sizes[0] + sizes[1]


def test_digits_are_normalised():
    data = load("digits")
    x = torch.cat([x for x, _ in data.loader("train", 100)])
    assert abs(x.mean().item()) < 0.02
    assert abs(x.std().item() - 1) < 0.02


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.37, 1.0])
def test_stratified_parts_cover_everything_once(fraction):
    labels = torch.tensor([0] * 50 + [1] * 10 + [2] * 31)[torch.randperm(91)]
    rest, part = stratified(labels, fraction, seed=4)
    assert torch.equal(torch.cat([rest, part]).sort().values, torch.arange(91))
    for label, count in ((0, 50), (1, 10), (2, 31)):
        assert int((labels[part] == label).sum()) == round(fraction * count)


def test_local_files_by_root_and_by_environment(small_mnist, offline, monkeypatch):
    data = load("mnist", root=small_mnist, validation=0.25)
    assert (len(data.train), len(data.validation), len(data.test)) == (30, 10, 20)
    assert data.train.images.dtype == torch.uint8
    assert data.notes == "lossless"
    monkeypatch.setenv("SECATEUR_DATA", str(small_mnist))
    assert len(load("mnist", validation=0.25).test) == 20


def test_offline_says_what_to_put_where(small_mnist, offline):
    with pytest.raises(
        SecateurError, match=r"train.parquet and test.parquet .* into data/mnist/, or set SECATEUR_DATA"
    ):
        load("mnist")
    with pytest.raises(SecateurError, match=r"holds no cifar10/train.parquet"):
        load("cifar10", root=small_mnist)


def test_fetched_where_there_is_a_network(small_mnist, offline, monkeypatch):
    asked = []

    def fetch(repository, **options):
        asked.append((repository, options["repo_type"]))
        return str(small_mnist / "mnist")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert len(load("mnist", validation=0.25).test) == 20
    assert asked == [("ylecun/mnist", "dataset")]
    os.unlink(small_mnist / "mnist" / "test.parquet")
    with pytest.raises(SecateurError, match="was fetched but"):
        load("mnist")


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("digit", {}, "did you mean 'digits'"),
        ("digits", {"validation": 1.0}, "validation=1.0"),
        ("digits", {"validation": float("nan")}, "validation=nan"),
        ("digits", {"validation": 1e-4}, "leaves an empty part"),
        ("builtins:dict", {}, "a dict with train and test"),
        ("nosuchmodule:make", {}, "cannot import"),
    ],
)
def test_bad_names_and_fractions(name, options, told):
    with pytest.raises(SecateurError, match=told):
        load(name, **options)


def test_own_factory():
    data = load(f"{__name__}:own")
    assert data.classes == 2
    with pytest.raises(SecateurError, match="no validation split"):
        data.split("validation")
    with pytest.raises(SecateurError, match="did you mean 'train'"):
        data.split("trian")


@pytest.mark.parametrize(("name", "sizes"), [("mnist", (54001, 5999, 10000)), ("cifar10", (45000, 5000, 10000))])
def test_real_files(name, sizes):
    source = {"mnist": data_registry.MNIST, "cifar10": data_registry.CIFAR10}[name]
    if not any((folder / name / "train.parquet").is_file() for folder in data_registry.folders(None)):
        pytest.skip(f"no {name} parquet files here: set SECATEUR_DATA to a folder that holds {name}/")
    data = load(name)
    assert (len(data.train), len(data.validation), len(data.test)) == sizes
    assert data.image == source.layout.shape
    assert data.notes in {"lossless", "images stored as JPEG (lossy)"}
    x = data.loader("test", 2000).normalise(data.test.images[:2000])
    assert x.mean().abs() < 0.1
    assert abs(x.std() - 1) < 0.1


def test_every_built_in_name_is_loaded_by_some_test():
    assert set(DATA) == {"digits", "mnist", "cifar10"}
