"""What the callback teaches: a mixture, or a classifier of which each row may have a label."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from torch import Tensor

from tgmm_nn.assignment import Assignment
from tgmm_nn.classifier import MixtureClassifier
from tgmm_nn.distributed import sum_over_ranks
from tgmm_nn.lightning.batch import Batch
from tgmm_nn.lightning.ranks import count_over_ranks
from tgmm_nn.lightning.sources import submodule
from tgmm_nn.maximization import Learned
from tgmm_nn.mixture import GaussianMixture
from tgmm_nn.statistics import Statistics

__all__ = ["Learner"]


class Learner:
    """A mixture with the E-step that its labels ask for; without a classifier labels are not looked at.

    Args:
        model: The mixture, or the classifier.
    """

    def __init__(self, model: GaussianMixture | MixtureClassifier) -> None:
        self.model = model
        self.classifier = model if isinstance(model, MixtureClassifier) else None
        self.gmm = model.mixture if isinstance(model, MixtureClassifier) else model

    @classmethod
    def find(cls, root: lightning.LightningModule, name: str, labelled: bool) -> Learner:
        """Return the mixture or classifier with a dotted name, or raise; labels need a classifier."""
        model = submodule(root, name, "module")
        if not isinstance(model, (GaussianMixture, MixtureClassifier)):
            raise TypeError(
                f"Expected module={name!r} to be a GaussianMixture or a MixtureClassifier, but got "
                f"{type(model).__name__}."
            )
        if labelled and not isinstance(model, MixtureClassifier):
            raise TypeError(f"Expected module={name!r} to be a MixtureClassifier, to learn from `targets`.")
        return cls(model)

    def log_prior(self, labels: Tensor) -> Tensor | None:
        """Return which components the labels allow; None where they say nothing."""
        return None if self.classifier is None else self.classifier.log_prior(labels)

    def used(self, batch: Batch) -> Batch:
        """Return the rows that are not ignored."""
        if self.classifier is None or self.classifier.ignore_index is None:
            return batch
        return batch.where(batch.labels != self.classifier.ignore_index)

    def statistics(self, batch: Batch, assignment: Assignment | None) -> Statistics:
        """Return the sums of this rank's rows."""
        return self.gmm.statistics(batch.rows, None, self.log_prior(batch.labels), assignment)

    def sinkhorn(self, batch: Batch, **options: Any) -> Assignment:
        """Return the assignment that balances components, within each class where there are classes."""
        return self.gmm.sinkhorn(batch.rows, log_prior=self.log_prior(batch.labels), **options)

    def update(self, statistics: Statistics, step_size: float | Tensor | None, learned: Learned) -> Tensor:
        """Make the M-step of the sums of all ranks."""
        return self.model.update(statistics, step_size, learned=learned)

    def components(self, batch: Batch) -> Tensor:
        """Return the most probable component of each row that its label allows, shape ``(n,)``."""
        joint, log_prior = self.gmm.log_joint(batch.rows), self.log_prior(batch.labels)
        return (joint if log_prior is None else joint + log_prior).argmax(-1)

    def classes(self) -> Tensor:
        """Return the class of each component, shape ``(K,)``; all zero where there are none."""
        m = self.gmm.n_components if self.classifier is None else self.classifier.components_per_class
        return torch.arange(self.gmm.n_components, device=self.gmm.means_.device) // m

    def of_class(self, batch: Batch, c: int) -> Tensor:
        """Return the rows that a component of class ``c`` may start anew on."""
        return batch.rows if self.classifier is None else batch.rows[batch.labels == c]

    def can_start(self, batch: Batch) -> bool:
        """Return whether the rows of all ranks are enough for a start; every rank has to call this."""
        if self.classifier is None:
            return count_over_ranks(len(batch.rows), batch.rows.device) >= self.gmm.n_components
        labels = batch.labels[(batch.labels >= 0) & (batch.labels < self.classifier.n_classes)]
        numbers = sum_over_ranks(torch.bincount(labels, minlength=self.classifier.n_classes))
        few = (numbers > 0) & (numbers < self.classifier.components_per_class)
        return bool(numbers.any()) and not bool(few.any())

    def start(self, batch: Batch, init: str) -> None:
        """Start a fresh model on the rows of all ranks, by ``"initialize"`` or by a whole ``"fit"``."""
        begin = getattr(self.model, init)
        _ = begin(batch.rows) if self.classifier is None else begin(batch.rows, batch.labels)
