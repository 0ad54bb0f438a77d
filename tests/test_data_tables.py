"""Tables in files: what is read and written, and errors that name the row and the column."""

import csv
import re

import numpy as np
import pytest
import sklearn.datasets
from sklearn.datasets import load_iris

from wpo_notes._tables import Table, checked_for_density, read_table, write_table

ROWS = [[1.5, -2.0], [3.0, 4e-3], [5.25, 6.0]]


def written(folder, text, name="data.csv", encoding="utf-8"):
    path = folder / name
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize(
    "text",
    [
        "a,b\n1.5,-2\n3,4e-3\n5.25,6\n",
        "a;b\r\n1.5;-2\r\n3;4e-3\r\n5.25;6\r\n",
        "a\tb\n1.5\t-2\n3\t4e-3\n5.25\t6",
        "a b\n1.5   -2\n   3 4e-3 \n5.25 6\n",
        "# a b\n1.5 -2\n3 4e-3\n5.25 6\n",
        '"a", "b"\n"1.5", "-2"\n\n3, 4e-3\n5.25, 6\n',
        "\ufeffa,b\n1.5,-2\n3,4e-3\n5.25,6\n",
    ],
)
def test_text_with_any_delimiter(tmp_path, text):
    table = read_table(written(tmp_path, text))
    assert table.columns == ("a", "b")
    assert table.named
    assert table.values.tolist() == ROWS


@pytest.mark.parametrize(
    ("text", "columns", "named", "count"),
    [
        ("1,2\n3,4\n", ("x1", "x2"), False, 2),
        ("5\n6\n7\n", ("x1",), False, 3),
        ("height of person\n1\n2\n", ("height of person",), True, 2),
        ("size,2019,2020\n1,2,3\n", ("size", "2019", "2020"), True, 1),
        (",a\n0,1\n1,2\n", ("x1", "a"), True, 2),
    ],
)
def test_header_is_found(tmp_path, text, columns, named, count):
    table = read_table(written(tmp_path, text))
    assert (table.columns, table.named, len(table.values)) == (columns, named, count)


def test_scikit_learns_own_file_of_iris_is_read_as_it_is():
    """It begins with '150,4,setosa,versicolor,virginica': counts and classes above five columns of numbers."""
    (folder,) = sklearn.datasets.__path__
    path = f"{folder}/data/iris.csv"
    columns = ["150", "4", "setosa", "versicolor"]
    assert np.array_equal(read_table(path, columns=columns).values, load_iris().data)


@pytest.mark.parametrize("ending", ["csv", "tsv", "npy"])
def test_what_is_written_is_read_again(tmp_path, ending):
    values = np.random.RandomState(0).standard_normal((20, 2)) * 1e5
    path = tmp_path / f"data.{ending}"
    columns = ("a, b", 'c"d') if ending != "npy" else ("x1", "x2")
    write_table(path, columns, values)
    table = read_table(path)
    assert table.columns == columns
    assert np.array_equal(table.values, values)


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="PyArrow is not installed: no Parquet")
    from pyarrow import parquet

    path = tmp_path / "data.parquet"
    write_table(path, ("a", "b"), np.array(ROWS))
    assert read_table(path).values.tolist() == ROWS
    parquet.write_table(
        pyarrow.table({"a": [1, 2], "b": ["x", "y"], "c": [1.0, None], "e": [True, False]}), path
    )
    assert read_table(path, columns=["a"]).values.tolist() == [[1.0], [2.0]]
    for column, message in {
        "b": "row 1, column 'b': 'x' is not a number",
        "c": "row 2, column 'c': a missing value",
        "e": "row 1, column 'e': 'True' is not a number",
    }.items():
        with pytest.raises(ValueError, match=message):
            read_table(path, columns=[column])
    path.write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="damaged or not a Parquet file"):
        read_table(path)


