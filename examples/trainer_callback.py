"""A Hugging Face Trainer as one worker of a run: a callback, and nothing else changes.

    trainer = Trainer(model=model, args=args, train_dataset=data,
                      callbacks=[OffbeatCallback("tcp://host:5555")])
    trainer.train()

Written to the protocol of transformers.TrainerCallback (``on_step_end`` follows each step of the
optimiser, gradient accumulation included) and tested against a stub of it: transformers is not
among the packages that offbeat is tested with.  For Lightning see lightning_callback.py.
"""

import sys
from typing import Any

import offbeat

try:
    from transformers import TrainerCallback
except ImportError:  # the example can be read, and tested, without
    TrainerCallback = object


class OffbeatCallback(TrainerCallback):
    """Joins when training begins, counts optimiser steps, stops the trainer when the run is over.

    Args:
        address: of the server.
        options: further arguments of ``offbeat.join``.
    """

    def __init__(self, address: str, **options: Any) -> None:
        self.address, self.options = address, options
        self.run: Any = None
        self.loss: float | None = None  # the last that was logged

    def on_train_begin(self, args: Any, state: Any, control: Any, **have: Any) -> None:
        """Have the model that the server gives in place before the first batch."""
        joined = offbeat.join(self.address, have["model"], have["optimizer"], **self.options)
        self.run = joined.__enter__()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **have: Any) -> None:
        """Keep the loss for the server's records."""
        self.loss = (logs or {}).get("loss", self.loss)

    def on_step_end(self, args: Any, state: Any, control: Any, **have: Any) -> None:
        """One step of the optimiser was made."""
        if not self.run.over and not self.run.step(self.loss):
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **have: Any) -> None:
        """Leave: what is not done is somebody else's."""
        self.run.__exit__(None, None, None)


if __name__ == "__main__":
    print(__doc__)
    if TrainerCallback is object:
        sys.exit("transformers is not installed here; pip install transformers")
