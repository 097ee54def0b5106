"""Parquet files are decoded exactly, kept, and every kind of damage is told."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from secateur._internal.errors import SecateurError
from secateur.lab.data import parquet
from secateur.lab.data.parquet import Layout, cache_file, decode, files_of, read

RGB = Layout(("img", "image"), (3, 5, 6), 10)
GREY = Layout(("img", "image"), (1, 5, 6), 10)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def encode(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def pixels(n: int, layout: Layout, seed: int = 0) -> np.ndarray:
    channels, height, width = layout.shape
    shape = (n, height, width) if channels == 1 else (n, height, width, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write(path, encoded, labels=None, column="img"):
    images = [{"bytes": item, "path": "x.png"} for item in encoded]
    labels = list(range(len(encoded))) if labels is None else labels
    pq.write_table(pa.table({column: images, "label": pa.array(labels)}), path)
    return path


@pytest.mark.parametrize("layout", [RGB, GREY])
@pytest.mark.parametrize("column", ["img", "image"])
def test_png_is_decoded_exactly(tmp_path, layout, column):
    raw = pixels(4, layout)
    result = read([write(tmp_path / "train.parquet", [encode(p) for p in raw], column=column)], layout)
    expected = raw[:, None] if layout is GREY else raw.transpose(0, 3, 1, 2)
    assert np.array_equal(result.images, expected)
    assert result.labels.tolist() == [0, 1, 2, 3]
    assert not result.jpeg


def test_jpeg_is_noticed(tmp_path):
    raw = pixels(3, RGB)
    mixed = [encode(raw[0]), encode(raw[1], "JPEG"), encode(raw[2])]
    assert decode(write(tmp_path / "a.parquet", mixed), RGB).jpeg


def test_parts_are_joined_in_order(tmp_path):
    raw = pixels(4, RGB)
    folder = tmp_path / "data" / "plain_text"
    folder.mkdir(parents=True)
    for part in (1, 0):
        two = raw[2 * part : 2 * part + 2]
        write(folder / f"train-0000{part}-of-00002.parquet", [encode(p) for p in two], [part, part])
    files = files_of(tmp_path / "data", "train")
    assert read(files, RGB).labels.tolist() == [0, 0, 1, 1]
    files[0].unlink()
    with pytest.raises(SecateurError, match="1 of 2 parts"):
        files_of(tmp_path / "data", "train")
    assert files_of(tmp_path / "data", "test") == []


def test_kept_pixels_are_used_and_damaged_ones_made_anew(tmp_path, monkeypatch):
    raw = pixels(3, RGB)
    files = [write(tmp_path / "train.parquet", [encode(p) for p in raw])]
    first = read(files, RGB)
    kept = cache_file(files)
    with monkeypatch.context() as patch:
        patch.setattr(parquet, "decode", None)
        assert np.array_equal(read(files, RGB).images, first.images)
    for damage in (b"", b"not a zip", kept.read_bytes()[:-40], kept.read_bytes()[:200]):
        kept.write_bytes(damage)
        assert np.array_equal(read(files, RGB).images, first.images)
    np.savez(kept, images=first.images[:, :1], labels=first.labels, jpeg=np.array(False))
    assert np.array_equal(read(files, RGB).images, first.images)
    assert [path.name for path in kept.parent.iterdir()] == [kept.name], "something temporary stayed"


def test_a_changed_file_is_read_anew(tmp_path):
    file = tmp_path / "train.parquet"
    write(file, [encode(p) for p in pixels(3, RGB)])
    read([file], RGB)
    raw = pixels(4, RGB, seed=1)
    write(file, [encode(p) for p in raw])
    assert np.array_equal(read([file], RGB).images, raw.transpose(0, 3, 1, 2))


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "file" / "below"))
    files = [write(tmp_path / "train.parquet", [encode(p) for p in pixels(2, RGB)])]
    with pytest.warns(UserWarning, match="not kept"):
        assert len(read(files, RGB).labels) == 2


def damaged(tmp_path, kind):
    """A file with one thing wrong."""
    good = [encode(p) for p in pixels(3, RGB)]
    path = tmp_path / "train.parquet"
    if kind == "foreign":
        path.write_bytes(b"hello" * 100)
    elif kind == "empty file":
        path.write_bytes(b"")
    elif kind == "truncated":
        write(path, good)
        path.write_bytes(path.read_bytes()[:-30])
    elif kind == "no rows":
        table = pq.read_table(write(path, good)).slice(0, 0)
        pq.write_table(table, path)
    elif kind == "no label":
        pq.write_table(pa.table({"img": [{"bytes": good[0], "path": ""}]}), path)
    elif kind == "plain column":
        pq.write_table(pa.table({"img": good, "label": [0, 1, 2]}), path)
    elif kind == "text labels":
        write(path, good, ["a", "b", "c"])
    elif kind == "missing label":
        write(path, good, [0, None, 2])
    else:
        column = "picture" if kind == "other column" else "img"
        labels = [0, 1, 10] if kind == "label 10" else [0, 1, -1] if kind == "label -1" else None
        last = {
            "half an image": good[2][: len(good[2]) // 2],
            "no image": b"no image at all",
            "missing image": None,
            "other size": encode(np.zeros((6, 6, 3), dtype=np.uint8)),
        }.get(kind, good[2])
        write(path, [*good[:2], last], labels, column)
    return path


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("foreign", "cannot be read as parquet"),
        ("empty file", "cannot be read as parquet"),
        ("truncated", "cannot be read as parquet"),
        ("no rows", "there is no image in it"),
        ("no label", "columns .* expected 'img' or 'image' and 'label'"),
        ("other column", "columns .* expected 'img' or 'image' and 'label'"),
        ("plain column", "expected a struct of bytes and path"),
        ("text labels", "column 'label' is string; expected integers"),
        ("missing label", "some labels are missing"),
        ("label 10", "labels 0 to 10; expected 0 to 9"),
        ("label -1", "labels -1 to 1; expected 0 to 9"),
        ("half an image", "row 2: the image cannot be decoded"),
        ("no image", "row 2: the image cannot be decoded"),
        ("missing image", "row 2: the image is missing"),
        ("other size", "row 2: an image of 6x6; expected 5x6"),
    ],
)
def test_damage_is_told_with_the_file(tmp_path, cache, kind, told):
    path = damaged(tmp_path, kind)
    with pytest.raises(SecateurError, match=told) as error:
        read([path], RGB)
    assert str(path) in str(error.value)
    assert not cache.exists(), "a damaged file was kept"
