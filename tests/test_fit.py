"""The training loop: it learns, resumes bit for bit, and says what went wrong."""

import math
import time

import pytest
import torch

from wpo_notes import datasets
from wpo_notes._clusters import clusters
from wpo_notes._files import load_tensors, save_tensors
from wpo_notes._members import Members, sorted_by
from wpo_notes.fit import (
    cosine,
    fit,
    fit_algorithm_1,
    fit_kernel_model,
    kernel_loss,
)
from wpo_notes.losses import implicit_score_matching, negative_log_likelihood
from wpo_notes.mixture import GaussianMixture
from wpo_notes.model import FreeKernelModel, KernelModel


def points(n=200, d=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64)


def _rows(x):
    return {tuple(row) for row in x.tolist()}


def small_model(x, seed=0):
    return KernelModel(x[:20], hidden=(8, 8), generator=torch.Generator().manual_seed(seed))


def run(model, x, steps=30, seed=5, **options):
    generator = torch.Generator().manual_seed(seed)
    return fit(model, x, steps=steps, batch_size=16, generator=generator, progress=False, **options)


def test_kernel_model_learns_the_direction_of_a_narrow_law():
    # A normal law with standard deviations 1 and 0.05 along (1, 1) and (1, -1): the learned
    # covariances must be narrow across and wide along. Margins: a factor of 2 around 0.05 for the
    # median width across; the widths along are limited by the spacing of the centres.
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(2000, 2, generator=generator, dtype=torch.float64)
    u = u * torch.tensor([1.0, 0.05], dtype=torch.float64)
    rotation = torch.tensor([[1.0, -1], [1, 1]], dtype=torch.float64) / math.sqrt(2)
    x = u @ rotation.T
    model = fit_algorithm_1(
        x,
        centers=60,
        hidden=(32, 32),
        steps=300,
        batch_size=128,
        generator=generator,
        progress=False,
    )
    covariance = torch.cholesky_inverse(model().precision_tril.detach())
    local = rotation.T @ covariance @ rotation
    across, along = local[:, 1, 1].sqrt().median(), local[:, 0, 0].sqrt().median()
    assert 0.025 < across < 0.1
    assert along > 3 * across
    direction = torch.linalg.eigh(covariance).eigenvectors[:, :, 1]
    cosine_to_line = (direction @ rotation[:, 0]).abs()
    assert cosine_to_line.median() > 0.99


def test_held_out_objective_falls_and_history_is_regular():
    x, fresh = points(n=2000, seed=1), points(n=1000, seed=2)
    model = small_model(x)
    before = implicit_score_matching(model(), fresh)
    result = run(model, x[20:], steps=100, held_out=fresh, record_every=25)
    assert [record.step for record in result.history] == [25, 50, 75, 100]
    assert result.history[-1].held_out < before
    last = implicit_score_matching(result.model(), fresh)
    assert result.history[-1].held_out == pytest.approx(float(last.detach()), rel=1e-12)


@pytest.mark.parametrize("killed_at", [1, 13, 20, 29])
def test_a_killed_run_resumes_bit_for_bit(tmp_path, killed_at):
    x = points()
    whole = run(small_model(x), x, held_out=points(seed=3), record_every=7)

    class Killed(BaseException):
        pass

    calls = 0

    def deadly(model, batch, index, generator):
        nonlocal calls
        if index is not None:
            calls += 1
            if calls > killed_at:
                raise Killed
        return kernel_loss()(model, batch, index, generator)

    options = {
        "held_out": points(seed=3),
        "record_every": 7,
        "checkpoint": tmp_path / "run",
        "checkpoint_every": 5,
    }
    with pytest.raises(Killed):
        run(small_model(x), x, loss=deadly, **options)
    # The new process starts from other weights and another seed: all state is in the file, except
    # before the first checkpoint, where there is nothing yet to go on from.
    fresh = killed_at < 5
    resumed = run(small_model(x, seed=0 if fresh else 9), x, seed=5 if fresh else 77, **options)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    assert resumed.history == whole.history


def test_a_finished_run_returns_its_result_again(tmp_path):
    x = points()
    first = run(small_model(x), x, checkpoint=tmp_path / "run")
    again = run(small_model(x, seed=9), x, checkpoint=tmp_path / "run")
    assert again.history == first.history
    assert torch.equal(again.model.network[0].weight, first.model.network[0].weight)


