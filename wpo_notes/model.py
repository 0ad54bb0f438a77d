r"""The WPO-informed kernel model: eq. (25) with a network for the local precisions, or with free ones.

Chapters: *Algorithm 1* (``book/algorithm.md``), *As good as it can be* (``book/as-good-as-it-can-be.md``) and, for
diagonal and low-rank precisions, *Many dimensions: real images* (``book/digits.md``).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch
from scipy.spatial import KDTree
from torch import Tensor, nn
from torch.nn.functional import softplus

from wpo_notes._checks import checked_positive, checked_sample_set, make_generator
from wpo_notes._files import load_tensors, save_tensors
from wpo_notes._network import perceptron
from wpo_notes._optional import needed
from wpo_notes._shapes import Float
from wpo_notes.mixture import GaussianMixture
from wpo_notes.structured import LowRankGaussianMixture

__all__ = ["FreeKernelModel", "FreeLowRankKernelModel", "KernelModel"]

# Least value of a factor's diagonal, relative to its start: a kernel that no point needs would
# otherwise grow without bound, since score matching hardly sees where its mass goes.
_LARGEST_FLOOR = 0.5
# In more dimensions a tree finds neighbours no faster than all distances do.
_TREE_DIMENSIONS = 15
# Low-rank factors start as random ones whose columns have this norm, in initial widths: at zero, where
# W W' has no slope, they would stay.
_INITIAL_COLUMN = 0.3


class KernelModel(nn.Module):
    r"""Gaussian mixture on given centres whose precisions a network gives, Section 4.2.

    The network :math:`\psi_\theta: \R^d \to \R^{d(d+1)/2}` gives the entries of the lower Cholesky
    factor, :math:`\Gamma_\theta(z) = L_\theta(z) L_\theta(z)^\top`. It sees standardised
    coordinates, and the factor is relative to the initial width, so that the model follows the
    data's units. The diagonal is a softplus: positive, so that the factor is unique, and bounded below,
    so that no kernel becomes much wider than the data.

    In many dimensions the covariances can be diagonal, :math:`\Gamma^{-1} = \operatorname{diag}(v)`, or of low rank
    besides, :math:`\operatorname{diag}(v) + W W^\top`; then the network gives :math:`v^{-1/2}`, with the same softplus,
    and W, and the model's mixture is a `LowRankGaussianMixture`.

    Args:
        centers: (N, d), the kernel centres Z_i, a buffer; at least two, distinct.
        hidden: widths of the hidden layers.
        precision: "full", "diagonal" or "lowrank".
        rank: number of columns of W, for "lowrank" only.
        initial_std: standard deviation of every kernel before training, in standardised units; the
            median distance from a centre to the nearest other if None, divided by :math:`\sqrt d` if
            the precisions are not full.
        generator: source of the network's initial weights; a fresh one if None.

    Raises:
        TypeError: centres that are not float32 or float64.
        ValueError: NaN, wrong rank, too few or repeated centres, a constant column; an unknown precision,
            or a rank that does not belong to it.

    Examples:
        >>> import torch
        >>> from wpo_notes.model import KernelModel
        >>> model = KernelModel(torch.tensor([[0.0, 0.0], [1.0, 3.0], [2.0, 1.0]]))
        >>> model()
        GaussianMixture(3 centres in 2 dimensions, torch.float32)
    """

    centers: Tensor
    offset: Tensor
    scale: Tensor
    initial_std: Tensor
    hidden: tuple[int, ...] | None
    __call__: Callable[..., GaussianMixture]  # what `forward` returns, for type checkers
    column_names: tuple[str, ...] | None = None  # names of the coordinates, kept in the file

    def __init__(
        self,
        centers: Float[Tensor, "N d"],
        *,
        hidden: Sequence[int] = (64,) * 5,
        precision: str = "full",
        rank: int = 0,
        initial_std: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        centers = checked_sample_set("centers", centers).detach().clone()
        d = centers.shape[1]
        _check_precision(precision, rank, d)
        self.hidden, self.precision, self.rank = tuple(hidden), precision, rank
        self.register_buffer("centers", centers)
        self.register_buffer("offset", centers.mean(0))
        self.register_buffer("scale", centers.std(0))
        if initial_std is None:
            initial_std = _median_neighbour_distance((centers - self.offset) / self.scale)
            initial_std /= 1 if precision == "full" else d**0.5
        checked_positive("initial_std", initial_std)
        self.register_buffer("initial_std", torch.full_like(centers[0, 0], initial_std))
        generator = make_generator(generator, centers.device)
        self.network = perceptron(
            d,
            self.hidden,
            d * (d + 1) // 2 if precision == "full" else d * (1 + rank),
            generator=generator,
            dtype=centers.dtype,
            device=centers.device,
        )
        if rank:
            start = self.network[-1].get_parameter("bias")[d:]
            nn.init.normal_(start, 0, _INITIAL_COLUMN * d**-0.5, generator=generator)

    def precision_tril(self, z: Float[Tensor, "M d"]) -> Float[Tensor, "M d d"]:
        """Lower Cholesky factors of the precisions at z, (M, d) -> (M, d, d), in 1 / units.

        Raises:
            TypeError: the model's precisions are diagonal or of low rank: see `variance_and_factor`.
        """
        if self.precision != "full":
            raise TypeError(
                f"a model of precision {self.precision!r} has no precision_tril, which would be a d x d matrix a "
                "centre: use variance_and_factor"
            )
        entries = self.network((z - self.offset) / self.scale)
        # The floor keeps kernels about as narrow as the data; at zero, the network's start, the
        # diagonal is one, which is the initial width.
        floor = self.initial_std.clamp(max=_LARGEST_FLOOR)
        return _lower_triangular(entries, floor) / (self.initial_std * self.scale[:, None])

    def variance_and_factor(
        self, z: Float[Tensor, "M d"]
    ) -> tuple[Float[Tensor, "M d"], Float[Tensor, "M d r"]]:
        """Variances v and factors W of the covariances at z, in units squared and units.

        Raises:
            TypeError: the model's precisions are full: see `precision_tril`.
        """
        if self.precision == "full":
            raise TypeError(
                "a model of full precision has no variance_and_factor: use precision_tril"
            )
        d = z.shape[1]
        entries = self.network((z - self.offset) / self.scale)
        entries, columns = entries.split([d, d * self.rank], 1)
        width = self.initial_std * self.scale
        # A copy, so that the softplus does not keep the network's whole output for the backward pass.
        variance = _relative_variance(entries.contiguous(), self.initial_std) * width.square()
        return variance, columns.unflatten(1, (d, self.rank)) * width[:, None]

    def forward(self) -> GaussianMixture:
        """Mixture with the current precisions, eq. (25)."""
        if self.precision == "full":
            return GaussianMixture(self.centers, self.precision_tril(self.centers))
        kernels = self.variance_and_factor(self.centers)
        # valid by construction; checking what may be most of the memory would take as much again
        return LowRankGaussianMixture(self.centers, *kernels, validate_args=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model, with the names of its columns if it has them, to a safetensors file with a checksum."""
        save_tensors(
            path,
            self.state_dict(),
            kind="kernel model",
            hidden=self.hidden,
            precision=self.precision,
            rank=self.rank,
            column_names=self.column_names,
        )

    @staticmethod
    def load(path: str | os.PathLike[str]) -> KernelModel:
        """Read a model that `save` wrote, on the CPU. Runs no code from the file.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a damaged or foreign file.
            ModuleNotFoundError: without safetensors: extra `fit`.
        """
        tensors, about = load_tensors(path, kind="kernel model")
        centers, log_weights = tensors["centers"], tensors.get("log_weights")
        model: KernelModel
        if about["hidden"] is not None:
            model = KernelModel(
                centers,
                hidden=about["hidden"],
                precision=about.get("precision", "full"),  # older files lack it
                rank=about.get("rank", 0),
                initial_std=float(tensors["initial_std"]),
            )
        elif "tril" in tensors:
            model = FreeKernelModel(
                GaussianMixture(centers, tensors["tril"], log_weights=log_weights)
            )
        else:
            kernels = tensors["variance"], tensors["factor"]
            model = FreeLowRankKernelModel(
                LowRankGaussianMixture(centers, *kernels, log_weights=log_weights)
            )
        model.load_state_dict(tensors)
        if about.get("column_names") is not None:
            model.column_names = tuple(about["column_names"])
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
        self.hidden, self.precision, self.rank = None, "full", 0
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


