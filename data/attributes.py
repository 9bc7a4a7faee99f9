"""Read the attributes of photos, such as smiling, from tables or folders; find the directions that change them."""

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

from data.photos import SUFFIXES
from vae import UserError


class Labels(typing.NamedTuple):
    """Labels of K photos for A attributes."""

    names: list[str]
    values: torch.Tensor  # (K, A) with mean 0, scaled so that two values are 2 apart; others have a deviation of 1
    photos: list[int]  # indices of the K photos

    def __str__(self):
        checksum = zlib.crc32(self.values.numpy().tobytes(), zlib.crc32(" ".join(self.names).encode()))
        return f"{len(self.names)} of {len(self.photos)} photos, checksum {checksum:08x}"


# Labels
def read_labels(table, photos):
    """Return the Labels of the first 16,384 Photos that have any; `table` is a file, or "folders".

    An attribute is left out unless at least 10 photos have it and 10 lack it. Raises UserError if none remains or the
    table cannot be read.
    """
    names, rows = folder_attributes(photos) if table == "folders" else table_attributes(table, photos)
    indices = [index for index, row in enumerate(rows) if row is not None][:16384]
    values = np.array([rows[index] for index in indices]).reshape(len(indices), len(names))
    labels = {name: scale_labels(name, column) for name, column in zip(names, values.T, strict=True)}
    few = [name for name in names if labels[name] is None]
    if few:
        some = textwrap.shorten(", ".join(few), 300, placeholder=" ...")
        print(f"Left out    {some} ({len(few)} in all), because fewer than 10 photos have it or lack it")
    kept = [name for name in names if labels[name] is not None]
    print(f"Attributes  {len(kept)}, known for {len(indices):,} of {len(photos):,} training photos")
    if not kept:
        raise UserError(f"ATTRIBUTES {table} has no attribute that at least 10 training photos have and 10 lack.")
    return Labels(kept, torch.from_numpy(np.stack([labels[name] for name in kept], axis=1)), indices)


def scale_labels(name, values):
    """Return values (K,) of an attribute as Labels have them, unknown ones as 0; None if too few have or lack it."""
    is_known = np.isfinite(values)
    known = values[is_known]
    labels = np.where(is_known, values - known.sum() / max(1, len(known)), 0)
    if min((labels > 0).sum(), (labels < 0).sum()) < 10:
        return None
    if len(np.unique(known)) == 2:
        return labels * 2 / np.ptp(known)
    print(f"Unit        One unit of {name} is {2 * known.std():.3g} (two standard deviations)")
    return labels / known.std()


def folder_attributes(photos):
    """Return the names of the folders (or .zips) with photos, and each photo's row: 1 for its folder, -1 for others."""
    paths = [Path(str(photo)).parts for photo in photos]
    level = len(Path(os.path.commonpath(map(str, photos))).parts)
    folders = [path[level].removesuffix(".zip") if len(path) > level + 1 else "" for path in paths]
    names = sorted({*folders} - {""})
    rows = dict(zip(["", *names], 2 * np.eye(1 + len(names))[:, 1:] - 1, strict=True))
    return names, [rows[folder] for folder in folders]


def table_attributes(path, photos):
    """Return the names of a table's columns, and each photo's row, or None; raises UserError if no photo has one."""
    names, table = read_table(path)
    rows = []
    for photo in photos:
        parts = without_suffix(os.path.abspath(str(photo))).split("/")
        endings = ("/".join(parts[start:]) for start in reversed(range(len(parts))))  # tables may contain folders
        rows.append(next((table[ending] for ending in endings if ending in table), None))
    if all(row is None for row in rows):
        raise UserError(
            f"ATTRIBUTES {path} has no row for {photos[0]} or any other photo: put file names in its first column."
        )
    return names, rows


def without_suffix(name):
    """Return the path of a photo with slashes, none of them in front, and without a suffix such as .jpg."""
    path = Path(name.strip().replace("\\", "/"))
    return (path.with_suffix("") if path.suffix.lower() in SUFFIXES else path).as_posix().lstrip("/")


