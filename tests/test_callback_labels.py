"""EMCallback with labels: a MixtureClassifier learns while a network trains. Oracle: the classifier's own EM steps."""

import copy

import pytest
import torch
from test_callback_ranks import CUTS, Parts, Record
from torch.utils.data import DataLoader, TensorDataset
from toy import QUIET, Toy, rows, state, trainer

from tgmm_nn import GaussianMixture, MixtureClassifier
from tgmm_nn.lightning import EMCallback

pytestmark = QUIET

MODES = pytest.mark.parametrize("mode", ["minibatch", "accumulate", "full"])


class Labelled(Toy):
    """The encoder's rows belong to three classes; the head learns them."""

    def __init__(self, *, fitted=True, components_per_class=1, learning_rate=0.01, **options):
        super().__init__(learning_rate=learning_rate)
        self.gmm = MixtureClassifier(
            3, 2, components_per_class, random_state=0, reg_covar=0.1, dtype="float64", **options
        )
        self.labels = []
        if fitted:
            k = 3 * components_per_class
            self.gmm.mixture.set_parameters([1 / k] * k, torch.randn(k, 2), torch.eye(2).expand(k, 2, 2))

    def training_step(self, batch, batch_idx):
        z = self.encoder(batch[0])
        self.seen.append(z.detach().clone())
        self.labels.append(batch[1])
        return {"loss": (z - 1).square().sum(), "y": batch[1], "few": batch[1][:3]}

    def predict_step(self, batch, batch_idx):
        return self.encoder(batch[0])


def classes(n=44):
    y = torch.arange(n) % 3
    y[::5] = -1
    return y


def labelled_loader(y=None):
    return DataLoader(TensorDataset(rows(), classes() if y is None else y), batch_size=10)


def assert_near_state(model, other, tolerance=1e-6):
    for name, buffer in other.named_buffers():
        torch.testing.assert_close(
            dict(model.named_buffers())[name],
            buffer,
            rtol=tolerance,
            atol=tolerance,
            equal_nan=True,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@MODES
@pytest.mark.parametrize("targets", [1, "outputs:y"])
def test_labels_settle_classes_and_rows_without_are_shared(mode, targets):
    model = Labelled(components_per_class=2)
    by_hand = copy.deepcopy(model.gmm)
    step = {"step_size": 0.2} if mode == "minibatch" else {}
    trainer(EMCallback(targets=targets, mode=mode, **step)).fit(model, labelled_loader())
    for epoch in (0, 1):
        z, y = model.seen[5 * epoch : 5 * epoch + 5], model.labels[5 * epoch : 5 * epoch + 5]
        batches = zip(z, y, strict=True) if mode == "minibatch" else [(torch.cat(z), torch.cat(y))]
        for part, labels in batches:
            by_hand.em_step(part, labels, **step)
    assert_near_state(model.gmm, by_hand, 1e-5)  # one component has next to no rows


@MODES
def test_sinkhorn_balances_within_each_class(mode):
    model = Labelled(components_per_class=2, learning_rate=0.0)
    by_hand = copy.deepcopy(model.gmm)
    y = torch.arange(44) % 3
    options = {"assignment": "sinkhorn", **({"step_size": 1.0} if mode == "minibatch" else {})}
    trainer(EMCallback(targets=1, mode=mode, **options), max_epochs=1).fit(model, labelled_loader(y))
    if mode == "full":
        counts = model.gmm.mixture.running_count.reshape(3, 2)
        expected = (torch.bincount(y).double() / 2)[:, None].expand(3, 2)
        torch.testing.assert_close(counts, expected, rtol=0, atol=0.05)
    assert not torch.equal(model.gmm.mixture.means_, by_hand.mixture.means_)


@MODES
@pytest.mark.parametrize("init", ["initialize", "fit"])
def test_a_fresh_classifier_starts_from_the_labelled_rows_of_each_class(mode, init):
    model = Labelled(fitted=False, components_per_class=2)
    by_hand = copy.deepcopy(model.gmm)
    trainer(EMCallback(targets=1, mode=mode, init=init), max_epochs=1).fit(model, labelled_loader())
    z, y = torch.cat(model.seen), torch.cat(model.labels)
    getattr(by_hand, init)(z, y)
    if mode != "minibatch":
        by_hand.em_step(z, y)
    assert_near_state(model.gmm, by_hand)


@pytest.mark.parametrize("options", [
    {"bank_size": 20}, {"bank_size": 24, "bank_per_component": True, "every_n_steps": 1}, {"refresh": True},
    {"refit": True, "n_iterations": 3}, {"min_weight": 0.1, "patience": 1}, {"max_rows_per_step": 7},
], ids=str)  # fmt: skip
def test_labels_go_with_their_rows_through_every_option(options):
    """A separable labelling: whatever rows are kept or encoded anew, each class ends at its own mean."""
    model = Labelled(learning_rate=0.0, components_per_class=1)
    x = rows(44)
    y = torch.arange(44) % 3  # the clusters of `rows`
    loader = DataLoader(TensorDataset(x, y), batch_size=10, shuffle=True)
    trainer(EMCallback(targets=1, mode="full", **options), max_epochs=4).fit(model, loader)
    z = model.encoder(x).detach().double()
    means = torch.stack([z[y == c].mean(0) for c in range(3)])
    spread = torch.stack([z[y == c].std(0) for c in range(3)]).max()
    assert float((model.gmm.mixture.means_ - means).abs().max() / spread) < 1.0


def test_ignored_rows_of_a_map_never_reach_the_classifier():
    model = Labelled(ignore_index=255)
    by_hand = copy.deepcopy(model.gmm)
    y = classes()
    y[::4] = 255
    trainer(EMCallback(targets=1, step_size=0.2), max_epochs=1).fit(model, labelled_loader(y))
    for z, labels in zip(model.seen, model.labels, strict=True):
        by_hand.em_step(z[labels != 255], labels[labels != 255], step_size=0.2)
    assert_near_state(model.gmm, by_hand)


class FrozenLabelled(Labelled):
    """The encoder stands still, so that ranks and one process see the same rows."""

    def training_step(self, batch, batch_idx):
        self.encoder(batch[0])
        return sum(p.square().sum() for p in self.encoder.parameters())


class LabelledParts(Parts):
    """Each rank's part of the rows, with its labels."""

    def __iter__(self):
        for (part,) in super().__iter__():
            yield part[:, :3], part[:, 3].long()


class RecordMixture(Record):
    """Of the classifier's mixture."""

    def on_train_batch_end(self, run, pl_module, *args):
        self.states.append(state(pl_module.gmm.mixture))


@pytest.mark.no_cover
@pytest.mark.parametrize("devices", [2, 3])
@pytest.mark.parametrize(
    "options",
    [{}, {"mode": "accumulate"}, {"mode": "full", "n_iterations": 2}, {"assignment": "sinkhorn"},
     {"mode": "full", "bank_size": 17}, {"fitted": False, "mode": "full"}],
    ids=str,
)  # fmt: skip
def test_labels_on_ranks_give_the_classifier_of_one_process(options, devices, tmp_path):
    x = torch.cat([rows(40), classes(40)[:, None].float()], -1)
    options = dict(options)
    fitted = options.pop("fitted", True)
    results = {}
    for n in (1, devices):
        torch.manual_seed(0)
        model = FrozenLabelled(fitted=fitted, components_per_class=2, learning_rate=0.0)
        how = {"devices": n, **({"strategy": "ddp_fork", "use_distributed_sampler": False} if n > 1 else {})}
        trainer(EMCallback(targets=1, **options), RecordMixture(tmp_path), **how).fit(
            model, LabelledParts(x, CUTS.get(n))
        )
        results[n] = [torch.load(tmp_path / f"{n}-{rank}.pt", weights_only=True)["states"] for rank in range(n)]
    for rank in results[devices]:
        for step, here in enumerate(rank):
            for name, value in here.items():
                torch.testing.assert_close(value, results[devices][0][step][name], rtol=0, atol=0, equal_nan=True)
                torch.testing.assert_close(
                    value, results[1][0][step][name], rtol=1e-8, atol=1e-8, equal_nan=True, msg=f"{name} in step {step}"
                )


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"targets": 5}, ValueError, "the batch to hold targets=5, but got 2 elements"),
        ({"targets": "y"}, ValueError, "the batch to hold targets='y', but got 2 elements"),
        ({"targets": "outputs:z"}, ValueError, "to return a dictionary with 'z' for targets='outputs:z'"),
        ({"targets": 0}, TypeError, "targets=0 to give integers, but got torch.float32"),
        ({"targets": "outputs:few"}, ValueError, "targets='outputs:few' to give one label for each of the 10 rows"),
    ],
)
def test_labels_that_are_not_there_raise_and_list_what_is(options, error, match):
    with pytest.raises(error, match=match):
        trainer(EMCallback(**options)).fit(Labelled(), labelled_loader())


