"""Notation, index of equations, reference, downloads and PDF: they are complete, and say so when they are not."""

from __future__ import annotations

import ast
import importlib
import io
import re
import shutil
import subprocess
import sys
import tarfile
from base64 import b64decode
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pdf
import portable
import pytest
import reference_links
import yaml
from docutils import nodes

from wpo_notes.metrics import Estimate

ROOT = Path(__file__).resolve().parents[1]
BOOK = ROOT / "book"
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
MACROS = CONFIG["sphinx"]["config"]["mathjax3_config"]["tex"]["macros"]
TEXT = {path.stem: path.read_text(encoding="utf-8") for path in sorted(BOOK.glob("*.md"))}
CODE = re.compile(r"^```\{code-cell\}.*?^```$", re.M | re.S)
FORMULA = re.compile(r"\$\$.*?\$\$|\$[^$\n]+\$", re.S)
# Symbols that carry meaning: the book's macros, Greek letters, letters in another script or under an accent, and
# functions with a name
GREEK = (
    "alpha beta gamma delta epsilon varepsilon zeta eta theta iota kappa lambda mu nu xi pi rho varrho sigma tau "
    "upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega ell"
)
SYMBOL = re.compile(
    r"\\(?:mathcal|mathbf|mathbb|mathrm|operatorname|hat|tilde|bar)\*?\s*\{?\\?[A-Za-z]+\}?"
    + rf"|\\(?:{'|'.join([*GREEK.split(), *MACROS])})(?![a-zA-Z])"
)


def symbols(page: str) -> set[str]:
    formulas = FORMULA.findall(CODE.sub("", TEXT[page]))
    return {re.sub(r"[\s{}]", "", found) for text in formulas for found in SYMBOL.findall(text)}


# ---- notation


def test_notation_has_every_macro_and_every_symbol_that_pages_share() -> None:
    pages = defaultdict(set)
    for page in TEXT.keys() - {"notation"}:
        for symbol in symbols(page):
            pages[symbol].add(page)
    wanted = {symbol for symbol, found in pages.items() if len(found) > 1}
    assert {rf"\{name}" for name in MACROS} <= pages.keys()
    assert wanted - symbols("notation") == set()
    assert {rf"\{name}" for name in MACROS} - symbols("notation") == set()


def test_notation_links_every_symbol() -> None:
    rows = [line for line in TEXT["notation"].splitlines() if line.startswith("| $")]
    assert len(rows) > 60
    for row in rows:
        assert re.search(r"\{(eq|prf:ref)\}`", row.split("|")[-2]), row


# ---- the paper's equations


@pytest.fixture
def index_of_equations(tmp_path: Path) -> Path:
    """A Sphinx project with the extension and a page that lists two equations."""
    (tmp_path / "conf.py").write_text(
        "extensions = ['myst_parser', 'paper_equations']\n"
        "myst_enable_extensions = ['dollarmath']\n"
        "master_doc = 'index'\n"
    )
    (tmp_path / "index.md").write_text(
        "# Index\n\n```{paper-equations}\n1: noising\n2: *denoising*\n```\n\n"
        "```{toctree}\nb\na\n```\n"
    )
    (tmp_path / "b.md").write_text("# Second page\n\n$$\nx = 0 \\paper{1}\n$$ (eq-b)\n")
    (tmp_path / "a.md").write_text(
        "# First page\n\n$$\nx = 1 \\paper{2, corrected}\n$$ (eq-a)\n\n"
        "$$\nx = 2 \\paper{1}\n$$ (eq-c)\n"
    )
    return tmp_path


def sphinx(folder: Path) -> tuple[int, str]:
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", ".", "_build"]
    run = subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(BOOK / "_ext"), "PATH": ""},
    )
    return run.returncode, run.stderr