def read_table(path):
    """Return the names of a table's columns, and a dictionary from file names without suffix to arrays of numbers.

    Reads CSV files with a header, and CelebA's list_attr_celeba.txt, in which spaces separate the columns, the first
    line is the number of rows, and the column of file names has no name. Raises UserError if the file is neither.
    """
    words = {"": "nan", "na": "nan", "true": "1", "false": "0"}
    table = {}
    try:
        lines = [line for line in Path(path).read_text("utf-8-sig").splitlines() if line.strip()]
        lines = lines[1:] if lines[0].strip().isdigit() else lines
        delimiter = max(",;\t", key=lines[0].count)
        separated = csv.reader(lines, delimiter=delimiter, skipinitialspace=True)
        header, *rows = separated if delimiter in lines[0] else map(str.split, lines)
        names = header if len(header) < len(rows[0]) else header[1:]
        if without_suffix(header[0]) != header[0]:
            raise ValueError("the first line must contain the names of the columns")
        for name, *cells in rows:
            if len(cells) != len(names):
                raise ValueError(f"the row of {name} has {len(cells)} numbers instead of {len(names)}")
            table[without_suffix(name)] = np.array([float(words.get(cell.strip().lower(), cell)) for cell in cells])
    except (OSError, ValueError, IndexError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"ATTRIBUTES {path} cannot be read as a table of file names and numbers ({reason}).") from None
    return names, table


# Directions
def parse_edit(text, known):
    """Parse "Smiling 2, Eyeglasses -1" into {name: units}; a missing number is 1.

    Upper case, spaces and underscores do not matter. Raises UserError for a name that is not `known`.
    """
    names = {simplify(name): name for name in known}
    units = {}
    for part in filter(str.strip, text.split(",")):
        name, number = re.fullmatch(r"\s*(.*?)(\s[-+]?(?:\d+\.?\d*|\.\d+))?\s*", part, re.DOTALL).groups()
        if simplify(name) not in names:
            nearest = ", ".join(names[one] for one in difflib.get_close_matches(simplify(name), names, 3, cutoff=0))
            raise UserError(
                f"EDIT: there is no attribute {name!r}; similar ones are {nearest}. Write EDIT as in "
                '"Smiling 2, Young -3"; --mode attributes shows all names.'
            )
        units[names[simplify(name)]] = float(number or 1)
    return units


def simplify(name):
    """Return a name in lower case without spaces and underscores."""
    return re.sub(r"[\s_]", "", name).lower()


def fit_directions(mu, labels):
    """Return {attribute: direction (L,)} that changes it when added to a code, given the codes mu (K, L) of Labels.

    Ridge regression of the codes on all labels at once changes the other attributes less than the difference between
    the mean codes with and without the attribute does. A weaker penalty than 1 would lose rare attributes, which the
    others explain. Each direction is then scaled: one unit moves a linear read-out of the attribute from its mean over
    the photos without the attribute to its mean over those with it.
    """
    mu = (mu - mu.mean(0)).double()
    covariance = labels.values.T @ mu / len(mu)  # (A, L), proportional to the differences of the means
    penalized = labels.values.T @ labels.values / len(mu) + torch.eye(len(covariance))
    directions = torch.linalg.solve(penalized, covariance)
    readouts = torch.linalg.lstsq(mu, labels.values).solution.T  # (A, L)
    variances = (readouts * covariance).sum(1)  # of the read-outs
    is_redundant = (readouts * directions).sum(1) < variances / 10  # the other labels leave only noise
    directions[is_redundant] = covariance[is_redundant]
    gaps = 2 * variances / labels.values.square().mean(0)
    rows = directions * (gaps / (readouts * directions).sum(1)).nan_to_num()[:, None]
    return dict(zip(labels.names, rows.float(), strict=True))