def test_labels_need_a_classifier_and_a_class_count_that_fits():
    model = Labelled()
    model.gmm = GaussianMixture(3, 2)
    with pytest.raises(TypeError, match="module='gmm' to be a MixtureClassifier, to learn from `targets`"):
        trainer(EMCallback(targets=1)).fit(model, labelled_loader())
    with pytest.raises(ValueError, match=r"`y` to hold classes from 0 to 2, .* but got \[7\]"):
        trainer(EMCallback(targets=1)).fit(Labelled(), labelled_loader(torch.full((44,), 7)))
    for bad, error in (("", ValueError), (-1, ValueError), (1.5, TypeError), ("outputs:", ValueError)):
        with pytest.raises(error, match="`targets`"):
            EMCallback(targets=bad)


@MODES
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_labels_of_any_integer_dtype_start_and_move_a_classifier(mode, dtype):
    models = []
    for kind in (torch.int64, dtype):
        torch.manual_seed(0)
        models.append(Labelled(fitted=False))
        trainer(EMCallback(targets=1, mode=mode)).fit(models[-1], labelled_loader((torch.arange(44) % 3).to(kind)))
    assert_near_state(models[0].gmm, models[1].gmm, 0.0)


def test_labels_that_are_no_integers_or_missing_raise():
    model = Labelled(fitted=False)
    for labels in (torch.zeros(44), torch.zeros(44, dtype=torch.bool)):
        with pytest.raises(TypeError, match="Expected targets=1 to give integers"):
            trainer(EMCallback(targets=1)).fit(model, labelled_loader(labels))
    with pytest.raises(ValueError, match="Expected `targets` to start the MixtureClassifier 'gmm' from, but got None"):
        trainer(EMCallback()).fit(model, labelled_loader())
