"""Every page of the built site in headless Chromium, wide and narrow, light and dark (`make browser`).

`make check-site` reads the same pages without a browser: links, anchors, descriptions, captions, weight.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote
from urllib.request import urlopen

import axe_playwright_python
import check_site
import chromium
import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import binary_opening

SITE = Path(__file__).resolve().parents[2] / "_build" / "html"
PAGES = sorted(path.stem for path in SITE.glob("*.html") if path.stem != "index")
WIDTHS = (1280, 390)  # CSS pixels: a desk, a phone
THEMES = ("light", "dark")
# Every width with every theme: two as the page is loaded, two when all is unfolded. What sticks out depends
# on the width, colours on the theme, and to lay a page out again takes most of a check's time.
FOLDED_LAYOUTS = ((1280, "light"), (390, "dark"))
UNFOLDED_LAYOUTS = ((390, "light"), (1280, "dark"))
PAPER = 794  # CSS pixels: A4
AXE = (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text(encoding="utf-8")

RENDERED = """async () => {
  await window.MathJax?.startup?.promise;
  await document.fonts.ready;
}"""

# What is unfolded is laid out in the next frame.
SETTLED = """() => new Promise(done =>
  requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 100))))"""

# Everything that a click would unfold.
UNFOLD = """() => {
  document.querySelectorAll("details").forEach(details => { details.open = true; });
  document.querySelectorAll(".toggle-hidden .toggle-button").forEach(button => button.click());
}"""

FOLDED = """() => [...document.querySelectorAll(".bd-article details > *, .bd-article .toggle > *")]
  .filter(inner => !inner.matches("summary, script, style") && !inner.checkVisibility(
    {contentVisibilityAuto: true}))
  .map(inner => inner.outerHTML.slice(0, 80))"""

# Elements that end right of the page and are in no box that scrolls or clips.
STICKS_OUT = """() => {
  const width = document.documentElement.clientWidth;
  const inside = element => {
    for (let box = element.parentElement; box && box !== document.body; box = box.parentElement)
      if (getComputedStyle(box).overflowX !== "visible") return true;
    return false;
  };
  const found = [...document.querySelectorAll("body *")].filter(element =>
    element.getBoundingClientRect().right > width + 1 && !inside(element));
  const names = found.map(element => element.outerHTML.slice(0, 80));
  const scrolled = document.documentElement.scrollWidth - width;
  return scrolled > 1 ? [`scrolls ${scrolled} px sideways: ${names.slice(0, 3).join(" , ")}`] : [];
}"""

# Boxes of the text that hide what is wider than they are. (Glyphs overhang by a few pixels.)
CUTS_OFF = """() => [...document.querySelectorAll(".bd-article :not(mjx-container *)")]
  .filter(box => box.clientWidth > 1 && box.scrollWidth > box.clientWidth + 12
    && ["hidden", "clip"].includes(getComputedStyle(box).overflowX))
  .map(box => `shows ${box.clientWidth} of ${box.scrollWidth} px: ${box.outerHTML.slice(0, 80)}`)"""

# On a phone a wide formula scrolls in a box of its own; at a desk none should have to.
WIDE_FORMULAS = """() => [...document.querySelectorAll('mjx-container[display="true"]')]
  .filter(formula => formula.scrollWidth > formula.clientWidth + 4)
  .map(formula => `cuts ${formula.scrollWidth - formula.clientWidth} px off the formula `
    + (formula.closest("div.math")?.id || formula.textContent.slice(0, 40)))"""

MATH_ERRORS = """() => [...document.querySelectorAll("mjx-merror, [data-mjx-error]")]
  .map(error => error.getAttribute("data-mjx-error") ?? error.textContent)"""

BROKEN_IMAGES = """async () => {
  const images = [...document.querySelectorAll("img")];
  images.forEach(image => { image.loading = "eager"; });
  await Promise.allSettled(images.map(image => image.decode()));
  return images.filter(image => !image.naturalWidth).map(image => image.src.slice(0, 80));
}"""

# Tokens of one class on one ground look the same, and so do a cell's table's rows and formulas: axe measures
# one token of each kind, two rows of such a table, the first ten formulas and twenty entries of the reference.
# It would take most of its time for the others. Everything is measured before anything is changed, or each
# change would cost a layout.
THIN_OUT = """() => {
  const seen = new Set();
  const again = [...document.querySelectorAll(".highlight span[class]")].filter(token => {
    const {color, backgroundColor} = getComputedStyle(token.closest(".highlight"));
    const kind = [token.className, color, backgroundColor].join();
    return token.firstElementChild === null && (seen.has(kind) || !seen.add(kind));
  });
  [...document.querySelectorAll("dl.py")].slice(20).forEach(entry => entry.remove());
  const tables = [...document.querySelectorAll(".cell_output table")];
  const widths = tables.map(table => table.getBoundingClientRect().width);
  const formulas = [...document.querySelectorAll("mjx-math")].slice(10);
  const boxes = formulas.map(formula => formula.getBoundingClientRect());
  again.forEach(token => token.remove());
  tables.forEach((table, k) => {
    table.style.minWidth = `${widths[k]}px`;
    [...table.querySelectorAll("tbody tr")].slice(2).forEach(row => row.remove());
  });
  formulas.forEach((formula, k) => {
    formula.parentElement.replaceChildren(formula);
    formula.replaceChildren();
    formula.style.display = "inline-block";
    formula.style.width = `${boxes[k].width}px`;
    formula.style.height = `${boxes[k].height}px`;
  });
}"""

# `region` (content outside of landmarks) is of moderate impact, and slow. `preload` would ask for the style
# sheets again, by wrong addresses, for a rule that is off by default.
AXE_RUN = """async where => {
  const options = {
    resultTypes: ["violations"], preload: false, rules: {region: {enabled: false}}};
  const {violations} = await axe.run(where, options);
  return violations
    .filter(violation => ["serious", "critical"].includes(violation.impact))
    .map(({id, impact, nodes}) => {
      const [{target, failureSummary}] = nodes;
      const why = failureSummary.split("\\n").slice(1).map(line => line.trim()).join("; ");
      return `axe, ${impact}: ${id}, ${nodes.length} times, first at ${target.join(" ")}: ${why}`;
    });
}"""

GROUND = """() => {
  let box = document.querySelector(".bd-article");
  while (box && getComputedStyle(box).backgroundColor === "rgba(0, 0, 0, 0)") box = box.parentElement;
  return getComputedStyle(box ?? document.documentElement).backgroundColor.match(/\\d+/g).map(Number);
}"""


def read(name: str) -> str:
    return (SITE / f"{name}.html").read_text(encoding="utf-8")


class Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keeps connections open

    def log_message(self, *_arguments) -> None:
        """Say nothing: a file that is missing is an error of the page that asks for it."""


@pytest.fixture(scope="session")
def address() -> Iterator[str]:
    """Where the site is served."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(SITE))) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="session")
