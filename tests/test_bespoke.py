"""Section 6.2's layer: against the mixture, automatic differentiation, NumPy and PyTorch's attention."""

import numpy as np
import pytest
import torch

from wpo_notes.bespoke import (
    AttentionLayer,
    CanonicalPolyadic,
    TensorKernelModel,
    UntiedLayer,
    WeightedKernelModel,
    layer_score_matching,
    lift,
)
from wpo_notes.fit import fit
from wpo_notes.losses import implicit_score_matching
from wpo_notes.mixture import GaussianMixture
from wpo_notes.model import FreeKernelModel, KernelModel


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def mixture(n=7, d=2, dtype=torch.float64):
    tril = random(n, d, d, seed=1, dtype=dtype).tril(-1) + torch.diag_embed(
        0.5 + random(n, d, seed=2, dtype=dtype).square()
    )
    weights = random(n, seed=3, dtype=dtype)
    return GaussianMixture(random(n, d, dtype=dtype), tril, log_weights=weights)


def perturbed(module, size=0.3):
    with torch.no_grad():
        for seed, parameter in enumerate(module.parameters()):
            parameter += size * random(*parameter.shape, seed=seed, dtype=parameter.dtype)
    return module


def jacobian(score, x):
    return torch.func.vmap(torch.func.jacrev(lambda point: score(point[None])[0]))(x)


def test_lift_is_the_kronecker_square_and_the_point():
    x = random(5, 3)
    expected = [np.concatenate([np.kron(point, point), point]) for point in x.numpy()]
    np.testing.assert_allclose(lift(x), np.stack(expected))


