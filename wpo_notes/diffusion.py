r"""The exact denoiser of a mixture, in the conventions of diffusion samplers.

For X with law π, independent white noise ξ and :math:`\eta(\cdot, \sigma^2)` the law of :math:`X + \sigma\xi`,
which for a Gaussian mixture is one too (Proposition 4.1, eq. (26)),

.. math:: D(x; \sigma) = \E[X \mid X + \sigma\xi = x] = x + \sigma^2\,\nabla\log\eta(x, \sigma^2)

minimises :math:`\E|D(X + \sigma\xi; \sigma) - X|^2`: it is what the denoiser of Karras et al. (2022) is
trained for, without training. In the paper's terms :math:`\sigma^2 = \beta^2 s`.

Chapter: *An exact teacher for diffusion samplers* (``book/samplers.md``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from wpo_notes._checks import checked_finite, checked_points
from wpo_notes._shapes import Float
from wpo_notes.mixture import GaussianMixture

__all__ = ["Denoiser", "NoisePredictor"]


class Denoiser:
    r"""Exact denoiser D(x; σ), score and noise of a law to which noise of standard deviation σ is added.

    The standard deviation is a number for all points or one a point. Points of equal σ are evaluated
    together, with one heat flow for each distinct value. Results are differentiable in x, in the
    mixture's parameters, and in a σ that is a 0-d tensor.

    Args:
        law: a mixture; or points (N, d), which stand for their empirical distribution (22): the denoiser
            that memorises them.

    Raises:
        TypeError: a law that is neither, or points that are not float32 or float64.
        ValueError: points that are not a matrix with an entry, or not finite.

    Examples:
        Of a normal law with variance 1 the denoiser is :math:`x / (1 + \sigma^2)`.

        >>> import torch
        >>> from wpo_notes.mixture import GaussianMixture
        >>> denoiser = GaussianMixture.from_variance(torch.zeros(1, 2), 1.0).as_denoiser()
        >>> denoiser(torch.tensor([[2.0, -4.0]]), 1.0)
        tensor([[ 1., -2.]])
    """

    def __init__(self, law: GaussianMixture | Float[Tensor, "N d"]) -> None:
        if not isinstance(law, GaussianMixture):
            law = checked_points("law", law)
            if law.ndim != 2 or law.numel() == 0:
                raise ValueError(
                    f"law must be a mixture or points (N, d), got shape {tuple(law.shape)}"
                )
        self.law = law

    def __call__(
        self, x: Float[Tensor, "*batch d"], sigma: float | Tensor
    ) -> Float[Tensor, "*batch d"]:
        r"""Mean of X given :math:`X + \sigma\xi = x`, (..., d) -> (..., d).

        Args:
            x: (..., d), noisy points, of the law's dtype.
            sigma: σ >= 0 in the data's units, a number or of shape (...). At σ = 0 the result is x.

        Raises:
            TypeError: points of another dtype than the law's.
            ValueError: points or σ of the wrong shape or not finite, a negative σ, σ = 0 for an empirical
                distribution, or a gradient asked for in σ of shape (...).
        """
        sigma = self._checked_sigma(sigma, x)
        return x + sigma[..., None].square() * self._score(x, sigma)

    def score(
        self, x: Float[Tensor, "*batch d"], sigma: float | Tensor
    ) -> Float[Tensor, "*batch d"]:
        r"""Score :math:`\nabla\log\eta(x, \sigma^2)` of the noisy law; arguments as for the denoiser."""
        return self._score(x, self._checked_sigma(sigma, x))

    def noise(
        self, x: Float[Tensor, "*batch d"], sigma: float | Tensor
    ) -> Float[Tensor, "*batch d"]:
        r"""Mean of the noise, :math:`\E[\xi \mid X + \sigma\xi = x] = (x - D)/\sigma = -\sigma\,\nabla\log\eta`.

        It is what a scheduler that works on :math:`x = X + \sigma\xi` itself takes for the model's output,
        such as ``EulerDiscreteScheduler`` of Hugging Face's diffusers with any of its spacings:
        ``scheduler.step(denoiser.noise(x, sigma), t, x)`` for t and sigma in its ``timesteps`` and ``sigmas``.

        Arguments as for the denoiser.
        """
        sigma = self._checked_sigma(sigma, x)
        return -sigma[..., None] * self._score(x, sigma)

    def noise_predictor(self, alphas_cumprod: Float[Tensor, " T"]) -> NoisePredictor:
        """Same noise as a function of a scheduler's scaled points and time steps, see `NoisePredictor`."""
        return NoisePredictor(self, alphas_cumprod)

    def _score(self, x: Tensor, sigma: Tensor) -> Tensor:
        if sigma.ndim == 0:
            return self._noisy(sigma).score(x)
        points = x.reshape(-1, x.shape[-1])
        levels, group = sigma.flatten().unique(return_inverse=True)
        order = group.argsort()
        sizes = group.bincount(minlength=len(levels)).tolist()
        parts = [
            self._noisy(level).score(part)
            for level, part in zip(levels, points[order].split(sizes), strict=True)
        ]
        return torch.cat([points[:0], *parts])[order.argsort()].reshape(x.shape)

    def _noisy(self, sigma: Tensor) -> GaussianMixture:
        """Law of X + sigma xi."""
        if isinstance(self.law, Tensor):
            return GaussianMixture.from_variance(self.law, sigma.square())
        return self.law.diffuse(sigma.square())

    def _checked_sigma(self, sigma: float | Tensor, x: Tensor) -> Tensor:
        law = self.law
        empirical = isinstance(law, Tensor)
        checked_points("x", x, law.shape[1] if isinstance(law, Tensor) else law.event_shape[0])
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
        _check_one_or_each("sigma", sigma, x)
        checked_finite("sigma", sigma)
        if bool((sigma < 0).any()) or (empirical and bool((sigma == 0).any())):
            kind = "positive, as point masses have no density," if empirical else "non-negative"
            raise ValueError(f"sigma must be {kind} but its least value is {float(sigma.min()):g}")
        if sigma.ndim and sigma.requires_grad:
            raise ValueError(
                "sigma must not require a gradient where it is one a point: detach it, or call with a 0-d tensor"
            )
        return sigma


