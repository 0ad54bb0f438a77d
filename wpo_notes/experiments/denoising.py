"""Training score networks by denoising score matching, several laws side by side: the baseline of Figure 2.

What the paper leaves open is chosen as is standard: the variance-exploding process with the
preconditioning of Karras et al. (2022), log σ uniform on a range, weight σ², Adam with a cosine schedule.

Chapter: *Figure 2* (``book/figure-2.md``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from wpo_notes import datasets, metrics
from wpo_notes.denoiser import ScoreNetwork, preconditioned
from wpo_notes.experiments.runs import Result
from wpo_notes.fit import fit
from wpo_notes.sde import LinearSDE, log_prob_probability_flow, sample_probability_flow

__all__ = ["DenoisingRun", "SideBySide", "denoiser_log_prob", "denoiser_samples"]


@dataclass(frozen=True)
class DenoisingRun:
    """Settings of the training of one network a law, on n points each, in one batched run.

    Args:
        data: names of the laws; the networks do not share anything but the rows of each batch.
        n: number of training points of each law.
        steps: number of Adam steps.
        seed: of the data, the initial weights, the batches and the noise.
        batch_size: points a step and law.
        lr: learning rate at the start of the cosine schedule.
        std_min: σ at which sampling stops, and the smallest in training.
        std_max: largest σ, β√T.
        hidden: widths of the hidden layers.
        record_every: steps between records of the objective.
        measured: number of fresh points for the KL.
        samples: number of samples kept for the figure.
    """

    data: tuple[str, ...]
    n: int
    steps: int
    seed: int
    batch_size: int = 64
    lr: float = 3e-3
    std_min: float = 0.005
    std_max: float = 20.0
    hidden: tuple[int, ...] = (64,) * 5
    record_every: int = 1000
    measured: int = 5000
    samples: int = 2500

    def run(
        self, *, device: torch.device, checkpoint: Path | None = None, progress: bool = False
    ) -> Result:
        """Train, sample by the probability-flow ODE, and measure each law's likelihood along it."""
        generator = torch.Generator(device).manual_seed(self.seed)
        laws = [datasets.get(name) for name in self.data]
        x = [law.sample(self.n, generator=generator, dtype=torch.float32) for law in laws]
        networks = [
            ScoreNetwork(
                law.dim,
                hidden=self.hidden,
                data_std=float(points.std(0).mean()),
                dtype=points.dtype,
                device=device,
                generator=generator,
            )
            for law, points in zip(laws, x, strict=True)
        ]
        model = SideBySide(networks)
        result = fit(
            model,
            torch.cat(x, -1),
            steps=self.steps,
            batch_size=self.batch_size,
            lr=self.lr,
            loss=side_by_side_loss(len(laws), self.std_min, self.std_max),
            record_every=self.record_every,
            checkpoint=checkpoint,
            checkpoint_every=10 * self.record_every,
            generator=generator,
            progress=progress,
        )
        measured, arrays = {}, {}
        for law, points, network in zip(laws, x, model.networks(), strict=True):
            measured[law.name], arrays[f"samples.{law.name}"] = self._measure(law, points, network)
        history = [record._asdict() for record in result.history]
        return Result(measured, history, arrays, result.seconds, result.cpu_seconds)

    def _measure(
        self, law: metrics.Law, x: Tensor, network: ScoreNetwork
    ) -> tuple[dict, np.ndarray]:
        generator = torch.Generator(x.device).manual_seed(10_000 + self.seed)
        kl = metrics.kl_divergence(
            _Typed(law, x.dtype),
            lambda y: denoiser_log_prob(network, y, self.std_min, self.std_max),
            n=self.measured,
            generator=generator,
        )
        drawn = denoiser_samples(
            network, self.samples, self.std_min, self.std_max, generator=generator
        )
        fresh = law.sample(self.measured, generator=generator, dtype=x.dtype)
        panel = metrics.memorisation(drawn, x, fresh)
        measured = {"kl": kl.value, "kl_error": kl.error, "memorisation": panel._asdict()}
        return measured, drawn.cpu().numpy()


class _Typed:
    """A law whose samples have a dtype."""

    def __init__(self, law: metrics.Law, dtype: torch.dtype) -> None:
        self.law, self.dtype, self.log_prob = law, dtype, law.log_prob

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        return self.law.sample(n, generator=generator, dtype=self.dtype)


