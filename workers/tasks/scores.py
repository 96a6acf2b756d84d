"""What counts as right: a classification is one by its loss, or by what its user says."""

from collections.abc import Callable
from functools import partial
from typing import Any

from offbeat.runtime.base.errors import ConfigError

Hits = Callable[[Any, Any], Any]
"""Of outputs and targets: ``[...]`` whether each is right; None where nobody could say."""


def known(loss: Any, outputs: Any, targets: Any) -> Hits | None:
    """What is right under ``loss``, None where that is not known.

    The loss is one of torch's, or computes the same numbers as one of them on outputs like
    ``outputs``: cross-entropy and its like (the largest output is the class) or binary
    cross-entropy of one output (above 0 for logits, above 1/2 for probabilities).

    Args:
        loss: of outputs and targets.
        outputs, targets: of a batch.
    """
    import torch

    if not (torch.is_tensor(outputs) and torch.is_tensor(targets)):
        return None
    nn, functional = torch.nn, torch.nn.functional
    largest = partial(_largest, _ignored(loss))
    rules: dict[Any, Hits] = dict.fromkeys(
        [
            functional.cross_entropy,
            functional.nll_loss,
            functional.multi_margin_loss,
            nn.CrossEntropyLoss,
            nn.NLLLoss,
            nn.MultiMarginLoss,
        ],
        largest,
    )
    logits, chances = partial(_above, 0.0), partial(_above, 0.5)
    rules |= {functional.binary_cross_entropy_with_logits: logits, nn.BCEWithLogitsLoss: logits}
    rules |= {functional.binary_cross_entropy: chances, nn.BCELoss: chances}
    bare = loss.func if isinstance(loss, partial) else loss
    for named in (bare, type(bare)):
        if getattr(named, "__hash__", None) and named in rules:
            return rules[named]
    real = outputs.detach()
    draws = torch.Generator(real.device).manual_seed(0)
    for like, hits in (
        (functional.cross_entropy, largest),
        (functional.nll_loss, largest),
        (_binary(functional.binary_cross_entropy_with_logits), logits),
        (_binary(functional.binary_cross_entropy), chances),
    ):
        z = torch.rand(real.shape, generator=draws, dtype=real.dtype, device=real.device)
        if hits is not chances:
            z = 8 * z - 4
        if _same(loss, like, z, targets):
            return hits
    return None


def _same(loss: Hits, like: Hits, z: Any, targets: Any) -> bool:
    try:
        one, other = (float(f(z.clone(), targets.clone())) for f in (loss, like))
    except Exception:  # it is another loss
        return False
    return abs(one - other) <= 1e-4 * abs(other)


def _binary(loss: Hits) -> Hits:
    """``loss`` of as many outputs as targets, in whatever shapes."""
    return lambda z, targets: loss(z.reshape(targets.shape), targets.to(z.dtype))


def _ignored(loss: Any) -> int:
    if isinstance(loss, partial):
        return int(loss.keywords.get("ignore_index", -100))
    return int(getattr(loss, "ignore_index", -100))


def _largest(ignored: int, outputs: Any, targets: Any) -> Any:
    if outputs.ndim < 2:
        return None
    found = outputs.argmax(1)
    if not targets.is_floating_point():
        counted = targets != ignored
        return (found == targets)[counted] if found.shape == targets.shape else None
    if targets.shape != outputs.shape or not one_hot(targets):
        return None
    return found == targets.argmax(1)


def _above(threshold: float, outputs: Any, targets: Any) -> Any:
    if outputs.numel() != targets.numel() or outputs.numel() != len(targets):
        return None  # of several labels a sample, which is right?
    wanted = targets.reshape(-1)
    if not bool(((wanted == 0) | (wanted == 1)).all()):
        return None
    return (outputs.reshape(-1) > threshold) == (wanted == 1)


def one_hot(targets: Any) -> bool:
    """Whether each of ``targets [B, C, ...]`` is all of one class."""
    return bool((((targets == 0) | (targets == 1)).all()) and (targets.sum(1) == 1).all())


def said(accuracy: Hits, outputs: Any, targets: Any, count: int) -> Hits:
    """``accuracy`` of the user's, once it has answered for ``count`` samples.

    Raises:
        ConfigError: its answer is not one number a sample, from 0 to 1.
    """
    import torch

    found = accuracy(outputs, targets)
    if not torch.is_tensor(found) or found.numel() != count:
        shape = list(found.shape) if torch.is_tensor(found) else type(found).__name__
        raise ConfigError(
            f"TorchTask: accuracy answered {shape} for {count} samples; it is to answer whether "
            "each of them is right, as (outputs.argmax(1) == targets) does"
        )
    if not bool(((found >= 0) & (found <= 1)).all()):
        raise ConfigError("TorchTask: accuracy answered numbers that are not from 0 to 1")
    return accuracy