def test_numpy(tmp_path):
    path = tmp_path / "data.npy"
    np.save(path, np.arange(6).reshape(3, 2))
    assert read_table(path).values.dtype == np.float64
    np.save(path, np.arange(3.0))
    assert read_table(path).values.shape == (3, 1)
    np.savez(tmp_path / "one.npz", data=np.array(ROWS))
    assert read_table(tmp_path / "one.npz").values.tolist() == ROWS
    np.savez(tmp_path / "two.npz", a=np.ones(2), b=np.ones(2))
    with pytest.raises(ValueError, match="2 arrays, not one"):
        read_table(tmp_path / "two.npz")
    for array in (np.ones((2, 2, 2)), np.array([["a"]]), np.ones((2, 2), complex)):
        np.save(path, array)
        with pytest.raises(ValueError, match=r"must hold a matrix \(n, d\) of numbers"):
            read_table(path)
    np.save(path, np.array([{}]), allow_pickle=True)  # never unpickled
    with pytest.raises(ValueError, match="not a file of one array"):
        read_table(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="not a file of one array"):
        read_table(path)
    np.save(path, np.array([[1.0], [np.inf]]))
    with pytest.raises(ValueError, match="row 2, column 'x1': an infinite value"):
        read_table(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a,b\n1,2\n3,red\n",
            r"row 2 \(line 3\), column 'b': 'red' is not a number: leave .* --columns",
        ),
        ("1,2,red\n3,4,blue\n", r"row 1 \(line 1\), column 'x3': 'red'"),
        ("a,b\n1,2\n\n3,\n", r"row 2 \(line 4\), column 'b': a missing value \(of 1 in"),
        ("a,b\nNA,2\nnan,inf\n", r"row 1 \(line 2\), column 'a': a missing value \(of 3 in"),
        ("a,b\n1,inf\n", r"row 1 \(line 2\), column 'b': an infinite value"),
        (",2\n1,3\n", r"row 1 \(line 1\), column 'x1': a missing value"),
        (
            "a,b\n1,2\n1,2,3\n",
            r"row 2 \(line 3\): 3 cell\(s\), but line 1 has 2: '3' is extra",
        ),
        (
            "\na,b,c\n1,2,3\n\n1\n",
            r"row 2 \(line 5\): 1 cell\(s\), but line 2 has 3: 'b' has none",
        ),
        ("1,2\n3\n", r"row 2 \(line 2\): 1 cell\(s\), but line 1 has 2: 'x2' has none"),
        ("a;b\n1,5;2\n", r"column 'a': '1,5' is not a number: write decimal points"),
        ("a,a\n1,2\n", "more than one column 'a'"),
        ("a,b\n", "has no rows of numbers"),
        ("", "is empty"),
    ],
)
def test_errors_name_the_row_and_the_column(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_table(written(tmp_path, text))


def test_errors_of_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file at .*absent\.csv"):
        read_table(tmp_path / "absent.csv")
    with pytest.raises(ValueError, match=r"data\.xls must end in one of \.csv"):
        read_table(written(tmp_path, "1,2\n", "data.xls"))
    with pytest.raises(ValueError, match="not text in UTF-8"):
        read_table(written(tmp_path, "größe\n1\n", encoding="latin-1"))
    with pytest.raises(ValueError, match="has no column 'c', but 'a', 'b'"):
        read_table(written(tmp_path, "a,b\n1,2\n"), columns=["c"])
    with pytest.raises(ValueError, match=r"must end in \.csv, \.tsv"):
        write_table(tmp_path / "data.txt", ("a",), np.ones((1, 1)))


def test_unnamed_columns_can_stand_for_named_ones_in_order(tmp_path):
    path = written(tmp_path, "1,2\n3,4\n")
    assert read_table(path, columns=["a", "b"], in_order=True).columns == ("a", "b")
    with pytest.raises(ValueError, match="no column 'a'"):
        read_table(path, columns=["a"], in_order=True)
    path = written(tmp_path, "b,c,a\n1,red,2\n")
    assert read_table(path, columns=["a", "b"], in_order=True).values.tolist() == [[2.0, 1.0]]


# ---- what speaks against a density


def normal(n=200, d=2, seed=0):
    return np.random.RandomState(seed).standard_normal((n, d))


def checked(values, **options):
    names = tuple("abcdefgh"[: values.shape[1]])
    return checked_for_density(Table(names, values, True), "data.csv", **options)


def test_no_doubts_about_normal_samples():
    table, sentences = checked(normal())
    assert table.values.shape == (200, 2)
    assert sentences == []


def with_column(column):
    values = normal()
    values[:, 1] = column
    return values


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (with_column(np.arange(200) % 30), "Column 'b' has only 30 values in 200 rows"),
        (with_column(np.arange(5, 205)), "Column 'b' only counts the rows"),
        (with_column(np.exp(4 * normal()[:, 1])), r"Column 'b' has heavy tails.*logarithm"),
        (with_column(2 * normal()[:, 0]), "Columns 'a', 'b' are almost linearly dependent"),
        (normal(60, 4), "60 rows are few for 4 columns: one Gaussian alone has 14 parameters"),
    ],
)
def test_doubts(values, sentence):
    _, sentences = checked(values)
    assert len(sentences) == 1
    assert re.search(sentence, sentences[0])


def test_repeated_rows_are_left_out_and_named():
    values = normal()
    values[[50, 70]] = values[[3, 10]]
    table, (sentence,) = checked(values)
    assert "2 of 200 rows repeat others (row 51 is row 4 again)" in sentence
    assert np.array_equal(table.values, np.delete(values, [50, 70], axis=0))


def test_what_has_no_density_is_refused():
    with pytest.raises(ValueError, match=r"data\.csv: column\(s\) 'b' are constant.*--columns"):
        checked(with_column(3))
    with pytest.raises(ValueError, match=r"has 13 distinct rows, but .* 2 column.* at least 14"):
        checked(normal(13))
    assert len(checked(normal(14))[0].values) == 14


def test_rows_that_are_held_out_are_needed_on_top():
    """Of 18 rows the largest of 5 folds has 4, and 14 are left; of 17 it has 4 too."""
    with pytest.raises(
        ValueError, match=r"has 17 .* 2 column\(s\) that holds out one row in 5 needs at least 18"
    ):
        checked(normal(17), folds=5)
    assert len(checked(normal(18), folds=5)[0].values) == 18


def test_csv_is_what_pythons_module_reads(tmp_path):
    write_table(tmp_path / "a.csv", ("a, b", "c"), np.array(ROWS))
    with (tmp_path / "a.csv").open(newline="") as file:
        head, *rows = csv.reader(file)
    assert head == ["a, b", "c"]
    assert [[float(cell) for cell in row] for row in rows] == ROWS
