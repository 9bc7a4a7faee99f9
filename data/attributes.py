"""Read the attributes of photos, such as smiling, from a table or folders; find directions that change them."""

import csv
import difflib
import os
import re
import textwrap
import typing
import zlib
from pathlib import Path

import numpy as np
import torch

from vae import UserError


class Labels(typing.NamedTuple):
    """Labels of K photos for A attributes, with mean 0; an unknown one is 0."""

    names: list[str]
    values: torch.Tensor  # (K, A), two values are 2 apart, others have a standard deviation of 1
    photos: list[int]  # indices of the K photos

    def __str__(self):
        checksum = zlib.crc32(self.values.numpy().tobytes(), zlib.crc32(" ".join(self.names).encode()))
        return f"{len(self.names)} of {len(self.photos)} photos, checksum {checksum:08x}"


# Labels
def read_labels(table, photos):
    """Return the Labels of at most 16,384 Photos; `table` is a file, or "folders".

    Attributes that fewer than 10 photos have, or lack, are left out. Raises UserError if none remains or the table
    cannot be read.
    """
    names, rows = folder_attributes(photos) if table == "folders" else table_attributes(table, photos)
    indices = [index for index, row in enumerate(rows) if row is not None][:16384]
    values = np.array([rows[index] for index in indices]).reshape(len(indices), len(names))
    labels = {name: scale_labels(name, column) for name, column in zip(names, values.T, strict=True)}
    few = [name for name in names if labels[name] is None]
    if few:
        some = textwrap.shorten(", ".join(few), 300, placeholder=" ...")
        print(f"Left out    {len(few)} attributes that fewer than 10 photos have, or lack: {some}")
    kept = [name for name in names if labels[name] is not None]
    print(f"Attributes  {len(kept)}, of {len(indices):,} training photos")
    if not kept:
        raise UserError(f"ATTRIBUTES {table} has no attribute that at least 10 training photos have, and 10 lack.")
    return Labels(kept, torch.from_numpy(np.stack([labels[name] for name in kept], axis=1)), indices)


def scale_labels(name, values):
    """Return values (K,) of an attribute as labels with mean 0, or None if too few are above or below the mean."""
    is_known = np.isfinite(values)
    known = values[is_known]
    labels = np.where(is_known, values - known.sum() / max(1, len(known)), 0)
    if min((labels > 0).sum(), (labels < 0).sum()) < 10:
        return None
    if len(np.unique(known)) == 2:
        return labels * 2 / np.ptp(known)
    print(f"Unit        of {name}: {2 * known.std():.3g}, which is two standard deviations")
    return labels / known.std()


def folder_attributes(photos):
    """Return the folders' names, and each photo's row, 1 for its folder and -1 for others; None outside of them."""
    paths = [Path(str(photo)).parts for photo in photos]
    level = len(Path(os.path.commonpath(map(str, photos))).parts)
    folders = [path[level] if len(path) > level + 1 else None for path in paths]
    names = sorted({*folders} - {None})
    rows = dict(zip(names, 2 * np.eye(len(names)) - 1, strict=True))
    return names, [rows.get(folder) for folder in folders]


def table_attributes(path, photos):
    """Return the names of a table's columns, and each photo's row, None if it has none; raises UserError if none has.

    A row's name is the file name, or the end of the path, with any suffix.
    """
    names, table = read_table(path)
    rows = []
    for photo in photos:
        parts = Path(str(photo)).with_suffix("").parts
        endings = ["/".join(parts[start:]) for start in range(len(parts))]
        rows.append(next((table[ending] for ending in endings if ending in table), None))
    if all(row is None for row in rows):
        raise UserError(f"{path} has no row for {photos[0]} or any other photo: put file names in its first column.")
    return names, rows


def read_table(path):
    """Return the names of a table's columns, and a dictionary from file names without suffix to arrays of numbers.

    Reads CSV files with a header, and CelebA's list_attr_celeba.txt, in which spaces separate the columns, the first
    line is the number of rows, and the column of file names has no name. Raises UserError if the file is neither.
    """
    try:
        lines = Path(path).read_text("utf-8-sig").strip().splitlines()
        lines = lines[1:] if lines[0].isdigit() else lines
        delimiter = max(",;\t", key=lines[0].count)
        header, *rows = csv.reader(lines, delimiter=delimiter) if delimiter in lines[0] else map(str.split, lines)
        names = header if len(header) < len(rows[0]) else header[1:]
        values = [np.array([float(cell or "nan") for cell in row[1:]]).reshape(len(names)) for row in rows]
    except (OSError, ValueError, IndexError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read as a table of file names and numbers ({reason}).") from None
    return names, {os.path.splitext(row[0])[0]: row_values for row, row_values in zip(rows, values, strict=True)}


# Directions
def parse_edit(text, known):
    """Parse "Smiling 2, Eyeglasses -1" into {name: units}; a missing number is 1.

    Upper case, spaces and underscores do not matter. Raises UserError for a name that is not `known`.
    """
    names = {simplify(name): name for name in known}
    units = {}
    for part in filter(str.strip, text.split(",")):
        name, number = re.fullmatch(r"\s*(.*?)(\s[-+]?\d*\.?\d+)?\s*", part, re.DOTALL).groups()
        if simplify(name) not in names:
            nearest = ", ".join(names[one] for one in difflib.get_close_matches(simplify(name), names, 3, cutoff=0))
            raise UserError(f"EDIT: there is no attribute {name!r}; similar ones are {nearest}. See --mode attributes.")
        units[names[simplify(name)]] = float(number or 1)
    return units


def simplify(name):
    """Return the letters and digits of a name in lower case."""
    return re.sub(r"[\W_]", "", name).lower()


def fit_directions(mu, labels):
    """Return {attribute: direction (L,)} that changes it when added to a code, given the codes mu (K, L) of Labels.

    Ridge regression of the codes on all labels at once keeps the other attributes as they are. With a weaker penalty
    than 1, rare attributes drown, because the others explain them. Each direction is then scaled: one unit moves a
    linear read-out of the attribute from its mean over the photos without the attribute to that over those with it.
    """
    mu = (mu - mu.mean(0)).double()
    covariance = labels.values.T @ mu / len(mu)  # (A, L)
    penalized = labels.values.T @ labels.values / len(mu) + torch.eye(len(covariance))
    directions = torch.linalg.solve(penalized, covariance)
    readouts = torch.linalg.lstsq(mu, labels.values).solution.T  # (A, L)
    variances = (readouts * covariance).sum(1)  # of the read-outs
    gaps = 2 * variances / labels.values.square().mean(0)
    moved = (readouts * directions).sum(1).maximum(variances / 10)  # redundant attributes would turn into noise
    rows = directions * (gaps / moved).nan_to_num()[:, None]
    return dict(zip(labels.names, rows.float(), strict=True))
