"""Devices that tests compute on: "cpu:0" takes every line that a GPU takes."""

import pytest
import torch

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
DEVICES = ["cpu:0", pytest.param("cuda:0", marks=GPU)]
