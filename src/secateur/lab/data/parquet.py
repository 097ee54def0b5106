"""Images in parquet files in the Hugging Face layout, decoded once and kept.

A split is ``train.parquet``, or ``train-00000-of-00001.parquet`` and so on, with a struct column ``{bytes, path}`` of
encoded images and an integer column ``label``. Decoding 60,000 of them takes many seconds, so the raw pixels are kept
as ``.npz`` in the user's cache (``SECATEUR_CACHE``), under the files' paths, sizes and times; a damaged one is rebuilt.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import tempfile
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from secateur._internal.errors import BadFile
from secateur._internal.extras import extra

JPEG = b"\xff\xd8\xff"


@dataclass(frozen=True)
class Layout:
    """What a data set's files must hold.

    Attributes:
        columns: allowed names of the image column.
        shape: channels, height, width.
        classes: labels are 0 to ``classes - 1``.
    """

    columns: tuple[str, ...]
    shape: tuple[int, int, int]
    classes: int


@dataclass(frozen=True, eq=False)
class Decoded:
    """uint8 images [n, channels, height, width], int64 labels [n], and whether any image was stored as JPEG."""

    images: np.ndarray
    labels: np.ndarray
    jpeg: bool


def files_of(folder: Path, split: str) -> list[Path]:
    """The parquet files of one split below a folder, in order; empty if there are none.

    Raises:
        BadFile: some parts of a split are missing.
    """
    if (folder / f"{split}.parquet").is_file():
        return [folder / f"{split}.parquet"]
    for where in ("", "*/"):
        parts = sorted(folder.glob(f"{where}{split}-*-of-*.parquet"))
        if parts:
            count = int(re.findall(r"-of-(\d+)", parts[0].name)[-1])
            if len(parts) != count:
                raise BadFile(f"{parts[0].parent}: {len(parts)} of {count} parts of {split!r} are there: add the rest")
            return parts
    return []


def read(files: Sequence[Path], layout: Layout) -> Decoded:
    """Decode the files of one split, or take the pixels from the cache.

    Raises:
        BadFile: a file, a column or an image cannot be read or is not what the layout says.
    """
    cached = cache_file(files)
    known = _from_cache(cached, layout)
    if known is not None:
        return known
    parts = [decode(file, layout) for file in files]
    result = Decoded(
        np.concatenate([part.images for part in parts]),
        np.concatenate([part.labels for part in parts]),
        any(part.jpeg for part in parts),
    )
    if not len(result.labels):
        raise BadFile(f"{files[0]}: there is no image in it")
    _to_cache(cached, result)
    return result


def decode(file: Path, layout: Layout) -> Decoded:
    """Decode one parquet file."""
    with extra("lab", "reading parquet files"):
        import pyarrow as pa
        import pyarrow.parquet as pq

    try:
        table = pq.read_table(file)
    except (pa.ArrowException, OSError) as error:
        raise BadFile(f"{file}: cannot be read as parquet ({error}): fetch it again") from error
    column = next((name for name in layout.columns if name in table.column_names), None)
    if column is None or "label" not in table.column_names:
        raise BadFile(
            f"{file}: columns {table.column_names}; expected {' or '.join(map(repr, layout.columns))} and 'label'"
        )
    kind = table.schema.field(column).type
    if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        raise BadFile(f"{file}: column {column!r} is {kind}; expected a struct of bytes and path")
    if not pa.types.is_integer(table.schema.field("label").type):
        raise BadFile(f"{file}: column 'label' is {table.schema.field('label').type}; expected integers")
    if table.column("label").null_count:
        raise BadFile(f"{file}: some labels are missing")
    labels = table.column("label").to_numpy().astype(np.int64)
    if len(labels) and (labels.min() < 0 or labels.max() >= layout.classes):
        raise BadFile(f"{file}: labels {labels.min()} to {labels.max()}; expected 0 to {layout.classes - 1}")
    images = np.empty((len(labels), *layout.shape), dtype=np.uint8)
    jpeg, row = False, 0
    for chunk in table.column(column).chunks:
        for encoded in chunk.field("bytes").to_pylist():
            images[row] = _image(encoded, layout, f"{file}, row {row}")
            jpeg = jpeg or encoded.startswith(JPEG)
            row += 1
    return Decoded(images, labels, jpeg)


def _image(encoded: bytes | None, layout: Layout, where: str) -> np.ndarray:
    with extra("lab", "decoding images"):
        from PIL import Image

    channels, height, width = layout.shape
    if not encoded:
        raise BadFile(f"{where}: the image is missing")
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadFile(f"{where}: the image cannot be decoded ({error}): fetch the file again") from error
    if pixels.shape[:2] != (height, width):
        raise BadFile(f"{where}: an image of {pixels.shape[0]}x{pixels.shape[1]}; expected {height}x{width}")
    return pixels.reshape(height, width, channels).transpose(2, 0, 1)


def cache_file(files: Sequence[Path]) -> Path:
    """Where the pixels of these files are kept; another name as soon as one of the files changes."""
    folder = Path(os.environ.get("SECATEUR_CACHE") or Path.home() / ".cache" / "secateur")
    text = "\n".join(f"{file.resolve()} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files)
    return folder / f"{files[0].stem}-{hashlib.sha256(text.encode()).hexdigest()[:24]}.npz"


def _from_cache(path: Path, layout: Layout) -> Decoded | None:
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            result = Decoded(arrays["images"], arrays["labels"], bool(arrays["jpeg"]))
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    fits = result.images.shape == (len(result.labels), *layout.shape) and result.images.dtype == np.uint8
    return result if fits and result.labels.dtype == np.int64 else None


def _to_cache(path: Path, decoded: Decoded) -> None:
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            temporary = file.name
            np.savez(file, images=decoded.images, labels=decoded.labels, jpeg=np.array(decoded.jpeg))
        os.replace(temporary, path)
    except OSError as error:  # a full or read-only disk costs time at the next start, nothing else
        warnings.warn(f"decoded images are not kept: {error}", stacklevel=2)
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)
