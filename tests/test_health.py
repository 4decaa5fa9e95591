"""Components that starve start anew on badly explained rows, and the log tells of births, deaths and moves."""

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from test_callback import started
from toy import QUIET, Toy, loader, rows, trainer

from tgmm_nn import GaussianMixture
from tgmm_nn.functional import distance
from tgmm_nn.lightning import EMCallback
from tgmm_nn.lightning.batch import Batch
from tgmm_nn.lightning.health import Health, badly_explained, matching
from tgmm_nn.lightning.learner import Learner
from tgmm_nn.lightning.monitor import Monitor
from tgmm_nn.maximization import EVERYTHING, Learned

pytestmark = QUIET

STARVED = [0.7, 0.3, 0.0]


def clusters(n=60, offset=20.0):
    """Two clusters near zero that the mixture knows, and a third, of a tenth of the rows, that it does not."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 2, generator=generator)
    x[: n // 2] += torch.tensor([6.0, 0.0])
    x[-n // 10 :] += offset
    return x


@pytest.fixture
def gmm():
    means = torch.tensor([[6.0, 0.0], [0.0, 0.0], [-50.0, 0.0]])
    return GaussianMixture(3, 2, random_state=0, reg_covar=1e-3).set_parameters(
        STARVED, means, torch.eye(2).expand(3, 2, 2)
    )


def test_badly_explained_rows_are_of_the_tenth_of_lowest_density(gmm):
    x = clusters()
    density = gmm(x)
    found = badly_explained(gmm, torch.cat([x, torch.tensor([[torch.nan, 0.0]])]), 3, step=0)
    assert len(found.unique(dim=0)) == 3
    assert bool((gmm(found) <= density.sort().values[5]).all())
    assert any(not torch.equal(found, badly_explained(gmm, x, 3, step)) for step in range(1, 5))
    assert len(badly_explained(gmm, x[:2], 3, step=0)) == 2
    assert len(badly_explained(gmm, x[:0], 1, step=0)) == 0


def test_a_component_starts_anew_after_so_many_updates_on_end_and_no_earlier(gmm):
    health, x = Health(min_weight=0.05, patience=3), clusters()
    health.begin(gmm)
    assert [health.after_update(Learner(gmm), Batch.of(x), EVERYTHING, step) for step in range(3)] == [0, 0, 1]
    assert float(gmm.weights_[2]) == pytest.approx(1 / 3)
    assert float((gmm.means_[2] - 20).abs().max()) < 4
    assert health.state_dict() == [0, 0, 0]


def test_a_recovery_in_between_starts_the_count_over(gmm):
    health, x = Health(min_weight=0.05, patience=2), clusters()
    health.begin(gmm)
    counts = []
    for weights in (STARVED, [0.5, 0.4, 0.1], STARVED, STARVED):
        gmm.weights_.copy_(torch.tensor(weights))
        counts.append(health.after_update(Learner(gmm), Batch.of(x), EVERYTHING, 0))
    assert counts == [0, 0, 0, 1]


def test_frozen_components_and_healthy_ones_are_left_alone(gmm):
    health, x = Health(min_weight=0.05, patience=1), clusters()
    health.begin(gmm)
    before = gmm.means_.clone()
    assert health.after_update(Learner(gmm), Batch.of(x), Learned.from_options(3, frozen_components=[2]), 0) == 0
    assert torch.equal(gmm.means_, before)
    assert health.after_update(Learner(gmm), Batch.of(x), EVERYTHING, 0) == 1
    assert torch.equal(gmm.means_[:2], before[:2])


def test_several_that_starve_go_to_the_rows_nearest_to_them(gmm):
    gmm.set_parameters([1.0, 0.0, 0.0], [[0.0, 0.0], [-9.0, 0.0], [9.0, 0.0]], torch.eye(2).expand(3, 2, 2))
    health = Health(min_weight=0.05, patience=1)
    health.begin(gmm)
    assert health.after_update(Learner(gmm), Batch.of(torch.tensor([[30.0, 0.0], [-30.0, 0.0]])), EVERYTHING, 0) == 2
    torch.testing.assert_close(gmm.means_[1:], torch.tensor([[-30.0, 0.0], [30.0, 0.0]]))


def test_without_rows_a_component_stays_due(gmm):
    health = Health(min_weight=0.05, patience=1)
    health.begin(gmm)
    assert health.after_update(Learner(gmm), Batch.of(clusters()[:0]), EVERYTHING, 0) == 0
    assert health.after_update(Learner(gmm), Batch.of(clusters()), EVERYTHING, 1) == 1


@pytest.mark.parametrize("mode", ["minibatch", "accumulate", "full"])
def test_in_training_a_dead_component_finds_the_cluster_that_none_explains(mode, gmm):
    """And running statistics do not pull it back: espnet#6284."""
    model = Toy(learning_rate=0.0)
    model.encoder = torch.nn.Identity()
    model.head = torch.nn.Linear(1, 1)
    model.training_step = lambda batch, batch_idx: model.encoder(batch[0]).sum() + 0 * model.head.weight.sum()
    model.configure_optimizers = lambda: torch.optim.SGD(model.head.parameters(), lr=0.0)
    model.gmm = gmm
    step = {"step_size": 0.2} if mode == "minibatch" else {}
    run = trainer(EMCallback(mode=mode, min_weight=0.02, patience=2, **step), Reseeded(), max_epochs=20)
    run.fit(model, loader(clusters(), batch_size=60))
    torch.testing.assert_close(gmm.means_[2], torch.tensor([20.0, 20.0]), rtol=0, atol=1.0)
    assert float(gmm.weights_[2]) == pytest.approx(0.1, abs=0.03)
    assert Reseeded.total == 1


