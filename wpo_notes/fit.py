r"""Training: one loop for all objectives, and Algorithm 1 on one's own samples.

Chapters: *Algorithm 1* (``book/algorithm.md``) and, under ``torchrun``, *Many machines*
(``book/many-machines.md``).
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from wpo_notes._checks import checked_points, checked_positive, checked_sample_set, make_generator
from wpo_notes._clusters import clusters
from wpo_notes._files import load_tensors, save_tensors
from wpo_notes._members import Members, sorted_by
from wpo_notes._optional import needed, progress_bar
from wpo_notes._shapes import Float, Int
from wpo_notes.distributed import average_gradients, check_same, own_generator, rank_and_size
from wpo_notes.losses import implicit_score_matching
from wpo_notes.mixture import GaussianMixture
from wpo_notes.model import FreeKernelModel, KernelModel

__all__ = [
    "FitResult",
    "Record",
    "TrainingStopped",
    "constant",
    "cosine",
    "fewest_points",
    "fit",
    "fit_algorithm_1",
    "fit_kernel_model",
    "kernel_loss",
]

# Numbers of centres up to this are tried even if fewer were likelier: on the way to the right number the
# likelihood may fall once, and small mixtures are cheap.
_ALWAYS_TRIED = 8

Loss = Callable[[nn.Module, Tensor, Tensor | None, torch.Generator], Tensor]


class Record(NamedTuple):
    """Objective, and what else was asked for, after a number of steps."""

    step: int
    objective: float  #: mean over the batches since the last record
    held_out: float | None  #: on the held-out points, if there are any
    measured: dict[str, Any] | None  #: what `measure` returned, if it was given


@dataclass(frozen=True)
class FitResult:
    """What `fit` returns: the trained model, the history of its objective, and the time it took."""

    model: nn.Module
    history: list[Record]
    seconds: float  #: wall time of training, without measurements, over all resumed runs
    cpu_seconds: float = 0.0  #: processor time of the same, of this process alone


class TrainingStopped(FloatingPointError):
    """The objective or its gradient stopped being finite; holds the records until then."""

    def __init__(
        self, message: str, history: list[Record], seconds: float, cpu_seconds: float
    ) -> None:
        super().__init__(message)
        self.history, self.seconds, self.cpu_seconds = history, seconds, cpu_seconds


def cosine(fraction: float) -> float:
    """Cosine schedule: factor of the learning rate at a fraction of the steps, from 1 down to 0."""
    return 0.5 * (1 + math.cos(math.pi * fraction))


def constant(fraction: float) -> float:
    """Constant learning rate, as a schedule."""
    return 1.0


def kernel_loss(exclude: Int[Tensor, " n"] | None = None) -> Loss:
    """Implicit score matching of a `KernelModel`, eq. (30), as a loss for `fit`.

    Args:
        exclude: (n,), for each training point the index of the centre that it is, or -1.
    """

    def loss(
        model: nn.Module, x: Tensor, index: Tensor | None, generator: torch.Generator
    ) -> Tensor:
        own = None if exclude is None or index is None else exclude[index]
        return implicit_score_matching(model(), x, exclude=own)

    return loss


def fit(
    model: nn.Module,
    x: Float[Tensor, "n d"],
    *,
    steps: int,
    batch_size: int = 512,
    lr: float = 2e-3,
    loss: Loss | None = None,
    schedule: Callable[[float], float] = cosine,
    clip: float = 5.0,
    held_out: Float[Tensor, "m d"] | None = None,
    measure: Callable[[nn.Module], dict[str, Any]] | None = None,
    record_every: int = 100,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 1000,
    generator: torch.Generator | None = None,
    progress: bool = True,
) -> FitResult:
    """Train `model` on the points x by Adam; in place, and returned with the objective's history.

    A run with a checkpoint that is killed and called again with the same arguments goes on from
    there and ends with the same parameters, bit for bit, on the same machine.

    In an initialised process group of ``torch.distributed`` all ranks call this with equal arguments, and
    each evaluates its part of every batch. The result is that of one process up to rounding, on all ranks.
    Rank 0 writes the checkpoint, all read it, and it goes on on any number of ranks. The loss has to be a mean
    over its points. If it draws noise, each rank's part has noise of its own, so that the result is another draw.

    Args:
        model: any module; a `KernelModel` if `loss` is None.
        x: (n, d), training points on the model's device.
        steps: number of Adam steps.
        batch_size: points a step, drawn with replacement.
        lr: learning rate at the start.
        loss: ``loss(model, points, index, generator) -> scalar``, where index says which rows of x
            the points are (None for held-out points); `kernel_loss()` if None.
        schedule: factor of the learning rate at the fraction of the steps done.
        clip: largest gradient norm, in multiples of its running mean: the objective has units
            1 / length squared, so a fixed bound would depend on the data's units.
        held_out: (m, d), points on which the objective is recorded, with the same noise each time.
        measure: ``measure(model) -> dict`` of numbers to keep with each record, as JSON would; it is
            called without gradients, and must not draw from `generator`.
        record_every: steps between records.
        checkpoint: file to write to, and to go on from if it exists.
        checkpoint_every: steps between checkpoints.
        generator: source of the batches and of the loss's noise; a fresh one if None. Its state is
            part of the checkpoint.
        progress: show a progress bar.

    Raises:
        TrainingStopped: the objective or its gradient stopped being finite; says at which step
            and where, and leaves the model with its last finite parameters.
        ValueError: points that are not finite or not a matrix, settings out of range, or a
            checkpoint that is damaged or belongs to another run; with a process group, models,
            points, settings or generators that are not the same on all ranks, or fewer points a
            step than ranks.
        ModuleNotFoundError: a checkpoint without safetensors: extra `fit`.
    """
    x = checked_points("x", x)
    if x.ndim != 2 or len(x) == 0:
        raise ValueError(f"x must be a matrix (n, d) with n >= 1, got shape {tuple(x.shape)}")
    if held_out is not None:
        checked_points("held_out", held_out, x.shape[1])
    for name, value in (("batch_size", batch_size), ("lr", lr), ("clip", clip)):
        checked_positive(name, value)
    for name, value in (("record_every", record_every), ("checkpoint_every", checkpoint_every)):
        checked_positive(name, value)
    checked_positive("steps", steps, zero=True)
    rank, ranks = rank_and_size()
    if batch_size < ranks:
        raise ValueError(
            f"batch_size must be at least the number of ranks, got {batch_size} points a step for "
            f"{ranks} ranks: start fewer ranks, or ask for larger batches"
        )
    loss = kernel_loss() if loss is None else loss
    generator = make_generator(generator, x.device)
    run = _Run(model, torch.optim.Adam(model.parameters(), lr=lr, fused=True), generator)
    settings = {
        "steps": steps,
        "batch_size": batch_size,
        "lr": lr,
        "clip": clip,
        "record_every": record_every,
        "data": _digest([x]),
    }
    if checkpoint is not None:
        needed("safetensors")  # now, not after the steps to the first checkpoint
        if Path(checkpoint).exists():
            run.resume(checkpoint, settings)
    if ranks > 1:
        states = {
            "model": _digest(model.state_dict().values()),
            "generator": _digest([generator.get_state()]),
        }
        check_same({"step of the checkpoint": run.step} | settings | states)

    run.start_clock()
    shown = progress and rank == 0
    bar = progress_bar(shown=shown, total=steps, initial=run.step, desc="fit", unit="step")
    while run.step < steps:
        for group in run.optimizer.param_groups:
            group["lr"] = lr * schedule(run.step / steps)
        index = torch.randint(len(x), (batch_size,), generator=generator, device=x.device)
        noise = generator
        if ranks > 1:
            index, noise = index[rank::ranks], own_generator(generator, rank)
        objective = loss(model, x[index], index, noise)
        run.optimizer.zero_grad()
        objective.backward()
        if ranks > 1:
            objective = average_gradients(model, objective, len(index) / batch_size)
        run.clip_gradient(clip, objective)
        run.optimizer.step()
        run.step += 1
        run.unrecorded.append(float(objective.detach()))
        if run.step % record_every == 0 or run.step == steps:
            run.stop_clock()
            run.record(loss, held_out, measure)
            run.start_clock()
            bar.set_postfix(objective=f"{run.history[-1].objective:.4g}")
        if checkpoint is not None and (run.step % checkpoint_every == 0 or run.step == steps):
            run.stop_clock()
            if rank == 0:
                run.save(checkpoint, settings)
            if ranks > 1:
                dist.barrier()
            run.start_clock()
        bar.update()
    bar.close()
    return FitResult(model, run.history, run.seconds, run.cpu_seconds)


def _digest(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@dataclass
class _Run:
    """Everything that changes while training, and so everything a checkpoint holds."""

    model: nn.Module
    optimizer: torch.optim.Adam
    generator: torch.Generator
    step: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    started: tuple[float, float] = (0.0, 0.0)  # wall and processor clock
    typical_norm: float | None = None
    unrecorded: list[float] = field(default_factory=list)
    history: list[Record] = field(default_factory=list)

    def start_clock(self) -> None:
        self.started = time.perf_counter(), time.process_time()

    def stop_clock(self) -> None:
        wall, cpu = self.started
        self.seconds += time.perf_counter() - wall
        self.cpu_seconds += time.process_time() - cpu

    def clip_gradient(self, clip: float, objective: Tensor) -> None:
        largest = math.inf if self.typical_norm is None else clip * self.typical_norm
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), largest))
        if not math.isfinite(norm) or not math.isfinite(float(objective.detach())):
            times = self.seconds, self.cpu_seconds
            raise TrainingStopped(self._diagnosis(objective), self.history, *times)
        clipped = min(norm, largest)
        if self.typical_norm is None:
            self.typical_norm = clipped
        self.typical_norm = 0.99 * self.typical_norm + 0.01 * clipped

    @torch.no_grad()
    def record(
        self,
        loss: Loss,
        held_out: Tensor | None,
        measure: Callable[[nn.Module], dict[str, Any]] | None,
    ) -> None:
        value = None
        if held_out is not None:
            same_noise = torch.Generator(held_out.device).manual_seed(0)
            value = float(loss(self.model, held_out, None, same_noise))
        mean = sum(self.unrecorded) / len(self.unrecorded)
        measured = None if measure is None else measure(self.model)
        self.history.append(Record(self.step, mean, value, measured))
        self.unrecorded.clear()

    def save(self, path: str | os.PathLike[str], settings: dict[str, Any]) -> None:
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for number, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{number}.{name}": value for name, value in state.items()}
        tensors["generator"] = self.generator.get_state()
        save_tensors(
            path,
            tensors,
            kind="checkpoint",
            settings=settings,
            step=self.step,
            seconds=self.seconds,
            cpu_seconds=self.cpu_seconds,
            typical_norm=self.typical_norm,
            unrecorded=self.unrecorded,
            history=self.history,
        )

    def _diagnosis(self, objective: Tensor) -> str:
        where = [
            name
            for name, parameter in self.model.named_parameters()
            if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all())
        ]
        value = float(objective.detach())
        cause = f"the objective is {value}"
        if math.isfinite(value):
            cause = f"the norm of the gradient is not finite (the objective is {value})"
            if where:
                cause = (
                    f"the gradient of {', '.join(where)} is not finite (the objective is {value})"
                )
        if isinstance(self.model, KernelModel):
            with torch.no_grad():
                narrowest = self.model()._narrowest_std()
            cause += (
                f"; the narrowest kernel has standard deviation about {narrowest:.2g}: "
                "if training points are centres, exclude each at itself, otherwise lower lr"
            )
        return f"training stopped at step {self.step}: {cause}"

    def resume(self, path: str | os.PathLike[str], settings: dict[str, Any]) -> None:
        tensors, about = load_tensors(path, kind="checkpoint")
        differing = [key for key in settings if about["settings"].get(key) != settings[key]]
        if differing:
            raise ValueError(
                f"{path} belongs to another run: its {', '.join(differing)} differ; "
                "call with the same settings and data, or remove the file to start anew"
            )
        own = self.model.state_dict()
        kept = {
            name.removeprefix("model."): value
            for name, value in tensors.items()
            if name.startswith("model.")
        }
        shapes = {name: value.shape for name, value in kept.items()}
        if shapes != {name: value.shape for name, value in own.items()}:
            raise ValueError(f"{path} holds another model: its parameters' names or shapes differ")
        self.model.load_state_dict(kept)
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("adam."):
                _, number, part = name.split(".")
                state.setdefault(int(number), {})[part] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.generator.set_state(tensors["generator"])
        self.step = about["step"]
        self.seconds = about["seconds"]
        self.cpu_seconds = about.get("cpu_seconds", 0.0)  # older files lack it
        self.typical_norm = about["typical_norm"]
        self.unrecorded = about["unrecorded"]
        self.history = [Record(*record) for record in about["history"]]


def fit_kernel_model(
    x: Float[Tensor, "n d"],
    *,
    centers: int | None = None,
    members: int = 5,
    steps: int = 200,
    batch_size: int = 512,
    lr: float = 1e-2,
    loss: Loss | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    generator: torch.Generator | None = None,
    progress: bool = True,
) -> KernelModel:
    r"""Kernel model of the samples x: terminal score matching (30) from clusters, pooled over folds.

    The points are split into as many folds as there are members. A member is fitted to the points outside
    its fold: k-means gives its centres, with the shares of the points as weights and the clusters'
    covariances to start from, and implicit score matching at the terminal time moves centres and
    precisions. The number of centres is doubled until the mean log-likelihood of the points under the
    member that has not seen them falls; then two numbers between are tried. The model is the mixture of the
    members with equal weights, again a kernel model: by the convexity of the divergence it is no worse than
    they are on average, and what score matching over-fits is different in each.

    All is done in standardised coordinates, so that the data's units do not matter.

    Args:
        x: (n, d), distinct samples of the law to learn, float32 or float64.
        centers: number of kernels in all; chosen by cross-validation if None.
        members: number of folds, and of mixtures that are pooled, at least 2.
        steps: Adam steps of each member.
        batch_size: points a step and member, on average.
        lr: learning rate at the start of the cosine schedule. A kernel's log-width changes by at most about
            lr times half the steps, which keeps every kernel from becoming a needle.
        loss: as for `fit`, a mean over the points that it is given, in standardised coordinates; implicit
            score matching (30) if None.
        checkpoint: folder of the checkpoints, one a number of centres, from which a killed fit goes on.
        generator: source of folds, clusters and batches.
        progress: show a progress bar.

    Raises:
        TypeError, ValueError: x is not a floating matrix of distinct finite points that vary in
            each coordinate, or has too few points for the centres.
        ModuleNotFoundError: without scikit-learn, whose k-means finds the centres: extra `fit`.

    Examples:
        >>> import torch
        >>> from wpo_notes.datasets import get
        >>> from wpo_notes.fit import fit_kernel_model
        >>> generator = torch.Generator().manual_seed(0)
        >>> x = get("moons").sample(300, generator=generator)
        >>> model = fit_kernel_model(x, centers=20, steps=20, generator=generator, progress=False)
        >>> mixture = model()
        >>> mixture.log_prob(x).shape, mixture.sample((5,), generator=generator).shape
        (torch.Size([300]), torch.Size([5, 2]))
    """
    x = checked_sample_set("x", x)
    generator = make_generator(generator, x.device)
    n, d = x.shape
    most = (n - n // members) // _points_a_center(d) if members >= 2 else 0
    smallest = 2 if centers is None else -(-centers // members) if members >= 2 else 0
    if not 2 <= smallest <= most:
        asked = "" if centers is None else f" with {centers} centres"
        raise ValueError(
            f"{n} points in {d} dimensions{asked} are too few or too many for {members} members: each "
            f"needs from 2 to (points outside its fold) / {_points_a_center(d)} centres, so bring more points "
            "or ask for other numbers"
        )
    offset, scale = x.mean(0), x.std(0)
    points = (x - offset) / scale
    fold = torch.randperm(n, generator=generator, device=x.device) % members
    seen = [points[fold != k] for k in range(members)]
    member = torch.cat([torch.full_like(fold[fold != k], k) for k in range(members)])
    results: dict[int, tuple[float, GaussianMixture]] = {}
    bar = progress_bar(shown=progress, desc="fit_kernel_model", unit=" sizes")

    def cross_validate(size: int) -> float:
        """Fit the members with `size` centres each; their log-likelihood on the points that they have not seen."""
        model = Members([clusters(part, size, generator=generator) for part in seen])
        path = None
        if checkpoint is not None:
            Path(checkpoint).mkdir(parents=True, exist_ok=True)
            path = Path(checkpoint) / f"{size}-centres"
        fit(
            model,
            torch.cat(seen),
            steps=steps,
            batch_size=members * batch_size,
            lr=lr,
            loss=sorted_by(member, kernel_loss() if loss is None else loss),
            checkpoint=path,
            generator=generator,
            progress=False,
        )
        order = fold.argsort()
        with torch.no_grad():
            likelihood = float(model.at(fold[order])().log_prob(points[order]).mean())
            results[size] = likelihood, model.pooled()
        bar.update()
        bar.set_postfix(centres=size)
        return likelihood

    def best() -> int:
        return max(results, key=lambda size: results[size][0])

    cross_validate(smallest)
    if centers is None:
        size = smallest
        while 2 * size <= most and (size <= _ALWAYS_TRIED or best() == size):
            size *= 2
            cross_validate(size)
        for between in (best() / 2**0.5, best() * 2**0.5):
            size = round(between)
            if 2 < size <= most and size not in results:
                cross_validate(size)
    bar.close()
    pooled = results[best()][1]
    return FreeKernelModel(
        GaussianMixture(
            pooled.centers * scale + offset,
            pooled.precision_tril / scale[:, None],
            log_weights=pooled.log_weights,
        )
    )


def fewest_points(d: int, members: int = 5) -> int:
    """Number of points in d dimensions that `fit_kernel_model` needs at least."""
    seen = 2 * _points_a_center(d)  # by each member: all points but one in `members`
    return seen + (seen - 1) // (members - 1)


def _points_a_center(d: int) -> int:
    """Points a centre, at least: a member's clusters shall have points enough for a covariance."""
    return 2 * (d + 1)


