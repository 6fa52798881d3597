"""Shows the smallest training loop, the ten lines of the README.

python -m examples.ten_lines
"""

import torch
from algoperf_kfac.pytorch import KFAC

model = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.GELU(), torch.nn.Linear(64, 3))
optimizer = KFAC(model, approximation="reduce", learning_rate=1e-2)
for _ in range(100):
    x, y = torch.randn(128, 20), torch.randint(3, (128,))
    optimizer.zero_grad()
    with optimizer.capture():  # watches the layers on statistics steps, costs nothing on the others
        torch.nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
print(optimizer.coverage())  # which layers K-FAC handles, and why not the others
