r"""One HTML page on a kernel model of one's own samples: held-out likelihood, pictures, memorisation.

Chapter: *Your own data* (``book/your-own-data.md``).
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from string import Template
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from scipy.spatial import KDTree
from torch import Tensor
from torch.distributions import MultivariateNormal

from wpo_notes._checks import checked_sample_set, make_generator
from wpo_notes._optional import needed
from wpo_notes._shapes import Float
from wpo_notes._tables import default_names
from wpo_notes.experiments.estimators import Stopwatch, bic_mixture
from wpo_notes.experiments.tables import table
from wpo_notes.fit import fit_kernel_model
from wpo_notes.metrics import Estimate, Memorisation, memorisation
from wpo_notes.mixture import GaussianMixture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Competitor", "Findings", "findings", "page"]

# Each round holds out a fifth of the rows, at most so many; further rounds, until enough rows have judged.
FOLDS = 5
_MOST_HELD_OUT, _ENOUGH_HELD_OUT = 2000, 500
_KERNEL_MODEL = "kernel model"
_SAMPLES = 2000
_BANDWIDTHS = np.geomspace(0.03, 3, 21)  # in standardised coordinates
_MOST_FOR_BANDWIDTH = 2000
_CLEAR = 3  # standard errors from which a difference is called one


class Competitor(NamedTuple):
    """A density estimate of the training rows, judged on the held-out rows."""

    name: str
    chosen: str  #: what it chose for itself
    log_density: Estimate  #: mean over the held-out rows, nats a row, in the data's units
    lead: Estimate | None  #: mean of the kernel model's minus its own, row by row; None for itself


class Findings(NamedTuple):
    """What a report shows: the competitors' means over all rounds, the rest of the first one."""

    competitors: list[Competitor]  #: the kernel model first
    rounds: int
    judged: int  #: rows that were held out in some round
    mixture: GaussianMixture
    training: Tensor
    held_out: Tensor
    samples: Tensor
    panel: Memorisation  #: of the model's samples
    null: Memorisation  #: of the held-out rows
    distance: tuple[
        Tensor, Tensor
    ]  #: from samples, from held-out rows, to the nearest training row


def findings(
    x: Float[Tensor, "n d"], *, generator: torch.Generator | None = None, **options: Any
) -> Findings:
    """Fit a kernel model to four fifths of the samples and judge it on the others, at most 2000.

    While fewer than 500 samples have judged, the next fifth is held out in turn, so that of few samples each judges
    once. Distances, and the fits of the competitors, are in coordinates standardised by the training rows;
    log-densities are in the data's units, which subtracts the logarithms of the scales.

    Args:
        x: (n, d), distinct samples.
        generator: source of the split, of the fits and of the samples; a fresh one if None.
        options: further arguments of `fit_kernel_model`.

    Raises:
        TypeError, ValueError: as `fit_kernel_model`, for four fifths of the samples.
    """
    x = checked_sample_set("x", x)
    generator = make_generator(generator, x.device)
    order = torch.randperm(len(x), generator=generator, device=x.device)
    rounds: list[_Round] = []
    judged = 0
    while len(rounds) < FOLDS and judged < _ENOUGH_HELD_OUT:
        held_out = torch.zeros_like(order, dtype=torch.bool)
        held_out[order[len(rounds) :: FOLDS][:_MOST_HELD_OUT]] = True
        rounds.append(_round(x[~held_out], x[held_out], generator, options))
        judged += int(held_out.sum())
    first = rounds[0]
    log_density = {
        name: torch.cat([one.log_density[name] for one in rounds]) for name in first.log_density
    }
    own = log_density[_KERNEL_MODEL]
    competitors = [
        Competitor(
            name,
            first.chosen[name],
            _mean(values),
            None if name == _KERNEL_MODEL else _mean(own - values),
        )
        for name, values in log_density.items()
    ]
    samples = first.mixture.sample((_SAMPLES,), generator=generator)
    offset, scale = first.training.mean(0), first.training.std(0)
    z, fresh, drawn = (
        (part - offset) / scale for part in (first.training, first.held_out, samples)
    )
    tree = KDTree(z.double().cpu().numpy())
    to_samples, to_held_out = (
        torch.from_numpy(tree.query(part.double().cpu().numpy())[0]) for part in (drawn, fresh)
    )
    return Findings(
        competitors,
        len(rounds),
        judged,
        first.mixture,
        first.training,
        first.held_out,
        samples,
        memorisation(drawn, z, fresh),
        memorisation(fresh, z, fresh),
        (to_samples, to_held_out),
    )


