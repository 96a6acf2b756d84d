"""Tasks: what is minimised, batched by construction."""

from offbeat.workers.tasks.contract import TASKS, Task
from offbeat.workers.tasks.empirical import EmpiricalRisk
from offbeat.workers.tasks.external import External, external
from offbeat.workers.tasks.least_squares import LeastSquares, least_squares
from offbeat.workers.tasks.lm import LanguageModel, lm
from offbeat.workers.tasks.logistic import logistic
from offbeat.workers.tasks.mixtures import mixtures
from offbeat.workers.tasks.mlp import mlp
from offbeat.workers.tasks.module import OWN_FILE, TorchTask
from offbeat.workers.tasks.quadratic import Quadratic, quadratic

__all__ = [
    "OWN_FILE",
    "TASKS",
    "EmpiricalRisk",
    "External",
    "LanguageModel",
    "LeastSquares",
    "Quadratic",
    "Task",
    "TorchTask",
    "external",
    "least_squares",
    "lm",
    "logistic",
    "mixtures",
    "mlp",
    "quadratic",
]
