"""Mixtures from scikit-learn and for it, equal in log-density."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tgmm_nn.covariance import Covariance
from tgmm_nn.functional import Parameters

__all__ = ["options_of", "to_sklearn"]

STARTS = {"kmeans": "kmeans", "k-means++": "kpp", "random_from_data": "random"}


def options_of(fitted: Any) -> dict[str, Any]:
    """Return the constructor's arguments that equal those of a fitted scikit-learn mixture, or raise."""
    from sklearn.mixture import GaussianMixture

    if not isinstance(fitted, GaussianMixture):
        raise TypeError(f"Expected `fitted` to be a sklearn.mixture.GaussianMixture, but got {type(fitted).__name__}.")
    if not hasattr(fitted, "precisions_cholesky_"):
        raise ValueError("Expected `fitted` to be fitted, but it has no parameters; call its fit first.")
    n_components, n_features = fitted.means_.shape
    seed = fitted.random_state
    return {
        "n_components": n_components,
        "n_features": n_features,
        "covariance_type": {"tied": "tied_full"}.get(fitted.covariance_type, fitted.covariance_type),
        "init_means": STARTS.get(fitted.init_params, "kmeans") if fitted.means_init is None else fitted.means_init,
        "init_weights": "uniform" if fitted.weights_init is None else fitted.weights_init,
        "n_init": fitted.n_init,
        "random_state": int(seed) if seed is not None and not hasattr(seed, "uniform") else None,
        "max_iter": fitted.max_iter,
        "tol": fitted.tol,
        "reg_covar": fitted.reg_covar,
        "warm_start": fitted.warm_start,
    }


def to_sklearn(
    parameters: Parameters,
    covariance: Covariance,
    covariance_type: str,
    options: dict[str, Any],
    attributes: dict[str, Any],
) -> Any:
    """Return a fitted scikit-learn mixture with these parameters.

    Args:
        parameters: Mixture in float64.
        covariance: Structure of its covariances.
        covariance_type: Name of its family.
        options: Arguments of scikit-learn's constructor, besides the family.
        attributes: What else a fitted one reports.
    """
    from sklearn.mixture import GaussianMixture

    weights, means, factor = (parameter.cpu() for parameter in parameters)
    starts = {ours: theirs for theirs, ours in STARTS.items()}
    given = {name: options.pop(name) for name in ("init_means", "init_weights")}
    options = {
        **options,
        "init_params": starts.get(given["init_means"], "kmeans") if isinstance(given["init_means"], str) else "kmeans",
        "means_init": None if isinstance(given["init_means"], str) else given["init_means"].numpy(),
        "weights_init": None if isinstance(given["init_weights"], str) else given["init_weights"].numpy(),
    }

    def public(element: Tensor) -> Any:
        return (covariance.matrix(element, means.shape[-1])[0] if covariance.tied else element).numpy()

    # Tied families that scikit-learn lacks are written as the one that contains them.
    model = GaussianMixture(covariance_type="tied" if covariance.tied else covariance_type, **options)
    model.weights_, model.means_ = weights.numpy(), means.numpy()
    model.covariances_ = public(covariance.square(covariance.root(factor)))
    model.precisions_, model.precisions_cholesky_ = public(covariance.square(factor)), public(factor)
    model.n_features_in_ = means.shape[-1]
    for name, value in attributes.items():
        setattr(model, name, value)
    return model
