r"""Many machines: the batch of a training step, or the centres of a mixture, spread over the ranks of ``torchrun``.

Chapter: *Many machines* (``book/many-machines.md``).

`wpo_notes.fit.fit` splits its batches by itself when a process group of ``torch.distributed`` is initialised;
`ShardedMixture` evaluates a mixture of which each rank holds some of the centres.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from wpo_notes._shapes import Float
from wpo_notes.mixture import GaussianMixture

__all__ = [
    "ShardedMixture",
    "average_gradients",
    "check_same",
    "own_generator",
    "rank_and_size",
]


def rank_and_size(group: dist.ProcessGroup | None = None) -> tuple[int, int]:
    """Rank of this process and number of ranks; (0, 1) if no process group is initialised."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(group), dist.get_world_size(group)
    return 0, 1


def check_same(about: dict[str, Any], group: dist.ProcessGroup | None = None) -> None:
    """Compare facts (name: value) between the ranks.

    Raises:
        ValueError: on all ranks, if a value is not the same on all of them; says which and where.
    """
    every: list[dict[str, Any]] = [{} for _ in range(rank_and_size(group)[1])]
    dist.all_gather_object(every, about, group=group)
    for rank, theirs in enumerate(every):
        differing = [name for name, value in every[0].items() if theirs[name] != value]
        if differing:
            raise ValueError(
                f"all ranks must have the same {', '.join(differing)}, but rank {rank} has another "
                "than rank 0: give all ranks equal arguments, generators seeded alike, and files "
                "that all can read"
            )


def own_generator(generator: torch.Generator, rank: int) -> torch.Generator:
    """Generator of one rank's own noise, seeded by the state of the one that all share, which is left as it is."""
    own = torch.Generator(generator.device)
    own.set_state(generator.get_state())
    seed = int(torch.randint(2**62, (), generator=own, device=own.device))
    return own.manual_seed(seed + rank)


def average_gradients(model: nn.Module, objective: Tensor, share: float) -> Tensor:
    r"""Put the mean over the ranks into the gradients of `model`, and return that of the objective.

    .. math:: J = \sum_r \frac{b_r}{B} J_r, \qquad \nabla_\theta J = \sum_r \frac{b_r}{B} \nabla_\theta J_r ,

    by one sum over all ranks. A value that is not finite on one rank is so on all of them after it.

    Args:
        model: has its gradients of :math:`J_r`.
        objective: :math:`J_r`, the mean over this rank's part of the batch.
        share: :math:`b_r / B`, that part; the shares of all ranks add up to one.
    """
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    values = [objective.detach(), *gradients]
    total = share * torch.cat([value.reshape(-1) for value in values])
    dist.all_reduce(total)
    parts = total.split([value.numel() for value in values])
    for gradient, part in zip(gradients, parts[1:], strict=True):
        gradient.copy_(part.view_as(gradient))
    return parts[0].reshape(())


