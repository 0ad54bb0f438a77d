"""The commands for one's own samples, on scikit-learn's real data and on files that are wrong."""

import csv
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import __file__ as sklearn_datasets
from sklearn.datasets import load_diabetes, load_iris, load_linnerud

from wpo_notes import fit as fit_module
from wpo_notes.__main__ import main
from wpo_notes._tables import read_table, write_table
from wpo_notes.fit import fit_kernel_model
from wpo_notes.model import FreeLowRankKernelModel, KernelModel
from wpo_notes.structured import LowRankGaussianMixture

# Files that nobody made for this package.
OTHERS = Path(sklearn_datasets).parent / "data"
QUICK = ["--centers", "10", "--steps", "3"]
FEATURES = tuple(load_iris().feature_names)


@pytest.fixture(scope="module")
def iris(tmp_path_factory):
    """Folder with iris as scikit-learn gives it, and a model of it."""
    folder = tmp_path_factory.mktemp("iris")
    write_table(folder / "iris.csv", FEATURES, load_iris().data)
    main(["fit", str(folder / "iris.csv"), "--out", str(folder / "model.safetensors"), *QUICK])
    return folder


def run(*arguments):
    main([str(one) for one in arguments])


def fails(capsys, *arguments):
    """The message of a command that ends with status 2."""
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_fit_is_fit_kernel_model_on_the_distinct_rows(iris, capsys):
    run("fit", iris / "iris.csv", "--out", iris / "again.safetensors", *QUICK, "--seed", 5)
    out, err = capsys.readouterr()
    assert "10 kernels for 149 rows of sepal length (cm)" in out
    assert "1 of 150 rows repeat others (row 143 is row 102 again)" in err
    loaded = KernelModel.load(iris / "again.safetensors")
    assert loaded.column_names == FEATURES
    x = load_iris().data
    x = torch.as_tensor(x[np.sort(np.unique(x, axis=0, return_index=True)[1])])
    same = fit_kernel_model(
        x, centers=10, steps=3, generator=torch.Generator().manual_seed(5), progress=False
    )
    assert torch.equal(loaded().log_prob(x), same().log_prob(x))
    assert not (iris / "again.safetensors.parts").exists()


def test_fit_shows_its_progress(iris, tmp_path, capsys):
    pytest.importorskip("tqdm", reason="tqdm is not installed: no progress bar")
    run("fit", iris / "iris.csv", "--out", tmp_path / "model.safetensors", *QUICK)
    out, err = capsys.readouterr()
    # One number of centres is asked for, and each of the five members has two.
    assert re.search(r"fit_kernel_model: 1 sizes .*centres=2", err)
    assert "sizes" not in out


def test_sample_keeps_the_names_and_obeys_the_seed(iris):
    for name, seed in (("a.csv", 0), ("b.csv", 0), ("c.csv", 1), ("d.npy", 0)):
        run(
            "sample",
            iris / "model.safetensors",
            "--count",
            500,
            "--out",
            iris / name,
            "--seed",
            seed,
        )
    a, b, c, d = (read_table(iris / f"{name}") for name in ("a.csv", "b.csv", "c.csv", "d.npy"))
    assert a.columns == FEATURES
    assert a.values.shape == (500, 4)
    assert np.array_equal(a.values, b.values)
    assert np.array_equal(a.values, d.values)
    assert not np.array_equal(a.values, c.values)
    # The mixture's mean is the data's, up to three steps of training; five standard errors of 500 samples.
    x = load_iris().data
    assert (np.abs(a.values.mean(0) - x.mean(0)) < 5 * x.std(0) / 500**0.5).all()