def test_index_links_each_equation_in_the_order_of_the_book(index_of_equations: Path) -> None:
    status, messages = sphinx(index_of_equations)
    assert status == 0, messages
    page = (index_of_equations / "_build" / "index.html").read_text(encoding="utf-8")
    first, second = re.findall(r"<tr class=\"row-\w+\"><td>.*?</tr>", page, re.S)
    assert re.findall(r'href="([^"]+)"', first) == ["b.html#equation-eq-b", "a.html#equation-eq-c"]
    assert re.findall(r'href="([^"]+)"', second) == ["a.html#equation-eq-a"]
    assert "<em>denoising</em>" in second
    assert "corrected" in second
    assert "First page" in second
    for name in ("a", "b"):
        html = (index_of_equations / "_build" / f"{name}.html").read_text(encoding="utf-8")
        assert f'id="equation-eq-{name}"' in html


@pytest.mark.parametrize(
    ("page", "old", "new", "message"),
    [
        ("a.md", r"\paper{2, corrected}", "", r"no formula is marked \paper{2}"),
        (
            "a.md",
            r"\paper{2, corrected}",
            r"\paper{3}",
            r"no line for the formula marked \paper{3}",
        ),
        ("a.md", " (eq-a)", "", r"the formula marked \paper{2} has no label"),
        ("index.md", "1: noising", "one: noising", "expected a line like"),
    ],
)
def test_index_reports_what_is_missing(
    index_of_equations: Path, page: str, old: str, new: str, message: str
) -> None:
    path = index_of_equations / page
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    status, messages = sphinx(index_of_equations)
    assert status != 0
    assert message in messages


def test_index_lists_the_papers_34_equations() -> None:
    numbers = re.findall(r"^(\d+): ", TEXT["equations"], re.M)
    assert numbers == [str(number) for number in range(1, 35)]


# ---- the reference


def test_chapters_link_only_what_the_reference_has() -> None:
    documented = set(re.findall(r"automodule:: (wpo_notes[\w.]*)", TEXT["api"]))
    roles = re.findall(r"\{py:(\w+)\}`(?:[^`<]*<)?~?(wpo_notes[\w.]*)", "\n".join(TEXT.values()))
    assert len(roles) > 50
    for kind, name in roles:
        parts = name.split(".")
        module = next(
            ".".join(parts[:stop])
            for stop in range(len(parts), 0, -1)
            if portable.module_file(".".join(parts[:stop]))
        )
        assert module in documented, name
        found = importlib.import_module(module)
        for part in name.removeprefix(module).split(".")[1:]:
            found = getattr(found, part)
        assert (kind == "mod") == (name == module), (kind, name)


def test_uses_of_a_chapter(tmp_path: Path) -> None:
    cells = (
        "from wpo_notes import datasets, pde as equations",
        "from wpo_notes.fit import fit\nlaw = datasets.get('moons')\nequations.laplacian(f, x)",
        "%%writefile x.py\nimport torch\ntorch.randn(3)",
    )
    chapter = tmp_path / "chapter.md"
    blocks = "\n\n".join(f"```{{code-cell}} ipython3\n{cell}\n```" for cell in cells)
    header = TEXT["intro"].split("---\n")[1]
    chapter.write_text(f"---\n{header}---\n\n# T\n\n{blocks}\n")
    assert reference_links.uses(chapter) == {
        "wpo_notes.datasets",
        "wpo_notes.datasets.get",
        "wpo_notes.fit.fit",
        "wpo_notes.pde",
        "wpo_notes.pde.laplacian",
    }


def linked(name: str, users: dict[str, list[str]], what: str = "function") -> list[str]:
    """What the reference adds to the docstring of a name."""
    lines = ["It does."]
    app = SimpleNamespace(env=SimpleNamespace(wpo_users=users))
    reference_links.link(app, what, name, None, None, lines)
    return [line for line in lines[1:] if line]


def test_entries_link_to_chapters_that_use_them_or_else_to_those_of_their_module() -> None:
    users = {"wpo_notes.fit.fit": ["algorithm", "digits"]}
    assert linked("wpo_notes.fit.fit", users) == ["Used in :doc:`algorithm`, :doc:`digits`."]
    assert linked("wpo_notes.fit.Record", users) == ["See :doc:`algorithm`, :doc:`many-machines`."]
    assert linked("wpo_notes.plots.samples", users) == []  # of all chapters
    assert linked("wpo_notes.fit.FitResult.model", users, "attribute") == []
    assert linked("wpo_notes.fit.Record.Inner", users, "class") == []


