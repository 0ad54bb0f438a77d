r"""The WPO-informed kernel model: eq. (25) with a network for the local precisions, or with free ones.

Chapters: *Algorithm 1* (``book/algorithm.md``) and *As good as it can be* (``book/as-good-as-it-can-be.md``).
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from jaxtyping import Float
from scipy.spatial import KDTree
from torch import Tensor, nn
from torch.nn.functional import softplus

from wpo_notes._checks import checked_positive, checked_sample_set, make_generator
from wpo_notes._files import load_tensors, save_tensors
from wpo_notes._network import perceptron
from wpo_notes.mixture import GaussianMixture

__all__ = ["FreeKernelModel", "KernelModel"]

# Least value of a factor's diagonal, relative to its start: a kernel that no point needs would
# otherwise grow without bound, since score matching hardly sees where its mass goes.
_LARGEST_FLOOR = 0.5


class KernelModel(nn.Module):
    r"""Gaussian mixture on given centres whose precisions a network gives, Section 4.2.

    The network :math:`\psi_\theta: \R^d \to \R^{d(d+1)/2}` gives the entries of the lower Cholesky
    factor, :math:`\Gamma_\theta(z) = L_\theta(z) L_\theta(z)^\top`. It sees standardised
    coordinates, and the factor is relative to the initial width, so that the model follows the
    data's units. The diagonal is a softplus: positive, so that the factor is unique, and bounded below,
    so that no kernel becomes much wider than the data.

    Args:
        centers: (N, d), the kernel centres Z_i, a buffer; at least two, distinct.
        hidden: widths of the hidden layers.
        initial_std: standard deviation of every kernel before training, in standardised units; the
            median distance from a centre to the nearest other if None.
        generator: source of the network's initial weights; a fresh one if None.

    Raises:
        TypeError: centres that are not float32 or float64.
        ValueError: NaN, wrong rank, too few or repeated centres, a constant column.
    """

    centers: Tensor
    offset: Tensor
    scale: Tensor
    initial_std: Tensor

    def __init__(
        self,
        centers: Float[Tensor, "N d"],
        *,
        hidden: Sequence[int] = (64,) * 5,
        initial_std: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        centers = checked_sample_set("centers", centers).detach().clone()
        d = centers.shape[1]
        self.hidden = tuple(hidden)
        self.register_buffer("centers", centers)
        self.register_buffer("offset", centers.mean(0))
        self.register_buffer("scale", centers.std(0))
        if initial_std is None:
            initial_std = _median_neighbour_distance((centers - self.offset) / self.scale)
        checked_positive("initial_std", initial_std)
        self.register_buffer("initial_std", torch.full_like(centers[0, 0], initial_std))
        self.network = perceptron(
            d,
            self.hidden,
            d * (d + 1) // 2,
            generator=make_generator(generator, centers.device),
            dtype=centers.dtype,
            device=centers.device,
        )

    def precision_tril(self, z: Float[Tensor, "M d"]) -> Float[Tensor, "M d d"]:
        """Lower Cholesky factors of the precisions at z, (M, d) -> (M, d, d), in 1 / units."""
        entries = self.network((z - self.offset) / self.scale)
        # The floor keeps kernels about as narrow as the data; at zero, the network's start, the
        # diagonal is one, which is the initial width.
        floor = self.initial_std.clamp(max=_LARGEST_FLOOR)
        return _lower_triangular(entries, floor) / (self.initial_std * self.scale[:, None])

    def forward(self) -> GaussianMixture:
        """Mixture with the current precisions, eq. (25)."""
        return GaussianMixture(self.centers, self.precision_tril(self.centers))

    def save(self, path: str | os.PathLike) -> None:
        """Write the model to a safetensors file with a checksum."""
        save_tensors(path, self.state_dict(), kind="kernel model", hidden=self.hidden)

    @staticmethod
    def load(path: str | os.PathLike) -> KernelModel:
        """Read a model that `save` wrote, on the CPU. Runs no code from the file.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a damaged or foreign file.
        """
        tensors, about = load_tensors(path, kind="kernel model")
        if about["hidden"] is None:
            start = GaussianMixture(
                tensors["centers"], tensors["tril"], log_weights=tensors["log_weights"]
            )
            model: KernelModel = FreeKernelModel(start)
        else:
            initial_std = float(tensors["initial_std"])
            model = KernelModel(tensors["centers"], hidden=about["hidden"], initial_std=initial_std)
        model.load_state_dict(tensors)
        return model

    def extra_repr(self) -> str:
        """Describe the centres in ``repr``."""
        return f"{self.centers.shape[0]} centres in {self.centers.shape[1]} dimensions"


class FreeKernelModel(KernelModel):
    r"""Kernel model whose centres and precisions are all free, each relative to where it starts.

    With the start :math:`Z_i^0, B_i`, in the kernel's own coordinates,

    .. math:: Z_i = Z_i^0 + B_i^{-\top} u_i, \qquad L_i = B_i E_i, \qquad \Gamma_i = L_i L_i^\top,

    with :math:`u_i` and the entries of the lower triangular :math:`E_i` as parameters, all zero at the
    start, where E is the identity. So a step of an optimiser moves a kernel by as much of its own width,
    however narrow it is. The diagonal of E is a softplus with a floor, so that no kernel becomes much
    wider than the centres are spread.

    Args:
        start: the mixture to start from, at least two kernels. Its weights stay as they are: implicit
            score matching hardly sees those of separated modes.

    Raises:
        ValueError: a start of one kernel.
    """

    tril: Tensor
    log_weights: Tensor

    def __init__(self, start: GaussianMixture) -> None:
        nn.Module.__init__(self)  # without the network
        n, d = start.centers.shape
        if n < 2:
            raise ValueError(f"start must have at least 2 kernels, got {n}")
        self.hidden = None
        self.register_buffer("centers", start.centers.detach().clone())
        self.register_buffer("tril", start.precision_tril.detach().clone())
        self.register_buffer("log_weights", start.log_weights.detach().clone())
        self.shift = nn.Parameter(torch.zeros_like(self.centers))
        self.entries = nn.Parameter(self.tril.new_zeros(n, d * (d + 1) // 2))

    def precision_tril(self, z: Float[Tensor, "M d"]) -> Float[Tensor, "M d d"]:
        """Lower Cholesky factors of the kernels whose centres are nearest to z, (M, d) -> (M, d, d)."""
        mixture = self()
        return mixture.precision_tril[torch.cdist(z, mixture.centers).argmin(1)]

    def forward(self) -> GaussianMixture:
        """Mixture with the current centres and precisions, eq. (25)."""
        width = 1 / (self.tril.diagonal(dim1=-2, dim2=-1) * self.centers.std(0))
        tril = self.tril @ _lower_triangular(self.entries, width.clamp(max=_LARGEST_FLOOR))
        offset = torch.linalg.solve_triangular(self.tril.mT, self.shift[..., None], upper=True)
        # valid by construction; NaN is met by the training loop
        return GaussianMixture(
            self.centers + offset[..., 0], tril, log_weights=self.log_weights, validate_args=False
        )


def _lower_triangular(entries: Tensor, floor: Tensor) -> Tensor:
    """Lower triangular matrices (M, d, d) from entries (M, d (d + 1) / 2): the identity at zero.

    The diagonal is positive and at least `floor`, which is below one.
    """
    d = int((2 * entries.shape[1]) ** 0.5)
    row, column = torch.tril_indices(d, d, device=entries.device)
    tril = entries.new_zeros(len(entries), d, d)
    tril[:, row, column] = entries
    diagonal = tril.diagonal(dim1=-2, dim2=-1)
    positive = floor + softplus(diagonal + torch.log(torch.expm1(1 - floor)))
    return torch.diagonal_scatter(tril, positive, dim1=-2, dim2=-1)


def _median_neighbour_distance(points: Tensor) -> float:
    array = points.cpu().numpy()
    distance, _ = KDTree(array).query(array, k=2)
    return float(torch.as_tensor(distance[:, 1], device="cpu").median())