def test_density_is_in_the_units_of_the_data_and_its_score_the_gradient(tmp_path):
    """Columns of units that differ by a million, against numbers in one unit."""
    x = load_diabetes().data[:150, [2, 3]]
    scale = np.array([1e3, 1e-3])
    for name, values in (("one", x), ("two", x * scale)):
        write_table(tmp_path / f"{name}.csv", ("bmi", "bp"), values)
        run("fit", tmp_path / f"{name}.csv", "--out", tmp_path / f"{name}.safetensors", *QUICK)
        run(
            "density",
            tmp_path / f"{name}.safetensors",
            tmp_path / f"{name}.csv",
            "--out",
            tmp_path / f"{name}-density.csv",
        )
    one, two = (read_table(tmp_path / f"{name}-density.csv") for name in ("one", "two"))
    assert one.columns == ("bmi", "bp", "log_density", "score bmi", "score bp")
    assert np.array_equal(one.values[:, :2], x)
    # The Jacobian of this change of units is one in all, and the score's is 1 / scale.
    np.testing.assert_allclose(one.values[:, 2], two.values[:, 2], rtol=1e-6)
    np.testing.assert_allclose(one.values[:, 3:], two.values[:, 3:] * scale, rtol=1e-5, atol=1e-5)
    step = 1e-5 * x[:, 0].std()
    for name, shift in (("up", step), ("down", -step)):
        write_table(tmp_path / f"{name}.csv", ("bmi", "bp"), x + np.array([shift, 0]))
        run(
            "density",
            tmp_path / "one.safetensors",
            tmp_path / f"{name}.csv",
            "--out",
            tmp_path / f"{name}.npy",
        )
    slope = (np.load(tmp_path / "up.npy") - np.load(tmp_path / "down.npy"))[:, 2] / (2 * step)
    np.testing.assert_allclose(slope, one.values[:, 3], rtol=1e-4, atol=1e-4)