class _Round(NamedTuple):
    """Fits to training rows, and the log-densities of the held-out rows under each, in the data's units."""

    training: Tensor
    held_out: Tensor
    mixture: GaussianMixture
    log_density: dict[str, Tensor]
    chosen: dict[str, str]


def _round(
    training: Tensor, held_out: Tensor, generator: torch.Generator, options: dict[str, Any]
) -> _Round:
    try:
        model = fit_kernel_model(training, generator=generator, **options)
    except ValueError as error:  # which counts the rows of this fit, and not those that were given
        rows = len(training) + len(held_out)
        raise ValueError(f"of the {rows} rows, {len(training)} are fitted: {error}") from error
    with torch.no_grad():
        mixture = model()
    log_density = {_KERNEL_MODEL: mixture.log_prob(held_out)}
    chosen = {_KERNEL_MODEL: f"{len(mixture.centers)} kernels"}
    offset, scale = training.mean(0), training.std(0)
    z, fresh = (training - offset) / scale, (held_out - offset) / scale
    seed = int(torch.randint(2**31, (), generator=generator, device=z.device))
    for name, (what, values) in {
        "one Gaussian": _gaussian(z, fresh),
        "isotropic KDE": _kernel_density(z, fresh, seed),
        "EM mixture (BIC)": _em_mixture(z, fresh, seed),
    }.items():
        log_density[name], chosen[name] = values - scale.log().sum(), what
    return _Round(training, held_out, mixture, log_density, chosen)


def page(
    found: Findings,
    *,
    title: str,
    columns: Sequence[str] | None = None,
    notes: Sequence[str] = (),
) -> str:
    """HTML of a report, with its figures in it: it loads nothing, and all text that it is given is escaped.

    Args:
        found: what `findings` returned.
        title: what the samples are called, such as their file's name.
        columns: names of the d columns; x1, x2, ... if None.
        notes: sentences that warn of something in the data.
    """
    from wpo_notes import _figures

    d = found.training.shape[1]
    names = default_names(d) if columns is None else tuple(columns)
    shown = names[: _figures.MOST_COLUMNS]
    listed = ", ".join(shown)
    kernel, *others = found.competitors
    warnings = [*notes, *_doubts(found)]
    pairs = _figures.pairs(
        found.mixture, names, samples=found.samples.cpu(), data=found.training.cpu()
    )
    compared = _figures.compared(
        [one.name for one in found.competitors],
        [one.log_density.value for one in found.competitors],
        [one.log_density.error for one in found.competitors],
    )
    near = _figures.distances(*found.distance)
    return _PAGE.substitute(
        title=escape(title),
        rows=len(found.training) + len(found.held_out),
        columns=d,
        names=escape(", ".join(names)),
        training=len(found.training),
        held_out=len(found.held_out),
        judged=found.judged,
        rounds=(
            "one fit"
            if found.rounds == 1
            else f"{found.rounds} fits, each with another fifth of the rows held out"
        ),
        kernels=len(found.mixture.centers),
        verdict=escape(_verdict(kernel, others)),
        warnings=_warnings(warnings),
        comparison=_html_table(
            ("", "chosen", "log-density, nats a row", "kernel model ahead by"),
            [
                (one.name, one.chosen, _text(one.log_density), one.lead and _text(one.lead))
                for one in found.competitors
            ],
        ),
        compared=_figure(
            compared,
            "Mean log-density of the held-out rows, with two standard errors. The same rows are used for all, so the "
            "differences in the table are known better than the bars suggest.",
            "Mean held-out log-density: "
            + "; ".join(f"{one.name} {one.log_density.value:.2f}" for one in found.competitors)
            + ".",
        ),
        pairs=_figure(
            pairs,
            "On the diagonal, the density of each column over a histogram of the training rows. Below it, the density of two "
            "columns, with the kernels as ellipses of one standard deviation (the heaviest "
            f"{_figures._MOST_ELLIPSES} of more). Above it, training rows (orange) over new samples (blue)."
            + (
                f" The first {len(shown)} of {d} columns; all marginals are exact."
                if d > len(shown)
                else ""
            ),
            f"Grid of the marginal densities of {listed}, one column on the diagonal and two below it, and of training rows and "
            "new samples above it.",
            wide=len(shown) > 2,
        ),
        memorisation=_html_table(
            ("", "samples", "held-out rows"),
            [
                (
                    "share with d₁ < d₂/3",
                    f"{found.panel.share_near:.3f}",
                    f"{found.null.share_near:.3f}",
                ),
                (
                    "authenticity",
                    f"{found.panel.authenticity:.3f}",
                    f"{found.null.authenticity:.3f}",
                ),
                ("copying score", f"{found.panel.copying_score:.2f}", "0 ± 1"),
                ("median distance", *(f"{part.median():.3g}" for part in found.distance)),
            ],
        ),
        copying=escape(_copying(found)),
        near=_figure(
            near,
            "Share of points whose nearest training row is closer than a distance. A model that copies has its curve to the left "
            "of that of the held-out rows, one that blurs to the right.",
            "Two rising curves, the distribution functions of the distance to the nearest training row, of the model's samples "
            f"(median {found.distance[0].median():.2g}) and of the held-out rows (median {found.distance[1].median():.2g}).",
        ),
    )