class NoisePredictor:
    r"""Noise :math:`\varepsilon(x_t, t)` for schedulers that scale: what a trained network would predict.

    With :math:`\bar\alpha_t` a scheduler's ``alphas_cumprod``, :math:`x_t = \sqrt{\bar\alpha_t}\,X +
    \sqrt{1 - \bar\alpha_t}\,\xi`, and

    .. math:: \varepsilon(x_t, t) = \E[\xi \mid x_t]
              = -\sigma_t\,\nabla\log\eta(x_t / \sqrt{\bar\alpha_t},\, \sigma_t^2), \qquad
              \sigma_t^2 = \frac{1 - \bar\alpha_t}{\bar\alpha_t} .

    It drives Hugging Face's diffusers, of which nothing is imported here: ``DDIMScheduler``,
    ``DDPMScheduler``, ``DPMSolverMultistepScheduler`` and others with ``prediction_type="epsilon"`` by
    ``scheduler.step(predictor(x, t), t, x)``, and ``EulerDiscreteScheduler`` with its default spacing by
    ``predictor(scheduler.scale_model_input(x, t), t)``. The first two clip to [-1, 1] unless they are made with
    ``clip_sample=False``.

    Args:
        denoiser: the law's denoiser.
        alphas_cumprod: (T,), falling, in (0, 1].

    Raises:
        ValueError: entries that are not in (0, 1] or do not fall, such as a scheduler's ``betas``; or the last
            of them 0 (``rescale_betas_zero_snr``), with which nothing of X is left to predict from.
    """

    def __init__(self, denoiser: Denoiser, alphas_cumprod: Float[Tensor, " T"]) -> None:
        alphas_cumprod = checked_points("alphas_cumprod", alphas_cumprod).detach()
        inside = (alphas_cumprod > 0) & (alphas_cumprod <= 1)
        falls = alphas_cumprod.diff() < 0
        if alphas_cumprod.ndim != 1 or not (bool(inside.all()) and bool(falls.all())):
            raise ValueError(
                "alphas_cumprod must have shape (T,) and fall within (0, 1], got shape "
                f"{tuple(alphas_cumprod.shape)} and values from {float(alphas_cumprod[..., 0].max()):g} to "
                f"{float(alphas_cumprod[..., -1].min()):g}: pass a scheduler's alphas_cumprod"
            )
        self.denoiser = denoiser
        level = alphas_cumprod.double()
        self.sigmas = ((1 - level) / level).sqrt()

    def __call__(
        self, x: Float[Tensor, "*batch d"], timestep: float | Tensor
    ) -> Float[Tensor, "*batch d"]:
        """Mean of the noise given the scaled points, (..., d) -> (..., d).

        Args:
            x: (..., d), scaled noisy points, of the law's dtype.
            timestep: t in [0, T - 1], a number or of shape (...). Between whole numbers σ is interpolated linearly, as
                ``EulerDiscreteScheduler`` does.

        Raises:
            ValueError: a time step outside [0, T - 1] or of the wrong shape; and as `Denoiser.noise`.
        """
        time = torch.as_tensor(timestep, device=x.device).double()
        _check_one_or_each("timestep", time, x)
        last = len(self.sigmas) - 1
        if not bool(((time >= 0) & (time <= last)).all()):
            raise ValueError(f"timestep must be from 0 to {last}, got {time.tolist()!r:.60}")
        sigmas = self.sigmas.to(x.device)
        below = time.long()
        above = (below + 1).clamp(max=last)
        sigma = torch.lerp(sigmas[below], sigmas[above], time - below)
        unscaled = x * (1 + sigma.square()).sqrt()[..., None].to(x.dtype)
        return self.denoiser.noise(unscaled, sigma.to(x.dtype))


def _check_one_or_each(name: str, value: Tensor, x: Tensor) -> None:
    """Check that there is one value for all points, or one for each."""
    if value.ndim and value.shape != x.shape[:-1]:
        raise ValueError(
            f"{name} must be a number or have shape {tuple(x.shape[:-1])}, one a point, "
            f"got shape {tuple(value.shape)}"
        )
