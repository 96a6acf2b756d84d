"""The one list of methods, of servers and of gossip, and what one's own need not say."""

from copy import copy
from typing import Any

from offbeat.runtime.base.errors import ConfigError
from offbeat.runtime.base.registry import Registry

ALGORITHMS = Registry(
    "algorithm",
    elsewhere={
        "asynchronous-sgd": "pure",
        "asgd": "pure",
        "fedavg": "local-sgd",
        "d-psgd": "dsgd",
        "gossip-sgd": "dsgd",
        "gradient-tracking": "dsgt",
        "diging": "dsgt",
        "push-sum": "gradient-push",
        "sgp": "gradient-push",
        "choco-sgd": "choco",
        "d2": "exact-diffusion",
        "lead": "cedas",
    },
)


def completed(given: Any, base: type) -> Any:
    """``given``, which need not be derived from ``base``, with the defaults that ``base`` has.

    Raises:
        ConfigError: it lacks what ``base`` has no default for.
    """
    own = type(given)
    if base in own.__mro__:
        return given
    named = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    made, whole = copy(given), f"{base.__module__}.{base.__name__}"
    try:
        kind: Any = type(base)(own.__name__, (own, base), named)
        object.__setattr__(made, "__class__", kind)
    except TypeError as error:  # it has slots, or a metaclass
        raise ConfigError(
            f"{own.__name__} cannot be completed ({error}); derive it from {whole}"
        ) from None
    if lacking := sorted(kind.__abstractmethods__):
        raise ConfigError(f"{own.__name__} has no {' and no '.join(lacking)}; see {whole}")
    return made