def test_processor_time_adds_up_and_older_checkpoints_go_on(tmp_path):
    x = points()
    before = time.process_time()
    whole = run(small_model(x), x, checkpoint=tmp_path / "run")
    assert 0 < whole.cpu_seconds < time.process_time() - before
    tensors, about = load_tensors(tmp_path / "run", kind="checkpoint")
    assert about["cpu_seconds"] == whole.cpu_seconds
    del about["cpu_seconds"]  # as before it was recorded
    save_tensors(tmp_path / "run", tensors, kind="checkpoint", **about)
    again = run(small_model(x), x, checkpoint=tmp_path / "run")
    assert again.history == whole.history
    assert again.cpu_seconds < whole.cpu_seconds


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    x = points()
    run(small_model(x), x, checkpoint=tmp_path / "run")
    with pytest.raises(ValueError, match="belongs to another run: its steps differ"):
        run(small_model(x), x, steps=31, checkpoint=tmp_path / "run")
    with pytest.raises(ValueError, match="its data differ"):
        run(small_model(x), x + 1, checkpoint=tmp_path / "run")
    with pytest.raises(ValueError, match="another model"):
        run(KernelModel(x[:21], hidden=(8, 8)), x, checkpoint=tmp_path / "run")


def test_a_damaged_checkpoint_is_refused(tmp_path):
    x = points()
    path = tmp_path / "run"
    run(small_model(x), x, checkpoint=path)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="checksum does not match"):
        run(small_model(x), x, checkpoint=path)
    small_model(x).save(path)
    with pytest.raises(ValueError, match="not a checkpoint file"):
        run(small_model(x), x, checkpoint=path)


def test_same_seed_same_run_and_global_state_untouched():
    x = points()
    state = torch.get_rng_state()
    one, other = run(small_model(x), x), run(small_model(x), x)
    fit_algorithm_1(x, centers=10, hidden=(4,), steps=2, progress=False)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(one.model.network[0].weight, other.model.network[0].weight)