class ShardedMixture:
    r"""Gaussian mixture whose centres are spread over ranks: none holds more than its own.

    With the shards :math:`\pi_r`, each a mixture of its own, and their weights :math:`W_r`,

    .. math:: \begin{aligned}
              \pi &= \sum_r W_r \pi_r, & \rho_r &= \frac{W_r \pi_r}{\pi}, \\
              \nabla\log\pi &= \sum_r \rho_r \nabla\log\pi_r, &
              \frac{\Delta\pi}{\pi} &= \sum_r \rho_r \frac{\Delta\pi_r}{\pi_r} .
              \end{aligned}

    An evaluation at M points sends M maxima and then M (1 + the number of results) sums. All ranks must call a
    method together and with equal arguments; all get its result. Results carry no gradients: this is for
    evaluation. To train on many ranks, split the batch (`wpo_notes.fit.fit`).

    Args:
        shard: this rank's centres, at least one, as a mixture of their own.
        log_weight: logarithm of this rank's share of the weights, up to a constant that all ranks have in
            common: ``log_weights[part].logsumexp(0)`` for the centres `part` of a mixture. `GaussianMixture`
            normalises the weights that it is given, so the shard does not tell. None for uniform weights over
            all centres: then it is the logarithm of the number of the shard's centres.
        group: the ranks; all if None.

    Raises:
        ValueError: shards of different dimensions or dtypes; no `log_weight` for weights that are not uniform.
    """

    def __init__(
        self,
        shard: GaussianMixture,
        *,
        log_weight: float | Float[Tensor, ""] | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.shard, self.group = shard, group
        self.rank, size = rank_and_size(group)
        centers = shard.centers
        uniform = torch.allclose(shard.log_weights, shard.log_weights[0])
        check_same(
            {
                "dimension": centers.shape[1],
                "dtype": str(centers.dtype),
                "kind of log_weight": log_weight is None,
            },
            group,
        )
        if log_weight is None:
            if not uniform:
                raise ValueError(
                    "log_weight must be given for a shard whose weights are not uniform, got None: pass "
                    "log_weights[part].logsumexp(0) of the whole mixture's weights"
                )
            log_weight = math.log(len(centers))
        every = centers.new_zeros(size)
        every[self.rank] = log_weight
        dist.all_reduce(every, group=group)
        self.log_weights = every.log_softmax(0)  # (ranks,)

    def log_prob(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """Log-density at x, (..., d) -> (...), eq. (25)."""
        return self._evaluate(x)[0]

    def score(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        r"""Score :math:`\nabla\log\pi` at x, (..., d) -> (..., d), eq. (29)."""
        return self._evaluate(x, score=True)[1]

    def laplacian_ratio(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        r"""Laplacian ratio :math:`\Delta\pi / \pi` at x, eq. (31)."""
        return self._evaluate(x, laplacian=True)[1]

    def log_prob_and_score(
        self, x: Float[Tensor, "*batch d"]
    ) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch d"]]:
        """Log-density and score from one pass over the centres."""
        log_prob, score = self._evaluate(x, score=True)
        return log_prob, score

    def score_and_laplacian_ratio(
        self, x: Float[Tensor, "*batch d"]
    ) -> tuple[Float[Tensor, "*batch d"], Float[Tensor, "*batch"]]:
        """Score and Laplacian ratio from one pass over the centres."""
        _, score, ratio = self._evaluate(x, score=True, laplacian=True)
        return score, ratio

    @torch.no_grad()
    def sample(
        self, sample_shape: Sequence[int] = (), *, generator: torch.Generator
    ) -> Float[Tensor, "*shape d"]:
        """Exact samples, the same on all ranks: a shard for each, then a draw on that shard's rank.

        Args:
            sample_shape: leading shape of the result.
            generator: in the same state on all ranks, on the centres' device.

        Raises:
            ValueError: generators that are not in the same state.
        """
        shape = torch.Size(sample_shape)
        weights = self.log_weights.exp()
        n, d = shape.numel(), self.shard.centers.shape[1]
        if n == 0:  # which multinomial refuses
            return weights.new_empty(*shape, d)
        own = torch.multinomial(weights, n, replacement=True, generator=generator) == self.rank
        noise = own_generator(generator, self.rank)
        # The last column counts the ranks that drew the sample.
        drawn = weights.new_zeros(n, d + 1)
        drawn[own, :d] = self.shard.sample((int(own.sum()),), generator=noise)
        drawn[own, d] = 1
        dist.all_reduce(drawn, group=self.group)
        if not bool((drawn[:, d] == 1).all()):
            raise ValueError(
                "generator must be in the same state on all ranks, but they chose different shards: "
                "seed it alike everywhere, and use it alike"
            )
        return drawn[:, :d].reshape(*shape, d)

    @torch.no_grad()
    def _evaluate(self, x: Tensor, *, score: bool = False, laplacian: bool = False) -> list[Tensor]:
        """Log-density at x and, where asked for, score and Laplacian ratio, in that order."""
        log_prob, *averages = self.shard._evaluate(x, score=score, laplacian=laplacian)
        exponent = self.log_weights[self.rank] + log_prob  # log of W_r pi_r
        top = exponent.clone()
        dist.all_reduce(top, dist.ReduceOp.MAX, group=self.group)
        density = (exponent - top).exp()[..., None]
        # the score is (..., d), the Laplacian ratio (...)
        columns = [part if part.ndim == x.ndim else part[..., None] for part in averages]
        total = torch.cat([density, *(density * column for column in columns)], -1)
        dist.all_reduce(total, group=self.group)
        means = (total[..., 1:] / total[..., :1]).split([c.shape[-1] for c in columns], -1)
        results = (mean.view_as(part) for mean, part in zip(means, averages, strict=True))
        return [top + total[..., 0].log(), *results]

    def __repr__(self) -> str:
        ranks = len(self.log_weights)
        return f"ShardedMixture({self.shard}, rank {self.rank} of {ranks})"