def browser():
    executable = chromium.find()
    if executable is None:
        pytest.skip(chromium.MISSING)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=chromium.FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def contexts(browser) -> dict:
    """One for each width and theme; the site follows the theme of the system."""
    contexts: dict = {}

    def context(width: int, theme: str):
        if (width, theme) not in contexts:
            contexts[width, theme] = browser.new_context(
                viewport={"width": width, "height": 900}, color_scheme=theme
            )
            contexts[width, theme].set_default_timeout(120_000)  # ms, for a busy machine
        return contexts[width, theme]

    return context


def test_site_is_built():
    assert PAGES, f"{SITE} has no pages; run `make book` first"


def test_static_checks():
    assert check_site.check(SITE) == []


@pytest.fixture
def visit(contexts, address):
    """Opens a page and waits until it is as its reader sees it; collects what goes wrong meanwhile."""
    opened = []

    def visit(name: str, width: int, theme: str):
        page = contexts(width, theme).new_page()
        opened.append(page)
        problems: list[str] = []

        def request(request) -> None:
            if not request.url.startswith((address, "data:", "blob:")):
                problems.append(f"asks another host: {request.url}")

        def response(response) -> None:
            if response.status >= 400:
                problems.append(f"status {response.status}: {response.url}")

        def console(message) -> None:
            if message.type == "error":
                problems.append(f"error on the console: {message.text} ({message.location['url']})")

        page.on("request", request)
        page.on("response", response)
        page.on("console", console)
        page.on("pageerror", lambda error: problems.append(f"error of a script: {error}"))
        page.goto(address + name)
        page.evaluate(RENDERED)
        assert page.evaluate("document.documentElement.dataset.theme") == theme
        return page, problems

    yield visit
    for page in opened:
        page.close()


def report(problems: list[str], place: str) -> None:
    assert not problems, "\n".join(f"{place}: {problem}" for problem in dict.fromkeys(problems))