def test_gradient_is_clipped_relative_to_its_running_mean():
    # A linear model whose loss is g * w: the gradient is g, one thousand times larger at one step.
    # Adam's step is lr * m / sqrt(v); unclipped, m would remember 1000 and v a million.
    model = torch.nn.Linear(1, 1, bias=False, dtype=torch.float64)
    seen = []

    def loss(model, x, index, generator):
        factor = 1000.0 if len(seen) == 10 else 1.0
        seen.append(None)
        return factor * model.weight.sum()

    gradients = []
    original = torch.optim.Adam.step

    def spy(self, *args, **options):
        gradients.append(float(model.weight.grad))
        return original(self, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", spy)
        fit(model, points(d=1), steps=12, loss=loss, clip=5.0, progress=False)
    assert gradients[10] == pytest.approx(5.0, rel=1e-3)
    assert gradients[11] == pytest.approx(1.0)


def test_cosine_schedule_sets_the_learning_rate():
    assert (cosine(0), cosine(0.5), cosine(1)) == pytest.approx((1, 0.5, 0))
    x = points()
    start = small_model(x)
    still = run(small_model(x), x, schedule=lambda fraction: 0.0)
    assert torch.equal(start.network[0].weight, still.model.network[0].weight)


@pytest.mark.parametrize("where", ["objective", "gradient"])
def test_divergence_is_reported_with_step_and_cause(where):
    x = points()
    model = small_model(x)
    steps = []

    def loss(model, batch, index, generator):
        value = kernel_loss()(model, batch, index, generator)
        steps.append({k: v.clone() for k, v in model.state_dict().items()})
        if len(steps) == 4:
            if where == "objective":
                return value * math.inf
            value.register_hook(lambda gradient: gradient * math.nan)
        return value

    message = "the objective is" if where == "objective" else r"the gradient of network\.0\.weight"
    with pytest.raises(
        FloatingPointError, match=rf"stopped at step 3: {message}.*narrowest kernel"
    ):
        run(model, x, loss=loss)
    for name, value in steps[-1].items():  # the last finite parameters are kept
        assert torch.equal(value, model.state_dict()[name])


def test_disjoint_centres_are_not_trained_on():
    x = points()
    seen = []

    def spy(model, batch, index, generator):
        seen.append(batch)
        return implicit_score_matching(model(), batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wpo_notes.fit.kernel_loss", lambda exclude: spy)
        model = fit_algorithm_1(x, centers=50, hidden=(4,), steps=20, batch_size=64, progress=False)
    assert not _rows(torch.cat(seen)) & _rows(model.centers)
    assert _rows(torch.cat(seen)) | _rows(model.centers) <= _rows(x)


def test_leave_one_out_scores_each_centre_by_the_others():
    x = points()
    given = {}

    def remember(exclude):
        given["exclude"] = exclude
        return kernel_loss(exclude)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wpo_notes.fit.kernel_loss", remember)
        model = fit_algorithm_1(
            x, centers=x[50:60], leave_one_out=True, hidden=(4,), steps=2, progress=False
        )
    expected = torch.full((200,), -1)
    expected[50:60] = torch.arange(10)
    assert torch.equal(given["exclude"], expected)
    index = torch.tensor([0, 55])
    loss = kernel_loss(expected)(model, x[index], index, torch.Generator())
    keep = [i for i in range(10) if i != 5]
    mixture = model()
    without = GaussianMixture(mixture.centers[keep], mixture.precision_tril[keep])
    by_hand = (
        implicit_score_matching(mixture, x[:1]) + implicit_score_matching(without, x[55:56])
    ) / 2
    torch.testing.assert_close(loss, by_hand)


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        (points(n=50), {"centers": 50}, ValueError, "fewer than the points, got 50 centres for 50"),
        (points(), {"centers": 1}, ValueError, "at least 2"),
        (points(n=1), {}, ValueError, "at least 2 points, got 1"),
        (points(n=0), {}, ValueError, "at least 2 points, got 0"),
        (points(), {"centers": points(d=3)}, ValueError, "centers must have event size 2"),
        (points(n=20), {"centers": points(n=20)}, ValueError, "all of them are"),
        (torch.zeros(9, 2).long(), {}, TypeError, "convert it with .float"),
        ([[1.0, 2.0]], {}, TypeError, "must be a torch tensor"),
        (points()[:, 0], {}, ValueError, r"use x\[:, None\]"),
        (points().repeat(2, 1), {}, ValueError, "200 of its 400 rows are duplicates"),
        (torch.full((9, 2), math.inf), {}, ValueError, "NaN or infinite"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_bad_samples(x, options, error, message):
    with pytest.raises(error, match=message):
        fit_algorithm_1(x, **options)


@pytest.mark.parametrize("name", ["batch_size", "lr", "clip", "record_every", "checkpoint_every"])
def test_settings_must_be_positive(name):
    x = points()
    with pytest.raises(ValueError, match=f"{name} must be a positive"):
        fit(small_model(x), x, steps=1, progress=False, **{name: 0})


@pytest.mark.usefixtures("unchecked_shapes")
def test_points_must_fit():
    x = points()
    with pytest.raises(ValueError, match="held_out must have event size 2"):
        fit(small_model(x), x, steps=1, held_out=points(d=3))
    with pytest.raises(ValueError, match="x must be finite"):
        fit(small_model(x), x * math.nan, steps=1)
    with pytest.raises(
        ValueError, match=r"x must be a matrix \(n, d\) with n >= 1, got shape \(2,\)"
    ):
        fit(small_model(x), x[0], steps=1)


def test_no_tensor_is_made_on_the_default_device(tmp_path):
    x = points()
    with torch.device("meta"):
        for leave_one_out in (False, True):
            model = fit_algorithm_1(
                x,
                centers=10,
                hidden=(4,),
                steps=3,
                leave_one_out=leave_one_out,
                held_out=x[:5],
                checkpoint=tmp_path / str(leave_one_out),
                progress=False,
            )
        value = model().log_prob(x)
    assert torch.isfinite(value).all()


# ---- the default: clusters, terminal score matching, pooled over folds ---------------------------


def fitted(x, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return fit_kernel_model(x, generator=generator, progress=False, **options)


def separated(n=3000, seed=0):
    """Four normal laws with unequal weights, far apart, and the exact density."""
    centers = torch.tensor([[0.0, 0], [8, 0], [0, 8], [8, 8]], dtype=torch.float64)
    law = GaussianMixture.from_variance(
        centers,
        torch.tensor([1.0, 0.25, 0.04, 1.0], dtype=torch.float64),
        log_weights=torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64).log(),
    )
    return law, law.sample((n,), generator=torch.Generator().manual_seed(seed))


def test_default_finds_the_number_of_normal_laws_and_is_near_efficient():
    law, x = separated()
    model = fitted(x)
    assert isinstance(model, FreeKernelModel)
    assert model.centers.shape == (20, 2)  # four in each of five members
    fresh = law.sample((4000,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        difference = law.log_prob(fresh) - model().log_prob(fresh)
    # Maximum likelihood with the 23 parameters of four normal laws loses 23 / 2n = 0.0038 on average; score
    # matching is not efficient, so a few times that is allowed.
    assert -0.005 < float(difference.mean()) < 0.015


def test_default_follows_the_units_of_each_coordinate():
    _, x = separated(n=600)
    a, b = torch.tensor([1e3, 1e-2], dtype=torch.float64), torch.tensor([5e4, -1.0]).double()
    one, other = (fitted(y, centers=20, steps=30)() for y in (x, a * x + b))
    torch.testing.assert_close(
        other.log_prob(a * x + b), one.log_prob(x) - a.log().sum(), rtol=1e-5, atol=1e-5
    )


def test_members_are_pooled_with_equal_weights():
    _, x = separated(n=500)
    mixture = fitted(x, centers=12, members=3, steps=5)()
    assert mixture.centers.shape == (12, 2)
    weights = mixture.log_weights.exp().reshape(3, 4).sum(1)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 3))


def noised(mixture, x):
    return implicit_score_matching(mixture.diffuse(0.01), x)


@pytest.mark.parametrize("loss", [implicit_score_matching, negative_log_likelihood, noised])
def test_members_side_by_side_have_the_gradients_that_they_have_alone(loss):
    """So that a step of Adam, which is the same for each parameter whatever its scale, is that of a member alone."""
    _, x = separated(n=90)
    starts = [clusters(x[k::3], 4, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    member = torch.arange(90) % 3
    together = Members(starts)

    def of_mixture(model, points, index, generator):
        return loss(model(), points)

    with torch.no_grad():
        for parameter in together.parameters():
            parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(9))
    value = sorted_by(member, of_mixture)(together, x, torch.arange(90), torch.Generator())
    value.backward()
    mixture, first, mean = together.pooled(), 0, 0.0
    for k, start in enumerate(starts):
        own = slice(first, first + len(start.centers))
        parameters = mixture.centers[own], mixture.precision_tril[own]
        alone = GaussianMixture(*parameters, log_weights=start.log_weights)
        mean = mean + loss(alone, x[k::3]) / 3
        first = own.stop
    torch.testing.assert_close(value, mean)
    expected = torch.autograd.grad(mean, list(together.parameters()))
    for parameter, gradient in zip(together.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_loss_of_members_has_no_responsibilities():
    def shares(model, points, index, generator):
        return model().responsibilities(points).square().mean()

    with pytest.raises(ValueError, match="must do without responsibilities"):
        fitted(points(), loss=shares, centers=10, steps=1)


def test_loss_of_members_must_use_all_points():
    def half(model, points, index, generator):
        return implicit_score_matching(model(), points[::2])

    with pytest.raises(
        ValueError, match=r"evaluate the mixture at points like those that it is given"
    ):
        fitted(points(), loss=half, centers=10, steps=1)


def test_score_matching_improves_on_the_clusters():
    law = datasets.get("swissroll")
    x = law.sample(3000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fresh = law.sample(4000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    trained, start = (fitted(x, centers=200, steps=k)().log_prob(fresh).detach() for k in (200, 0))
    difference = trained - start
    # measured: 0.022, seven standard errors; three leave room for other rounding
    assert float(difference.mean()) > 3 * float(difference.std()) / len(difference) ** 0.5


def test_killed_fit_goes_on_from_its_folder(tmp_path, monkeypatch):
    _, x = separated(n=300)
    options = {"members": 3, "steps": 12}
    whole = fitted(x, **options)
    calls = 0

    def deadly(*arguments, **keywords):
        nonlocal calls
        calls += 1
        if calls == 20:  # with the second number of centres
            raise KeyboardInterrupt
        return implicit_score_matching(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr("wpo_notes.fit.implicit_score_matching", deadly)
        with pytest.raises(KeyboardInterrupt):
            fitted(x, checkpoint=tmp_path / "run", **options)
    resumed = fitted(x, checkpoint=tmp_path / "run", **options)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"members": 1}, "200 points in 2 dimensions are too few or too many for 1 members"),
        ({"centers": 500}, "with 500 centres .* bring more points"),
        ({"centers": 1}, "with 1 centres"),
    ],
)
def test_default_says_what_does_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        fitted(points(), **options)


def test_default_refuses_too_few_points():
    with pytest.raises(ValueError, match="10 points in 2 dimensions are too few"):
        fitted(points(n=10))


def test_default_makes_no_tensor_on_the_default_device(tmp_path):
    x = points()
    with torch.device("meta"):
        model = fit_kernel_model(
            x, members=2, steps=3, batch_size=8, checkpoint=tmp_path / "run", progress=False
        )
        assert torch.isfinite(model().log_prob(x)).all()
