"""Finds Chromium, and installs Debian's package where it can: ``python tests/browser/chromium.py``."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# A browser that asks nothing of the system, reaches no other host, and draws the same way everywhere.
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-proxy-server",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
MISSING = (
    f"THE SITE IS NOT TESTED: no Chromium. None of {', '.join(NAMES)} is on the PATH; "
    "install one (Debian: apt-get install chromium) or name it with CHROMIUM=/path/to/chromium"
)


def find() -> str | None:
    """Path of the browser: what CHROMIUM names, else the first of the known names on the PATH."""
    named = os.environ.get("CHROMIUM")
    return next(filter(None, map(shutil.which, [named] if named else NAMES)), None)


def can_install() -> bool:
    """Whether this is a Debian system that its user may change."""
    return shutil.which("apt-get") is not None and os.geteuid() == 0


def install() -> None:
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for arguments in (["update"], ["install", "--yes", "--no-install-recommends", "chromium"]):
        subprocess.run(["apt-get", "--quiet", *arguments], env=environment, check=False)


def main() -> None:
    """Install the browser if it is missing and can be, and print its path, or that there is none."""
    if find() is None and "CHROMIUM" not in os.environ and can_install():
        install()
    print(find() or MISSING, file=sys.stdout if find() else sys.stderr)


if __name__ == "__main__":
    main()
