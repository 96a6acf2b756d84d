"""A training loop of your own in a run of others: a small net on the digits.

As two workers of a server, the server in one terminal and the loops in two others:

    offbeat serve examples/served/own_loop.toml --out runs/own-loop
    python examples/own_loop.py tcp://127.0.0.1:5555

As the three nodes of a gossip run, each in a terminal of its own, n0, n1 and n2:

    python examples/own_loop.py examples/served/own_gossip.toml examples/served/hosts.toml n0

On Ray, which begins the loops by itself:

    cd examples && offbeat run served/own_ray.toml

What is offbeat's are the three lines marked below.
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn

import offbeat


def train(address, **options):
    """Train until the run is over.

    Args:
        address: of the run.
        options: more for ``offbeat.join``.
    """
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.from_numpy(images).float() / 16, torch.from_numpy(labels)
    torch.manual_seed(0)  # the nodes of a gossip run begin with one model
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    chance = torch.Generator()  # each process draws samples of its own
    chance.seed()

    with offbeat.join(address, model, optimizer, **options) as run:  # <- offbeat's
        print(f"joined; {sum(p.numel() for p in model.parameters())} parameters", flush=True)
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


if __name__ == "__main__":
    address, *node = sys.argv[1:]
    train(address, **dict(zip(("hosts", "name"), node, strict=False)))
