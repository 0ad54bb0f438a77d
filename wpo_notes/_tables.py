"""Tables of numbers in files (CSV, NumPy, Parquet), with the names of their columns, and what speaks against a fit."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from wpo_notes._optional import needed
from wpo_notes.fit import fewest_points

__all__ = ["Table", "checked_for_density", "default_names", "read_table", "write_table"]

_DELIMITERS = "\t", ";", ",", " "  # the first wins ties: 1,5;2,5 is two cells with decimal commas
_SNIFFED_LINES = 100
_MISSING = {"", "na", "n/a", "nan", "null", "none", "?", "-"}
_TEXT_ENDINGS = ".csv", ".tsv", ".txt", ".dat"
# When to doubt a density: rows for each distinct value of a column, distance of the farthest value from the median
# in interquartile ranges (3 for 100 000 normal values), rows for each parameter of one Gaussian, and the smallest
# eigenvalue of the correlations.
_ROWS_A_VALUE, _FAR, _ROWS_A_PARAMETER, _DEPENDENT = 5, 10, 10, 1e-6


class Table(NamedTuple):
    """Numbers (n, d) with names of the columns; `named` if the names are the file's own."""

    columns: tuple[str, ...]
    values: np.ndarray
    named: bool


class _Raw(NamedTuple):
    """A file's columns, each cell as it stands there, and the lines of the file on which the rows are."""

    columns: tuple[str, ...]
    cells: list[Sequence[Any]]  # one sequence a column
    named: bool
    lines: list[int] | None = None

    def row(self, index: int) -> str:
        """How a message names a row."""
        return f"row {index + 1}" + (f" (line {self.lines[index]})" if self.lines else "")


def default_names(count: int) -> tuple[str, ...]:
    """Names of columns that have none: x1, x2, ..."""
    return tuple(f"x{number}" for number in range(1, count + 1))


def read_table(
    path: str | os.PathLike[str], *, columns: Sequence[str] | None = None, in_order: bool = False
) -> Table:
    """Read finite numbers from a file whose ending says what it is.

    Args:
        path: text (.csv, .tsv, .txt, .dat) with commas, semicolons, tabs or blanks between the cells and with or
            without a line of names; .npy or .npz with one array; .parquet.
        columns: names of the columns to take, in this order; all if None.
        in_order: take the columns of a file without names as these, if there are as many.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown ending, a damaged file, rows of different lengths, a missing column, or a cell that is
            no finite number; the message names the row and the column.
        ModuleNotFoundError: a Parquet file without pyarrow.
    """
    path = Path(path)
    if path.suffix.lower() not in _READERS:
        raise ValueError(
            f"{path} must end in one of {', '.join(_READERS)}, which says how it is read: rename or convert it"
        )
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}")
    raw = _READERS[path.suffix.lower()](path)
    if not raw.columns or len(raw.cells[0]) == 0:
        raise ValueError(f"{path} has no rows of numbers")
    repeated = [name for name, count in Counter(raw.columns).items() if count > 1]
    if repeated:
        raise ValueError(f"{path} has more than one column {repeated[0]!r}: rename them")
    chosen = raw.columns if columns is None else tuple(columns)
    if in_order and not raw.named and len(chosen) == len(raw.columns):
        raw = raw._replace(columns=chosen)
    absent = [name for name in chosen if name not in raw.columns]
    if absent:
        raise ValueError(
            f"{path} has no column {absent[0]!r}, but {', '.join(map(repr, raw.columns))}"
        )
    parsed = [_numbers(path, raw, raw.columns.index(name)) for name in chosen]
    values = np.stack(parsed, 1)
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        row, column = bad[0].tolist()
        what = "a missing value" if np.isnan(values[row, column]) else "an infinite value"
        raise ValueError(
            f"{path}, {raw.row(row)}, column {chosen[column]!r}: {what} (of {len(bad)} in the file that are missing or "
            "infinite): remove or fill in those rows"
        )
    return Table(chosen, values, raw.named)


def write_table(path: str | os.PathLike[str], columns: Sequence[str], values: np.ndarray) -> None:
    """Write numbers (n, d) with the names of their columns: .csv, .tsv, .npy (without names) or .parquet.

    Raises:
        ValueError: another ending.
        ModuleNotFoundError: a Parquet file without pyarrow.
    """
    path = Path(path)
    ending = path.suffix.lower()
    if ending in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(
                file, delimiter="," if ending == ".csv" else "\t", lineterminator="\n"
            )
            writer.writerow(columns)
            writer.writerows(values.tolist())
    elif ending == ".npy":
        np.save(path, values)
    elif ending == ".parquet":
        table = needed("pyarrow").table(dict(zip(columns, values.T, strict=True)))
        needed("pyarrow.parquet").write_table(table, path)
    else:
        raise ValueError(
            f"{path} must end in .csv, .tsv, .npy or .parquet, which says how it is written"
        )