class SideBySide(nn.Module):
    """K score networks of one architecture as one module: a batched product a layer, not K small ones."""

    def __init__(self, networks: Sequence[ScoreNetwork]) -> None:
        super().__init__()
        self._own = list(networks)  # a plain list: their parameters are not this module's
        layers = list(zip(*(_linear_layers(network) for network in networks), strict=True))
        self.weights = nn.ParameterList(
            torch.stack([layer.weight.detach().mT for layer in group]) for group in layers
        )
        self.biases = nn.ParameterList(
            torch.stack([layer.bias.detach()[None] for layer in group]) for group in layers
        )
        data_std = torch.tensor([network.data_std for network in networks])
        self.register_buffer("data_std", data_std.to(self.weights[0])[:, None, None])

    def forward(self, y: Tensor, std: Tensor) -> Tensor:
        """Scores at y, (K, B, d) -> (K, B, d), for noise of standard deviation `std`, (K, B)."""
        return preconditioned(self._layers, y, std[..., None], self.data_std)

    def _layers(self, inputs: Tensor) -> Tensor:
        *hidden, last = zip(self.weights, self.biases, strict=True)
        for weight, bias in hidden:
            inputs = nn.functional.gelu(torch.baddbmm(bias, inputs, weight))
        return torch.baddbmm(last[1], inputs, last[0])

    @torch.no_grad()
    def networks(self) -> list[ScoreNetwork]:
        """The K networks, with the current parameters."""
        for k, network in enumerate(self._own):
            groups = zip(_linear_layers(network), self.weights, self.biases, strict=True)
            for layer, weight, bias in groups:
                layer.weight.copy_(weight[k].mT)
                layer.bias.copy_(bias[k, 0])
        return self._own


def _linear_layers(network: ScoreNetwork) -> list[nn.Linear]:
    return [layer for layer in network.network if isinstance(layer, nn.Linear)]


def side_by_side_loss(count: int, std_min: float, std_max: float):
    """Sum over the networks of denoising score matching (5), weight σ², log σ uniform: a loss for `fit`.

    The points of the K laws stand side by side in a row of the data, (n, K d).
    """
    low, high = math.log(std_min), math.log(std_max)

    def loss(
        model: SideBySide, rows: Tensor, index: Tensor | None, generator: torch.Generator
    ) -> Tensor:
        x = rows.reshape(len(rows), count, -1).transpose(0, 1)
        options = {"generator": generator, "dtype": x.dtype, "device": x.device}
        std = torch.exp(low + (high - low) * torch.rand(x.shape[:2], **options))
        noise = torch.randn(x.shape, **options)
        scaled = std[..., None]
        error = scaled * model(x + scaled * noise, std) + noise
        return error.square().sum((0, 2)).mean()

    return loss


def variance_exploding(std_min: float, std_max: float) -> tuple[LinearSDE, float]:
    """Noising process, and its time at which the noise has standard deviation `std_min`."""
    sde = LinearSDE.variance_exploding(std_min, std_max)
    return sde, math.log(2) / (2 * math.log(std_max / std_min))


def _terminal(network: ScoreNetwork, std_max: float, like: Tensor) -> MultivariateNormal:
    """Normal law of the noise's and the data's variance, close to that of Y(T)."""
    d = network.dim
    identity = torch.eye(d, dtype=like.dtype, device=like.device)
    variance = std_max**2 + network.data_std**2
    return MultivariateNormal(torch.zeros_like(identity[0]), variance * identity)


def denoiser_log_prob(network: ScoreNetwork, x: Tensor, std_min: float, std_max: float) -> Tensor:
    """Log-likelihood of x under the probability-flow ODE between the two noise levels, (n, d) -> (n,)."""
    sde, stop = variance_exploding(std_min, std_max)
    terminal = _terminal(network, std_max, x)
    return log_prob_probability_flow(sde, network.score(sde), x, terminal.log_prob, stop=stop)


def denoiser_samples(
    network: ScoreNetwork,
    n: int,
    std_min: float,
    std_max: float,
    *,
    generator: torch.Generator,
) -> Tensor:
    """Samples along the probability-flow ODE, (n, d)."""
    like = next(network.parameters())
    sde, stop = variance_exploding(std_min, std_max)
    white = torch.randn(n, network.dim, generator=generator, dtype=like.dtype, device=like.device)
    start = math.sqrt(std_max**2 + network.data_std**2) * white
    return sample_probability_flow(sde, network.score(sde), start, stop=stop)
