"""A training loop of your own as one worker of a run: a small net on the digits.

    offbeat serve examples/served/own_loop.toml --out runs/own-loop   (the server; in one terminal)
    python examples/own_loop.py tcp://127.0.0.1:5555                  (in two others)

What is offbeat's are the three lines marked below.
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn

import offbeat

images, labels = load_digits(return_X_y=True)
images, labels = torch.from_numpy(images).float() / 16, torch.from_numpy(labels)
model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
chance = torch.Generator()  # each process draws samples of its own
chance.seed()

with offbeat.join(sys.argv[1], model, optimizer) as run:  # <- offbeat's
    print(f"joined; {sum(p.numel() for p in model.parameters())} parameters")
    while not run.over:  # <- offbeat's
        rows = torch.randint(len(labels), (32,), generator=chance)
        loss = nn.functional.cross_entropy(model(images[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.step(loss)  # <- offbeat's
    print(f"{run.jobs} jobs done")
right = (model(images).argmax(1) == labels).float().mean()
print(f"accuracy of the model as this loop left it: {right:.3f}")
