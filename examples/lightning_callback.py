"""A Lightning Trainer as one worker of a run: a callback, and nothing else changes.

    trainer = Trainer(callbacks=[OffbeatCallback("tcp://host:5555")])
    trainer.fit(module, data)

Written to the protocol of lightning.pytorch.Callback, for one optimiser, and tested against a stub
of it: lightning is not among the packages that offbeat is tested with.
"""

import sys
from typing import Any

import offbeat

try:
    from lightning.pytorch import Callback
except ImportError:  # the example can be read, and tested, without
    Callback = object


class OffbeatCallback(Callback):
    """Joins when training begins, counts optimiser steps, stops the trainer when the run is over.

    Args:
        address: of the server.
        options: further arguments of ``offbeat.join``.
    """

    def __init__(self, address: str, **options: Any) -> None:
        self.address, self.options = address, options
        self.run: Any = None
        self.steps = 0  # of the optimiser, that the run knows of

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Have the model that the server gives in place, after any checkpoint of the trainer's."""
        (optimizer,) = trainer.optimizers
        self.run = offbeat.join(self.address, pl_module, optimizer, **self.options).__enter__()
        self.steps = trainer.global_step

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Perhaps a step of the optimiser was made; not of every batch, where gradients add up."""
        if trainer.global_step > self.steps and not self.run.over:
            self.steps = trainer.global_step
            self.run.step(outputs["loss"])
        trainer.should_stop = trainer.should_stop or self.run.over

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Leave: what is not done is somebody else's."""
        self.run.__exit__(None, None, None)


if __name__ == "__main__":
    print(__doc__)
    if Callback is object:
        sys.exit("lightning is not installed here; pip install lightning")
