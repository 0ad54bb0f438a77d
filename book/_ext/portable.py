r"""Makes an executed chapter a notebook that runs, and can be read, away from this repository.

The first cell carries the package and the records that the chapter reads. If the notebook is not in a checkout
of the book, the cell unpacks them beside the notebook and installs the requirements that are missing. Text cells
are written for Jupyter and Colab, which know neither MyST's roles nor the book's macros.
"""

from __future__ import annotations

import ast
import base64
import gzip
import io
import re
import sys
import tarfile
import tomllib
from collections.abc import Callable, Iterable
from functools import cache
from importlib import metadata
from itertools import chain
from pathlib import Path

import nbformat

import wpo_notes

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "book" / "results"
# What the unpacked folder needs beside the modules, so that it can be installed as well.
FILES = ("LICENSE", "LICENSE-text", "README.md", "pyproject.toml", "requirements.txt")
# Extras of the package that chapters use.
EXTRAS = ("fit", "plots", "progress", "experiments")

SETUP = '''\
# @title Run this cell first
# If the book is not here: unpack its package beside this notebook, and install what is missing.
import base64
import importlib.util
import io
import os
import subprocess
import sys
import tarfile
import types
from pathlib import Path

REQUIREMENTS = {requirements!r}
ARCHIVE = """
{archive}
"""

package = importlib.util.find_spec("wpo_notes")
checkout = Path(package.origin).parents[1] if package else None
if not checkout or not (checkout / "book" / "results").is_dir():
    folder = Path("{folder}").resolve()
    content = io.BytesIO(base64.b64decode(ARCHIVE))
    with tarfile.open(fileobj=content, mode="r:gz") as archive:
        archive.extractall(folder, filter="data")
    sys.path.insert(0, str(folder))
    paths = [str(folder), os.environ.get("PYTHONPATH")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    missing = [
        requirement
        for module, requirement in REQUIREMENTS.items()
        if importlib.util.find_spec(module) is None
    ]
    if missing:
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *missing], check=True)
    print(f"The package and the records of this page are in {{folder}}.")
if importlib.util.find_spec("myst_nb") is None:
    # On the site, glue carries numbers into the text.
    sys.modules["myst_nb"] = types.SimpleNamespace(glue=lambda name, value, display=True: None)
'''


# ---- what a chapter needs