def test_fields_of_named_tuples_have_no_docstring_of_python_s() -> None:
    for docstring, left in ((Estimate.value.__doc__, []), ("Alias for it.", ["Alias for it."])):
        lines = [docstring]
        reference_links.leave_out_aliases(None, "attribute", "name", None, None, lines)
        assert lines == left


def test_every_module_of_the_reference_names_chapters_of_the_book() -> None:
    for name in re.findall(r"automodule:: (wpo_notes[\w.]*)", TEXT["api"]):
        about = importlib.import_module(name).__doc__
        pages = {page for _, page in reference_links.NAMED.findall(about)}
        assert pages or "Chapters: all" in about, name
        assert pages <= TEXT.keys(), name


def test_chapters_link_back_to_documented_functions_and_classes_only() -> None:
    users = {
        "wpo_notes.fit.fit": ["one", "two"],
        "wpo_notes.fit._digest": ["one"],  # not documented
        "wpo_notes.fit": ["one"],
        "wpo_notes.experiments.runs.run": ["one"],
        "wpo_notes.datasets.get": ["one"],
        "wpo_notes.pde.gradient": ["two"],
    }
    kinds = {name: "function" for name in users if "_digest" not in name}
    kinds["wpo_notes.fit"] = "module"
    entries = {name: SimpleNamespace(objtype=kind) for name, kind in kinds.items()}
    domains = {"py": SimpleNamespace(objects=entries)}
    env = SimpleNamespace(wpo_users=users, get_domain=domains.get)
    assert list(reference_links.used(env, "one")) == ["wpo_notes.datasets.get", "wpo_notes.fit.fit"]


# ---- notebooks that run elsewhere


ROLES = {
    "eq": lambda target: {"eq-a": "(1.2)"}[target],
    "doc": lambda target: f"*{target.title()}*",
    "glue:text": lambda target: {"x:.1f": "0.5"}[target],
}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (r"$\R^d$, $\d x$, $\delta$, $\Rho$", r"$\mathbb{R}^d$, $\mathrm{d} x$, $\delta$, $\Rho$"),
        (
            "$$\nx \\paper{9, corrected}\n$$ (eq-a)",
            "$$\nx \\qquad{\\color{#888888}{\\small\\text{[paper: (9, corrected)]}}}\n\\tag*{(1.2)}\n$$",
        ),
        ("by {eq}`eq-a` it is {glue:text}`x:.1f`", "by (1.2) it is 0.5"),
        ("{doc}`moons`, {doc}`these <moons>`", "*Moons*, these"),
        ("{py:func}`~wpo_notes.fit.fit`, {eq}`none`", "`wpo_notes.fit.fit`, `none`"),
        (
            ":::{prf:proposition} Name\n:label: prop-a\n\nBody {eq}`eq-a`.\n:::",
            "**Proposition (Name).** Body (1.2).\n",
        ),
        (":::{prf:proof}\nBody.\n:::\n\nMore.", "*Proof.* Body. ∎\n\n\nMore."),
        ("```{opening}\n:needs: intro\n\nYou will know.\n```", "You will know.\n"),
        ("```shell\nmake book\n```", "```shell\nmake book\n```"),
        ("{nb-download}`Download this <x.ipynb>`", ""),
    ],
)
def test_text_is_readable_without_the_book(source: str, expected: str) -> None:
    assert portable.Text(MACROS, ROLES)(source) == expected


def test_chapters_keep_no_syntax_of_the_book() -> None:
    text = portable.Text(MACROS, {})
    for page, source in TEXT.items():
        written = text(CODE.sub("", source))
        left = re.findall(r"\{[\w:-]+\}`|^:::|^```\{|\\paper|\$\$ \(", written, re.M)
        assert left == [], page