def checked_for_density(
    table: Table, path: str | os.PathLike[str], *, folds: int | None = None
) -> tuple[Table, list[str]]:
    """The table without repeated rows, and sentences about what speaks against a density fitted to it.

    Args:
        table: what `read_table` returned.
        path: of its file, for the messages.
        folds: into which the rows are cut, if each fit is to leave one of them out.

    Raises:
        ValueError: constant columns, or too few distinct rows for `fit_kernel_model`.
    """
    constant = np.ptp(table.values, axis=0) == 0
    if constant.any():
        names = ", ".join(
            repr(name) for name, yes in zip(table.columns, constant, strict=True) if yes
        )
        raise ValueError(
            f"{path}: column(s) {names} are constant, so the rows have no density: leave them out with --columns"
        )
    table, sentences = _distinct_rows(table)
    n, d = table.values.shape
    fewest, held_out = fewest_points(d), ""
    if folds is not None:  # the largest fold is left out
        fewest = -(-fewest * folds // (folds - 1))
        held_out = f" that holds out one row in {folds}"
    if n < fewest:
        raise ValueError(
            f"{path} has {n} distinct rows, but a fit of {d} column(s){held_out} needs at least {fewest}: bring more "
            "rows, or choose fewer columns with --columns"
        )
    return table, sentences + _doubts(table)


def _distinct_rows(table: Table) -> tuple[Table, list[str]]:
    """The rows that repeat no earlier one, in order, and a sentence about the others if there are any."""
    _, first, inverse = np.unique(table.values, axis=0, return_index=True, return_inverse=True)
    count = len(table.values)
    if len(first) == count:
        return table, []
    earlier = first[inverse.ravel()]
    repeat = int(np.flatnonzero(earlier != np.arange(count))[0])
    sentence = (
        f"{count - len(first)} of {count} rows repeat others (row {repeat + 1} is row {earlier[repeat] + 1} again) "
        "and are left out: where many points coincide, there is no density."
    )
    return table._replace(values=table.values[np.sort(first)]), [sentence]


def _doubts(table: Table) -> list[str]:
    """What in a table of distinct rows, no column constant, speaks against a density: a sentence each."""
    values, columns = table.values, table.columns
    n, d = values.shape
    found = []
    steps = np.diff(values, axis=0)
    for name, column, step in zip(columns, values.T, steps.T, strict=True):
        if (step == step[0]).all():
            found.append(f"Column {name!r} only counts the rows: leave it out.")
            continue
        distinct = len(np.unique(column))
        if distinct * _ROWS_A_VALUE <= n:
            found.append(
                f"Column {name!r} has only {distinct} values in {n} rows: it is discrete or rounded, and kernels narrower "
                "than its steps mean nothing."
            )
        low, middle, high = np.quantile(column, (0.25, 0.5, 0.75))
        far = np.abs(column - middle).max() / (high - low) if high > low else 0.0
        if far > _FAR:
            hint = " its logarithm may be the better column" if column.min() > 0 else ""
            found.append(
                f"Column {name!r} has heavy tails or outliers (a value {far:.0f} interquartile ranges from the median): the "
                f"tails of a mixture of Gaussians are lighter{';' if hint else ''}{hint}."
            )
    parameters = d * (d + 3) // 2
    if n < _ROWS_A_PARAMETER * parameters:
        found.append(
            f"{n} rows are few for {d} columns: one Gaussian alone has {parameters} parameters. Compare with it, or take "
            "fewer columns."
        )
    if d > 1:
        eigenvalues, vectors = np.linalg.eigh(np.corrcoef(values.T))
        if eigenvalues[0] < _DEPENDENT:
            involved = [columns[k] for k in np.flatnonzero(np.abs(vectors[:, 0]) > 0.1)]
            found.append(
                f"Columns {', '.join(map(repr, involved))} are almost linearly dependent: there is hardly a density; leave "
                "one out."
            )
    return found


def _numbers(path: Path, raw: _Raw, column: int) -> np.ndarray:
    """One column as float64, NaN where a value is missing."""
    cells = raw.cells[column]
    if isinstance(cells, np.ndarray):
        return cells.astype(np.float64)
    numbers = np.empty(len(cells))
    for row, cell in enumerate(cells):
        try:
            numbers[row] = np.nan if cell.strip().lower() in _MISSING else float(cell)
        except ValueError:
            comma = not _is_text(cell.replace(",", ".", 1))
            advice = "write decimal points" if comma else "leave the column out with --columns"
            raise ValueError(
                f"{path}, {raw.row(row)}, column {raw.columns[column]!r}: {cell[:40]!r} is not a number: {advice}"
            ) from None
    return numbers


def _read_text(path: Path) -> _Raw:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error}): save it as that") from error
    if lines:
        lines[0] = lines[0].removeprefix("#")  # as np.savetxt writes a header
    rows = _rows(lines, _delimiter(lines[:_SNIFFED_LINES]))
    if not rows:
        raise ValueError(f"{path} is empty")
    named = _is_header([cells for _, cells in rows[:2]])
    first, width = rows[0][0], len(rows[0][1])
    names = default_names(width)
    if named:
        head = [cell.strip() for cell in rows.pop(0)[1]]
        names = tuple(name or default for name, default in zip(head, names, strict=True))
    raw = _Raw(names, [()] * width, named, [line for line, _ in rows])
    for row, (_, cells) in enumerate(rows):
        count = len(cells)
        if count != width:
            odd = (
                f"{names[count]!r} has none" if count < width else f"{cells[width][:40]!r} is extra"
            )
            raise ValueError(
                f"{path}, {raw.row(row)}: {count} cell(s), but line {first} has {width}: {odd}"
            )
    return raw._replace(cells=list(zip(*(cells for _, cells in rows), strict=True)) or raw.cells)