@pytest.mark.parametrize("name", PAGES)
def test_page(name: str, visit):
    """One visit for both widths, both themes and print."""
    page, problems = visit(f"{name}.html", *FOLDED_LAYOUTS[0])
    report(problems, name)
    for width, theme in FOLDED_LAYOUTS:
        show(page, width, theme)
        problems += page.evaluate(STICKS_OUT)
        report(problems, f"{name} at {width} px, {theme}")
    check_print(name, page, problems)
    page.evaluate(UNFOLD)
    for width, theme in UNFOLDED_LAYOUTS:
        show(page, width, theme)
        problems += [f"stays folded: {inner}" for inner in page.evaluate(FOLDED)]
        problems += [f"unfolded, {problem}" for problem in page.evaluate(STICKS_OUT)]
        problems += page.evaluate(CUTS_OFF)
        if width == WIDTHS[0]:
            problems += page.evaluate(WIDE_FORMULAS)
        report(problems, f"{name} at {width} px, {theme}")
    problems += [f"formula: {error}" for error in page.evaluate(MATH_ERRORS)]
    problems += [f"image that cannot be shown: {image}" for image in page.evaluate(BROKEN_IMAGES)]
    page.evaluate(THIN_OUT)
    page.evaluate(AXE)
    # Of the text, each width and each theme once: what colours do does not depend on the width, and what the
    # layout does not on the theme. What is around the text is the same on all pages.
    around = FOLDED_LAYOUTS if name == "intro" else ()
    for width, theme in UNFOLDED_LAYOUTS[::-1] + around:
        show(page, width, theme)
        # The site waits 300 ms after a change of size before it lets the keyboard reach what now scrolls.
        page.wait_for_timeout(400)
        exclude = [".bd-article"] if (width, theme) in around else []
        problems += page.evaluate(AXE_RUN, {"exclude": exclude})
        report(problems, f"{name} at {width} px, {theme}")


def show(page, width: int, theme: str) -> None:
    """Change the window's width and the system's theme."""
    page.set_viewport_size({"width": width, "height": 900})
    page.emulate_media(color_scheme=theme)
    page.evaluate(SETTLED)
    assert page.evaluate("document.documentElement.dataset.theme") == theme


def check_print(name: str, page, problems: list[str]) -> None:
    """Check the page on paper, from the dark theme, and leave it as it was."""
    page.emulate_media(color_scheme="dark")
    page.wait_for_function("document.documentElement.dataset.theme === 'dark'")
    page.set_viewport_size({"width": PAPER, "height": 900})
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.evaluate(SETTLED)
    if page.evaluate("document.documentElement.dataset.theme") != "light":
        problems.append("is printed in the dark theme")
    problems += [f"stays folded: {inner}" for inner in page.evaluate(FOLDED)]
    problems += page.evaluate(STICKS_OUT) + page.evaluate(CUTS_OFF)
    animations = page.locator(".animation")
    for k in range(animations.count()):
        animation = animations.nth(k)
        shown = [image for image in animation.locator("img").all() if image.is_visible()]
        if len(shown) != 1 or shown[0].get_attribute("data-still") is None:
            problems.append(f"an animation prints {len(shown)} frames, or not its still")
        if animation.locator("button:visible, input:visible").count():
            problems.append("an animation's controls are printed")
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    page.emulate_media(media="screen")
    if page.evaluate("document.documentElement.dataset.theme") != "dark":
        problems.append("stays in the light theme")
    report(problems, f"{name} in print")


def test_front_page_leads_to_the_first_chapter(contexts, address):
    page = contexts(WIDTHS[0], THEMES[0]).new_page()
    page.goto(address)
    page.wait_for_url("**/intro.html")
    page.close()


def test_code_is_hidden_on_all_pages_and_shown_again(browser, address):
    context = browser.new_context(viewport={"width": WIDTHS[1], "height": 900})
    page = context.new_page()
    code, results = page.locator(".cell > .cell_input"), page.locator(".cell > .cell_output")
    empty = page.locator(".cell:not(.tag_hide-cell):not(:has(> .cell_output))")
    button = page.locator(".btn-code-button")
    for name, hide in (("algorithm", True), ("memorisation", False)):
        page.goto(f"{address}{name}.html")
        assert button.get_attribute("aria-pressed") == str(not hide).lower()
        assert code.count() > 5
        assert empty.count() > 0
        for hidden in (not hide, hide):
            assert code.filter(visible=True).count() == (0 if hidden else code.count())
            assert empty.filter(visible=True).count() == (0 if hidden else empty.count())
            assert results.filter(visible=True).count() == results.count() > 0
            if hidden != hide:
                button.click()
        assert page.evaluate(STICKS_OUT) == []
    page.goto(f"{address}notation.html")
    assert button.count() == 0
    context.close()


# ---- the checks find what they are for