def test_archive_is_repeatable_and_holds_the_files() -> None:
    paths = [BOOK / "claims.toml", ROOT / "pyproject.toml"]
    first = portable.archive(paths)
    assert portable.archive(paths) == first
    assert max(map(len, first.splitlines())) == 76  # as RFC 2045 has it
    with tarfile.open(fileobj=io.BytesIO(b64decode(first)), mode="r:gz") as file:
        assert file.getnames() == ["book/claims.toml", "pyproject.toml"]
        assert file.extractfile("pyproject.toml").read() == paths[1].read_bytes()


def test_records_are_those_that_the_cells_read() -> None:
    def folders(*cells: str) -> set[str]:
        found = portable.records(cells)
        return {path.parent.relative_to(portable.RESULTS).as_posix() for path in found}

    scored = "from wpo_notes.experiments import self_scoring"
    assert folders("from wpo_notes.experiments import digits") == set()
    assert folders(scored, "results") & {"digits", "self_scoring", "again/self_scoring"} == {
        "self_scoring"
    }
    assert {"self_scoring", "again/self_scoring"} <= folders(scored, 'results / "again"')
    assert folders('Record.load(results, "benchmarks", "cpu")') == {"benchmarks"}


def test_a_page_that_reads_earlier_records_brings_them() -> None:
    pages = {page: CODE.findall(text) for page, text in TEXT.items() if '/ "again"' in text}
    # The page of times reads all records, which no notebook can carry.
    assert set(pages) == {"execution", "figure-2", "figures-3-4", "self-scoring"}
    for page in pages.keys() - {"execution"}:
        cells = pages[page]
        sources = [re.sub(r"^```.*$|^---$(?s:.*?)^---$", "", cell, flags=re.M) for cell in cells]
        assert any("again" in path.parts for path in portable.records(sources)), page


def test_requirements_are_the_packages_and_the_cells() -> None:
    found = portable.requirements(["import torch, os", "from sympy import Symbol\n%%time"])
    assert found["torch"].startswith("torch>=")
    assert found["sklearn"].startswith("scikit-learn")
    assert found["matplotlib"].startswith("matplotlib")
    assert found["sympy"] == "sympy"
    assert {"os", "wpo_notes", "ruff"} & set(found) == set()


