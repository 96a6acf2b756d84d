"""Any torch module under stragglers: a small convolutional net on the digits, three methods.

    python examples/torch_module.py

The same file is a task of experiment files, studies and the command line:

    offbeat run --task "torch('examples/torch_module.py', partition='dirichlet(0.3)', batch=16)" \\
        --workers 16 --speeds "lognormal(0.5)" --stragglers 2x10 --seconds 400 \\
        --algorithm "pure(lr=0.05)" --algorithm "minibatch(lr=0.05)" --algorithm "rescaled(lr=0.05)"
"""

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

import offbeat
from offbeat.workers.tasks import TorchTask


def make():
    """The module, its loss, and the data."""
    images, labels = load_digits(return_X_y=True)
    dataset = torch.utils.data.TensorDataset(
        torch.from_numpy(images.astype(np.float32) / 16).reshape(-1, 1, 8, 8),
        torch.from_numpy(labels),
    )
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 10)
    )  # fmt: skip
    return net, nn.functional.cross_entropy, dataset


if __name__ == "__main__":
    torch.set_num_threads(1)  # as the command has it: products this small gain nothing from more
    torch.manual_seed(0)
    task = TorchTask(*make(), workers=16, partition="dirichlet(0.3)", batch=16)
    fleet = offbeat.Fleet(workers=16, speeds="lognormal(0.5)", stragglers="2x10")
    results = []
    for method in ("pure(lr=0.05)", "minibatch(lr=0.05)", "rescaled(lr=0.05)"):
        results.append(offbeat.run(task, method, fleet, stop={"seconds": 400}))
        print(results[-1])
    print(results[0].plot("runs/torch_module.png", *results[1:]))