def _gaussian(z: Tensor, fresh: Tensor) -> tuple[str, Tensor]:
    gaussian = MultivariateNormal(z.mean(0), torch.atleast_2d(z.mT.cov()))
    return "", gaussian.log_prob(fresh)


def _kernel_density(z: Tensor, fresh: Tensor, seed: int) -> tuple[str, Tensor]:
    """Isotropic kernels on all training rows, their bandwidth by five-fold cross-validation.

    It is validated on at most 2000 rows, and then narrowed as the optimal bandwidth is with their number,
    :math:`n^{-1/(d+4)}`.
    """
    n, d = z.shape
    some = z[:_MOST_FOR_BANDWIDTH].cpu().numpy()
    selection, kde = needed("sklearn.model_selection"), needed("sklearn.neighbors").KernelDensity()
    folds = selection.KFold(5, shuffle=True, random_state=seed)
    search = selection.GridSearchCV(kde, {"bandwidth": _BANDWIDTHS}, cv=folds, refit=False)
    bandwidth = float(search.fit(some).best_params_["bandwidth"]) * (len(some) / n) ** (1 / (d + 4))
    log_density = GaussianMixture.from_variance(z, bandwidth**2).log_prob(fresh)
    return f"bandwidth {bandwidth:.2g}, standardised", log_density


def _em_mixture(z: Tensor, fresh: Tensor, seed: int) -> tuple[str, Tensor]:
    fitted = bic_mixture(z, seed, Stopwatch())
    return f"{fitted.chosen:.0f} components", fitted.log_prob(fresh)


def _mean(values: Tensor) -> Estimate:
    return Estimate(float(values.mean()), float(values.std() / len(values) ** 0.5))


def _clearly(estimate: Estimate) -> int:
    """Sign of a difference that is clear, else 0."""
    return (estimate.value > _CLEAR * estimate.error) - (estimate.value < -_CLEAR * estimate.error)


def _verdict(kernel: Competitor, others: list[Competitor]) -> str:
    words = {1: "likelier than", 0: "not told apart from", -1: "less likely than"}
    parts = [
        f"{words[sign]} {' and '.join(names)}"
        for sign in (1, 0, -1)
        if (names := [one.name for one in others if one.lead and _clearly(one.lead) == sign])
    ]
    return (
        f"The kernel model gives the held-out rows {_text(kernel.log_density)} nats each: it is "
        f"{'; '.join(parts)} (a difference counts from {_CLEAR} standard errors)."
    )