@pytest.mark.parametrize("absent", [[], ["ot", "torchdiffeq"]], ids=["all there", "two absent"])
def test_notebook_runs_in_an_empty_folder_without_the_repository(
    tmp_path: Path, absent: list[str]
) -> None:
    cells = (
        "from pathlib import Path\n\nfrom myst_nb import glue\n\nimport wpo_notes\n"
        "from wpo_notes.datasets import get",
        'results = Path(wpo_notes.__file__).parents[1] / "book" / "results"\nname = "benchmarks"',
        "glue('number', 1.0, display=False)",
        "assert Path(wpo_notes.__file__).is_relative_to(Path.cwd())\n"
        "assert any((results / name).glob('*.json'))\nget('moons')",
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    made = portable.portable(notebook, MACROS, ROLES)
    nbformat.validate(made)
    assert made.cells[0].metadata["jupyter"] == {"source_hidden": True}
    # The test's environment has the package and myst-nb: hide both, as where neither is installed. And print what
    # would be run.
    hide = (
        "import subprocess, sys\nfrom importlib.machinery import PathFinder\n"
        "subprocess.run = lambda command, check: print('run', command, check)\n"
        "class Hidden(PathFinder):\n"
        "    @classmethod\n"
        "    def find_spec(cls, name, path=None, target=None):\n"
        f"        if name in {[*absent, 'myst_nb']}:\n            return None\n"
        "        spec = super().find_spec(name, path, target)\n"
        "        away = name == 'wpo_notes' and spec and not spec.origin.startswith(sys.argv[1])\n"
        "        return None if away else spec\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'ditable' not in repr(f)]\n"
        "sys.meta_path[sys.meta_path.index(PathFinder)] = Hidden\n"
    )
    script = tmp_path / "notebook.py"
    script.write_text(hide + "\n\n".join(cell.source for cell in made.cells))
    empty = tmp_path / "empty"
    empty.mkdir()
    run = subprocess.run([sys.executable, script, empty], cwd=empty, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    *commands, last = run.stdout.splitlines()
    assert last.startswith("The package and the records of this page are in")
    wanted = [portable.requirements([])[module] for module in absent]  # POT>=..., torchdiffeq>=...
    pip = [sys.executable, "-m", "pip", "install", "--quiet", *wanted]
    assert commands == ([f"run {pip} True"] if absent else [])
    assert [path.name[:9] for path in empty.iterdir()] == ["wpo_notes"]


# ---- the PDF


def test_macros_are_defined_for_latex() -> None:
    written = pdf.macros({"R": "\\mathbb{R}", "paper": ["\\color{##888888}{(#1)}", 1]})
    assert written.splitlines() == [
        r"\providecommand{\R}{}\renewcommand{\R}[0]{\mathbb{R}}",
        r"\providecommand{\paper}{}\renewcommand{\paper}[1]{\color[HTML]{888888}{(#1)}}",
    ]


@pytest.mark.skipif(shutil.which("xelatex") is None, reason="xelatex is not installed")
def test_latex_reads_the_macros(tmp_path: Path) -> None:
    body = r"$\R \E \WProx \Tr \KL \d x \paper{13, corrected}$"
    (tmp_path / "x.tex").write_text(
        "\\documentclass{article}\\usepackage{amsmath,amssymb,xcolor}\n"
        f"{pdf.macros(MACROS)}\\begin{{document}}{body}\\end{{document}}\n"
    )
    command = ["xelatex", "-interaction=nonstopmode", "-halt-on-error", "x.tex"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
    assert (tmp_path / "x.pdf").is_file()


def rows(formula: str) -> list[str]:
    """Rows that Sphinx puts into LaTeX's `split`, without the environments that are complete in themselves."""
    inner = re.sub(r"\\begin\{(\w+\*?)\}.*?\\end\{\1\}", "", formula, flags=re.S)
    return inner.split(r"\\")


def test_formulas_of_docstrings_have_the_one_column_that_latex_allows_them() -> None:
    count = 0
    for path in (ROOT / "wpo_notes").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for formula in re.findall(r"^ *\.\. math::(.*?)\n\s*\n", text, re.M | re.S):
            count += 1
            assert all(row.count("&") <= 1 for row in rows(formula)), (path.name, formula)
    assert count > 30
    assert [row.count("&") for row in rows("a &= b, & c &= d\\\\ e &= f")] == [3, 1]


@pytest.mark.parametrize(
    ("count", "length", "broken"), [(31, 5, True), (4, 2500, True), (4, 50, False)]
)
def test_a_long_table_is_broken_over_pages_in_columns_of_its_own_widths(
    count, length, broken
) -> None:
    cells = [["name", "x" * length]] * count
    table = nodes.table()
    group = nodes.tgroup(cols=2)
    table += group
    group += [nodes.colspec(colwidth=50), nodes.colspec(colwidth=50)]
    body = nodes.tbody()
    group += body
    for texts in cells:
        row = nodes.row()
        row += [nodes.entry("", nodes.paragraph(text=text)) for text in texts]
        body += row
    document = nodes.document("", "")
    document += table
    pdf.break_tables(document)
    widths = [column["colwidth"] for column in table.findall(nodes.colspec)]
    if broken:
        assert table["classes"] == ["longtable", "colwidths-given"]
        assert widths == [8, min(max(length, 8), 60)]
    else:
        assert (table["classes"], widths) == ([], [50, 50])


# ---- examples


def test_public_modules_have_examples() -> None:
    """The modules that a reader calls; `pytest --doctest-modules` runs them."""
    modules = "datasets diffusion estimator fit losses metrics mixture model pde proximal sde"
    for name in modules.split():
        tree = ast.parse((ROOT / "wpo_notes" / f"{name}.py").read_text(encoding="utf-8"))
        public = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        documented = [ast.get_docstring(node) or "" for node in public]
        assert any(">>> " in text for text in documented), name