def _delimiter(lines: list[str]) -> str:
    """The delimiter that cuts most lines into one and the same number of cells, more than one."""

    def agreeing(delimiter: str) -> int:
        widths = Counter(len(cells) for _, cells in _rows(lines, delimiter))
        width, count = widths.most_common(1)[0] if widths else (1, 0)
        return count if width > 1 else 0

    return max(_DELIMITERS, key=agreeing)


def _rows(lines: list[str], delimiter: str) -> list[tuple[int, list[str]]]:
    """Line number and cells of each line that is not blank."""
    if delimiter == " ":
        lines = [" ".join(line.split()) for line in lines]
    reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=True)
    return [
        (reader.line_num, cells)
        for cells in reader
        if len(cells) > 1 or (cells and cells[0].strip())
    ]


def _is_header(rows: list[list[str]]) -> bool:
    """Whether the first of two rows is names: text in every cell that is not blank, or above a number."""
    text = [_is_text(cell) for cell in rows[0]]
    if all(yes or not cell.strip() for yes, cell in zip(text, rows[0], strict=True)):
        return any(text)
    return len(rows) > 1 and any(
        above and not _is_text(below) for above, below in zip(text, rows[1], strict=False)
    )


def _is_text(cell: str) -> bool:
    """Whether a cell is neither a number nor missing."""
    try:
        float(cell)
    except ValueError:
        return cell.strip().lower() not in _MISSING
    return False


def _read_numpy(path: Path) -> _Raw:
    try:
        array = np.load(path, allow_pickle=False)
        if isinstance(array, np.lib.npyio.NpzFile):
            with array as archive:
                if len(archive.files) != 1:
                    raise ValueError(f"it holds {len(archive.files)} arrays, not one")
                array = archive[archive.files[0]]
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} is not a file of one array of numbers: {error}") from error
    if array.ndim == 1:
        array = array[:, None]
    if array.ndim != 2 or array.dtype.kind not in "iuf":
        raise ValueError(
            f"{path} must hold a matrix (n, d) of numbers, one point a row, got {array.dtype} of shape {array.shape}"
        )
    return _Raw(default_names(array.shape[1]), list(array.T), named=False)


def _read_parquet(path: Path) -> _Raw:
    pyarrow = needed("pyarrow")
    try:
        table = needed("pyarrow.parquet").read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path} is damaged or not a Parquet file: {error}") from error
    columns: list[Sequence[Any]] = []
    for column in table.columns:
        kinds = pyarrow.types
        if any(
            is_kind(column.type)
            for is_kind in (kinds.is_integer, kinds.is_floating, kinds.is_decimal)
        ):
            columns.append(column.cast("float64", safe=False).to_numpy())
        else:  # an error if it is asked for, which names the first cell
            columns.append([str(cell) for cell in column.to_pylist()])
    return _Raw(tuple(table.column_names), columns, named=True)


_READERS = dict.fromkeys(_TEXT_ENDINGS, _read_text) | {
    ".npy": _read_numpy,
    ".npz": _read_numpy,
    ".parquet": _read_parquet,
}
