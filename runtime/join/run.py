"""A run that a training loop takes part in.

    with offbeat.join("tcp://host:5555", model, optimizer) as run:
        for inputs, targets in batches:
            loss = criterion(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if not run.step(loss):
                break

A job is so many of the loop's own steps; what they moved, x_received - x, goes to the server, and
the next model it gives is loaded into the parameters in place.  In a gossip run that difference is
what the method takes for a gradient, and the next model is the one that it mixed.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from offbeat.runtime.base import shapes
from offbeat.runtime.base.errors import ConfigError, StorageError, nearest
from offbeat.runtime.compute.backend import JobRequest, JobResult
from offbeat.runtime.compute.flat import Flat, names
from offbeat.runtime.compute.source import HERE, Source, log
from offbeat.runtime.join.courier import Courier
from offbeat.runtime.protocol.messages import MOST_TEXT
from offbeat.runtime.run import checkpoint

PATIENCE_S = 600.0
_joined: WeakSet[Any] = WeakSet()  # modules that take part in a run now


class Run:
    """See ``join``.

    ``jobs`` are the jobs done; ``over`` says whether the run is.

    Args:
        source: makes who gives the jobs, of the model's parameters.
        model, patience_s, bf16: see ``join``.
    """

    def __init__(
        self, source: Callable[[Flat], Source], model: Any, patience_s: float | None, bf16: bool
    ) -> None:
        self._made, self._model = source, model
        self._patience_s, self._bf16 = patience_s, bf16
        self._order: JobRequest | None = None
        self._entered = False
        self.over, self.jobs = False, 0
        self._done = self._told = 0  # steps of the job at hand, and losses that were said
        self._total: Any = 0.0
        self._began_s = 0.0

    def __enter__(self) -> "Run":
        if self._model in _joined:
            raise ConfigError("this model takes part in a run already; leave that one first")
        _joined.add(self._model)
        try:
            self._flat = Flat(self._model, self._bf16)
            self._source = self._made(self._flat)
        except BaseException:
            _joined.discard(self._model)
            raise
        try:
            self._source.start()
            self._entered = True
            self._next()
            if self.over:
                log.warning("the run was over before this loop joined it: it has nothing to do")
        except BaseException as error:
            self._leave(f"it ended: {type(error).__name__}")
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._leave("its loop ended" if kind is None else f"its loop ended: {kind.__name__}")

    def _leave(self, why: str) -> None:
        _joined.discard(self._model)
        self._entered, self._order = False, None
        self._source.leave(why)

    @property
    def shard(self) -> int:
        """Whose data the job at hand is of: the worker's own number, or another's."""
        return 0 if self._order is None else self._order.shard

    @property
    def draw(self) -> int:
        """Steps that were handed out on that data before the next one, by whichever worker."""
        return 0 if self._order is None else self._order.draw + self._done

    def step(self, loss: Any = None) -> bool:
        """Say that the optimiser has made a step; answers whether the run goes on.

        Most calls only count.  After the last step of a job its result is sent, which goes on
        while the loop does, and the next job is waited for; where the server is gone, until it is
        back.

        Args:
            loss: of that step, a number or a tensor; the server records the mean.

        Raises:
            ConfigError: the run is over, or was left; Refused, Fenced: the server said so;
            ComputeError: there was no server for too long.
        """
        if not self._entered:
            raise ConfigError("step() belongs into the block: with offbeat.join(...) as run")
        if self._order is None:
            raise ConfigError(
                "the run is over: end the loop where step() answers False, or run.over is true"
            )
        if loss is not None:
            self._total = self._total + (loss.detach() if hasattr(loss, "detach") else loss)
            self._told += 1
        self._done += 1
        if self._source.over:
            self.over, self._order = True, None
        elif self._done >= self._order.steps:
            self._finish(self._order)
            self._next()
        elif self._source.replaced(self._order):
            self._next()
        return not self.over

    def _finish(self, order: JobRequest) -> None:
        loss = float(self._total) / self._told if self._told else None
        self._answer(order, loss)
        self.jobs += 1

    def _answer(self, order: JobRequest, loss: float | None) -> None:
        moved: Any = self._flat.moved(fresh=not self._source.delivered)
        spent_s = time.perf_counter() - self._began_s
        self._source.answer(order, JobResult(order.serial, loss, moved, {}, spent_s))

    def _next(self) -> None:
        """Begin the next job, once it is here."""
        self._order = None
        self._began_s = time.perf_counter()
        while (order := self._source.next(self._patience_s)) is not None:
            self._flat.receive(order.x)
            if order.steps:
                break
            self._answer(order, None)  # a job of no steps asks for the model that is here
        if order is None:
            self.over = True
            return
        self._flat.load()
        self._order, self._done, self._told, self._total = order, 0, 0, 0.0
        self._began_s = time.perf_counter()


def join(
    address: str,
    model: Any,
    optimizer: Any,
    *,
    name: str = "",
    keys: str | Path | None = None,
    patience_s: float | None = PATIENCE_S,
    bf16: bool = False,
    hosts: str | Path | Mapping[str, str] | None = None,
    folder: str | Path | None = None,
    bind: str = "",
    suspect_after_s: float = 1.0,
) -> Run:
    """Let a training loop take part in a run; use as a context.

        offbeat.join("tcp://host:5555", model, optimizer)               a worker of a server
        offbeat.join("gossip.toml", model, optimizer,
                     hosts="hosts.toml", name="a")                      a node among its neighbours
        offbeat.join("ray", model, optimizer)                           in a loop that Ray runs

    The server is one that ``offbeat serve`` began.  A gossip run has none: every loop joins with
    the same experiment and host file, as ``offbeat peer`` does, and one that is killed and started
    again returns to the run.  All its models must begin alike: seed them, or give the experiment a
    file.  Ray runs the function that the experiment names,
    ``work = "own-loop(loop='module:function')"`` with ``engine = "ray"``, once for each worker and
    with the address "ray": it begins those that die again, which no loop could do for itself.

    The trainable parameters become views into one flat vector, into which each job's model is
    loaded in place; optimiser state, schedules, gradient accumulation, mixed precision
    (torch.autocast, GradScaler) and data stay the loop's own business.  So do buffers: the running
    statistics of BatchNorm are not averaged.  Call ``step`` once after each step of the optimiser.
    After the block the parameters are what the loop left; ``weights`` reads the run's own.

    A server that is gone is waited for, at the end of the job at hand; Ctrl-C and other exceptions
    leave the run, and the server hands the job to somebody else, or the neighbours go on without
    this node.  One process a model: of several that share one, as under DistributedDataParallel,
    joining is not supported.

    A gossip method is given x_received - x_after in a gradient's place: ``dsgd(lr=1.0)`` is then
    Local SGD on a graph, and with one plain step of size eta a job every method is itself, with
    lr * eta.  One that wants gradients at several points (``motef-vr``) is refused.

    Args:
        address: of the server; or the experiment of a gossip run, a TOML file; or "ray".
        model: a torch module, on its device.
        optimizer: what steps its parameters; a list, where there are several.
        name: of this worker or node, and of its key.
        keys: a folder of keys; see ``offbeat keys``.
        patience_s: how long to wait for a server, or any neighbour, that is not there; None: for
            ever.
        bf16: differences travel to the server as bfloat16, half of the bytes.
        hosts: of a gossip run: its host file, or endpoints by name in the order of the nodes.
        folder: of this node, for its records and checkpoints; None: runs/EXPERIMENT-NAME.
        bind: where this node listens, if not at its address among the hosts.
        suspect_after_s: silence after which a neighbour is suspected.

    Raises:
        ConfigError: a model or optimiser that cannot take part, or another than the run's;
        and what ``Run.step`` raises.
    """
    _check(model, optimizer if isinstance(optimizer, Sequence) else [optimizer])
    own_keys = None if keys is None else Path(keys).expanduser()
    server = "://" in address
    if not server and bf16:
        raise ConfigError("bf16 = True is for servers; a gossip method has a compressor for that")
    source: Callable[[Flat], Source]
    if server:
        source = partial(_courier, address, name, own_keys)
    elif address == "ray":
        source = _host
    elif hosts is None:
        raise ConfigError(
            f'join("{address}"): give the address of a server, as tcp://host:5555; or the '
            'experiment of a gossip run with hosts = "hosts.toml" and the name of a node; or "ray"'
        )
    else:
        options = {"bind": bind, "suspect_after_s": suspect_after_s, "keys_folder": own_keys}
        source = _peering(Path(address), hosts, name, folder, options)
    return Run(source, model, patience_s, bf16)


def _host(flat: Flat) -> Source:
    """The desk of the loop that is run in this thread."""
    try:
        return HERE.get().seat(flat)
    except LookupError:
        raise ConfigError(
            'join("ray") belongs into a function that Ray runs: name it in the experiment, '
            'work = "own-loop(loop=\'module:function\')", with engine = "ray"'
        ) from None


def _peering(
    file: Path,
    hosts: str | Path | Mapping[str, str],
    name: str,
    folder: str | Path | None,
    options: dict[str, Any],
) -> Callable[[Flat], Source]:
    """Makes the peer of a node."""
    from offbeat.deploy.hosts import read_hosts
    from offbeat.runtime.experiment.experiment import read
    from offbeat.runtime.join.peering import LoopSource
    from offbeat.runtime.on_zeromq.alike import PeerAddress, alone

    if not isinstance(hosts, Mapping):
        hosts = {node.name: node.endpoint for node in read_hosts(Path(hosts)).nodes()}
    if name not in hosts:
        raise ConfigError(f'no node is called "{name}"{nearest(name, hosts)}')
    if options["keys_folder"] is not None and not options["bind"]:
        options |= {"bind": f"tcp://*:{hosts[name].rpartition(':')[2]}"}
    experiments = read(file, {"engine": "zmq", "clock": "real"})
    if len(experiments) > 1:
        raise ConfigError(f"{file}: is a comparison of {len(experiments)} runs; take one at a time")
    place = Path("runs") / f"{file.stem}-{name}" if folder is None else Path(folder)
    listed = {node: PeerAddress(node, endpoint) for node, endpoint in hosts.items()}
    topology = experiments[0].topology
    seats = topology.seated(listed) if topology else [*listed.values()]
    number = seats.index(listed[name])
    return partial(LoopSource, alone(experiments[0]), seats, number, place, **options)


def _courier(address: str, name: str, keys: Path | None, flat: Flat) -> Source:
    if len(text := shapes.write(flat.shapes)) > MOST_TEXT:
        raise ConfigError(
            f"the names and shapes of the model's {len(flat.shapes)} parameters take {len(text)} "
            f"bytes; at most {MOST_TEXT} can be told"
        )
    like = np.broadcast_to(np.zeros((), flat.dtype), flat.dim)
    return Courier(address, name, keys, like, text, flat.memory)


def _check(model: Any, optimizers: Sequence[Any]) -> None:
    """Raise ConfigError where the optimisers do not step the model, all of it and nothing else."""
    stepped = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    named = {name: id(p) for name, p in model.named_parameters()}
    trained = {name: id(p) for name, p in model.named_parameters() if p.requires_grad}
    if still := [name for name, p in trained.items() if p not in stepped]:
        raise ConfigError(
            f"no optimiser steps {', '.join(still[:4])}{'...' * (len(still) > 4)}; give join every "
            "optimiser of the model, or freeze these (requires_grad = False)"
        )
    if foreign := stepped - set(named.values()):
        raise ConfigError(
            f"the optimiser steps {len(foreign)} tensors that are not the model's; was it made for "
            "another model, or before this one was moved?"
        )


def weights(folder: str | Path, model: Any = None) -> dict[str, NDArray]:
    """The parameters in a run folder's newest checkpoint, by name.

        model.load_state_dict({k: torch.from_numpy(v) for k, v in weights(folder, model).items()},
                              strict=False)

    Args:
        folder: of the run.
        model: whose names they shall have, for example that of ``torch.compile``; None: those of
            the module that it, or ``DistributedDataParallel``, was put around.

    Raises:
        ConfigError: the model has other parameters.
        StorageError: no such run, or none of training loops.
    """
    path = Path(folder) / shapes.FILE
    try:
        layout = shapes.read(path.read_text())
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror})") from None
    x = checkpoint.read(Path(folder) / "checkpoint")[0]["x"]
    ends = np.cumsum([int(np.prod(shape)) for _, shape in layout])
    pieces = np.split(x, ends[:-1])
    found = {name: part.reshape(s) for (name, s), part in zip(layout, pieces, strict=True)}
    if model is None:
        return found
    called, layout = names(model), shapes.bare(layout)
    here = shapes.bare([(n, tuple(model.get_parameter(c).shape)) for n, c in called.items()])
    full = dict(zip((name for name, _ in here), called.values(), strict=True))
    known = dict(layout)
    if said := shapes.difference([one for one in here if one[0] in known], layout):
        raise ConfigError(f"the model is another than that of the run in {folder}: {said}")
    return {full[name]: part for name, part in zip(known, found.values(), strict=True)}