class FreeLowRankKernelModel(KernelModel):
    r"""`FreeKernelModel` with covariances diagonal plus low rank.

    With the start :math:`Z_i^0, v_i^0, W_i^0`, coordinate by coordinate,

    .. math:: Z_i = Z_i^0 + \sqrt{v_i^0}\, u_i, \qquad v_i = v_i^0 / g(e_i)^2, \qquad
              W_i = W_i^0 + \sqrt{v_i^0}\, B_i,

    with parameters u, e and B, all zero at the start, where g is one. As there, g is a softplus with a floor. A factor that
    starts at zero stays there.

    Args:
        start: the mixture to start from, at least two kernels. Its weights stay as they are.

    Raises:
        ValueError: a start of one kernel.
    """

    variance: Tensor
    factor: Tensor
    log_weights: Tensor
    __call__: Callable[..., LowRankGaussianMixture]

    def __init__(self, start: LowRankGaussianMixture) -> None:
        nn.Module.__init__(self)  # without the network
        n, _, rank = start.factor.shape
        if n < 2:
            raise ValueError(f"start must have at least 2 kernels, got {n}")
        self.hidden, self.rank = None, rank
        self.precision = "lowrank" if rank else "diagonal"
        self.register_buffer("centers", start.centers.detach().clone())
        self.register_buffer("variance", start.diagonal.detach().clone())
        self.register_buffer("factor", start.factor.detach().clone())
        self.register_buffer("log_weights", start.log_weights.detach().clone())
        self.shift = nn.Parameter(torch.zeros_like(self.centers))
        self.entries = nn.Parameter(torch.zeros_like(self.variance))
        self.columns = nn.Parameter(torch.zeros_like(self.factor))

    def variance_and_factor(
        self, z: Float[Tensor, "M d"]
    ) -> tuple[Float[Tensor, "M d"], Float[Tensor, "M d r"]]:
        """Variances and factors of the kernels whose centres are nearest to z."""
        mixture = self()
        nearest = torch.cdist(z, mixture.centers).argmin(1)
        return mixture.diagonal[nearest], mixture.factor[nearest]

    def forward(self) -> LowRankGaussianMixture:
        """Mixture with the current centres and covariances, eq. (25)."""
        std = self.variance.sqrt()
        variance = self.variance * _relative_variance(self.entries, std / self.centers.std(0))
        # valid by construction; NaN is met by the training loop
        return LowRankGaussianMixture(
            self.centers + std * self.shift,
            variance,
            self.factor + std[..., None] * self.columns,
            log_weights=self.log_weights,
            validate_args=False,
        )


