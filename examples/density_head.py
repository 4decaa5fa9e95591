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
known = y < 5  # digits 5 to 9 are what the network never sees
order = torch.randperm(int(known.sum()))
train, test = order[:700], order[700:]

encoder = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))
decoder, head = nn.Linear(16, 64), nn.Linear(16, 5)
optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters(), *head.parameters()], lr=3e-3)
for _ in range(300):
    z = encoder(x[known][train])
    loss = (
        nn.functional.cross_entropy(head(z), y[known][train]) + (decoder(z) - x[known][train]).square().sum(-1).mean()
    )
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

with torch.no_grad():
    seen, fresh, foreign = (encoder(rows) for rows in (x[known][train], x[known][test], x[~known]))
density = MixtureClassifier(n_classes=5, n_features=16, reg_covar=1e-2).fit(seen, y[known][train])
print(f"accuracy of the densities: {(density.predict(fresh) == y[known][test]).float().mean():.3f}")
score = OutlierScore(density).calibrate(fresh, quantile=0.95)
print(
    "digits 5 to 9 against 0 to 4:", {k: round(v, 3) for k, v in detection_scores(score(fresh), score(foreign)).items()}
)
print(f"share of digits 5 to 9 that is told apart: {score.is_outlier(foreign).float().mean():.3f}")