class Reseeded(lightning.Callback):
    """Adds up what is logged."""

    def on_train_start(self, *args):
        type(self).total = 0

    def on_train_epoch_end(self, run, pl_module):
        type(self).total += int(run.callback_metrics["em/reseeded"])


def test_the_counts_travel_with_the_checkpoint(tmp_path):
    callback = EMCallback(min_weight=0.3, patience=100)
    checkpoint = ModelCheckpoint(tmp_path, filename="last")
    trainer(checkpoint, callback, enable_checkpointing=True).fit(started(), loader())
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"][callback.state_key]
    assert saved == {"starving": callback.health.state_dict(), "bank": {}}
    assert max(saved["starving"]) > 0
    other = Health(min_weight=0.3, patience=100)
    other.begin(started().gmm, saved["starving"])
    assert other.state_dict() == saved["starving"]


# ------------------------------------------------------------------------------------------- which is which, and logs


def test_the_matching_shares_most_rows(generator):
    x = rows(50)[:, :2]
    old = GaussianMixture(3, 2, random_state=0).initialize(x)
    new = GaussianMixture(3, 2, random_state=1).fit(x)
    new.permute_components(torch.randperm(3, generator=generator))
    order = matching(old, new, torch.cat([x, torch.full((1, 2), torch.nan)]), torch.zeros(3))
    shared = old.predict_proba(x).mT @ new.predict_proba(x)
    best = max(float(shared[range(3), list(p)].sum()) for p in torch.cartesian_prod(*[torch.arange(3)] * 3).tolist()
               if len(set(p)) == 3)  # fmt: skip
    assert float(shared[range(3), order].sum()) == pytest.approx(best)


