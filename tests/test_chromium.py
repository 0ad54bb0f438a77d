"""The search for a browser: it is found, installed where that can be done, or its absence is plain to see."""

import pytest
from browser import chromium

PATH = "/usr/bin/chromium"


@pytest.fixture
def system(monkeypatch):
    """A system on which nothing is installed; `install` only notes that it was called."""
    calls = []
    monkeypatch.delenv("CHROMIUM", raising=False)
    monkeypatch.setattr(chromium, "find", lambda: None)
    monkeypatch.setattr(chromium, "install", lambda: calls.append("install"))
    monkeypatch.setattr(chromium.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(chromium.os, "geteuid", lambda: 0)
    return calls


def test_browser_that_is_found_is_printed(system, monkeypatch, capsys):
    monkeypatch.setattr(chromium, "find", lambda: PATH)
    chromium.main()
    assert capsys.readouterr() == (f"{PATH}\n", "")
    assert system == []


def test_root_of_debian_installs_it(system, monkeypatch, capsys):
    monkeypatch.setattr(chromium, "find", lambda: PATH if system else None)
    chromium.main()
    assert capsys.readouterr() == (f"{PATH}\n", "")
    assert system == ["install"]


def no_apt(monkeypatch):
    monkeypatch.setattr(chromium.shutil, "which", lambda name: None)


def no_root(monkeypatch):
    monkeypatch.setattr(chromium.os, "geteuid", lambda: 1000)


def wrongly_named(monkeypatch):
    monkeypatch.setenv("CHROMIUM", "/nowhere/chromium")


@pytest.mark.parametrize("lack", [no_apt, no_root, wrongly_named])
def test_where_it_cannot_be_installed_its_absence_is_said_aloud(system, monkeypatch, capsys, lack):
    lack(monkeypatch)
    chromium.main()
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("THE SITE IS NOT TESTED: no Chromium.")
    assert "apt-get install chromium" in err
    assert system == []


def test_failed_installation_is_said_aloud(system, capsys):
    chromium.main()
    assert capsys.readouterr().err == chromium.MISSING + "\n"
    assert system == ["install"]


def test_find_obeys_the_variable_and_else_takes_the_first_name_on_the_path(monkeypatch):
    there = {"google-chrome", "/opt/chromium"}
    monkeypatch.setattr(chromium.shutil, "which", lambda name: name if name in there else None)
    for named, found in ((None, "google-chrome"), ("/opt/chromium",) * 2, ("/nowhere", None)):
        if named:
            monkeypatch.setenv("CHROMIUM", named)
        else:
            monkeypatch.delenv("CHROMIUM", raising=False)
        assert chromium.find() == found
