"""Export a network with a density head to ONNX and run it in onnxruntime: ``python examples/density_head_onnx.py``."""

from importlib.util import find_spec

import torch
from sklearn.datasets import load_digits
from torch import nn

from tgmm_nn import GaussianMixture

torch.manual_seed(0)
digits = load_digits()
x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
known, held_out = y < 8, torch.arange(len(y)) >= 1200  # the digits 8 and 9 are never learned
learned = known & ~held_out

# Any encoder: here one that learned to classify. Then EM, once, on its rows; the network's output is their density.
encoder, classes = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)), nn.Linear(8, 8)
optimizer = torch.optim.Adam([*encoder.parameters(), *classes.parameters()], lr=3e-3)
for _ in range(200):
    optimizer.zero_grad()
    nn.functional.cross_entropy(classes(encoder(x[learned])), y[learned]).backward()
    optimizer.step()
gmm = GaussianMixture(8, 8, reg_covar=1e-3, random_state=0).fit(encoder(x[learned]).detach())
network = nn.Sequential(encoder, gmm).eval()
density = network(x[held_out]).detach()
medians = [density[part[held_out]].median().item() for part in (known, ~known)]
print("median log-density of held-out rows, in nats: known digits {:.1f}, unknown digits {:.1f}".format(*medians))

if missing := [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]:
    print(f"not exported: pip install {' '.join(missing)}")
else:
    import onnxruntime

    options = {"dynamic_shapes": ({0: torch.export.Dim("batch")},), "dynamo": True, "external_data": False}
    torch.onnx.export(network, (x[:2],), "density_head.onnx", **options, verbose=False)
    session = onnxruntime.InferenceSession("density_head.onnx")
    (value,) = session.run(None, {session.get_inputs()[0].name: x[held_out].numpy()})
    print(f"onnxruntime differs on {len(value)} rows by {(torch.from_numpy(value) - density).abs().max():.0e} at most")
