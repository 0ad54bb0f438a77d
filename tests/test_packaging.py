"""Tests of what is released: wheel and sdist, what they need, what they say, and their types."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from email import message_from_bytes
from email.message import Message
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import wpo_notes
from wpo_notes._optional import _INSTALLED_BY

ROOT = Path(__file__).parents[1]
BASE = {"torch", "numpy", "scipy"}
FIT = {"scikit-learn", "safetensors"}  # the extra `fit`
# Stands before a script: the packages named are as if they were not installed.
REFUSE = """
import sys
from importlib.machinery import PathFinder

REFUSED = set(sys.argv[1].split())
find = PathFinder.find_spec

def find_others(name, path=None, target=None):
    return None if name.partition(".")[0] in REFUSED else find(name, path, target)

PathFinder.find_spec = find_others
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the wheel and the sdist, the wheel made from the sdist, both from a copy of the tree."""
    folder = tmp_path_factory.mktemp("built")
    left_out = (".*", "_build", "build", "dist", "__pycache__", "*.egg-info", "*.part")
    shutil.copytree(ROOT, folder / "tree", ignore=shutil.ignore_patterns(*left_out))
    build = ["-m", "build", "--no-isolation", "--outdir", str(folder), str(folder / "tree")]
    run(sys.executable, *build)
    return folder


@pytest.fixture(scope="module")
def wheel(built) -> Path:
    return next(built.glob("*.whl"))


@pytest.fixture(scope="module")
def about(wheel) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return message_from_bytes(archive.read(name))


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> str:
    """An interpreter for which the wheel is installed, and its dependencies are those of this environment."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(folder)
    python = str(folder / "bin" / "python")
    pip = ["-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps"]
    run(sys.executable, *pip, str(wheel))
    (site,) = folder.glob("lib/python*/site-packages")
    # The installed wheel comes first; .pth files in the folder that is added here, such as that of an
    # editable install, are not read.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return python


def run(*command: str, check: bool = True, cwd: Path | None = None) -> str:
    """Run a command and return what it printed; an error shows that too."""
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    if check and done.returncode:
        pytest.fail(f"{command[:4]} failed:\n{done.stdout}\n{done.stderr}")
    return done.stdout


def source_files() -> set[str]:
    return {str(path.relative_to(ROOT)) for path in (ROOT / "wpo_notes").rglob("*.py")}


def requirements(about: Message) -> dict[str | None, dict[str, Requirement]]:
    """By extra, None for the base, what is required by its canonical name."""
    found: dict[str | None, dict[str, Requirement]] = {None: {}}
    for extra in about.get_all("Provides-Extra"):
        found[extra] = {}
    for text in about.get_all("Requires-Dist"):
        requirement = Requirement(text)
        extra = re.search(r'extra == "(.*?)"', text)
        name = canonicalize_name(requirement.name)
        found[extra and extra[1]][name] = requirement
    return found


# ---- contents ---------------------------------------------------------------------------------------


