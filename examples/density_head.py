"""A density head on a network of your own: which class, and how typical, from one module.

python examples/density_head.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

from tgmm_nn import MixtureClassifier, OutlierScore
from tgmm_nn.metrics import detection_scores

torch.manual_seed(0)
digits = load_digits()
x, y = torch.from_numpy(digits.data).float() / 16, torch.from_numpy(digits.target)
order = torch.randperm(len(x))
known, foreign = order[y[order] < 5], order[y[order] >= 5]  # the network never sees the digits 5 to 9
train, held, test = known[:600], known[600:750], known[750:]

encoder = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))
decoder, head = nn.Linear(16, 64), nn.Linear(16, 5)
optimizer = torch.optim.Adam(nn.ModuleList([encoder, decoder, head]).parameters(), lr=3e-3)
for _ in range(300):
    z = encoder(x[train])
    loss = nn.functional.cross_entropy(head(z), y[train]) + (decoder(z) - x[train]).square().sum(-1).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

z = encoder(x).detach()
density = MixtureClassifier(n_classes=5, n_features=16, reg_covar=1e-2).fit(z[train], y[train])
score = OutlierScore(density).calibrate(z[held], quantile=0.95)
print(f"accuracy of the densities: {(density.predict(z[test]) == y[test]).float().mean():.3f}")
print(f"told apart: {score.is_outlier(z[foreign]).float().mean():.3f} of the digits 5 to 9")
print({name: round(value, 3) for name, value in detection_scores(score(z[test]), score(z[foreign])).items()})