@cache
def project() -> dict:
    """What ``pyproject.toml`` says of the package."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def imports(source: str) -> set[str]:
    """Modules that the statements of a module or cell import, with the names taken from them."""
    found = set()
    for node in ast.parse(re.sub(r"^[%!].*$", "", source, flags=re.M)).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@cache
def module_file(name: str) -> Path | None:
    """The file of one of the package's modules."""
    path = ROOT.joinpath(*name.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if name.split(".")[0] == "wpo_notes" and candidate.is_file():
            return candidate
    return None


def reached(names: Iterable[str]) -> set[str]:
    """These modules and those that they import; what packages' ``__init__`` imports does not count."""
    found, waiting = set(), set(names)
    while waiting:
        name = waiting.pop()
        found.add(name)
        file = module_file(name)
        if file and file.name != "__init__.py":
            waiting |= imports(file.read_text(encoding="utf-8")) - found
    return found


def requirements(sources: Iterable[str]) -> dict[str, str]:
    """Requirement by module: the package's, those of its extras, and what else the cells import."""
    about = project()
    extras = [about["optional-dependencies"][name] for name in EXTRAS]
    ranges = {
        re.match(r"[\w.-]+", line)[0].lower(): line
        for line in chain(about["dependencies"], *extras)
    }
    direct = {name.split(".")[0] for source in sources for name in imports(source)}
    direct -= {*sys.stdlib_module_names, "wpo_notes", "myst_nb"}
    found = {}
    for distribution, modules in modules_by_distribution().items():
        if distribution in ranges or direct & set(modules):
            found[modules[0]] = ranges.get(distribution, distribution)
    return found


@cache
def modules_by_distribution() -> dict[str, list[str]]:
    """Modules of what is installed, the one with the distribution's own name first."""
    found: dict[str, list[str]] = {}
    for module, distributions in sorted(metadata.packages_distributions().items()):
        for distribution in distributions:
            if module.isidentifier():
                found.setdefault(distribution.lower(), []).append(module)
    return {
        distribution: sorted(modules, key=lambda module, name=distribution: module != name)
        for distribution, modules in sorted(found.items())
    }


def records(sources: Iterable[str]) -> list[Path]:
    """Files of the records that the cells read: of the experiments that they name or import.

    Those in a further folder, such as earlier versions in ``again``, only if the cells name that too.
    """
    sources = list(sources)
    if not any(re.search(r"\bresults\b", source) for source in sources):
        return []
    names = reached(set().union(*map(imports, sources)))
    named = {name.rpartition(".")[2] for name in names if name.startswith("wpo_notes.experiments")}
    named |= set(re.findall(r"\"(\w+)\"", "\n".join(sources)))
    return [
        path
        for path in sorted(RESULTS.rglob("*.*"))
        if named.issuperset(path.relative_to(RESULTS).parts[:-1])
    ]


def archive(paths: Iterable[Path]) -> str:
    """Files of the repository as a compressed archive in base64; equal files give an equal text."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for path in paths:
            about = tarfile.TarInfo(path.relative_to(ROOT).as_posix())
            content = path.read_bytes()
            about.size = len(content)
            file.addfile(about, io.BytesIO(content))
    # The records, which are most of it, are compressed already: xz takes eight times as long and gains 2 %.
    packed = gzip.compress(buffer.getvalue(), mtime=0)
    return base64.encodebytes(packed).decode().rstrip()


def setup_cell(sources: list[str]) -> nbformat.NotebookNode:
    """The cell that makes the others run anywhere."""
    package = sorted((ROOT / "wpo_notes").rglob("*.py"))
    typed = sorted((ROOT / "wpo_notes").glob("py.typed"))
    files = [*package, *typed, *(ROOT / name for name in FILES), *records(sources)]
    source = SETUP.format(
        requirements=requirements(sources),
        archive=archive(files),
        folder=f"{project()['name']}-{wpo_notes.__version__}",
    )
    hidden = {"jupyter": {"source_hidden": True}, "cellView": "form", "tags": ["setup"]}
    return nbformat.v4.new_code_cell(source, id="setup", metadata=hidden)


# ---- text


class Text:
    """Writes the book's Markdown for readers that know neither roles and directives nor the macros.

    Args:
        macros: as MathJax has them: the replacement, or replacement and number of arguments (0 or 1).
        roles: by role, from its target to what a reader sees.
    """

    # A fence of colons or backticks, name, title, options, content
    directive = re.compile(
        r"^(:{3,}|`{3,})\{([\w:-]+)\}([^\n]*)\n((?:[ ]*:[\w-]+:[^\n]*\n)*)(.*?)^\1[ ]*$",
        re.M | re.S,
    )
    role = re.compile(r"\{([\w:-]+)\}`([^`]+)`")
    label = re.compile(r"^\$\$[ ]+\(([\w-]+)\)[ ]*$", re.M)
    target = re.compile(r"^\([\w-]+\)=\n", re.M)

    def __init__(
        self, macros: dict[str, str | list], roles: dict[str, Callable[[str], str]]
    ) -> None:
        self.macros, self.roles = macros, roles

    def __call__(self, text: str) -> str:
        text = self.directive.sub(self._directive, text)
        text = self.target.sub("", text)
        text = self.label.sub(self._tag, text)
        text = self.role.sub(self._role, text)
        for name, replacement in self.macros.items():
            body, count = replacement if isinstance(replacement, list) else (replacement, 0)
            argument = r"\{([^}]*)\}" * count
            text = re.sub(
                rf"\\{name}(?![a-zA-Z]){argument}",
                lambda match, body=body: _insert(body, match.groups()),
                text,
            )
        return text

    def _tag(self, match: re.Match[str]) -> str:
        number = self._role(self.role.match(f"{{eq}}`{match[1]}`"))
        return rf"\tag*{{{number}}}" + "\n$$"

    def _role(self, match: re.Match[str]) -> str:
        name, content = match.groups()
        explicit = re.fullmatch(r"(.*?)\s*<(.*)>", content, re.S)
        if name == "nb-download":  # the reader has it
            return ""
        if explicit and name not in {"glue:text", "eq"}:
            return explicit[1]
        try:
            return self.roles[name](content)
        except KeyError:  # another role, or a target that is missing, of which the build has warned
            return f"`{content.removeprefix('~')}`"

    def _directive(self, match: re.Match[str]) -> str:
        _, name, title, _, content = match.groups()
        kind = name.rpartition(":")[2]
        title = title.strip()
        if name == "prf:proof":
            return f"*Proof.* {self(content).strip()} ∎\n"
        if name.startswith("prf:"):
            named = f"{kind.capitalize()} ({title})." if title else f"{kind.capitalize()}."
            return f"**{named}** {self(content).strip()}\n"
        heading = f"**{title}**\n\n" if title else ""
        return f"{heading}{self(content).strip()}\n"


def _insert(body: str, arguments: tuple[str, ...]) -> str:
    for number, argument in enumerate(arguments, start=1):
        body = re.sub(rf"(?<!#)#{number}", lambda _, argument=argument: argument, body)
    return body.replace("##", "#")


# ---- the notebook


def portable(
    notebook: nbformat.NotebookNode,
    macros: dict[str, str | list],
    roles: dict[str, Callable[[str], str]],
) -> nbformat.NotebookNode:
    """The executed chapter, with the first cell and with text that any Jupyter can show."""
    text = Text(macros, roles)
    cells = []
    for cell in notebook.cells:
        cell = cell.copy()
        cell.metadata = {
            key: kept for key, kept in cell.metadata.items() if key in {"tags", "jupyter"}
        }
        if cell.cell_type == "markdown":
            cell.source = text(cell.source)
        cells.append(cell)
    sources = [cell.source for cell in cells if cell.cell_type == "code"]
    about = {key: notebook.metadata[key] for key in ("kernelspec",) if key in notebook.metadata}
    return nbformat.v4.new_notebook(cells=[setup_cell(sources), *cells], metadata=about)
