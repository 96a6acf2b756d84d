#!/bin/sh
# torch 2.13.0: torch.func.functional_call is written like a pure function of a module's parameters,
# but it puts the given parameters into the module for the time of the call and takes them out again.
# Two threads that call it on one module, each with its own parameters, compute with each other's.
# No error, no warning, no word of threads in its documentation: a gradient that is computed while
# another thread evaluates is silently of other parameters.
#
# Seen:   two threads, parameters 0 and 1, each call reads the parameter twice: 200 calls each, some of
#         which (about every second) saw the other thread's parameter
# Exits with 0 while this is so, and with 1 once every call sees its own parameters alone.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import sys
import threading
import time

import torch


class Twice(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(-1.0))

    def forward(self, x):
        first = float(self.weight)
        time.sleep(0.001)
        return first, float(self.weight)


module, wrong = Twice(), [0, 0]


def calls(value):
    for _ in range(200):
        given = {"weight": torch.tensor(float(value))}
        if torch.func.functional_call(module, given, (None,)) != (value, value):
            wrong[value] += 1


threads = [threading.Thread(target=calls, args=(value,)) for value in (0, 1)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(f"torch {torch.__version__}: of 200 calls each, {wrong[0]} and {wrong[1]} saw other parameters")
sys.exit(0 if sum(wrong) else 1)
PYTHON