def test_the_wheel_holds_every_module_the_type_marker_and_the_licences_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (info,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
        for licence in ("LICENSE", "LICENSE-text"):
            assert archive.read(f"{info}/licenses/{licence}") == (ROOT / licence).read_bytes()
    assert {name for name in names if not name.startswith(info)} == (
        source_files() | {"wpo_notes/py.typed"}
    )


def test_the_sdist_holds_what_the_wheel_is_made_of_and_neither_book_nor_tests(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        files = {
            name.partition("/")[2]
            for name in archive.getnames()
            if archive.getmember(name).isfile()
        }
    stated = {"README.md", "CHANGELOG.md", "CITATION.cff", "LICENSE", "LICENSE-text"}
    assert source_files() | stated | {"pyproject.toml", "wpo_notes/py.typed"} <= files
    top = {name.partition("/")[0] for name in files}
    assert top <= stated | {"pyproject.toml", "wpo_notes", "wpo_notes.egg-info"} | {
        "MANIFEST.in",
        "PKG-INFO",
        "setup.cfg",
    }


# ---- metadata ---------------------------------------------------------------------------------------


def test_the_version_is_that_of_the_package_the_changelog_and_the_citation(about):
    assert about["Version"] == wpo_notes.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", wpo_notes.__version__)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    releases = re.findall(r"^## \[(\d+)\.(\d+)\.(\d+)\] - (\d{4}-\d\d-\d\d)$", changelog, re.M)
    assert releases == sorted(releases, key=lambda one: tuple(map(int, one[:3])), reverse=True)
    dates = [date for *_, date in releases]
    assert dates == sorted(dates, reverse=True)
    assert ".".join(releases[0][:3]) == wpo_notes.__version__ == citation["version"]
    assert releases[0][3] == citation["date-released"]


def test_the_base_needs_no_package_of_the_book_and_extras_name_the_rest(about):
    required = requirements(about)
    assert set(required[None]) == BASE
    assert {
        extra: set(names) for extra, names in required.items() if extra not in (None, "all")
    } == {
        "fit": FIT,
        "plots": {"matplotlib"},
        "progress": {"tqdm"},
        "experiments": {"pot", "torchdiffeq"},
        "parquet": {"pyarrow"},
        "diffusers": {"diffusers"},
        "fast": {"numba"},
        "types": {"jaxtyping"},
    }
    assert required["all"]["wpo-notes"].extras == required.keys() - {None, "all"}


def test_every_range_has_a_lower_bound_and_allows_the_version_that_is_tested(about):
    pins = {}
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines():
        if "==" in line:
            name, version = line.split("#")[0].strip().split("==")
            pins[canonicalize_name(name)] = version
    required = requirements(about)
    required.pop("all")
    for names in required.values():
        for name, requirement in names.items():
            assert {specifier.operator for specifier in requirement.specifier} == {">="}, name
            if name in pins:
                assert requirement.specifier.contains(pins[name]), name
    assert pins.keys() >= BASE | FIT


def test_what_an_error_says_to_install_brings_the_package(about):
    required = requirements(about)
    for package, source in _INSTALLED_BY.values():
        (extra,) = re.fullmatch(r"wpo_notes\[(.*)\]", source).groups()
        assert canonicalize_name(package) in required[extra]


# ---- in an environment with the base dependencies only ----------------------------------------------


@cache
def distributions_of() -> dict[str, set[str]]:
    """By importable name of this environment, the packages that it is from."""
    found = metadata.packages_distributions()
    return {module: set(map(canonicalize_name, names)) for module, names in found.items()}


def not_required(*roots: str) -> set[str]:
    """Importable names of this environment that installing `roots` would not bring."""
    brought, left = set(), list(roots)
    while left:
        name = canonicalize_name(left.pop())
        if name in brought:
            continue
        brought.add(name)
        for text in metadata.requires(name) or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                left.append(requirement.name)
    return {
        module
        for module, names in distributions_of().items()
        if module != "wpo_notes" and brought.isdisjoint(names)
    }


def test_what_is_refused_is_what_the_base_does_not_bring():
    refused = not_required(*BASE)
    assert {"matplotlib", "tqdm", "ot", "torchdiffeq", "pytest", "IPython"} <= refused
    assert {"sklearn", "joblib", "safetensors", "jaxtyping", "beartype"} <= refused
    assert refused.isdisjoint({"torch", "numpy", "scipy"})
    assert {"sklearn", "joblib", "safetensors"} <= refused - not_required(*BASE, *FIT)


IMPORT_ALL = """
import importlib, pkgutil
import wpo_notes

assert "site-packages" in wpo_notes.__file__, wpo_notes.__file__
for module in pkgutil.walk_packages(wpo_notes.__path__, "wpo_notes."):
    if not module.name.startswith(EXCEPT):
        importlib.import_module(module.name)
        print(module.name)
assert REFUSED.isdisjoint(sys.modules)
"""


UNCOMPILED = ("wpo_notes.plots", "wpo_notes._figures", "wpo_notes._compiled", "wpo_notes._loops")
OF_SCIKIT_LEARN = (
    "wpo_notes.estimator",
    "wpo_notes.experiments",
    "wpo_notes.report",
    "wpo_notes.__main__",
)


@pytest.mark.parametrize(
    ("roots", "left_out"),
    [(BASE, UNCOMPILED + OF_SCIKIT_LEARN), (BASE | FIT, UNCOMPILED)],
    ids=["base", "fit"],
)
def test_modules_import_without_the_packages_that_only_some_functions_need(python, roots, left_out):
    script = f"{REFUSE}\nEXCEPT = {left_out}\n{IMPORT_ALL}"
    imported = run(python, "-I", "-c", script, " ".join(not_required(*roots))).split()
    assert {"wpo_notes.fit", "wpo_notes.sde", "wpo_notes.metrics", "wpo_notes.proximal"} <= set(
        imported
    )


TRAIN = """
import torch
from wpo_notes.fit import fit, fit_algorithm_1, fit_kernel_model
from wpo_notes.model import KernelModel

x = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
generator = torch.Generator().manual_seed(1)
model = fit_algorithm_1(x, centers=50, steps=3, generator=generator)
mixture = model()
new = mixture.sample((500,), generator=generator)
assert new.shape == (500, 2) and bool(mixture.log_prob(new).isfinite().all())
before = [parameter.clone() for parameter in model.parameters()]
for function in (
    lambda: fit_kernel_model(x, centers=10, members=2, steps=3, generator=generator),
    lambda: fit(model, x, steps=3, checkpoint=sys.argv[2], generator=generator),
    lambda: model.save(sys.argv[2]),
    lambda: KernelModel.load(sys.argv[2]),
):
    try:
        function()
    except ImportError as error:
        print(error)
after = model.parameters()
assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
"""


def test_the_base_trains_the_model_and_says_before_any_step_what_needs_another_package(
    python, tmp_path
):
    refused = " ".join(not_required(*BASE))
    printed = run(python, "-I", "-c", REFUSE + TRAIN, refused, str(tmp_path / "file")).splitlines()
    said = "this needs {}, which is not installed: pip install 'wpo_notes[fit]'".format
    assert printed == [said("scikit-learn"), *3 * [said("safetensors")]]
    assert not list(tmp_path.iterdir())


def test_without_scikit_learn_the_commands_say_in_one_line_what_installs_it(python):
    script = f"{REFUSE}\nimport runpy\nrunpy.run_module('wpo_notes', run_name='__main__')"
    done = subprocess.run(
        [python, "-I", "-c", script, " ".join(not_required(*BASE))], capture_output=True, text=True
    )
    said = "this needs scikit-learn, which is not installed: pip install 'wpo_notes[fit]'"
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"python -m wpo_notes: {said}\n"


SHAPES = """
from typing import get_type_hints
from torch import Tensor
from wpo_notes import losses

hints = get_type_hints(losses.implicit_score_matching)
assert hints["x"] is Tensor, hints
"""


def test_without_jaxtyping_a_shape_is_the_type_alone(python):
    run(python, "-I", "-c", REFUSE + SHAPES, " ".join(not_required(*BASE)))


FIT_DATA = """
import torch
from wpo_notes import metrics, proximal, sde
from wpo_notes.fit import fit_kernel_model

x = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
generator = torch.Generator().manual_seed(1)
mixture = fit_kernel_model(x, centers=10, members=2, steps=3, generator=generator)()
new = mixture.sample((500,), generator=generator)
assert new.shape == (500, 2) and bool(mixture.log_prob(new).isfinite().all())

noising = sde.LinearSDE.brownian(1.0, 1.0)
line = torch.linspace(0, 1, 5)
for function, arguments in {
    metrics.wasserstein: (x, new),
    metrics.sliced_wasserstein: (x, new),
    sde.sample_probability_flow: (noising, noising.score(mixture), x),
}.items():
    try:
        function(*arguments)
    except ImportError as error:
        print(error)
try:
    density = torch.full((5,), 0.8)
    proximal.mean_field_objective(
        density, density, line, line[:, None], torch.full((5,), 0.25), horizon=1.0, gamma=1.0
    )
except ImportError as error:
    print(error)
"""


def test_the_extra_fit_fits_without_a_bar_and_says_what_the_other_functions_need(python):
    refused = " ".join(not_required(*BASE, *FIT))
    printed = run(python, "-I", "-c", REFUSE + FIT_DATA, refused).splitlines()
    said = "this needs {}, which is not installed: pip install 'wpo_notes[experiments]'".format
    assert printed == [said("POT"), said("POT"), said("torchdiffeq"), said("POT")]


def test_a_package_that_is_there_but_broken_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "pyarrow.py").write_text("import something_else_that_is_missing\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "pyarrow", raising=False)
    from wpo_notes._optional import needed

    with pytest.raises(ModuleNotFoundError, match="No module named 'something_else_that_is_missi"):
        needed("pyarrow")


# ---- types ------------------------------------------------------------------------------------------

ACCEPTED = """
from pathlib import Path
from typing import assert_type

import numpy as np
import torch
from torch import Tensor

from wpo_notes.datasets import get
from wpo_notes.denoiser import ScoreNetwork, denoising_loss
from wpo_notes.diffusion import Denoiser
from wpo_notes.estimator import KernelScoreDensity
from wpo_notes.fit import FitResult, fit, fit_kernel_model
from wpo_notes.losses import implicit_score_matching
from wpo_notes.metrics import Estimate, kl_divergence
from wpo_notes.mixture import GaussianMixture
from wpo_notes.model import KernelModel
from wpo_notes.sde import LinearSDE, sample_reverse_sde


def learn(x: Tensor, path: Path) -> GaussianMixture:
    model = fit_kernel_model(x, centers=10, progress=False)
    model.save(path)
    assert_type(KernelModel.load(str(path)), KernelModel)
    assert_type(model(), GaussianMixture)
    return model()


def use(mixture: GaussianMixture, x: Tensor) -> None:
    assert_type(mixture.log_prob(x), Tensor)
    assert_type(mixture.score(x), Tensor)
    assert_type(mixture.sample((500,)), Tensor)
    assert_type(mixture.sample(torch.Size([500]), generator=torch.Generator()), Tensor)
    assert_type(mixture.diffuse(0.1), GaussianMixture)
    assert_type(mixture.marginal([0]), GaussianMixture)
    assert_type(mixture.mean, Tensor)
    assert_type(implicit_score_matching(mixture, x), Tensor)
    assert_type(kl_divergence(get("moons"), mixture.log_prob, n=100), Estimate)
    assert_type(Denoiser(mixture)(x, 0.5), Tensor)


def noise(mixture: GaussianMixture, x: Tensor) -> Tensor:
    process = LinearSDE.brownian(1.0, 2.0)
    std: float = process.variance(2.0) ** 0.5
    return sample_reverse_sde(process, process.score(mixture), std * x, steps=10)


def train(x: Tensor) -> float:
    result = fit(ScoreNetwork(2, data_std=1.0), x, steps=10, loss=denoising_loss(0.01, 2.0), progress=False)
    assert_type(result, FitResult)
    return result.history[-1].objective


def estimate(x: np.ndarray[tuple[int, int], np.dtype[np.float64]]) -> float:
    return KernelScoreDensity(centers=10).fit(x).score(x)
"""
# Each marked line is an error, of the kind that it names.
REJECTED = """
from wpo_notes.fit import fit_kernel_model
from wpo_notes.mixture import GaussianMixture

fit_kernel_model([[0.0, 1.0]])  # arg-type
fit_kernel_model(centres=10)  # call-arg


def use(mixture: GaussianMixture) -> str:
    mixture.diffuse("wide")  # arg-type
    mixture.logprob  # attr-defined
    return mixture.log_prob(mixture.centers)  # return-value
"""


def test_a_strict_type_checker_accepts_right_uses_of_the_installed_package_and_rejects_wrong_ones(
    python, tmp_path
):
    (tmp_path / "accepted.py").write_text(ACCEPTED)
    (tmp_path / "rejected.py").write_text(REJECTED)
    options = ["--strict", "--no-error-summary", "--python-executable", python]
    output = run(
        *(sys.executable, "-m", "mypy", *options, "accepted.py", "rejected.py"),
        check=False,
        cwd=tmp_path,
    )
    found = set(re.findall(r"^(\w+\.py):(\d+): error: .*\[([a-z-]+)\]$", output, re.M))
    expected = {
        ("rejected.py", str(number), line.split("# ")[1])
        for number, line in enumerate(REJECTED.splitlines(), 1)
        if "# " in line
    }
    assert found == expected, output


def test_the_type_marker_and_the_checker_cover_the_public_modules():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]
    assert settings["strict"]
    ignored = [each["module"] for each in settings["overrides"] if each.get("ignore_errors")]
    assert ignored == ["wpo_notes.experiments.*"]