def test_what_is_logged_is_what_happened():
    """Against the same numbers by hand: one epoch in minibatch mode."""
    model = started()
    first = GaussianMixture(3, 2)
    first.load_state_dict(model.gmm.state_dict())
    run = trainer(EMCallback(step_size=0.3, min_weight=0.32, patience=50), max_epochs=1)
    run.fit(model, loader())
    gmm, logged = GaussianMixture(3, 2, reg_covar=0.1), run.callback_metrics
    gmm.load_state_dict(first.state_dict())
    density, entropy, births, deaths = [], [], 0, 0
    for z in model.seen:
        density.append(gmm(z))
        entropy.append(torch.distributions.Categorical(probs=gmm.predict_proba(z)).entropy())
        alive = gmm.weights_ >= 0.32
        gmm.em_step(z, step_size=0.3)
        births += int((~alive & (gmm.weights_ >= 0.32)).sum())
        deaths += int((alive & (gmm.weights_ < 0.32)).sum())
    expected = {
        "log_likelihood": torch.cat(density).mean(),
        "entropy": entropy[0].mean(),  # of the first step
        "effective_components": torch.distributions.Categorical(probs=gmm.weights_).entropy().exp(),
        "smallest_weight": gmm.weights_.min(),
        "condition_number": torch.linalg.cond(gmm.covariances_).max(),
        "moved": (gmm.weights_ * distance(gmm.means_, first.mixture(), gmm.covariance)).sum(),
        "births": torch.tensor(float(births)),
        "deaths": torch.tensor(float(deaths)),
        "reseeded": torch.tensor(0.0),
    }
    assert births + deaths > 0
    for name, value in expected.items():
        torch.testing.assert_close(logged[f"em/{name}"], value, rtol=1e-4, atol=1e-5, msg=name)


def test_an_epoch_without_a_usable_row_repeats_the_likelihood_before_it(gmm):
    monitor = Monitor()
    monitor.begin(gmm)
    monitor.see(gmm, clusters())
    before = monitor.values(gmm)
    monitor.begin(gmm)
    monitor.see(gmm, torch.full((3, 2), torch.nan))
    assert monitor.values(gmm)["log_likelihood"] == before["log_likelihood"]
    assert torch.isfinite(before["log_likelihood"])


def test_a_component_that_starts_anew_leaves_frozen_weights_alone():
    model = started()
    model.gmm.set_parameters([0.6, 0.399, 0.001], model.gmm.means_, model.gmm.covariances_)
    callback = EMCallback(mode="accumulate", frozen_components=[0], min_weight=0.1, patience=1)
    means = model.gmm.means_.clone()
    trainer(callback, max_epochs=1).fit(model, loader())
    assert float(model.gmm.weights_[0]) == pytest.approx(0.6)
    assert torch.equal(model.gmm.means_[0], means[0])
    assert float(model.gmm.weights_.sum()) == pytest.approx(1.0)
    frozen = started()
    frozen.gmm.set_parameters([0.6, 0.399, 0.001], means, frozen.gmm.covariances_)
    callback = EMCallback(mode="accumulate", frozen_components=[2], min_weight=0.1, patience=1)
    trainer(callback, max_epochs=1).fit(frozen, loader())
    assert torch.equal(frozen.gmm.means_[2], means[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
def test_rows_of_any_dtype_can_seed_a_component(gmm, dtype):
    health = Health(min_weight=0.05, patience=1)
    health.begin(gmm)
    assert health.after_update(Learner(gmm), Batch.of(clusters().to(dtype)), EVERYTHING, 0) == 1


def test_moves_are_measured_from_the_start_on():
    """Not from the fresh layer that was there before."""
    model = Toy(learning_rate=0.0)
    run = trainer(EMCallback(init_samples=20, step_size=0.01), max_epochs=1)
    run.fit(model, loader(rows() + 100))
    assert float(run.callback_metrics["em/moved"]) < 5


@pytest.mark.parametrize("prog_bar", [True, False])
def test_the_progress_bar_shows_the_likelihood_where_it_should(prog_bar):
    run = trainer(EMCallback(prog_bar=prog_bar), max_epochs=1)
    run.fit(started(), loader())
    assert ("em/log_likelihood" in run.progress_bar_metrics) == prog_bar
