"""Fit a mixture, read it, move it by minibatches, and put it inside a network: ``python examples/quickstart.py``."""

import torch
from torch import nn

from tgmm_nn import GaussianMixture

generator = torch.Generator().manual_seed(0)
centres = torch.tensor([[-4.0, 0.0], [4.0, 0.0], [0.0, 5.0]])
x = centres[torch.arange(600) % 3] + torch.randn(600, 2, generator=generator)

gmm = GaussianMixture(n_components=3, n_features=2, covariance_type="full", random_state=0).fit(x)
print(f"converged: {gmm.converged_}, iterations: {gmm.n_iter_}, log-likelihood: {gmm.lower_bound_:.3f} nats per row")
print("means:", [[round(v, 1) for v in row] for row in gmm.means_.tolist()])
print("rows per component:", torch.bincount(gmm.predict(x)).tolist())

# The rows drift; each batch gets 5 % of the running statistics.
for t in range(100):
    rows = torch.randint(600, (64,), generator=generator)
    gmm.em_step(x[rows] + 0.02 * t, step_size=0.05)
print("means after the drift:", [[round(v, 1) for v in row] for row in gmm.means_.tolist()])

# A layer: the log-density is differentiable in its input, and the mixture travels in the network's state_dict.
network = nn.Sequential(nn.Linear(5, 2), gmm)
network(torch.randn(8, 5, generator=generator)).mean().backward()
print("gradient of the linear layer:", tuple(network[0].weight.grad.shape))
print("in its state:", [name for name in network.state_dict() if name.endswith("means_")])