@pytest.mark.parametrize(
    ("check", "body"),
    [
        (STICKS_OUT, '<table style="width: 500px"><tr><td>x</td></tr></table>'),
        (CUTS_OFF, '<div style="overflow: hidden"><p style="width: 900px">x</p></div>'),
        (FOLDED, "<details><summary>Solution</summary><p>x</p></details>"),
        (MATH_ERRORS, '<mjx-container><mjx-merror data-mjx-error="Undefined">x</mjx-merror>'),
        (
            WIDE_FORMULAS,
            '<mjx-container display="true" style="display: block; overflow: auto; width: 90px">'
            '<p style="width: 99px">x</p></mjx-container>',
        ),
        (BROKEN_IMAGES, '<img src="none.png" alt="None">'),
        (AXE_RUN, '<p style="color: #777; background: #999">pale words</p>'),
        (AXE_RUN, "<button></button>"),
    ],
)
def test_check_finds(check: str, body: str, contexts):
    page = contexts(390, "light").new_page()
    head = (
        '<!doctype html><html lang="en"><title>x</title><meta name="viewport" content="width=390">'
    )
    page.set_content(f'{head}<main class="bd-article"><h1>x</h1><p>right</p></main>')
    page.evaluate(AXE)
    assert page.evaluate(check, {"exclude": []}) == []
    page.evaluate(
        "body => document.querySelector('main').insertAdjacentHTML('beforeend', body)", body
    )
    assert len(page.evaluate(check, {"exclude": []})) == 1
    page.evaluate(UNFOLD)
    page.evaluate(SETTLED)
    assert page.evaluate(FOLDED) == []
    page.close()


PIXEL = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        (
            "addEventListener('beforeprint', () => { document.documentElement.dataset.theme = 'dark'; })",
            "is printed in the dark theme",
        ),
        (
            "addEventListener('afterprint', () => { document.documentElement.dataset.theme = 'light'; })",
            "stays in the light theme",
        ),
        ("add(`<div style='width: 900px'>wide</div>`)", "px sideways"),
        (f"add(`<div class='animation'><img src='{PIXEL}' alt=''></div>`)", "or not its still"),
        (
            f"add(`<div class='animation'><img src='{PIXEL}' alt='' data-still>"
            "<button style='display: block !important'>Play</button></div>`)",
            "controls are printed",
        ),
    ],
)
def test_check_of_print_finds(script: str, problem: str, visit):
    page, problems = visit("genindex.html", 1280, "light")
    check_print("as built", page, problems)
    page.evaluate(
        """script => {
          const article = document.querySelector(".bd-article");
          const add = body => article.insertAdjacentHTML("beforeend", body);
          eval(script);
        }""",
        script,
    )
    with pytest.raises(AssertionError, match=problem):
        check_print("changed", page, problems)


def test_visit_notes_requests_and_errors(visit):
    page, problems = visit("search.html", 390, "light")
    page.evaluate("fetch('http://elsewhere.example/').catch(() => fetch('/missing'))")
    with page.expect_event("pageerror"):
        page.evaluate("setTimeout(() => { throw new Error('mine'); })")
    found = " ".join(problems)
    assert "asks another host: http://elsewhere.example/" in found
    assert "status 404" in found
    assert "error of a script: mine" in found


# ---- pictures that move

SHOWN = """animation => {
  const shown = [...animation.querySelectorAll("img")].filter(image => image.checkVisibility());
  const slider = animation.querySelector("input");
  return [shown.map(image => image.dataset.label).join(), slider.getAttribute("aria-valuetext")];
}"""
MAX_ANIMATION = 1_000_000  # bytes of its HTML, frames included


@pytest.mark.parametrize("name", [page for page in PAGES if 'class="animation"' in read(page)])
def test_animations_move_by_key_and_by_button(name: str, visit):
    page, problems = visit(f"{name}.html", 1280, "light")
    for animation in page.locator(".animation").all():
        assert len(animation.evaluate("animation => animation.outerHTML")) < MAX_ANIMATION
        slider, button = animation.locator("input"), animation.locator("button")
        last = int(slider.get_attribute("max"))
        slider.focus()
        seen = []
        for key, frame in (("Home", 0), ("ArrowRight", 1), ("End", last)):
            slider.press(key)
            label, text = animation.evaluate(SHOWN)
            assert slider.input_value() == str(frame)
            assert label == text
            seen.append(label)
        assert len(set(seen)) == 3
        button.click()  # from the end it starts anew
        assert button.inner_text() == "Pause"
        page.wait_for_function("slider => slider.value === '2'", arg=slider.element_handle())
        button.click()
        assert button.inner_text() == "Play"
        label, text = animation.evaluate(SHOWN)
        assert label == text != seen[-1]
    report(problems, name)