def test_density_finds_columns_by_name_or_takes_them_in_order(iris, tmp_path, capsys):
    x = load_iris().data[:7]
    model = iris / "model.safetensors"
    with (tmp_path / "labelled.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["species", *FEATURES[::-1]])
        writer.writerows([["setosa", *row[::-1]] for row in x])
    np.save(tmp_path / "unnamed.npy", x)
    for name in ("labelled.csv", "unnamed.npy"):
        run("density", model, tmp_path / name, "--out", tmp_path / f"{name}.npy")
    found = np.load(tmp_path / "labelled.csv.npy")
    assert np.array_equal(found, np.load(tmp_path / "unnamed.npy.npy"))
    with torch.no_grad():
        expected = KernelModel.load(model)().log_prob(torch.as_tensor(x))
    np.testing.assert_allclose(found[:, 4], expected.numpy())
    write_table(tmp_path / "other.csv", ("a", "b"), x[:, :2])
    message = fails(capsys, "density", model, tmp_path / "other.csv", "--out", tmp_path / "x.csv")
    assert "has no column 'sepal length (cm)', but 'a', 'b'" in message
    # a model of unnamed columns takes any, but as many
    x = load_iris().data[:, :2]
    np.save(tmp_path / "two.npy", x)
    run("fit", tmp_path / "two.npy", "--out", tmp_path / "two.safetensors", *QUICK)
    assert KernelModel.load(tmp_path / "two.safetensors").column_names is None
    run(
        "density", tmp_path / "two.safetensors", tmp_path / "other.csv", "--out", tmp_path / "y.csv"
    )
    assert read_table(tmp_path / "y.csv").columns[:3] == ("a", "b", "log_density")
    message = fails(
        capsys,
        "density",
        tmp_path / "two.safetensors",
        iris / "iris.csv",
        "--out",
        tmp_path / "x.csv",
    )
    assert "has 4 columns, but the model's rows have 2" in message


@pytest.mark.parametrize(("ending", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_plot(iris, tmp_path, ending, start):
    for number, data in enumerate(([], ["--data", iris / "iris.csv"])):
        out = tmp_path / f"{number}.{ending}"
        run("plot", iris / "model.safetensors", "--out", out, *data)
        assert out.read_bytes().startswith(start)
    assert (tmp_path / f"0.{ending}").read_bytes() != (tmp_path / f"1.{ending}").read_bytes()


def test_plot_of_one_column_with_a_name_like_mathematics(tmp_path):
    write_table(tmp_path / "one.csv", (r"price in $ \frac{",), load_iris().data[:, :1] ** 1.1)
    run("fit", tmp_path / "one.csv", "--out", tmp_path / "one.safetensors", *QUICK)
    run("plot", tmp_path / "one.safetensors", "--out", tmp_path / "one.png")
    assert (tmp_path / "one.png").stat().st_size > 1000


def test_a_low_rank_model_is_sampled_evaluated_and_drawn(iris, tmp_path):
    x = torch.as_tensor(load_iris().data)
    variance = torch.full((2, 4), 0.1, dtype=x.dtype)
    factor = torch.tensor([[1.0], [0.5], [1.0], [0.2]], dtype=x.dtype).expand(2, 4, 1)
    start = LowRankGaussianMixture(x[[0, 149]], variance, factor)
    model = FreeLowRankKernelModel(start)
    model.column_names = FEATURES
    model.save(tmp_path / "model.safetensors")
    assert KernelModel.load(tmp_path / "model.safetensors").column_names == FEATURES
    run("sample", tmp_path / "model.safetensors", "--count", 5, "--out", tmp_path / "new.csv")
    run("density", tmp_path / "model.safetensors", iris / "iris.csv", "--out", tmp_path / "d.npy")
    np.testing.assert_allclose(np.load(tmp_path / "d.npy")[:, 4], start.log_prob(x).numpy())
    run("plot", tmp_path / "model.safetensors", "--out", tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_killed_fit_goes_on(iris, tmp_path, monkeypatch, capsys):
    whole = ("fit", iris / "iris.csv", "--out", tmp_path / "whole.safetensors", "--steps", 3)
    run(*whole)
    arguments = (*whole[:3], tmp_path / "model.safetensors", *whole[4:])
    real, calls = fit_module.fit, []

    def killed(*args, **options):
        calls.append(options["checkpoint"])
        if len(calls) == 3:  # with the third number of centres
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(fit_module, "fit", killed)
    with pytest.raises(KeyboardInterrupt):
        run(*arguments)
    assert not (tmp_path / "model.safetensors").exists()
    assert len(list((tmp_path / "model.safetensors.parts").iterdir())) == 2
    run(*arguments)
    assert "going on from" in capsys.readouterr().err
    one, other = (KernelModel.load(tmp_path / f"{name}.safetensors") for name in ("model", "whole"))
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    # parts of another fit are not gone on from
    shutil.copytree(tmp_path, tmp_path / "copy")
    monkeypatch.undo()
    calls.clear()
    monkeypatch.setattr(fit_module, "fit", killed)
    with pytest.raises(KeyboardInterrupt):
        run(*arguments)
    monkeypatch.undo()
    assert "belongs to another run" in fails(capsys, *arguments, "--seed", 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no file at"),
        ("a,b\n" + "1,2\n" * 3, "column(s) 'a', 'b' are constant"),
        ("a,b\n1,2\n3,4\n5,7\n", "has 3 distinct rows, but a fit of 2 column(s)"),
    ],
)
@pytest.mark.parametrize("command", ["fit", "report"])
def test_errors_of_the_samples(tmp_path, capsys, command, content, message):
    path = tmp_path / "samples.csv"
    if content is not None:
        path.write_text(content)
    text = fails(capsys, command, path, "--out", tmp_path / "out")
    assert f"python -m wpo_notes {command}: error:" in text
    assert message in text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("3,4,5,", "row 2 (line 3), column 'petal width (cm)': a missing value"),
        ("3,4,5,x", "row 2 (line 3), column 'petal width (cm)': 'x' is not a number"),
        ("3,4,5", "row 2 (line 3): 3 cell(s), but line 1 has 4: 'petal width (cm)' has none"),
    ],
)
@pytest.mark.parametrize("command", ["fit", "report", "density", "plot"])
def test_errors_of_a_row(iris, tmp_path, capsys, command, row, message):
    path, model = tmp_path / "points.csv", iris / "model.safetensors"
    path.write_text(f"{','.join(FEATURES)}\n1,2,3,4\n{row}\n")
    points = {"density": (model, path), "plot": (model, "--data", path)}.get(command, (path,))
    text = fails(capsys, command, *points, "--out", tmp_path / "out.png")
    assert f"python -m wpo_notes {command}: error: {path}, {message}" in text


def test_report_needs_rows_for_a_fit_to_four_fifths_of_them(tmp_path, capsys):
    """15 rows are enough for a fit, but the 12 that a report would fit are not."""
    path = tmp_path / "samples.csv"
    write_table(path, FEATURES[:2], np.random.RandomState(0).standard_normal((15, 2)))
    message = fails(capsys, "report", path, "--out", tmp_path / "report.html", *QUICK)
    assert f"error: {path} has 15 distinct rows, but a fit of 2 column(s) that holds out" in message
    assert "needs at least 18: bring more rows, or choose fewer columns" in message
    run("fit", path, "--out", tmp_path / "model.safetensors", *QUICK)


def test_errors_of_the_other_files(iris, tmp_path, capsys):
    model, data = iris / "model.safetensors", iris / "iris.csv"
    absent, folder = tmp_path / "absent.safetensors", tmp_path / "absent" / "x.csv"
    for command in (
        ("sample", absent, "--out", tmp_path / "x.csv"),
        ("density", absent, data, "--out", tmp_path / "x.csv"),
        ("plot", absent, "--out", tmp_path / "x.png"),
    ):
        assert "no kernel model file at" in fails(capsys, *command)
    for command in (
        ("fit", data, "--out", folder),
        ("report", data, "--out", folder),
        ("sample", model, "--out", folder),
        ("density", model, data, "--out", folder),
        ("plot", model, "--out", folder),
    ):
        assert "make it first" in fails(capsys, *command)
    assert "is damaged or not" in fails(capsys, "sample", data, "--out", tmp_path / "x.csv")
    assert "must end in" in fails(capsys, "sample", model, "--out", tmp_path / "x.xls")
    assert "at least 1" in fails(capsys, "sample", model, "--count", 0, "--out", tmp_path / "x.csv")
    assert "xls" in fails(capsys, "plot", model, "--out", tmp_path / "x.xls")
    assert "has no column 'c'" in fails(
        capsys, "fit", data, "--out", tmp_path / "m", "--columns", "c"
    )
    assert "with 500 centres" in fails(
        capsys, "fit", data, "--out", tmp_path / "m", "--centers", 500
    )


def test_chosen_columns_keep_their_order(iris, tmp_path):
    columns = [FEATURES[2], FEATURES[0]]
    run(
        "fit",
        iris / "iris.csv",
        "--out",
        tmp_path / "two.safetensors",
        *QUICK,
        "--columns",
        *columns,
    )
    assert KernelModel.load(tmp_path / "two.safetensors").column_names == tuple(columns)


def test_every_command_on_scikit_learns_own_file_of_iris(tmp_path):
    """Its first line is '150,4,setosa,versicolor,virginica', above four columns of numbers and one of classes."""
    columns = ("150", "4", "setosa", "versicolor")
    file, model = OTHERS / "iris.csv", tmp_path / "model.safetensors"
    new, density = tmp_path / "new.csv", tmp_path / "density.npy"
    run("fit", file, "--out", model, *QUICK, "--columns", *columns)
    run("sample", model, "--count", 50, "--out", new)
    assert read_table(new).columns == columns
    run("density", model, file, "--out", density)
    with torch.no_grad():
        expected = KernelModel.load(model)().log_prob(torch.as_tensor(load_iris().data))
    np.testing.assert_allclose(np.load(density)[:, 4], expected.numpy())
    run("plot", model, "--data", file, "--out", tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    run("report", file, "--out", tmp_path / "report.html", *QUICK, "--columns", *columns)
    assert "<td>kernel model" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_fit_and_density_on_scikit_learns_own_file_of_linnerud(tmp_path, capsys):
    """Names and numbers between blanks; 20 rows of 3 columns, one more than a fit needs."""
    file, model = OTHERS / "linnerud_exercise.csv", tmp_path / "model.safetensors"
    run("fit", file, "--out", model, *QUICK)
    assert KernelModel.load(model).column_names == ("Chins", "Situps", "Jumps")
    run("density", model, file, "--out", tmp_path / "density.npy")
    assert np.array_equal(np.load(tmp_path / "density.npy")[:, :3], load_linnerud().data)
    assert "20 rows are few for 3 columns" in capsys.readouterr().err
    assert "needs at least 24" in fails(capsys, "report", file, "--out", tmp_path / "report.html")


def test_help_in_a_process_of_its_own_shows_the_commands():
    shown = subprocess.run(
        [sys.executable, "-m", "wpo_notes", "--help"], capture_output=True, text=True, check=True
    ).stdout
    for text in (
        "python -m wpo_notes fit samples.csv --out model.safetensors",
        "figure2",
        "list",
        "report samples.csv --out report.html",
    ):
        assert text in shown
