"""The calls that users come with, as they are written in the documentation of the surface."""

import lightning
import pytest
import torch
from torch.utils.data import DataLoader

from tgmm_nn import GaussianMixture

pytestmark = pytest.mark.filterwarnings("ignore:EM did not converge:UserWarning")


@pytest.fixture
def X(generator):
    centres = torch.tensor([[0.0, 0.0], [5.0, 5.0], [0.0, 5.0]])
    return centres[torch.arange(300) % 3] + torch.randn(300, 2, generator=generator)


def test_the_basics(X):
    gmm = GaussianMixture(n_components=3, n_features=2, covariance_type="full")
    gmm.fit(X)
    labels, probabilities, log_likelihood = gmm.predict(X), gmm.predict_proba(X), gmm.score(X)
    assert labels.shape == (300,)
    assert probabilities.shape == (300, 3)
    assert isinstance(log_likelihood, float)


@pytest.mark.parametrize(
    ("covariance_type", "shape", "n_free"),
    [
        ("full", (3, 2, 2), 9),
        ("diag", (3, 2), 6),
        ("spherical", (3,), 3),
        ("tied_full", (2, 2), 3),
        ("tied_diag", (2,), 2),
        ("tied_spherical", (), 1),
    ],
)
def test_six_covariance_types(X, covariance_type, shape, n_free):
    gmm = GaussianMixture(n_components=3, n_features=2, covariance_type=covariance_type).fit(X)
    assert gmm.covariances_.shape == shape
    assert gmm.n_parameters == n_free + 3 * 2 + 2


def test_maximum_a_posteriori(X):
    gmm = GaussianMixture(
        n_components=3,
        n_features=2,
        weight_concentration_prior=torch.ones(3) * 2.0,
        mean_prior=torch.zeros(3, 2),
        mean_precision_prior=0.01,
        covariance_prior=torch.eye(2).unsqueeze(0).repeat(3, 1, 1),
        degrees_of_freedom_prior=3.0,
    ).fit(X)
    assert gmm.objective_ < gmm.lower_bound_


def test_starting_means(X):
    for init in ("kmeans", "kpp", "random", torch.tensor([[0, 0], [5, 5], [0, 5]], dtype=torch.float32)):
        gmm = GaussianMixture(n_components=3, n_features=2, init_means=init).fit(X)
        assert gmm.fitted_


def test_restarts_hard_assignment_and_progress(X, capsys):
    GaussianMixture(n_components=3, n_features=2, n_init=10, random_state=42).fit(X)
    GaussianMixture(n_components=3, n_features=2, cem=True).fit(X)
    gmm = GaussianMixture(n_components=3, n_features=2, max_iter=200, tol=1e-4, verbose=True, verbose_interval=10).fit(
        X
    )
    print(f"Converged: {gmm.converged_}, iterations: {gmm.n_iter_}, log-likelihood: {gmm.lower_bound_:.2f}")
    assert "Converged: True" in capsys.readouterr().out


def test_samples(X):
    gmm = GaussianMixture(n_components=3, n_features=2).fit(X)
    samples, component_ids = gmm.sample(100)
    assert (samples.shape, component_ids.shape) == ((100, 2), (100,))
    samples, _ = gmm.sample(50, component=0)
    samples, _ = gmm.sample(100, confidence=0.95)
    samples, _ = gmm.sample(100, std_range=(1.0, 2.0))
    outliers, _ = gmm.sample(20, std_range=(3.0, float("inf")))
    assert gmm(outliers).mean() < gmm(samples).mean()


def test_persistence(X, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    gmm = GaussianMixture(n_components=3, n_features=2).fit(X)
    gmm.save("my_model.pth")
    loaded = GaussianMixture.load("my_model.pth", device="cpu")
    torch.save(gmm.save_state_dict(), "model_state.pth")
    fresh = GaussianMixture(n_components=3, n_features=2)
    fresh.load_state_dict(torch.load("model_state.pth"))
    assert torch.equal(loaded(X), gmm(X))
    assert torch.equal(fresh(X), gmm(X))


def test_device_and_attributes(X):
    gmm = GaussianMixture(n_components=3, n_features=2, device="cuda" if torch.cuda.is_available() else "cpu")
    gmm.fit(X)
    read = gmm.weights_, gmm.means_, gmm.covariances_, gmm.converged_, gmm.n_iter_, gmm.lower_bound_, gmm.fitted_
    assert [type(value) for value in read[3:]] == [bool, int, float, bool]


def test_as_a_layer(X):
    gmm = GaussianMixture(n_components=3, n_features=2).fit(X)
    x, a, b = X.requires_grad_(), X[:100], X[100:]
    log_density = gmm(x)
    log_density.sum().backward()
    assert x.grad is not None
    gmm.em_step(x)
    gmm.em_step(x, step_size=0.05)
    stats = gmm.statistics(a).merge(gmm.statistics(b))
    gmm.maximize(stats)
    assert gmm.fitted_


@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:The number of training batches")
@pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX` has been removed")
def test_while_a_network_trains(monkeypatch, tmp_path):
    from tgmm_nn.lightning import EMCallback

    class Clustered(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.encoder, self.gmm = torch.nn.Linear(3, 2), GaussianMixture(3, 2)

        def training_step(self, batch, batch_idx):
            return self.encoder(batch).square().mean()

        def train_dataloader(self):
            return DataLoader(torch.randn(64, 3), 16)

        def configure_optimizers(self):
            return torch.optim.SGD(self.encoder.parameters(), lr=1e-2)

    monkeypatch.chdir(tmp_path)
    model, where = Clustered(), {"max_epochs": 2, "accelerator": "cpu"}
    lightning.Trainer(callbacks=[EMCallback(module="gmm", embeddings="encoder", mode="minibatch")], **where).fit(model)
    assert model.gmm.fitted_
    assert model.gmm.n_updates.item() > 0
