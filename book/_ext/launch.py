"""Sphinx extension: buttons above a chapter that open it on Binder and on Colab, once the book has a public address.

``make book BOOK_REPOSITORY=owner/name`` names a repository on GitHub. Binder opens the chapter's source there, in the environment that
the folder ``.binder`` describes. Colab opens the downloadable notebook, which has to be on the branch `SITE`, where the built site is
published. Without a repository there are no buttons: they would lead nowhere.
"""

from __future__ import annotations

import os
import re

from sphinx.application import Sphinx
from sphinx.errors import ConfigError

SITE = "gh-pages"


def add_buttons(app: Sphinx, pagename: str, templatename: str, context: dict, doctree) -> None:
    repository = app.config.launch_repository
    notebook = re.search(
        rf'href="(_downloads/\w+/{re.escape(pagename)}\.ipynb)"', context.get("body", "")
    )
    if not (repository and notebook):
        return
    places = [
        (
            "Binder",
            "svg",
            f"mybinder.org/v2/gh/{repository}/HEAD?urlpath=lab/tree/book/{pagename}.md",
        ),
        (
            "Colab",
            "png",
            f"colab.research.google.com/github/{repository}/blob/{SITE}/{notebook[1]}",
        ),
    ]
    links = [
        {
            "type": "link",
            "text": name,
            "tooltip": f"Open on {name}",
            "icon": f"_static/images/logo_{name.lower()}.{suffix}",
            "url": f"https://{address}",
        }
        for name, suffix, address in places
    ]
    context["header_buttons"].append(
        {
            "type": "group",
            "tooltip": "Run this chapter elsewhere",
            "icon": "fas fa-rocket",
            "label": "launch-buttons",
            "buttons": links,
        }
    )


def check(app: Sphinx, config) -> None:
    if not re.fullmatch(r"([\w.-]+/[\w.-]+)?", config.launch_repository):
        raise ConfigError(
            "BOOK_REPOSITORY must be owner/name of a repository on GitHub, but is "
            f"{config.launch_repository!r}"
        )


def setup(app: Sphinx) -> dict:
    app.add_config_value("launch_repository", os.environ.get("BOOK_REPOSITORY", ""), "html")
    app.connect("config-inited", check)
    # The theme makes the list of buttons at priority 500 and fills it at 501.
    app.connect("html-page-context", add_buttons, priority=502)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