def _check_precision(precision: str, rank: int, d: int) -> None:
    if precision not in ("full", "diagonal", "lowrank"):
        raise ValueError(f"precision must be 'full', 'diagonal' or 'lowrank', got {precision!r}")
    if precision == "lowrank" and not 1 <= rank < d:
        raise ValueError(
            f"rank must be from 1 to {d - 1} for low-rank precisions in {d} dimensions, got {rank}"
        )
    if precision != "lowrank" and rank:
        raise ValueError(
            f"rank belongs to low-rank precisions, got {rank} for {precision!r}: give precision='lowrank'"
        )


def _relative_variance(entries: Tensor, width: Tensor) -> Tensor:
    """Variances from entries, one at zero: 1 / (a softplus with the floor of `width`, at most one half) squared."""
    return _inverse_width(entries, width.clamp(max=_LARGEST_FLOOR)).square().reciprocal()


def _inverse_width(entries: Tensor, floor: Tensor) -> Tensor:
    """Softplus that is one at zero and at least `floor`, which is below one."""
    return floor + softplus(entries + torch.log(torch.expm1(1 - floor)))


def _lower_triangular(entries: Tensor, floor: Tensor) -> Tensor:
    """Lower triangular matrices (M, d, d) from entries (M, d (d + 1) / 2): the identity at zero.

    The diagonal is positive and at least `floor`, which is below one.
    """
    d = int((2 * entries.shape[1]) ** 0.5)
    row, column = torch.tril_indices(d, d, device=entries.device)
    flat = entries.new_zeros(len(entries), d * d).index_copy(1, d * row + column, entries)
    tril = flat.unflatten(1, (d, d))
    diagonal = tril.diagonal(dim1=-2, dim2=-1)
    return torch.diagonal_scatter(tril, _inverse_width(diagonal, floor), dim1=-2, dim2=-1)


def _median_neighbour_distance(points: Tensor) -> float:
    array = points.cpu().numpy()
    if array.shape[1] > _TREE_DIMENSIONS:
        neighbours = needed("sklearn.neighbors").NearestNeighbors
        search = neighbours(n_neighbors=2, algorithm="brute").fit(array)
        distance, _ = search.kneighbors(array)
    else:
        distance, _ = KDTree(array).query(array, k=2)
    return float(torch.as_tensor(distance[:, 1], device="cpu").median())
