"""Few rows of many features: what maximum likelihood does with them, and what conjugate priors do: MAP and NIW.

python examples/priors.py
"""

import torch

from tgmm_nn import GaussianMixture

K, D = 3, 8
generator = torch.Generator().manual_seed(0)
means = 4 * torch.eye(K, D)
rotations = torch.linalg.qr(torch.randn(K, D, D, generator=generator)).Q
roots = rotations * torch.linspace(0.3, 1.5, D)  # of the covariances, roots @ roots.mT


def draw(n):
    """Draw n rows of each component."""
    return (means[:, None] + torch.randn(K, n, D, generator=generator) @ roots.mT).flatten(0, 1)


seen, others = draw(8), draw(2000)  # 8 rows for the 8 + 36 numbers of a component

# A prior is rows that were seen before. Ψ with ν degrees of freedom adds Ψ to the scatter of a component, and ν + d + 1
# to what that is divided by; a mean m with a precision of κ is κ rows at m. Together they are Normal-inverse-Wishart.
nu = D + 2
covariance = {"covariance_prior": (nu + D + 1) * seen.var(0).mean() * 0.3, "degrees_of_freedom_prior": nu}
mean = {"mean_prior": seen.mean(0), "mean_precision_prior": 0.5}
choices = {"none (maximum likelihood)": {}, "inverse Wishart": covariance, "Normal-inverse-Wishart": covariance | mean}

print(f"{len(seen)} rows of {D} features, {K} full covariances; mean log-density in nats per row\n")
print("prior                        these rows   other rows   narrowest sd")
for name, priors in choices.items():
    gmm = GaussianMixture(K, D, n_init=5, random_state=0, max_iter=500, **priors).fit(seen)
    narrowest = 1 / torch.linalg.matrix_norm(gmm.factor_, 2).max()  # float32 covariances would round it away
    print(f"{name:28} {gmm.score(seen):10.1f} {gmm.score(others):12.1f} {narrowest:14.4f}")
truth = GaussianMixture(K, D).set_parameters(torch.ones(K) / K, means, roots @ roots.mT)
print(f"{'the truth':28} {truth.score(seen):10.1f} {truth.score(others):12.1f} {0.3:14.4f}")
print("\nWithout a prior each component shrinks onto a plane through its few rows; `reg_covar`, 1e-6, alone keeps its")
print(
    "narrowest sd above 0. The rows that it was fitted to look likely, others impossible. A prior bounds it from below."
)
