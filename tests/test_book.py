"""The book as a whole: its parts fit together, and its machinery fails when it should."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from unittest.mock import ANY

import check_site
import jupytext
import numpy as np
import portable
import pytest
import ruff_chapters
import yaml

import wpo_notes.ledger
from wpo_notes.__main__ import main

pytest_plugins = "pytester"

ROOT = Path(__file__).resolve().parents[1]
BOOK = ROOT / "book"
HEADER = {
    "jupytext": {
        "formats": "md:myst",
        "text_representation": {"extension": ".md", "format_name": "myst"},
    },
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
}
PAGES = sorted(BOOK.glob("*.md"))
NOTEBOOKS = [page for page in PAGES if page.read_text(encoding="utf-8").startswith("---\n")]
CHAPTERS = [page for page in NOTEBOOKS if page.stem not in {"intro", "how-to-run", "execution"}]
MODULES = [path for path in sorted((ROOT / "wpo_notes").glob("*.py")) if path.stem[0] != "_"]
TEXT = {page.stem: page.read_text(encoding="utf-8") for page in PAGES}
with (BOOK / "claims.toml").open("rb") as file:
    CLAIMS = tomllib.load(file)["claim"]


def names(paths: list[Path]) -> list[str]:
    return [path.stem for path in paths]


def cells(page: str) -> list:
    return [
        cell for cell in jupytext.reads(TEXT[page], fmt="md:myst").cells if cell.cell_type == "code"
    ]


# ---- the parts fit together


def test_toc_lists_every_page_once() -> None:
    toc = yaml.safe_load((BOOK / "_toc.yml").read_text())
    listed = [
        toc["root"],
        *(entry["file"] for part in toc["parts"] for entry in part["chapters"]),
    ]
    assert sorted(listed) == sorted(TEXT)


def test_claims_are_complete_and_unique() -> None:
    for claim in CLAIMS:
        assert set(claim) == {"id", "kind", "place", "text"}, claim
        assert claim["kind"] in {"claim", "erratum"}, claim
        assert all(value.strip() for value in claim.values()), claim
        assert re.fullmatch(r"[a-z0-9-]+", claim["id"]), claim
    ids = [claim["id"] for claim in CLAIMS]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("page", names(NOTEBOOKS))
def test_verdicts_are_on_known_claims(page: str) -> None:
    code = "\n".join(cell.source for cell in cells(page))
    recorded = re.findall(r"ledger\.record\(\s*\"([^\"]+)\"", code)
    assert len(recorded) == code.count("ledger.record(")
    assert set(recorded) <= {claim["id"] for claim in CLAIMS}
    # Else the verdict is made and never shown, and the ledger, which is read from what is shown, lacks it.
    deciding = [cell.source for cell in cells(page) if "ledger.record(" in cell.source]
    ends = [ast.unparse(ast.parse(source).body[-1]) for source in deciding]
    assert all(end.startswith("ledger.record(") for end in ends)
    assert len(ends) == len(recorded)
    # A verdict that is computed is checked where it is recorded; one that is written out, here.
    written = re.findall(r"ledger\.record\(\s*\"[^\"]+\"\s*,\s*\"([^\"]+)\"", code)
    assert set(written) <= set(wpo_notes.ledger.VERDICTS)
    # A claim's box is a link target, so a page can hold it only once.
    assert len(set(recorded)) == len(recorded)


@pytest.mark.parametrize("page", names(NOTEBOOKS))
def test_notebooks_have_the_header_and_a_download(page: str) -> None:
    assert yaml.safe_load(TEXT[page].split("---\n")[1]) == HEADER
    last = TEXT[page].rstrip().splitlines()[-1]
    assert re.fullmatch(rf"\{{nb-download\}}`[^`<]+ <{page}\.ipynb>`", last)


@pytest.mark.parametrize("page", names(NOTEBOOKS))
def test_figures_have_a_caption_and_a_description(page: str) -> None:
    for cell in cells(page):
        if "plt.show()" in cell.source:
            about = cell.metadata.get("mystnb", {})
            assert about["figure"]["caption"].strip(), cell.source
            assert about["figure"]["name"].startswith("fig-"), cell.source
            assert len(about["image"]["alt"].strip()) > 20, cell.source
        if "plots.animation(" in cell.source:
            about = cell.metadata["mystnb"]["figure"]
            assert about["caption"].strip(), cell.source
            assert about["name"].startswith("fig-"), cell.source


@pytest.mark.parametrize("page", names(CHAPTERS))
def test_chapters_have_question_module_and_exercises(page: str) -> None:
    opening = TEXT[page].split("\n## ")[0]
    assert "*Question" in opening
    modules = re.findall(r"\{py:mod\}`~?wpo_notes\.(\w+)", opening)
    assert modules
    assert set(modules) <= {*names(MODULES), "experiments"}
    assert re.search(r"^## What was checked$.*^## Exercises$", TEXT[page], re.M | re.S)


@pytest.mark.parametrize("page", names(CHAPTERS))
def test_chapters_have_an_opening_and_solved_exercises(page: str) -> None:
    opening, *_ = TEXT[page].split("\n## ")
    assert opening.index("*Question") < opening.index("```{opening}") < opening.index("{code-cell}")
    listed = "{checked-claims}" in TEXT[page]
    assert listed == any("ledger.record(" in cell.source for cell in cells(page))
    exercises = re.findall(r"^\*\*Exercise (\d+)\.\*\*", TEXT[page], re.M)
    solutions = [cell for cell in cells(page) if "hide-cell" in cell.metadata.get("tags", [])]
    assert exercises == [str(number + 1) for number in range(len(solutions))] != []
    assert all("assert " in cell.source for cell in solutions)


@pytest.mark.parametrize("module", names(MODULES))
def test_modules_name_a_chapter_that_names_them(module: str) -> None:
    docstring = ast.get_docstring(ast.parse((ROOT / "wpo_notes" / f"{module}.py").read_text()))
    if "Chapters: all" in docstring:
        return
    pairs = re.findall(r"\*([^*]+)\*\s+\(``book/([\w-]+)\.md``\)", docstring)
    assert pairs, "a line like: Chapter: *Title* (``book/name.md``)"
    for title, page in pairs:
        assert re.search(r"^# (.*)$", TEXT[page], re.M)[1] == " ".join(title.split())
        assert f"wpo_notes.{module}" in TEXT[page]


def test_every_module_is_in_the_reference() -> None:
    documented = re.findall(r"automodule:: wpo_notes\.(\w+)$", TEXT["api"], re.M)
    assert sorted(documented) == sorted([*names(MODULES), "experiments"])


def test_no_notebook_with_outputs_is_tracked() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "*.ipynb"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    assert listed.stdout == ""


def test_readme_example_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    quick = example.replace("fit_kernel_model(x)", "fit_kernel_model(x, centers=20, steps=5)")
    assert quick != example
    exec(compile(quick, "README.md", "exec"), scope)
    assert scope["score"].shape == scope["x"].shape


def test_readme_commands_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The calls of the package in the README, in its order and in one folder, with few training steps."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = [shlex.split(found) for found in re.findall(r"`python -m wpo_notes\s([^`]+)`", text)]
    assert [command[0] for command in commands] == ["fit", "report"]
    monkeypatch.chdir(tmp_path)
    samples = np.random.RandomState(0).standard_normal((30, 2))
    np.savetxt("samples.csv", samples, delimiter=",", header="a,b", comments="")
    for command in commands:
        main([*command, "--steps", "3"])
        assert Path(command[command.index("--out") + 1]).stat().st_size > 1000


# ---- the Makefile


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # Without the variables by which an outer make would pass on its own options.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    return subprocess.run(
        ["make", "-f", str(ROOT / "Makefile"), *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        env=environment,
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder that looks like a checkout that has been set up."""
    for name in ("requirements.txt", "pyproject.toml", ".venv/.ready"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def test_make_sets_up_only_when_out_of_date(checkout: Path) -> None:
    assert "pip install" not in make(checkout, "-n", "book").stdout
    stamp = (checkout / ".venv" / ".ready").stat().st_mtime
    os.utime(checkout / "requirements.txt", (stamp + 10, stamp + 10))
    steps = make(checkout, "-n", "book").stdout
    assert steps.index("-m venv") < steps.index("pip install") < steps.index("jupyter-book build")
    (checkout / ".venv" / ".ready").unlink()
    assert "pip install" in make(checkout, "-n", "unit").stdout


def test_make_says_when_python_is_missing(checkout: Path) -> None:
    (checkout / ".venv" / ".ready").unlink()
    run = make(checkout, "setup", "PYTHON=")
    assert run.returncode != 0
    assert "Python 3.11 or newer is needed" in run.stderr


def test_make_lists_every_target(tmp_path: Path) -> None:
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    assert [line.split()[0] for line in make(tmp_path).stdout.splitlines()] == targets


# ---- chapters as tests


def myst(*sources: str, title: str = "Tiny") -> str:
    blocks = "\n\n".join(f"```{{code-cell}} ipython3\n{source}\n```" for source in sources)
    return f"---\n{yaml.safe_dump(HEADER)}---\n\n# {title}\n\n{blocks}\n"


@pytest.fixture
def tiny_chapters(pytester: pytest.Pytester) -> pytest.Pytester:
    (pytester.path / "book" / "_ext").mkdir(parents=True)
    shutil.copy(ROOT / "conftest.py", pytester.path)
    shutil.copy(BOOK / "_ext" / "executed.py", pytester.path / "book" / "_ext")
    shutil.copy(ROOT / "requirements.txt", pytester.path)
    # without what takes long to import and is not used there
    pytester.makeini("[pytest]\npythonpath = book/_ext\naddopts = -p no:hypothesispytest\n")
    return pytester


def test_chapters_run_and_stop_at_the_first_failure(tiny_chapters: pytest.Pytester) -> None:
    book = tiny_chapters.path / "book"
    (book / "bad.md").write_text(myst("x = 1", "assert x == 2", "x + 1", "import time"))
    (book / "good.md").write_text(myst("x = 1", "assert x == 1"))
    (book / "slow.md").write_text(myst("import time\ntime.sleep(60)", "x = 1"))
    (book / "page.md").write_text("# No notebook\n\n```python\nassert False\n```\n")
    run = tiny_chapters.runpytest_subprocess("--nbval", "--nbval-cell-timeout", "3", "book")
    # bad: one cell passes, one fails, two are skipped; good: two pass; slow: one fails, one is skipped
    run.assert_outcomes(passed=3, failed=2, skipped=3)


def test_chapters_that_passed_are_not_executed_again(tiny_chapters: pytest.Pytester) -> None:
    book = tiny_chapters.path / "book"
    good, bad = book / "good.md", book / "bad.md"
    good.write_text(myst("x = 1", "x + 1"))
    bad.write_text(myst("x = 1", "assert x == 2"))
    run = tiny_chapters.runpytest_subprocess
    run("--nbval", "book/good.md::Cell 0").assert_outcomes(passed=1)  # a part is not kept
    run("--nbval", "--unexecuted", "book").assert_outcomes(passed=3, failed=1)
    run("--nbval", "--unexecuted", "book").assert_outcomes(passed=1, failed=1)
    bad.write_text(myst("x = 2", "assert x == 2"))
    run("--nbval", "--unexecuted", "book").assert_outcomes(passed=2)
    assert run("--nbval", "--unexecuted", "book").ret == pytest.ExitCode.NO_TESTS_COLLECTED
    run("--nbval", "book").assert_outcomes(passed=4)
    # A change of the package or of the requirements makes all results old.
    (tiny_chapters.path / "requirements.txt").write_text("other==1\n")
    run("--nbval", "--unexecuted", "book").assert_outcomes(passed=4)


def test_plain_pytest_leaves_the_chapters_alone(tiny_chapters: pytest.Pytester) -> None:
    (tiny_chapters.path / "book" / "bad.md").write_text(myst("assert False"))
    items, _ = tiny_chapters.inline_genitems("book")
    assert items == []


def test_cells_have_a_timeout(tiny_chapters: pytest.Pytester) -> None:
    assert tiny_chapters.parseconfigure("--nbval").option.nbval_cell_timeout == 300
    config = tiny_chapters.parseconfigure("--nbval", "--nbval-cell-timeout", "7")
    assert config.option.nbval_cell_timeout == 7


# ---- the build


@pytest.fixture
def tiny_book(tmp_path: Path) -> Path:
    """A book of two chapters, a ledger and a reference, with the real configuration and extensions."""
    book = tmp_path / "book"
    book.mkdir()
    for name in ("_ext", "_static"):
        shutil.copytree(BOOK / name, book / name)
    for name in ("claims.toml", "references.bib"):
        shutil.copy(BOOK / name, book)
    for name in ("_config.yml", "requirements.txt", *portable.FILES):
        shutil.copy(ROOT / name, tmp_path)
    (book / "results").mkdir()
    (tmp_path / "wpo_notes").mkdir()
    (tmp_path / "wpo_notes" / "key.py").write_text("")
    files = [{"file": name} for name in ("two", "ledger", "api")]
    toc = {"format": "jb-book", "root": "one", "chapters": files}
    (book / "_toc.yml").write_text(yaml.safe_dump(toc))
    (book / "api.md").write_text(
        "# Reference\n\n```{eval-rst}\n.. automodule:: wpo_notes.ledger\n   :members:\n```\n"
    )
    (book / "ledger.md").write_text(
        "# Ledger\n\n```{ledger} claim\n```\n\n```{ledger-summary}\n```\n"
    )
    return tmp_path


def build(top: Path, *options: str, **environment: str) -> tuple[int, str]:
    run = subprocess.run(
        [Path(sys.executable).with_name("jupyter-book"), "build", *options, "book"],
        cwd=top,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    return run.returncode, run.stdout + run.stderr


def record(claim: str, verdict: str) -> str:
    return (
        f'from wpo_notes import ledger\nledger.record("{claim}", "{verdict}", "Error 1e-9 < 1e-6.")'
    )


def row_of(claim: str, page: str) -> str:
    return re.search(rf'<tr[^>]*id="claim-{claim}".*?</tr>', page, re.S)[0]


def test_build_is_strict_and_the_ledger_follows_the_chapters(tiny_book: Path) -> None:
    one, two = tiny_book / "book" / "one.md", tiny_book / "book" / "two.md"
    executions = tiny_book / "executions"
    count = f"with open({str(executions)!r}, 'a') as file:\n    print(1, file=file)"
    one.write_text(myst(count, record("cole-hopf", "holds")))

    # A verdict on an unknown claim is a warning and fails the build, the second time too, when the
    # chapters come from the cache.
    two.write_text(myst(record("no-such-claim", "holds")))
    for _ in range(2):
        status, output = build(tiny_book)
        assert status != 0
        assert "claims.toml lacks: ['no-such-claim']" in output
    assert len(executions.read_text().splitlines()) == 1

    # Corrected, it passes. The package has changed, so the cached chapter is executed again.
    two.write_text(myst("1 + 1"))
    (tiny_book / "wpo_notes" / "key.py").write_text("changed = True\n")
    status, output = build(tiny_book)
    assert status == 0, output
    assert len(executions.read_text().splitlines()) == 2
    html = tiny_book / "_build" / "html"
    ledger = (html / "ledger.html").read_text(encoding="utf-8")
    row = row_of("cole-hopf", ledger)
    assert ">Holds<" in row
    assert "Error 1e-9 &lt; 1e-6." in row
    assert 'href="one.html#verdict-cole-hopf"' in row
    assert 'id="verdict-cole-hopf"' in (html / "one.html").read_text(encoding="utf-8")
    assert ">Not yet examined<" in row_of("kernel-formula", ledger)
    number = sum(claim["kind"] == "claim" for claim in CLAIMS)
    assert f"Of {number} claims: 1 holds, {number - 1} are not yet examined." in ledger
    assert check_site.check(html) == []

    # A failing cell fails the build.
    two.write_text(myst("assert 1 + 1 == 3, 'arithmetic'"))
    status, output = build(tiny_book)
    assert status != 0
    assert "arithmetic" in output


def test_site_is_built_from_the_chapters_that_pytest_executed(tiny_book: Path) -> None:
    executions = tiny_book / "executions"
    count = f"with open({str(executions)!r}, 'a') as file:\n    print(1, file=file)"
    one = myst(count, "print('text')\n2 ** 70", record("cole-hopf", "holds"), "display(1.5)")
    one = one.replace("# Tiny\n", "# Tiny\n\n```{opening}\n:needs: two\n\nYou will know it.\n```\n")
    (tiny_book / "book" / "one.md").write_text(one + "\n```{checked-claims}\n```\n")
    (tiny_book / "book" / "two.md").write_text("# Second\n\nNo code.\n")
    shutil.copy(ROOT / "conftest.py", tiny_book)
    command = [sys.executable, "-m", "pytest", "--nbval", "-o", "pythonpath=book/_ext", "book"]
    subprocess.run(command, cwd=tiny_book, check=True, capture_output=True)
    status, output = build(tiny_book)
    assert status == 0, output
    assert len(executions.read_text().splitlines()) == 1
    html = (tiny_book / "_build" / "html" / "one.html").read_text(encoding="utf-8")
    for shown in ("text", str(2**70), "1.5"):
        assert re.search(rf"<pre>(<span></span>)?{shown}\n", html), shown
    # the box at the beginning
    box = re.search(r'<div class="opening.*?</div>', html, re.S)[0]
    assert "You will know it." in box
    assert re.search(r'<strong>Needs</strong> <a [^>]*href="two.html"', box)
    assert "in 1 s (this page, when it was last built)" in box
    (entry,) = re.findall(r'<strong>In the package</strong>: <a [^>]*href="([^"]*)"', box)
    assert entry == "api.html#wpo_notes.ledger.record"
    # and back
    reference = (tiny_book / "_build" / "html" / "api.html").read_text(encoding="utf-8")
    assert re.search(
        r'id="wpo_notes.ledger.record".*?Used in <a [^>]*href="one.html"', reference, re.S
    )
    # the list at the end
    (item,) = re.findall(r"<li>.*?</li>", html[html.index("checked-claims") :], re.S)[:1]
    assert 'href="#verdict-cole-hopf"' in item
    assert "Error 1e-9 &lt; 1e-6." in item


def test_opening_that_needs_an_unknown_page_fails_the_build(tiny_book: Path) -> None:
    unneeding = "```{opening}\n\nYou will know it.\n```\n"
    opening = (
        "```{opening}\n:needs: nowhere\n\nYou will know it.\n```\n\n```{checked-claims}\n```\n"
    )
    (tiny_book / "book" / "one.md").write_text(f"# One\n\n{opening}")
    (tiny_book / "book" / "two.md").write_text(f"# Second\n\n{unneeding}")
    status, output = build(tiny_book)
    assert status != 0
    assert "nowhere" in output
    second = (tiny_book / "_build" / "html" / "two.html").read_text(encoding="utf-8")
    assert "<strong>Needs</strong> no other chapter." in second
    assert "In the package" not in second
    html = (tiny_book / "_build" / "html" / "one.html").read_text(encoding="utf-8")
    assert "a time that was not measured" in html
    assert "No claim of the ledger is decided on this page." in html


def test_buttons_lead_to_binder_and_colab_where_there_is_a_repository(tiny_book: Path) -> None:
    chapters, site = tiny_book / "book", tiny_book / "_build" / "html"
    (chapters / "one.md").write_text(
        myst("1 + 1") + "\n{nb-download}`Download this chapter as a notebook <one.ipynb>`\n"
    )
    (chapters / "two.md").write_text("# Second\n\nText alone.\n")

    def links(page: str) -> list[str]:
        html = (site / f"{page}.html").read_text(encoding="utf-8")
        return re.findall(r'href="https://(?:mybinder|colab)\.[^"]*"', html)

    assert build(tiny_book) == (0, ANY)
    assert not links("one")
    assert build(tiny_book, BOOK_REPOSITORY="owner/name") == (0, ANY)
    binder, colab = links("one")
    source = re.search(r"/v2/gh/owner/name/HEAD\?urlpath=lab/tree/(.*)\"", binder)[1]
    assert (tiny_book / source).read_text().startswith("---")
    notebook = re.search(r"/github/owner/name/blob/gh-pages/(.*)\"", colab)[1]
    assert '"nbformat"' in (site / notebook).read_text()
    assert not links("two")
    status, output = build(tiny_book, BOOK_REPOSITORY="https://host/owner/name")
    assert status != 0
    assert "BOOK_REPOSITORY must be owner/name of a repository on GitHub, but is 'https:" in output


def test_binder_has_the_requirements_and_opens_chapters_as_make_lab_does() -> None:
    folder = ROOT / ".binder"
    (other,) = re.findall(r"^--requirement (.*)$", (folder / "requirements.txt").read_text(), re.M)
    assert (folder / other).resolve() == ROOT / "requirements.txt"
    assert os.access(folder / "postBuild", os.X_OK)
    for script in (ROOT / "Makefile", folder / "postBuild"):
        assert "set-default-viewer markdown myst" in script.read_text()


STATED = """
```{prf:proposition} Of two equal numbers
:label: prop-three-equal

One is one.
```

```{prf:proof}
Count. By {prf:ref}`prop-three-equal` this is done.
```
"""


def test_the_source_of_the_pdf_has_the_numbers_of_the_site_and_places_for_the_verdicts(
    tiny_book: Path,
) -> None:
    book = tiny_book / "book"
    start, theory, back = (
        {"caption": caption, "chapters": [{"file": name} for name in names]}
        for caption, names in (
            ("Start", ["two"]),
            ("Theory", ["three"]),
            ("Back", ["ledger", "api"]),
        )
    )
    parts = [start, theory | {"numbered": True}, back]
    (book / "_toc.yml").write_text(
        yaml.safe_dump({"format": "jb-book", "root": "one", "parts": parts})
    )
    (book / "one.md").write_text(myst(record("cole-hopf", "holds")))
    (book / "two.md").write_text(myst("1"))
    solution = (
        "```{code-cell} ipython3\n:tags: [hide-cell]\n\nprint(6 * 7)\n```\n\n"
        "{nb-download}`Download this <three.ipynb>`\n"
    )
    (book / "three.md").write_text(myst(record("decoupling", "does not hold")) + STATED + solution)
    status, output = build(tiny_book, "--builder", "latex")
    assert status == 0, output
    text = (tiny_book / "_build" / "latex" / "book.tex").read_text()
    unnumbered = r"\setcounter{secnumdepth}{-2}"
    numbered = r"\setcounter{secnumdepth}{2}\setcounter{chapter}{0}"
    assert re.findall(r"\\setcounter\{secnumdepth\}.*|\\part\{.*?\}", text) == [
        unnumbered,
        r"\part{Start}",
        r"\part{Theory}",
        numbered,
        unnumbered + r"\setcounter{chapter}{0}",
        r"\part{Back}",
    ]
    assert r"{note}{Proposition 1.1 (Of two equal numbers)}" in text
    assert r"\sphinxstyleemphasis{Proof.} Count. By" in text
    links = set(re.findall(r"\\hyperref\[\\detokenize\{(three:[^:].*?)\}\]", text))
    assert links == {"three:prop-three-equal", "three:verdict-decoupling"}
    assert all(rf"\label{{\detokenize{{{link}}}}}" in text for link in links)
    assert r"\sphinxstylestrong{Does not hold} \sphinxcode" in text
    assert "decoupling: does not hold" not in text
    assert r"\PYG{n+nb}{print}" in text
    assert re.search(r"^42$", text, re.M)
    assert "Download this" not in text


# ---- the checks of the site and of the cells' style

FIGURE = "<figure>{}<figcaption>Points</figcaption></figure>"


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ('<a href="none.html">x</a>', "link to a missing file: none.html"),
        ('<a href="other.html#nowhere">x</a>', "link to a missing place: other.html#nowhere"),
        ('<script src="https://cdn.example/x.js"></script>', "loads https://cdn.example/x.js"),
        ('<link rel="stylesheet" href="//cdn.example/x.css">', "loads //cdn.example/x.css"),
        (FIGURE.format('<img src="data:,">'), "image without a description: data:,"),
        (
            FIGURE.format('<img src="data:," alt="_images/1a2b.png">'),
            "image without a description: data:,",
        ),
        ('<img src="data:," alt="Two half circles">', "image outside of a figure: data:,"),
        ('<figure><img src="data:," alt="Two half circles"></figure>', "figure without a caption"),
        ("<p>" + "long " * 300_000 + "</p>", "weighs 1.50 MB, more than 1.5 MB"),
        (r"<p>where $\WProx$ is</p>", r"not rendered: $\WProx$"),
        ("<p>see {eq}`x`</p>", "not rendered: {eq}`"),
        ('<p class="system-message">x</p>', "a message of the build is on the page"),
        ('<div class="output stderr">x</div>', "a cell's output is of class output stderr: x"),
        ('<div class="output stderr"></div>', "a cell's output is of class output stderr"),
    ],
)
def test_site_check_finds(body: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(f"<html><body>{body}</body></html>")
    (tmp_path / "other.html").write_text('<p id="here"></p>')
    assert check_site.check(tmp_path) == [f"page.html: {problem}"]


def test_site_check_accepts_what_is_right(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(
        '<a href="other.html#here">x</a><a href="https://example.org/">x</a><a href="#top">x</a>'
        '<p id="top">costs $5 and $6</p>'
        + FIGURE.format('<img src="data:," alt="Two half circles of points">')
        + '<script>"<img>"</script>'
        r'<div class="math"><span>$\WProx$</span></div><code>$\alpha$</code>'
    )
    (tmp_path / "other.html").write_text('<p id="here"></p>')
    assert check_site.check(tmp_path) == []
    assert check_site.check(tmp_path / "empty")[0].endswith("run `make book` first")


def test_site_check_weighs_a_page_with_its_own_images(tmp_path: Path) -> None:
    for name in ("_images/a.png", "_images/b.png", "_static/shared.js"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(1_000_000))
    figure = FIGURE.format('<img src="_images/{0}.png" alt="Two half circles of points">')
    shared = '<script src="_static/shared.js"></script>'
    (tmp_path / "light.html").write_text(shared + 2 * figure.format("a"))
    assert check_site.check(tmp_path) == []
    (tmp_path / "heavy.html").write_text(shared + figure.format("a") + figure.format("b"))
    assert check_site.check(tmp_path) == ["heavy.html: weighs 2.00 MB, more than 1.5 MB"]


def test_site_check_reads_style_sheets(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("")
    (tmp_path / "x.css").write_text("@import url('https://fonts.example/a.css');")
    assert len(check_site.check(tmp_path)) == 1


def test_ruff_reads_and_rewrites_cells_only(tmp_path: Path) -> None:
    options = "---\nmystnb:\n  figure:\n    caption: |\n      x  =  1\n---\n"
    text = f"# T\n\nx  =  1\n\n```{{code-cell}} ipython3\n{options}import os\nx  =  1\nx\n```\n"
    chapter = tmp_path / "chapter.md"
    chapter.write_text(text)
    assert "F401" in " ".join(ruff_chapters.check(chapter))
    ruff_chapters.fix(chapter)
    assert chapter.read_text() == text.replace("import os\nx  =  1\nx\n", "x = 1\nx\n")
    assert ruff_chapters.check(chapter) == []
    chapter.write_text(chapter.read_text().replace("x = 1", "x  = 1"))
    (problem,) = ruff_chapters.check(chapter)
    assert "make format" in problem