# ---- search


@pytest.mark.parametrize(
    ("words", "chapter"),
    [
        ("memorization", "memorisation.html"),
        ("memorisation", "memorisation.html"),
        ("Cole-Hopf", "mean-field-game.html"),
        ("ISM", "score-based-models.html"),
    ],
)
def test_search_finds(words: str, chapter: str, visit):
    page, problems = visit(f"search.html?q={quote(words)}", 1280, "light")
    page.wait_for_function("document.querySelector('#search-results .search-summary')?.textContent")
    links = page.locator(f'#search-results a[href*="{chapter}"]')
    links.first.wait_for()
    report(problems, f"search for {words}")


def test_search_says_when_it_finds_nothing(visit):
    page, _ = visit("search.html?q=zyxwvu", 1280, "light")
    page.get_by_text("did not match any documents").wait_for()


# ---- figures


class Images(HTMLParser):
    """Addresses of the images of a page's article."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        # Of an animation's frames, which differ little, the one that is shown first.
        if tag == "img" and "hidden" not in found and "_static/" not in found["src"]:
            self.found.append(found["src"])


def pixels(address: str) -> np.ndarray:
    """Red, green, blue, alpha (height, width, 4) of an image in a file or in the address itself."""
    if address.startswith("data:"):
        return np.asarray(Image.open(urlopen(address)).convert("RGBA"))
    return np.asarray(Image.open(SITE / address).convert("RGBA"))


def luminance(rgb: np.ndarray) -> np.ndarray:
    """Relative luminance of colours (..., 3) in 0 to 255: Web Content Accessibility Guidelines 2.1."""
    c = np.asarray(rgb, dtype=float) / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    return linear @ (0.2126, 0.7152, 0.0722)


def contrast(colors: np.ndarray, ground: np.ndarray) -> np.ndarray:
    first, second = luminance(colors) + 0.05, luminance(ground) + 0.05
    return np.maximum(first, second) / np.minimum(first, second)


def illegible(image: np.ndarray, grounds: dict[str, np.ndarray]) -> list[str]:
    """What cannot be read of a figure on the grounds of the two themes.

    Letters and lines are the opaque pixels of strokes thinner than 9 pixels, which a morphological opening
    removes. They need contrast 3 on both grounds (Guideline 1.4.11); areas need not, since a picture of a
    density has dark and bright places by its nature.
    """
    alpha = image[..., 3]
    problems = []
    if np.concatenate([alpha[[0, -1]].ravel(), alpha[:, [0, -1]].ravel()]).any():
        problems.append("has a ground of its own: its edge is not transparent")
    strokes = image[(alpha > 250) & ~binary_opening(alpha > 0, np.ones((9, 9)))][:, :3]
    if len(strokes) < 100:
        problems.append(f"has no letters or lines: {len(strokes)} pixels")
        return problems
    for theme, ground in grounds.items():
        low = contrast(strokes, ground) < 3
        if low.mean() > 0.01:
            color = np.median(strokes[low], axis=0).astype(int)
            problems.append(f"{low.mean():.0%} of its strokes are illegible on {theme}: {color}")
    return problems


@pytest.fixture(scope="session")
def grounds(contexts, address) -> dict[str, np.ndarray]:
    """Background of the text in each theme."""
    found = {}
    for theme in THEMES:
        page = contexts(1280, theme).new_page()
        page.goto(f"{address}intro.html")
        found[theme] = np.array(page.evaluate(GROUND))
        page.close()
    assert luminance(found["light"]) > 0.9
    assert luminance(found["dark"]) < 0.05
    return found


@pytest.mark.parametrize("name", PAGES)
def test_figures_are_legible_in_both_themes(name: str, grounds):
    found = Images(read(name)).found
    problems = [
        f"image {address[:60]} {problem}"
        for address in found
        for problem in illegible(pixels(address), grounds)
    ]
    report(problems, name)


def test_black_and_white_letters_are_illegible():
    grounds = {"light": np.array([255, 255, 255]), "dark": np.array([18, 18, 18])}
    image = np.zeros((100, 200, 4), dtype=np.uint8)
    image[20:80, 10:190:8] = (122, 122, 122, 255)
    assert illegible(image, grounds) == []
    for color, theme in (((0, 0, 0, 255), "dark"), ((255, 255, 255, 255), "light")):
        marked = image.copy()
        marked[20:80, 14:190:16] = color
        (problem,) = illegible(marked, grounds)
        assert f"illegible on {theme}" in problem
    image[:] = np.where(image[..., 3:] == 0, 255, image)
    assert "ground of its own" in illegible(image, grounds)[0]