def fit_algorithm_1(
    x: Float[Tensor, "n d"],
    *,
    centers: int | Float[Tensor, "N d"] = 1000,
    leave_one_out: bool = False,
    held_out: Float[Tensor, "m d"] | None = None,
    hidden: Sequence[int] = (64,) * 5,
    steps: int = 2000,
    generator: torch.Generator | None = None,
    **options: Any,
) -> KernelModel:
    """Algorithm 1 of the paper on the samples x, without ever scoring a centre at itself.

    The centres are samples, and a network gives their precisions. Leaving a centre out at itself makes the objective the right one; it does not prevent over-fitting. With few points a centre,
    or a high learning rate, single kernels can become needles (Proposition *Needles* of the
    chapter): compare the objective on `held_out` points, or the likelihood of fresh ones.

    Args:
        x: (n, d), distinct samples of the law to learn, float32 or float64.
        centers: number of centres, drawn from x at random, or the centres themselves, (N, d).
        leave_one_out: train on all points, each point that is a centre scored by the others; if
            False, the points that are centres are not trained on (disjoint).
        held_out: (m, d), points on which the objective is recorded.
        hidden: widths of the network's hidden layers.
        steps: number of Adam steps.
        generator: source of the centres, the initial weights and the batches.
        options: further arguments of `fit`.

    Raises:
        TypeError, ValueError: x is not a floating matrix of distinct finite points that vary in
            each coordinate, or there are not fewer centres than points.
    """
    x = checked_sample_set("x", x)
    generator = make_generator(generator, x.device)
    if isinstance(centers, int):
        if not 2 <= centers < len(x):
            raise ValueError(
                f"centers must be at least 2 and fewer than the points, got {centers} centres for "
                f"{len(x)} points: ask for fewer, or bring more points"
            )
        order = torch.randperm(len(x), generator=generator, device=x.device)
        centers = x[order[:centers]]
    else:
        checked_points("centers", centers, x.shape[1])
    model = KernelModel(centers, hidden=hidden, generator=generator)
    own = _index_of_equal_row(x, model.centers)
    if not leave_one_out:
        x = x[own < 0]
        if len(x) == 0:
            raise ValueError(
                "x must have points that are not centres, but all of them are: ask for fewer "
                "centres, or for leave_one_out=True"
            )
    loss = kernel_loss(own if leave_one_out else None)
    fit(model, x, steps=steps, loss=loss, held_out=held_out, generator=generator, **options)
    return model


def _index_of_equal_row(x: Tensor, rows: Tensor) -> Tensor:
    """For each row of x the index of the equal row among `rows`, or -1: (n,)."""
    _, label = torch.unique(torch.cat([rows, x]), dim=0, return_inverse=True)
    index = label.new_full((int(label.max()) + 1,), -1)
    index[label[: len(rows)]] = torch.arange(len(rows), device=x.device)
    return index[label[len(rows) :]]
