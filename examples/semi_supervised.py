"""Five labels in each class: a mixture for each, learned from labelled and unlabelled rows together.

python examples/semi_supervised.py
"""

import torch
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA

from tgmm_nn import MixtureClassifier

digits = load_digits()
x = torch.from_numpy(PCA(20, random_state=0).fit_transform(digits.data)).float()
y = torch.from_numpy(digits.target)

for seed in range(3):
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    labels = torch.full_like(y, -1)  # -1: no label
    for c in range(10):
        few = order[y[order] == c][:5]
        labels[few] = c
    rest = labels < 0
    options = {"covariance_type": "tied_full", "reg_covar": 1.0, "max_iter": 300}
    few = MixtureClassifier(10, 20, **options).fit(x[~rest], labels[~rest])
    every = MixtureClassifier(10, 20, **options).fit(x, labels)
    scores = [float((model.predict(x[rest]) == y[rest]).float().mean()) for model in (few, every)]
    print(f"seed {seed}: from 50 labelled rows {scores[0]:.3f}, with {int(rest.sum())} more rows {scores[1]:.3f}")
