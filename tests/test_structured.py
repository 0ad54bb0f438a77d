"""Covariances diagonal plus low rank: one contract for the three kinds, against full precisions and differences."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from sklearn.decomposition import PCA
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from wpo_notes import structured as module
from wpo_notes.fit import fit, kernel_loss
from wpo_notes.losses import implicit_score_matching, negative_log_likelihood
from wpo_notes.mixture import GaussianMixture
from wpo_notes.model import FreeLowRankKernelModel, KernelModel
from wpo_notes.structured import LowRankGaussianMixture, low_rank_clusters

F64 = torch.float64
KINDS = {"full": 2, "diagonal": 0, "lowrank": 2}  # rank of the covariances' factor


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def parameters(n: int, d: int, r: int, *, std=0.5, ratio=3.0, offset=0.0, spread=3.0, seed=0):
    """Centres, variances about std^2, factors about ratio * std, unequal log-weights, in float64."""
    generator = seeded(seed)
    about = {"generator": generator, "dtype": F64}
    centers = offset + spread * (2 * torch.rand(n, d, **about) - 1)
    variance = std**2 * (0.5 + torch.rand(n, d, **about))
    factor = ratio * std * torch.randn(n, d, r, **about)
    return centers, variance, factor, torch.randn(n, **about)


def build(kind: str, centers, variance, factor, log_weights) -> GaussianMixture:
    if kind == "full":
        covariance = torch.diag_embed(variance) + factor @ factor.mT
        return GaussianMixture.from_covariance(centers, covariance, log_weights=log_weights)
    return LowRankGaussianMixture(centers, variance, factor, log_weights=log_weights)


def make(kind: str, n: int = 6, d: int = 4, **options) -> GaussianMixture:
    return build(kind, *parameters(n, d, KINDS[kind], **options))


def differences(centers, variance, factor, log_weights, x):
    """Log-density, score and Laplacian ratio from differences and dense covariances, in float64."""
    centers, variance, factor, log_weights, x = (
        part.double() for part in (centers, variance, factor, log_weights, x)
    )
    precision = torch.linalg.inv(torch.diag_embed(variance) + factor @ factor.mT)
    difference = x[:, None] - centers
    pulled = torch.einsum("nij,mnj->mni", precision, difference)
    exponents = log_weights.log_softmax(0) + 0.5 * torch.linalg.slogdet(precision)[1]
    exponents = exponents - 0.5 * (difference * pulled).sum(-1)
    exponents = exponents - 0.5 * x.shape[1] * math.log(2 * math.pi)
    weights = exponents.softmax(1)
    laplacians = pulled.square().sum(-1) - precision.diagonal(dim1=1, dim2=2).sum(1)
    return (
        exponents.logsumexp(1),
        -(weights[..., None] * pulled).sum(1),
        (weights * laplacians).sum(1),
        weights,
    )


# ---- the contract of all kinds --------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [module._BLOCK_ELEMENTS, 40])
def test_evaluation(kind, block, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", block)  # 40: blocks of one and of five points
    given = parameters(6, 4, KINDS[kind])
    mixture = build(kind, *given)
    x = 2 * torch.randn(11, 4, generator=seeded(1), dtype=F64)
    log_prob, score, ratio, weights = differences(*given, x)
    close = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(mixture.log_prob(x), log_prob, **close)
    torch.testing.assert_close(mixture.score(x), score, **close)
    torch.testing.assert_close(mixture.laplacian_ratio(x), ratio, **close)
    torch.testing.assert_close(mixture.responsibilities(x), weights, **close)
    divergence = ratio - score.square().sum(-1)
    torch.testing.assert_close(mixture.score_divergence(x), divergence, **close)
    for got, expected in zip(mixture.log_prob_and_score(x), (log_prob, score), strict=True):
        torch.testing.assert_close(got, expected, **close)
    for got, expected in zip(mixture.evaluate(x), differences(*given, x), strict=True):
        torch.testing.assert_close(got, expected, **close)
    shaped = x[:10].reshape(2, 5, 4)
    torch.testing.assert_close(mixture.score(shaped), score[:10].reshape(2, 5, 4), **close)
    torch.testing.assert_close(mixture.log_prob(x[0]), log_prob[0], **close)
    assert mixture.responsibilities(shaped).shape == (2, 5, 6)
    assert mixture.score(x[:0]).shape == (0, 4)
    assert mixture.responsibilities(x[:0]).shape == (0, 6)


@pytest.mark.parametrize("kind", KINDS)
def test_log_prob_matches_torch(kind):
    mixture = make(kind)
    x = torch.randn(9, 4, generator=seeded(1), dtype=F64)
    torch.testing.assert_close(mixture.to_torch().log_prob(x), mixture.log_prob(x))
    torch.testing.assert_close(mixture.to_torch().mean, mixture.mean)
    torch.testing.assert_close(mixture.to_torch().variance, mixture.variance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [module._BLOCK_ELEMENTS, 8])
def test_exclude_removes_the_centre(kind, block, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", block)  # 8: one kernel a block
    given = parameters(6, 4, KINDS[kind])
    mixture = build(kind, *given)
    x = torch.cat([given[0], given[0][:2]])
    exclude = torch.tensor([0, 1, 2, 3, 4, 5, -1, 3])
    score, ratio = mixture.score_and_laplacian_ratio(x, exclude=exclude)
    for row, index in enumerate(exclude.tolist()):
        kept = [i for i in range(6) if i != index]
        without = build(kind, *(part[kept] for part in given))
        torch.testing.assert_close(score[row], without.score(x[row]))
        torch.testing.assert_close(ratio[row], without.laplacian_ratio(x[row]))
    with pytest.raises(ValueError, match="indices of the 6 centres"):
        mixture.score_and_laplacian_ratio(x, exclude=exclude + 2)


@pytest.mark.parametrize("kind", KINDS)
def test_diffuse_adds_the_variance(kind):
    centers, variance, factor, log_weights = parameters(6, 4, KINDS[kind])
    mixture = build(kind, centers, variance, factor, log_weights)
    x = torch.randn(9, 4, generator=seeded(1), dtype=F64)
    for v in (0.0, 0.2, 3.0):
        expected = differences(centers, variance + v, factor, log_weights, x)
        torch.testing.assert_close(mixture.diffuse(v).log_prob(x), expected[0])
        torch.testing.assert_close(mixture.diffuse(v).score(x), expected[1])
    twice = mixture.diffuse(0.3).diffuse(0.7)
    torch.testing.assert_close(twice.log_prob(x), mixture.diffuse(1.0).log_prob(x))
    # Proposition 4.1: the heat equation
    v = torch.tensor(0.4, dtype=F64, requires_grad=True)
    rate = torch.autograd.functional.jacobian(lambda v: mixture.diffuse(v).log_prob(x), v)
    torch.testing.assert_close(rate, 0.5 * mixture.diffuse(0.4).laplacian_ratio(x))
    with pytest.raises(ValueError, match=r"non-negative finite number, got -0\.1"):
        mixture.diffuse(-0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_marginal_and_conditional(kind):
    given = parameters(5, 4, KINDS[kind])
    mixture = build(kind, *given)
    assert type(mixture.marginal([0])) is type(mixture.conditional([0], given[0][0, :1]))
    x = torch.randn(7, 4, generator=seeded(1), dtype=F64)
    dims, rest = [3, 1], [0, 2]
    centers, variance, factor, log_weights = given
    expected = differences(
        centers[:, dims], variance[:, dims], factor[:, dims], log_weights, x[:, dims]
    )
    torch.testing.assert_close(mixture.marginal(dims).log_prob(x[:, dims]), expected[0])
    torch.testing.assert_close(mixture.marginal(dims).score(x[:, dims]), expected[1])
    for point in x:  # the product rule
        conditional = mixture.conditional(dims, point[dims])
        parts = mixture.marginal(dims).log_prob(point[dims]) + conditional.log_prob(point[rest])
        torch.testing.assert_close(parts, mixture.log_prob(point))
    # the textbook's formula, for a single kernel
    single = build(kind, *(part[:1] for part in given))
    c = single.covariance_matrix
    gain = c[rest][:, dims] @ torch.linalg.inv(c[dims][:, dims])
    conditional = single.conditional(dims, x[0, dims])
    torch.testing.assert_close(
        conditional.covariance_matrix, c[rest][:, rest] - gain @ c[dims][:, rest]
    )
    torch.testing.assert_close(
        conditional.mean, centers[0, rest] + gain @ (x[0, dims] - centers[0, dims])
    )
    with pytest.raises(ValueError, match="distinct coordinates from 0 to 3"):
        mixture.marginal([0, 0])
    with pytest.raises(ValueError, match="leave at least one coordinate free"):
        mixture.conditional([0, 1, 2, 3], x[0])
    with pytest.raises(ValueError, match="values must have event size 2"):
        mixture.conditional([0, 1], x[0])
    unchecked = inspect.unwrap(type(mixture).conditional)
    with pytest.raises(ValueError, match=r"values must be one point of shape \(2,\)"):
        unchecked(mixture, [0, 1], x[:, :2])


@pytest.mark.parametrize("kind", KINDS)
def test_sample_moments(kind):
    given = parameters(5, 3, KINDS[kind])
    mixture = build(kind, *given)
    centers, variance, factor, log_weights = given
    weights = log_weights.softmax(0)
    mean = weights @ centers
    covariance = torch.diag_embed(variance) + factor @ factor.mT
    offset = centers - mean
    covariance = torch.einsum(
        "n,nij->ij", weights, covariance + offset[:, :, None] * offset[:, None]
    )
    torch.testing.assert_close(mixture.mean, mean)
    torch.testing.assert_close(mixture.covariance_matrix, covariance)
    torch.testing.assert_close(mixture.variance, covariance.diagonal())
    n = 40_000
    x = mixture.sample((n,), generator=seeded(3))
    # n times the squared Mahalanobis distance is chi squared with 3 degrees, above 30 once in a million.
    distance = (x.mean(0) - mean) @ torch.linalg.solve(covariance, x.mean(0) - mean)
    assert n * float(distance) < 30
    # Each whitened second moment has standard error sqrt(kurtosis / n) < sqrt(15 / n): five of them.
    tril = torch.linalg.cholesky(covariance)
    whitened = torch.linalg.solve_triangular(tril, (x - mean).mT, upper=False)
    error = whitened @ whitened.mT / n - torch.eye(3, dtype=F64)
    assert float(error.abs().max()) < 5 * math.sqrt(15 / n)
    assert torch.equal(x[:4], mixture.sample((n,), generator=seeded(3))[:4])
    assert mixture.sample((2, 3)).shape == (2, 3, 3)
    assert mixture.sample((0, 3)).shape == (0, 3, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_constraints_hold_for_good_parameters_only(kind):
    mixture = make(kind)
    for name, constraint in mixture.arg_constraints.items():
        value = getattr(mixture, name)
        assert bool(constraint.check(value).all())
        if value.numel():
            assert not bool(constraint.check(value * math.nan).all())
    if kind != "full":
        assert not mixture.arg_constraints["diagonal"].check(-mixture.diagonal).all()


@pytest.mark.parametrize("kind", KINDS)
def test_rsample_derivatives_match_closed_forms(kind):
    # E x_0^2 has the derivatives 2 w Z_0 in the centres and w in the first variance: those of a sum over
    # components, so the estimate from n draws has a standard error of order 1 / sqrt(n).
    *given, log_weights = parameters(3, 3, KINDS[kind], ratio=1.0)
    given = [part.requires_grad_() for part in given]
    mixture = build(kind, *given, log_weights)
    assert mixture.has_rsample
    weights = log_weights.softmax(0)
    centers, variance, factor = given
    second = weights @ (centers[:, 0].square() + variance[:, 0] + factor[:, 0].square().sum(-1))
    exact = torch.autograd.grad(second, given)
    estimates = []
    for seed in range(40):
        x = mixture.rsample((1000,), generator=seeded(seed))
        assert torch.equal(x, mixture.sample((1000,), generator=seeded(seed)))
        estimates.append(torch.autograd.grad(x[:, 0].square().mean(), given, retain_graph=True))
    for found, expected in zip(zip(*estimates, strict=True), exact, strict=True):
        found = torch.stack(found)
        error = (found - found.mean(0)).square().sum(0).sqrt() / 40
        assert ((found.mean(0) - expected).abs() <= 5.5 * error + 1e-12).all()  # t, 39 degrees
        assert float(error.norm()) <= 0.1 * float(expected.norm())
    weighted = build(kind, *given, log_weights.requires_grad_())
    with pytest.raises(NotImplementedError, match="rsample has no derivative in log_weights"):
        weighted.rsample((2,))


@pytest.mark.parametrize("kind", KINDS)
def test_kl_divergence(kind):
    p, q = make(kind, 5, 3), make(kind, 4, 3, seed=1)
    x = p.sample((40_000,), generator=seeded(2))
    ratio = p.log_prob(x) - q.log_prob(x)
    found = float(torch.distributions.kl_divergence(p, q))
    worst = float((5 * p.log_weights.exp().max()).sqrt() * ratio.std()) / 100
    # five of both errors, of which the first is a bound
    assert abs(found - float(ratio.mean())) < 5 * (worst**2 + ratio.var().item() / 40_000) ** 0.5
    assert 5 * worst < 0.2 * found
    dense = torch.distributions.kl_divergence(p.to_torch(), q)
    assert abs(float(dense) - found) < 8 * worst  # other draws
    batch = p.expand((2,))
    assert batch.sample((3,)).shape == (3, 2, 3)
    torch.testing.assert_close(batch.log_prob(x[0]), p.log_prob(x[0]).expand(2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("exclude", [None, torch.tensor([0, -1, 2])])
def test_gradients(kind, exclude):
    given = parameters(3, 3, KINDS[kind], ratio=1.0)
    x = torch.randn(3, 3, generator=seeded(1), dtype=F64)

    def evaluated(x, *given):
        return tuple(build(kind, *given)._evaluate(x, score=True, laplacian=True, exclude=exclude))

    assert gradcheck(evaluated, [part.requires_grad_() for part in (x, *given)])


@pytest.mark.parametrize("kind", KINDS)
def test_no_tensor_is_made_on_the_default_device(kind):
    given = parameters(5, 3, KINDS[kind])
    x = torch.randn(4, 3, generator=seeded(1), dtype=F64)
    with torch.device("meta"):
        mixture = build(kind, *given)
        values = [
            *mixture._evaluate(
                x, score=True, laplacian=True, exclude=torch.full((4,), -1, device="cpu")
            ),
            mixture.responsibilities(x),
            mixture.diffuse(0.1).log_prob(x),
            mixture.conditional([0], x[0, :1]).log_prob(x[:, 1:]),
            mixture.covariance_matrix,
            mixture.sample((3,), generator=seeded()),
        ]
    for value in values:
        assert value.device.type == "cpu"
        assert torch.isfinite(value).all()


@pytest.mark.parametrize("kind", KINDS)
def test_bad_points(kind):
    mixture = make(kind)
    with pytest.raises(ValueError, match="x must have event size 4"):
        mixture.log_prob(torch.zeros(2, 3, dtype=F64))
    with pytest.raises(ValueError, match="x must be finite"):
        mixture.diffuse(0.1).score(torch.full((2, 4), math.nan, dtype=F64))
    with pytest.raises(TypeError, match=r"mixture's dtype torch.float64, got torch.float32"):
        mixture.log_prob(torch.zeros(2, 4))


# ---- rounding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["diagonal", "lowrank"])
@pytest.mark.parametrize(
    ("std", "ratio", "offset", "d"),
    [(0.02, 1, 0, 2), (0.02, 20, 100, 3), (0.002, 500, 0, 6), (0.02, 5, 100, 64), (1.0, 1, 0, 2)],
)
def test_float32_error(kind, std, ratio, offset, d):
    given = [
        part.float() for part in parameters(60, d, KINDS[kind], std=std, ratio=ratio, offset=offset)
    ]
    single = build(kind, *given)
    x = single.sample((300,), generator=seeded(1))
    log_prob, score, laplacian, _ = differences(*given, x)
    double = build(kind, *(part.double() for part in given))
    scale = float(1 / given[1].min()) * d  # bounds tr Gamma
    # Measured: 6e-8 relative in all of them, which is the rounding of the results.
    for mixture, points in ((single, x), (double, x.double())):
        error = (mixture.log_prob(points) - log_prob).abs()
        assert float((error / (1 + log_prob.abs())).max()) < 1e-6
        error = (mixture.score(points) - score).norm(dim=1)
        assert float((error / (score.norm(dim=1) + 0.1 * scale**0.5)).max()) < 1e-6
        assert float((mixture.laplacian_ratio(points) - laplacian).abs().max()) < 1e-6 * scale
        assert mixture.log_prob(points).dtype == points.dtype


@pytest.mark.parametrize("kind", ["diagonal", "lowrank"])
def test_far_points(kind):
    given = parameters(20, 3, KINDS[kind], std=0.02, ratio=5)
    x = given[0][:5] + 2e4 * torch.nn.functional.normalize(torch.ones(3, dtype=F64), dim=0)
    mixture = build(kind, *given)
    log_prob, score, ratio, _ = differences(*given, x)
    torch.testing.assert_close(mixture.log_prob(x), log_prob, rtol=1e-10, atol=0)
    torch.testing.assert_close(mixture.score(x), score, rtol=1e-8, atol=0)
    torch.testing.assert_close(mixture.laplacian_ratio(x), ratio, rtol=1e-8, atol=0)


def test_float32_stays_float32():
    mixture = build("lowrank", *(part.float() for part in parameters(4, 3, 2)))
    x = torch.zeros(2, 3)
    for value in (
        mixture.responsibilities(x),
        mixture.sample((2,)),
        mixture.diffuse(0.1).diagonal,
        mixture.conditional([0], x[0, :1]).factor,
        mixture.conditional([0], x[0, :1]).centers,
        mixture.covariance_matrix,
        mixture.variance,
    ):
        assert value.dtype == torch.float32


# ---- construction --------------------------------------------------------------------------------


def test_constructor_errors():
    centers, variance, factor, log_weights = parameters(3, 2, 1)
    zero = variance.clone()
    zero[1, 0] = 0
    cases = [
        (ValueError, r"variance must be positive, but variance\[1\] has 0", (centers, zero, factor)),
        (ValueError, "factor must be finite", (centers, variance, factor * math.inf)),
        (ValueError, r"variance must have shape \(3, 2\)", (centers, variance[:2], factor)),
        (ValueError, r"factor must have shape \(3, 2, r\).*got \(3, 2\)", (centers, variance, factor[..., 0])),
        (ValueError, r"factor must have shape \(3, 2, r\)", (centers, variance, factor.mT)),
        (ValueError, r"centers must be a matrix \(N, d\)", (centers[0], variance, factor)),
        (ValueError, "N and d at least 1", (centers[:0], variance[:0], factor[:0])),
        (TypeError, "variance must have the centres' dtype", (centers, variance.float(), factor)),
        (TypeError, "factor must have dtype float32 or float64", (centers, variance, factor.long())),
        (TypeError, "centers must have dtype float32 or float64", (centers.long(), variance, factor)),
    ]  # fmt: skip
    for error, message, arguments in cases:
        with pytest.raises(error, match=message):
            LowRankGaussianMixture(*arguments)
    with pytest.raises(ValueError, match=r"log_weights must have shape \(3,\)"):
        LowRankGaussianMixture(centers, variance, factor, log_weights=log_weights[:2])
    with pytest.raises(ValueError, match="variance must be positive"):
        LowRankGaussianMixture(centers, -variance, factor)
    LowRankGaussianMixture(centers, -variance, factor, validate_args=False)
    text = "LowRankGaussianMixture(3 centres in 2 dimensions, rank 1, torch.float64)"
    assert repr(LowRankGaussianMixture(centers, variance, factor)) == text


def test_named_constructors():
    centers, variance, _, log_weights = parameters(4, 3, 0)
    x = torch.randn(5, 3, generator=seeded(1), dtype=F64)
    isotropic = LowRankGaussianMixture.from_variance(centers, 0.3, log_weights=log_weights)
    expected = GaussianMixture.from_variance(centers, 0.3, log_weights=log_weights)
    torch.testing.assert_close(isotropic.log_prob(x), expected.log_prob(x))
    for given in (variance[0], variance):
        mixture = LowRankGaussianMixture.from_variance(centers, given)
        assert torch.equal(mixture.diagonal, given.expand(4, 3))
    with pytest.raises(ValueError, match=r"variance must be a number or have shape \(3,\)"):
        LowRankGaussianMixture.from_variance(centers, variance[:, 0])
    with pytest.raises(TypeError, match="has no from_covariance"):
        LowRankGaussianMixture.from_covariance(centers, torch.eye(3, dtype=F64))


# ---- where a model starts ------------------------------------------------------------------------


def test_one_cluster_is_probabilistic_pca():
    # With many points the shrinkage, of order 2 / n, vanishes. Then the directions and the variances along them
    # are scikit-learn's PCA, and the squares of each coordinate are exact.
    x = build("lowrank", *parameters(1, 5, 2)).sample((20_000,), generator=seeded(2))
    mixture = low_rank_clusters(x, 1, 2, generator=seeded())
    pca = PCA(2).fit(x.numpy())
    expected = torch.from_numpy(
        pca.components_.T * (pca.explained_variance_ - pca.noise_variance_) ** 0.5
    )
    for column, other in zip(mixture.factor[0].T, expected.T, strict=True):
        sign = torch.sign(column @ other)
        torch.testing.assert_close(sign * column, other, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(mixture.covariance_matrix.diagonal(), x.var(0), rtol=1e-3, atol=0)
    torch.testing.assert_close(mixture.mean, x.mean(0))


def test_clusters_are_found_and_small_ones_given_up():
    law = build("diagonal", *parameters(4, 3, 0, std=0.05))
    x = law.sample((400,), generator=seeded(1))
    far = torch.full((1, 3), 9.0, dtype=F64)
    mixture = low_rank_clusters(torch.cat([x, far]), 5, 1, generator=seeded())
    assert len(mixture.centers) == 4
    mixture = low_rank_clusters(x, 4, 1, generator=seeded())
    nearest = torch.cdist(mixture.centers, law.centers).amin(1)
    assert float(nearest.max()) < 0.05
    for bad, message in (((0, 1), "count must be from 1"), ((4, 3), "rank must be from 0 to 2")):
        with pytest.raises(ValueError, match=message):
            low_rank_clusters(x, *bad)
    with pytest.raises(ValueError, match="more than rank"):
        low_rank_clusters(x[:6], 6, 1)


# ---- models --------------------------------------------------------------------------------------

MODELS = {"diagonal": {"precision": "diagonal"}, "lowrank": {"precision": "lowrank", "rank": 2}}


def network_model(kind: str, dtype=F64) -> KernelModel:
    z = torch.randn(30, 4, generator=seeded(), dtype=dtype) * torch.tensor(
        [1, 1, 10, 0.1], dtype=dtype
    )
    return KernelModel(z, hidden=(8, 8), generator=seeded(1), **MODELS[kind])


def free_model(kind: str, dtype=F64) -> KernelModel:
    given = parameters(6, 4, KINDS[kind])
    return FreeLowRankKernelModel(build(kind, *(part.to(dtype) for part in given)))


def perturbed(model, size=0.3):
    generator = seeded(5)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter += size * noise
    return model


@pytest.mark.parametrize("kind", MODELS)
def test_network_starts_near_the_initial_width(kind):
    model = network_model(kind)
    mixture = model()
    z = (model.centers - model.offset) / model.scale
    nearest = torch.cdist(z, z).fill_diagonal_(math.inf).amin(1).median()
    torch.testing.assert_close(model.initial_std, nearest / 2)  # over the root of d = 4
    width = model.initial_std * model.scale
    torch.testing.assert_close(mixture.diagonal, width.square().expand(30, 4))
    # columns of norm about 0.3 in these widths, chi squared with 4 degrees
    columns = (mixture.factor / width[:, None]).norm(dim=1)
    assert ((columns > 0.03) & (columns < 0.9)).all()


@pytest.mark.parametrize("make_model", [network_model, free_model])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    "loss", [kernel_loss(), lambda m, x, i, g: negative_log_likelihood(m(), x)]
)
def test_fit_lowers_the_objective(make_model, kind, loss):
    model = make_model(kind)
    x = build("lowrank", *parameters(3, 4, 1)).sample((300,), generator=seeded(7))
    with torch.no_grad():
        before = float(loss(model, x, None, seeded()))
    fit(model, x, steps=60, batch_size=100, lr=2e-2, loss=loss, generator=seeded(), progress=False)
    with torch.no_grad():
        after = float(loss(model, x, None, seeded()))
    assert after < before
    for parameter in model.parameters():
        assert parameter.grad is not None
    assert math.isfinite(float(implicit_score_matching(model(), x).detach()))


@pytest.mark.parametrize("make_model", [network_model, free_model])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_saved_model_is_the_same_model(make_model, kind, dtype, tmp_path):
    model = perturbed(make_model(kind, dtype))
    model.save(tmp_path / "model.safetensors")
    loaded = KernelModel.load(tmp_path / "model.safetensors")
    assert type(loaded) is type(model)
    assert (loaded.precision, loaded.rank) == (kind, KINDS[kind])
    x = torch.randn(5, 4, generator=seeded(3), dtype=dtype)
    assert torch.equal(loaded().log_prob(x), model().log_prob(x))


@pytest.mark.parametrize("kind", MODELS)
def test_no_variance_is_much_wider_than_the_data(kind):
    model = network_model(kind)
    torch.nn.init.constant_(model.network[-1].bias, -50)
    torch.testing.assert_close(
        model().diagonal.sqrt(), model.scale * (model.initial_std / 0.5).clamp(min=1).expand(30, 4)
    )
    free = free_model(kind)
    torch.nn.init.constant_(free.entries, -50)
    start = parameters(6, 4, KINDS[kind])
    widest = torch.maximum(start[0].std(0), 2 * start[1].sqrt())
    assert (free().diagonal.sqrt() <= widest * (1 + 1e-9)).all()


@pytest.mark.parametrize("kind", MODELS)
def test_free_model_starts_at_its_start_and_moves_in_its_own_widths(kind):
    start = build(kind, *parameters(6, 4, KINDS[kind]))
    model = FreeLowRankKernelModel(start)
    x = torch.randn(5, 4, generator=seeded(3), dtype=F64)
    torch.testing.assert_close(model().log_prob(x), start.log_prob(x), rtol=1e-12, atol=1e-12)
    perturbed(model)
    mixture, std = model(), start.diagonal.sqrt()
    torch.testing.assert_close((mixture.centers - start.centers) / std, model.shift.detach())
    torch.testing.assert_close(
        (mixture.factor - start.factor) / std[..., None], model.columns.detach()
    )
    nearest = model.variance_and_factor(mixture.centers[[3, 1]] + 1e-9)
    torch.testing.assert_close(nearest[0], mixture.diagonal[[3, 1]])
    torch.testing.assert_close(nearest[1], mixture.factor[[3, 1]])
    with pytest.raises(ValueError, match="at least 2 kernels, got 1"):
        FreeLowRankKernelModel(build(kind, *parameters(1, 4, KINDS[kind])))


def test_model_errors():
    z = torch.randn(5, 3, generator=seeded(), dtype=F64)
    cases = [
        (
            {"precision": "banded"},
            "precision must be 'full', 'diagonal' or 'lowrank', got 'banded'",
        ),
        ({"precision": "lowrank"}, "rank must be from 1 to 2 for low-rank precisions in 3"),
        ({"precision": "lowrank", "rank": 3}, "rank must be from 1 to 2"),
        ({"precision": "diagonal", "rank": 1}, "rank belongs to low-rank precisions"),
        ({"rank": 1}, "rank belongs to low-rank precisions, got 1 for 'full'"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            KernelModel(z, **options)
    with pytest.raises(TypeError, match="use variance_and_factor"):
        KernelModel(z, precision="diagonal").precision_tril(z)
    with pytest.raises(TypeError, match="use precision_tril"):
        KernelModel(z).variance_and_factor(z)


# ---- memory ----------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for part in result if isinstance(result, tuple | list) else (result,):
            if isinstance(part, torch.Tensor) and not part._is_view():
                self.elements = max(self.elements, part.numel())
        return result


def test_no_matrix_a_centre_and_bounded_blocks(monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", 2**14)
    n, m, d, r = 300, 500, 40, 2
    given = [part.float().requires_grad_() for part in parameters(n, d, r)]
    mixture = build("lowrank", *given)
    x = mixture.sample((m,), generator=seeded(1))
    with LargestTensor() as largest, torch.no_grad():
        mixture.score_and_laplacian_ratio(x)
        mixture.log_prob(x)
    assert largest.elements <= max(2**14, m * d) < n * d * r
    with LargestTensor() as largest:
        implicit_score_matching(mixture, x[:64]).backward()
        mixture.diffuse(0.1).marginal(range(d // 2)).log_prob(x[:, : d // 2])
        mixture.conditional([0], x[0, :1]).sample((5,))
    # the largest are the parameters and their gradients
    assert largest.elements <= n * d * r < m * n < n * d * d


def test_divergence_is_reported_with_the_narrowest_kernel():
    x = torch.randn(40, 3, generator=seeded(), dtype=F64)
    model = KernelModel(x[:10], hidden=(4,), precision="lowrank", rank=1, generator=seeded())

    def loss(model, batch, index, generator):
        return kernel_loss()(model, batch, index, generator) * math.inf

    narrowest = f"{float(model().diagonal.min()) ** 0.5:.2g}"
    with pytest.raises(FloatingPointError, match=f"standard deviation about {narrowest}:"):
        fit(model, x, steps=2, loss=loss, progress=False)
