"""The one list of methods, of servers and of gossip."""

from offbeat.runtime.registry import Registry

ALGORITHMS = Registry(
    "algorithm",
    elsewhere={
        "asynchronous-sgd": "pure", "asgd": "pure", "fedavg": "local-sgd",
        "d-psgd": "dsgd", "gossip-sgd": "dsgd", "gradient-tracking": "dsgt", "diging": "dsgt",
        "push-sum": "gradient-push", "sgp": "gradient-push", "choco-sgd": "choco",
        "d2": "exact-diffusion", "lead": "cedas",
    },
)  # fmt: skip