@pytest.mark.parametrize("d", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tied_layer_is_the_mixture(d, dtype):
    law = mixture(d=d, dtype=dtype)
    x = random(20, d, seed=4, dtype=dtype)
    layer = AttentionLayer.from_mixture(law)
    tolerance = {"rtol": 1e-3, "atol": 1e-3} if dtype == torch.float32 else {}
    reference = law.to_torch()
    torch.testing.assert_close(layer.log_sum_exp(x), reference.log_prob(x), **tolerance)
    torch.testing.assert_close(layer.score(x), law.score(x), **tolerance)
    torch.testing.assert_close(layer.exponents(x).softmax(1), law.responsibilities(x), **tolerance)
    _, divergence = layer.score_and_divergence(x)
    torch.testing.assert_close(divergence, law.score_divergence(x), **tolerance)
    assert divergence.dtype == dtype


def test_scaled_dot_product_attention_gives_the_score():
    law = mixture(d=3)
    x = random(20, 3, seed=4)
    layer = AttentionLayer.from_mixture(law)
    mean = torch.nn.functional.scaled_dot_product_attention(
        torch.cat([lift(x), torch.ones(20, 1)], 1)[None],
        torch.cat([layer.key, layer.bias[:, None]], 1)[None],
        layer.value[None],
        scale=1.0,
    )[0]
    score = mean[:, 9:] - (mean[:, :9].reshape(-1, 3, 3) @ x[..., None])[..., 0]
    torch.testing.assert_close(score, law.score(x))


@pytest.mark.parametrize("d", [1, 2, 3])
def test_divergence_of_an_untied_layer_is_the_trace_of_its_jacobian(d):
    layer = perturbed(UntiedLayer(mixture(d=d)))()
    x = random(20, d, seed=4)
    score, divergence = layer.score_and_divergence(x)
    trace = jacobian(layer.score, x).diagonal(dim1=1, dim2=2).sum(1)
    torch.testing.assert_close(divergence, trace)
    torch.testing.assert_close(score, layer.score(x))


def test_untied_layer_starts_as_the_mixture():
    law = mixture()
    x = random(20, 2, seed=4)
    untied = UntiedLayer(law)
    torch.testing.assert_close(untied().log_sum_exp(x), law.log_prob(x))
    torch.testing.assert_close(untied().score(x), law.score(x))
    torch.testing.assert_close(layer_score_matching(untied(), x), implicit_score_matching(law, x))
    assert untied.departure().max() == 0


def test_untied_layer_is_a_gradient_field_where_it_has_not_departed():
    untied = perturbed(UntiedLayer(mixture()))
    x = random(20, 2, seed=4)
    assert untied.departure().min() > 0.1
    free = jacobian(untied().score, x)
    assert (free - free.mT).abs().max() > 0.1
    with torch.no_grad():  # the relations of (34), in the coordinates of the start
        untied.slope.copy_(-(untied.quadratic + untied.quadratic.mT))
        untied.offset.copy_(untied.linear)
    assert untied.departure().max() < 1e-12
    layer = untied()
    own = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(layer.log_sum_exp(own).sum(), own)
    torch.testing.assert_close(layer.score(x), gradient)


def test_layer_score_matching_against_automatic_differentiation():
    untied = perturbed(UntiedLayer(mixture()))
    x = random(20, 2, seed=4)
    score = untied().score(x)
    trace = jacobian(untied().score, x).diagonal(dim1=1, dim2=2).sum(1)
    expected = (2 * trace + score.square().sum(1)).mean()
    torch.testing.assert_close(layer_score_matching(untied(), x), expected)


def test_training_the_untied_layer_lowers_the_objective():
    law = mixture()
    x = law.sample((500,), generator=torch.Generator().manual_seed(0))
    model = UntiedLayer(GaussianMixture.from_variance(law.centers, 1.0))

    def loss(model, x, index, generator):
        return layer_score_matching(model(), x)

    generator = torch.Generator().manual_seed(0)
    before = float(layer_score_matching(model(), x).detach())
    fit(model, x, steps=50, lr=1e-2, loss=loss, generator=generator, progress=False)
    assert float(layer_score_matching(model(), x).detach()) < before


def test_learned_weights_are_those_of_the_mixture():
    law = mixture()
    model = WeightedKernelModel(FreeKernelModel(law), law.log_weights)
    x = random(20, 2, seed=4)
    torch.testing.assert_close(model().log_prob(x), law.log_prob(x))
    with torch.no_grad():
        model.log_weights += random(7, seed=5)
    expected = GaussianMixture(law.centers, law.precision_tril, log_weights=model.log_weights)
    torch.testing.assert_close(model().log_prob(x), expected.log_prob(x))
    implicit_score_matching(model(), x).backward()
    assert model.log_weights.grad.abs().min() > 0


def test_canonical_polyadic_against_numpy():
    bound = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    function = perturbed(CanonicalPolyadic(bound, 5, rank=3, degree=4), size=1.0)
    z = 2 * torch.rand(11, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 1
    a, c = (p.detach().numpy() for p in (function.coefficients, function.combination))
    value = np.zeros((11, 5))
    for r in range(3):
        product = np.ones(11)
        for k in range(3):
            product *= np.polynomial.chebyshev.chebval(z[:, k].numpy(), a[r, k])
        value += product[:, None] * c[:, r]
    np.testing.assert_allclose(function(z * bound).detach(), value, rtol=1e-10, atol=1e-12)


def test_canonical_polyadic_has_its_rank_and_is_constant_outside():
    bound = torch.ones(2, dtype=torch.float64)
    function = perturbed(CanonicalPolyadic(bound, 1, rank=2, degree=6), size=1.0)
    side = torch.linspace(-1, 1, 30, dtype=torch.float64)
    values = function(torch.cartesian_prod(side, side)).reshape(30, 30)
    assert torch.linalg.matrix_rank(values) == 2
    outside = torch.tensor([[3.0, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(function(outside), function(outside.clamp(max=1)))


def test_tensor_kernel_model_starts_as_the_network_does():
    z = random(30, 2)
    tensor = TensorKernelModel(z, rank=3, degree=4)
    network = KernelModel(z)
    torch.testing.assert_close(tensor().precision_tril, network().precision_tril)
    assert sum(p.numel() for p in tensor.parameters()) == 3 * (2 * 5 + 3)


def test_tensor_kernel_model_says_how_to_save_it(tmp_path):
    with pytest.raises(TypeError, match=r"save its state_dict\(\)"):
        TensorKernelModel(random(30, 2)).save(tmp_path / "model")


@pytest.mark.parametrize("name", ["rank", "degree"])
def test_rank_and_degree_are_positive(name):
    with pytest.raises(ValueError, match=f"{name} must be a positive"):
        CanonicalPolyadic(torch.ones(2), 1, **({"rank": 1, "degree": 1} | {name: 0}))
