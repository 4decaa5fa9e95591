"""How many components? Mixtures of several sizes and families are fitted, and one is chosen by a criterion."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from sklearn.decomposition import PCA
from torch import Tensor

from tgmm_nn.checks import check_choice, check_integer, check_number, check_share
from tgmm_nn.covariance import COVARIANCES
from tgmm_nn.experiments.reports import Row
from tgmm_nn.experiments.rows import RowsDataModule
from tgmm_nn.mixture import GaussianMixture
from tgmm_nn.plotting import new_axes, plot_criterion, save

__all__ = ["ComponentChoice", "Trial"]

# What is computed of a mixture and rows, what it is called, and which value is best.
CRITERIA: dict[str, tuple[Callable[[GaussianMixture, Tensor], float], str, Literal["smallest", "largest"]]] = {
    "bic": (lambda gmm, x: gmm.bic(x), "BIC", "smallest"),
    "icl": (lambda gmm, x: gmm.icl(x), "ICL", "smallest"),
    "heldout": (lambda gmm, x: gmm.score(x), "held-out log-density, nats per row", "largest"),
}


class Trial(NamedTuple):
    """A fit: family, number of components, seed, value of the criterion, and whether EM converged."""

    family: str
    n_components: int
    seed: int
    value: float
    converged: bool


class ComponentChoice:
    r"""Choose the number of components, and the family, of a mixture of rows.

    By ``criterion``:

    - ``"bic"``: :math:`-2 \log L + p \log n` of the rows that are fitted. Of several seeds the smallest counts, and the
      smallest is best.
    - ``"icl"``: the same, and a penalty for components that overlap.
    - ``"heldout"``: mean log p(x), in nats, of rows that are held out, others with each seed. Their mean counts, and
      the largest is best.

    Rows are projected to their first principal components where there are more features than ``n_principal``: densities
    of many features need more rows than most data have. Where a curve is flat, held-out rows decide by chance: look at
    the picture.

    Args:
        gmm: Gives the options of the mixtures but for size, family and seed: restarts, priors, regularisation.
        candidates: Numbers of components to try.
        families: Covariance types to try.
        criterion: One of those above.
        n_seeds: Fits of each number and family, from starts of their own.
        test_size: Share of the rows that ``"heldout"`` holds out.
        n_principal: Most features; None keeps all.
        max_rows: Most rows; of more, as many are drawn.

    Raises:
        TypeError: If an option has the wrong type.
        ValueError: If an option is out of range.

    References:
        Schwarz, Estimating the dimension of a model, 1978.
        Biernacki, Celeux and Govaert, Assessing a mixture model for clustering with the integrated completed
        likelihood, 2000.
        Smyth, Model selection for probabilistic clustering using cross-validated likelihood, 2000.

    Example:
        >>> x = torch.randn(300, 2) + 9 * torch.eye(3, 2)[torch.arange(300) % 3]
        >>> choice = ComponentChoice(GaussianMixture(1, 2, n_init=3), candidates=[2, 3, 4], n_seeds=1)
        >>> choice.best(choice.trials(x, seed=0)).n_components
        3
    """

    def __init__(
        self,
        gmm: GaussianMixture,
        *,
        candidates: Sequence[int] = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30),
        families: Sequence[str] = ("full",),
        criterion: Literal["bic", "icl", "heldout"] = "bic",
        n_seeds: int = 3,
        test_size: float = 0.2,
        n_principal: int | None = 10,
        max_rows: int = 20_000,
    ) -> None:
        for name, values in (("candidates", candidates), ("families", families)):
            if isinstance(values, str) or not isinstance(values, Sequence) or not values:
                raise TypeError(f"Expected `{name}` to be a list of at least one value, but got {values!r}.")
        for candidate in candidates:
            check_integer("candidates", candidate)
        for family in families:
            check_choice("families", family, COVARIANCES)
        check_choice("criterion", criterion, CRITERIA)
        check_integer("n_seeds", n_seeds)
        check_number("test_size", test_size)
        check_share("test_size", float(test_size))
        check_integer("n_principal", n_principal, optional=True)
        check_integer("max_rows", max_rows)
        self.gmm, self.candidates, self.families = gmm, sorted(set(candidates)), list(dict.fromkeys(families))
        self.criterion, self.n_seeds, self.test_size = criterion, n_seeds, float(test_size)
        self.n_principal, self.max_rows = n_principal, max_rows

    def trials(self, x: Tensor, seed: int) -> list[Trial]:
        """Fit a mixture of each family, size and seed to rows ``(N, d)``, and return what became of them.

        Raises:
            ValueError: If fewer rows are fitted than the largest candidate has components.
        """
        fits = []
        parts = {number: self._parts(x, number) for number in range(seed, seed + self.n_seeds)}
        for family, k, number in product(self.families, self.candidates, parts):
            fitted, scored = parts[number]
            if len(fitted) < k:
                raise ValueError(f"Expected `candidates` of at most {len(fitted)}, the rows to fit, but got {k}.")
            gmm = self._mixture(k, fitted.shape[1], family, number)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="EM did not converge")  # told in a column
                gmm.fit(fitted, sync=False)
            fits.append(Trial(family, k, number, CRITERIA[self.criterion][0](gmm, scored), gmm.converged_))
        return fits

    def best(self, trials: Sequence[Trial]) -> Trial:
        """Return the size and family of the best value, of the seed that came nearest to it."""
        sign = 1.0 if CRITERIA[self.criterion][2] == "smallest" else -1.0
        by_size = {t[:2]: [u for u in trials if u[:2] == t[:2]] for t in trials}
        values = {size: self._value([t.value for t in found]) for size, found in by_size.items()}
        chosen = min(values, key=lambda size: sign * values[size])
        nearest = min(by_size[chosen], key=lambda t: abs(t.value - values[chosen]))
        return nearest._replace(value=values[chosen])

    def report(self, data: RowsDataModule, folder: Path, seed: int) -> list[Row]:
        """Choose for the rows of a data module; write all trials as ``criterion.csv``, and draw ``criterion.png``."""
        x, _ = data.sample(self.max_rows)
        trials = self.trials(x, seed)
        with (folder / "criterion.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([*Trial._fields[:3], self.criterion, "converged"])
            writer.writerows([*trial[:4], int(trial.converged)] for trial in trials)
        self._draw(trials, folder / "criterion.png")
        chosen = self.best(trials)
        hint = "; it is the largest that was tried" if chosen.n_components == self.candidates[-1] else ""
        width = self._parts(x, seed)[0].shape[1]
        said = f"{len(x)} rows of {width} features: {chosen.n_components} components, {chosen.family}{hint}."
        print(f"\nChosen by {CRITERIA[self.criterion][1]} on {said}")
        sizes = [self.best([t for t in trials if t[:2] == size]) for size in dict.fromkeys(t[:2] for t in trials)]
        return [
            {
                "method": f"{size.n_components} components, {size.family}",
                "n_components": size.n_components,
                self.criterion: size.value,
                "chosen": "*" if size[:2] == chosen[:2] else "",
            }
            for size in sizes
        ]

    def _mixture(self, n_components: int, n_features: int, family: str, seed: int) -> GaussianMixture:
        given: dict[str, Any] = {"n_components": n_components, "n_features": n_features, "covariance_type": family}
        return GaussianMixture(**{**self.gmm.options(), **given, "random_state": seed, "dtype": self.gmm.means_.dtype})

    def _parts(self, x: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Return the rows to fit, and those that the criterion is of; the axes of both are those of the former."""
        if self.criterion != "heldout":
            fitted = scored = x
        else:
            order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
            n_scored = max(1, round(self.test_size * len(x)))
            fitted, scored = x[order[n_scored:]], x[order[:n_scored]]
        n = self.n_principal
        if n is None or n >= min(fitted.shape):
            return fitted, scored
        axes = PCA(n, random_state=seed).fit(fitted.numpy())
        return torch.from_numpy(axes.transform(fitted.numpy())), torch.from_numpy(axes.transform(scored.numpy()))

    def _value(self, values: Sequence[float]) -> float:
        return sum(values) / len(values) if self.criterion == "heldout" else min(values)

    def _draw(self, trials: Sequence[Trial], file: Path) -> None:
        """Draw the criterion over the number of components, a panel for each family; a star marks what is chosen."""
        _, name, best = CRITERIA[self.criterion]
        axes, chosen = new_axes(1, len(self.families)), self.best(trials).family
        for family, ax in zip(self.families, axes, strict=True):
            table = torch.tensor([t.value for t in trials if t.family == family], dtype=torch.float64)
            table = table.reshape(len(self.candidates), self.n_seeds).mT
            values = table if self.criterion == "heldout" else table.amin(0)
            plot_criterion(self.candidates, values, name=name, best=best, star=family == chosen, ax=ax)
            ax.set_title(f"{family}{', chosen' if family == chosen else ''}\n{ax.get_title()}")
        limits = [limit for ax in axes for limit in ax.get_ylim()]
        for ax in axes:  # families are compared
            ax.set_ylim(min(limits), max(limits))
        save(axes[0], file)