def _doubts(found: Findings) -> list[str]:
    """What the numbers of a report say against its model."""
    doubts = []
    gaussian = found.competitors[1].lead
    if gaussian and _clearly(gaussian) < 1:
        doubts.append(
            "On the held-out rows the kernel model is not clearly better than one Gaussian: with these rows, its finer "
            "structure is not to be trusted."
        )
    if found.judged < _ENOUGH_HELD_OUT:
        doubts.append(
            f"Only {found.judged} rows judge: the comparisons below see only large differences."
        )
    return doubts


def _copying(found: Findings) -> str:
    score = found.panel.copying_score
    if score < -_CLEAR:
        return (
            f"The copying score is {score:.1f}: samples lie closer to training rows than held-out rows do. The model copies "
            "training rows, with some noise; do not use its samples as new ones."
        )
    if score > _CLEAR:
        return (
            f"The copying score is {score:.1f}: samples lie farther from training rows than held-out rows do. The model does "
            "not copy; it is wider than the data somewhere."
        )
    return f"The copying score is {score:.1f}: samples lie as far from training rows as held-out rows do, so no sign of copying."


def _text(estimate: Estimate) -> str:
    return f"{estimate.value:.2f} ± {estimate.error:.2f}"


def _warnings(sentences: Sequence[str]) -> str:
    if not sentences:
        return "<p>No warnings about the data.</p>"
    return "<ul>" + "".join(f"<li>{escape(one)}</li>" for one in sentences) + "</ul>"


def _html_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    # A region that scrolls must be reached by the keyboard too.
    return f'<div class="scroll" tabindex="0">{table(head, rows)._repr_html_()}</div>'


def _figure(figure: Figure, caption: str, alt: str, *, wide: bool = False) -> str:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=130)
    data = base64.b64encode(stream.getvalue()).decode()
    image = f'<img src="data:image/png;base64,{data}" alt="{escape(alt)}">'
    if wide:
        image = f'<div class="scroll wide" tabindex="0">{image}</div>'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Kernel model of $title</title>
<style>
:root { color-scheme: light dark; --ink: #1b1b1b; --page: #ffffff; --line: #b8b8b8; --soft: #575757; --note: #fff4e0; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --page: #121212; --line: #555555; --soft: #b0b0b0; --note: #33270f; }
}
body { margin: 0 auto; max-width: 46rem; padding: 1rem; background: var(--page); color: var(--ink);
  font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; }
h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; overflow-wrap: normal; }
th, td { padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left; }
figure { margin: 1.2rem 0; }
img { max-width: 100%; height: auto; }
figcaption, .soft { color: var(--soft); font-size: .9rem; }
.scroll { overflow-x: auto; }
.wide img { min-width: 36rem; }
.note { background: var(--note); padding: .1rem 1rem; border-radius: .4rem; }
</style>
</head>
<body>
<main>
<h1>Kernel model of $title</h1>
<p>$rows distinct rows of $columns columns: $names. A mixture of $kernels kernels was fitted by score matching to
$training of the rows, chosen at random; the other $held_out are held out. Densities are in the units of the
columns.</p>
<p><strong>$verdict</strong></p>

<h2>Warnings</h2>
<div class="note">$warnings</div>

<h2>Held-out log-density</h2>
<p>The mean over $judged held-out rows of $rounds, with its standard error. Each competitor sees the same training rows,
standardised, and chooses its size without the held-out ones; what is given as chosen is of the first fit. One nat more is a density larger by a factor of 2.7.</p>
$comparison
$compared

<h2>Density and samples</h2>
$pairs

<h2>Does it copy its training rows?</h2>
<p>Each of $held_out held-out rows is what a perfect sample would be, so the samples' numbers are to be compared with theirs.</p>
$memorisation
<p><strong>$copying</strong></p>
<p class="soft">d₁ and d₂ are the distances to the nearest and second nearest training row, in standardised columns: many copies
make the share large. Authenticity is the share of points farther from their nearest training row than that is from its own
nearest: copies make it small. The copying score is Mann and Whitney's statistic between the distances of samples and of
held-out rows, in standard deviations: about 0 ± 1 for new points of the same law, very negative for copies. Copies with enough
noise pass all three; what they are worth, the held-out log-density says.</p>
$near
</main>
</body>
</html>
""")
