"""The kernel model: parametrisation, units, files."""

import math

import pytest
import torch

from wpo_notes.mixture import GaussianMixture
from wpo_notes.model import FreeKernelModel, KernelModel


def centers(n=30, d=2, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=dtype)


def perturbed(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(
                parameter.shape, generator=generator, dtype=parameter.dtype
            )
    return model


@pytest.mark.parametrize("d", [1, 2, 5])
def test_factors_are_lower_triangular_with_positive_diagonal(d):
    model = perturbed(KernelModel(centers(d=d), hidden=(16, 16)))
    tril = model.precision_tril(centers(n=11, d=d, seed=1))
    assert tril.shape == (11, d, d)
    assert not tril.triu(1).any()
    assert (tril.diagonal(dim1=-2, dim2=-1) > 0).all()
    assert tril.std(0).max() > 0  # the network sees its input


def test_diagonal_stays_positive_for_any_output_of_the_network():
    model = KernelModel(centers(), hidden=(4,))
    last = model.network[-1]
    for bias in (-1e20, 1e20):
        torch.nn.init.constant_(last.bias, bias)
        diagonal = model.precision_tril(model.centers).diagonal(dim1=-2, dim2=-1)
        assert (diagonal > 0).all()
        assert torch.isfinite(diagonal).all()


@pytest.mark.parametrize("initial_std", [0.05, 3.0])
def test_no_kernel_becomes_much_wider_than_the_data(initial_std):
    z = centers() * torch.tensor([1.0, 10.0], dtype=torch.float64)
    model = KernelModel(z, hidden=(4,), initial_std=initial_std)
    torch.nn.init.constant_(model.network[-1].bias, -50)
    with torch.no_grad():
        model.network[-1].bias[1] = 0  # the off-diagonal entry
    covariance = torch.cholesky_inverse(model().precision_tril)
    widest = covariance.diagonal(dim1=-2, dim2=-1).sqrt() / z.std(0)
    torch.testing.assert_close(widest, torch.full_like(widest, max(1.0, initial_std / 0.5)))


def test_before_training_every_kernel_is_isotropic_in_standardised_units():
    z = centers() * torch.tensor([1.0, 10.0], dtype=torch.float64)
    model = KernelModel(z, initial_std=0.25)
    covariance = torch.cholesky_inverse(model().precision_tril)
    expected = (0.25 * z.std(0)).square()
    torch.testing.assert_close(covariance, expected.diag().expand(30, 2, 2))


def test_initial_width_is_the_median_distance_to_the_nearest_other_centre():
    z = centers()
    u = (z - z.mean(0)) / z.std(0)
    distance = torch.cdist(u, u).fill_diagonal_(math.inf).amin(1)
    torch.testing.assert_close(KernelModel(z).initial_std, distance.median())


def test_model_follows_the_units_of_the_data():
    # x -> a x + b takes the density to density / |a|: same network, other units.
    z = centers()
    a, b = torch.tensor([3.0, 0.01], dtype=torch.float64), 100.0
    one, other = KernelModel(z, hidden=(8,)), KernelModel(a * z + b, hidden=(8,))
    other.network.load_state_dict(perturbed(one).network.state_dict())
    x = centers(seed=2)
    torch.testing.assert_close(
        other().log_prob(a * x + b), one().log_prob(x) - a.log().sum(), rtol=1e-9, atol=1e-9
    )


def test_forward_is_the_mixture_of_equation_25():
    model = perturbed(KernelModel(centers(), hidden=(8, 8)))
    x = centers(n=5, seed=3)
    tril = model.precision_tril(model.centers)
    precision = tril @ tril.mT
    offset = x[:, None] - model.centers
    quadratic = torch.einsum("mni,nij,mnj->mn", offset, precision, offset)
    density = (torch.linalg.det(precision).sqrt() / (2 * math.pi) * (-quadratic / 2).exp()).mean(1)
    torch.testing.assert_close(model().log_prob(x), density.log(), rtol=1e-10, atol=1e-10)


def test_parameters_receive_gradients_and_centres_do_not():
    model = KernelModel(centers(), hidden=(8,))
    model().log_prob(model.centers).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert not model.centers.requires_grad
    assert "centers" in dict(model.named_buffers())


def test_only_the_given_generator_is_used():
    state = torch.get_rng_state()
    one = KernelModel(centers(), generator=torch.Generator().manual_seed(3))
    other = KernelModel(centers(), generator=torch.Generator().manual_seed(3))
    third = KernelModel(centers(), generator=torch.Generator().manual_seed(4))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(one.network[0].weight, other.network[0].weight)
    assert not torch.equal(one.network[0].weight, third.network[0].weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saved_model_is_the_same_model(tmp_path, dtype):
    model = perturbed(KernelModel(centers(dtype=dtype), hidden=(8, 4)))
    model.save(tmp_path / "model.safetensors")
    loaded = KernelModel.load(tmp_path / "model.safetensors")
    assert loaded.hidden == (8, 4)
    assert loaded.centers.dtype == dtype
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name


def test_damaged_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    KernelModel(centers(), hidden=(8,)).save(path)
    content = path.read_bytes()

    path.write_bytes(content[:-20])
    with pytest.raises(ValueError, match="damaged or not a kernel model file"):
        KernelModel.load(path)
    flipped = bytearray(content)
    flipped[-5] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(ValueError, match="checksum does not match"):
        KernelModel.load(path)
    torch.save({"a": 1}, path)  # a pickle: never unpickled
    with pytest.raises(ValueError, match="damaged or not a kernel model file"):
        KernelModel.load(path)
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="is not a kernel model file of wpo_notes"):
        KernelModel.load(path)
    with pytest.raises(FileNotFoundError, match="no kernel model file at"):
        KernelModel.load(tmp_path / "absent")


def test_saving_never_leaves_half_a_file(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    model = KernelModel(centers(), hidden=(8,))
    model.save(path)
    before = path.read_bytes()

    def fails(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fails)
    with pytest.raises(OSError, match="disk full"):
        perturbed(model).save(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (torch.zeros(5, 2), ValueError, "all of its 5 points are equal"),
        (torch.zeros(5, 2, dtype=torch.int64), TypeError, "dtype float32 or float64"),
        (torch.randn(1, 2), ValueError, "at least 2 points, got 1"),
        (torch.randn(5), ValueError, "one point a row"),
        (torch.tensor([[0.0, 1], [1, 1], [2, 1]]), ValueError, r"column\(s\) \[1\] are constant"),
        (torch.tensor([[0.0], [1], [1]]), ValueError, "1 of its 3 rows are duplicates"),
        (torch.tensor([[0.0], [math.nan]]), ValueError, "NaN or infinite"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_bad_centres(bad, error, message):
    with pytest.raises(error, match=message):
        KernelModel(bad)


def test_bad_initial_width():
    with pytest.raises(ValueError, match="initial_std must be a positive"):
        KernelModel(centers(), initial_std=0.0)


def test_repr_says_how_many_centres():
    assert "30 centres in 2 dimensions" in repr(KernelModel(centers(), hidden=(4,)))


def test_no_tensor_is_made_on_the_default_device():
    z = centers()
    with torch.device("meta"):
        mixture = KernelModel(z, hidden=(8,))()
        value = mixture.log_prob(z)
    assert value.device.type == "cpu"
    assert torch.isfinite(value).all()


# ---- free centres and precisions ------------------------------------------------------------------


def start(n=6, d=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tril = 3 * torch.eye(d, dtype=torch.float64) + torch.randn(
        n, d, d, generator=generator, dtype=torch.float64
    ).tril(-1)
    return GaussianMixture(
        centers(n, d, seed), tril, log_weights=torch.randn(n, generator=generator).double()
    )


def test_free_model_starts_at_its_start():
    mixture = FreeKernelModel(start())()
    x = centers(seed=3)
    torch.testing.assert_close(mixture.log_prob(x), start().log_prob(x), rtol=1e-12, atol=1e-12)


def test_free_kernels_move_in_their_own_coordinates():
    model = perturbed(FreeKernelModel(start()))
    mixture = model()
    # whitened by the start's factor, the shift is the parameter
    moved = torch.einsum("nji,nj->ni", start().precision_tril, mixture.centers - start().centers)
    torch.testing.assert_close(moved, model.shift.detach())
    relative = torch.linalg.solve_triangular(
        start().precision_tril, mixture.precision_tril, upper=False
    )
    torch.testing.assert_close(relative[:, 1, 0], model.entries[:, 1].detach())
    assert (relative.diagonal(dim1=-2, dim2=-1) > 0).all()


def test_no_free_kernel_becomes_much_wider_than_the_centres_are_spread():
    model = FreeKernelModel(start())
    torch.nn.init.constant_(model.entries, -50)
    with torch.no_grad():
        model.entries[:, 1] = 0
    diagonal = model().precision_tril.diagonal(dim1=-2, dim2=-1)
    assert (1 / diagonal <= 2 * start().centers.std(0)).all()


def test_free_model_gives_the_factor_of_the_nearest_kernel():
    model = perturbed(FreeKernelModel(start()))
    mixture = model()
    order = torch.tensor([3, 0, 5])
    near = mixture.centers[order] + 1e-9
    torch.testing.assert_close(model.precision_tril(near), mixture.precision_tril[order])


@pytest.mark.parametrize("load", [KernelModel.load, FreeKernelModel.load])
def test_saved_free_model_is_the_same_model(tmp_path, load):
    model = perturbed(FreeKernelModel(start()))
    model.save(tmp_path / "model.safetensors")
    loaded = load(tmp_path / "model.safetensors")
    assert isinstance(loaded, FreeKernelModel)
    x = centers(seed=3)
    assert torch.equal(loaded().log_prob(x), model().log_prob(x))


def test_free_model_needs_two_kernels():
    with pytest.raises(ValueError, match="at least 2 kernels, got 1"):
        FreeKernelModel(start(n=1))
