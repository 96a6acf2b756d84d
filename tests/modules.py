"""A small torch task, as a user would make it."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from offbeat.workers.tasks import TorchTask


def linear(inputs=6, outputs=3):
    torch.manual_seed(1)
    return nn.Linear(inputs, outputs)


def table(n=60, targets=None):
    g = torch.Generator().manual_seed(0)
    a, y = torch.randn(n, 6, generator=g), torch.randint(3, (n,), generator=g)
    return TensorDataset(a, y if targets is None else targets(y))


def made(module=None, loss=F.cross_entropy, data=None, **options):
    module, data = module or linear(), table() if data is None else data
    return TorchTask(module, loss, data, **{"workers": 3, "batch": 8, **options})
