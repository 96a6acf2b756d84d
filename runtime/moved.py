"""Where modules and names of 0.1 are now: an import of an old one works for one release, and warns.

``offbeat.runtime`` is private; what users extend is in ``offbeat.extend``.
"""

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = "offbeat.runtime."
MODULES = {
    "errors": "base.errors",
    "registry": "base.registry",
    "randomness": "base.randomness",
    "trees": "base.trees",
    "tensors": "base.tensors",
    "finite": "base.tensors",
    "memory": "base.tensors",
    "logs": "base.logs",
    "net.shapes": "base.shapes",
    "tables": "base.tables",
    "experiment": "experiment.experiment",
    "settings": "experiment.settings",
    "backends": "experiment.engines",
    "network": "node.network",
    "overrides": "experiment.overrides",
    "files": "experiment.files",
    "metrics": "experiment.metrics",
    "crew": "compute.backend",
    "farmed": "compute.farmed",
    "private": "compute.private",
    "own.desk": "compute.source",
    "own.flat": "compute.flat",
    "loop": "run.loop",
    "records": "run.records",
    "checkpoint": "run.checkpoint",
    "folders": "run.folders",
    "engine": "server.loop",
    "virtual": "server.virtual",
    "remote": "server.remote",
    "peer": "node.channels",
    "node": "node.node",
    "node_rounds": "node.synchronous",
    "node_pairs": "node.asynchronous",
    "gossip": "gossip.loop",
    "stacked": "gossip.stacked",
    "rounds": "gossip.rounds",
    "pairs": "gossip.pairs",
    "hosted": "gossip.hosted",
    "watched": "gossip.driver",
    "replayed": "gossip.replayed",
    "net.wire": "protocol.wire",
    "net.messages": "protocol.messages",
    "net.jobs": "protocol.roster",
    "net.link": "protocol.channel",
    "net.hub": "protocol.server",
    "net.spoke": "protocol.worker",
    "net.mesh": "protocol.peer",
    "net.seat": "protocol.slot",
    "net.sockets": "transport.sockets",
    "net.keys": "transport.keys",
    "net.metrics": "transport.metrics",
    "net.guard": "transport.guard",
    "actors.crew": "on_ray.server",
    "actors.gossip": "on_ray.gossip",
    "actors.loops": "on_ray.loops",
    "actors.start": "on_ray.start",
    "net.server": "on_zeromq.server",
    "net.worker": "on_zeromq.worker",
    "net.peer": "on_zeromq.peer",
    "net.peers": "on_zeromq.gossip",
    "net.local": "on_zeromq.local",
    "net.alike": "on_zeromq.alike",
    "own.courier": "join.courier",
    "own.peering": "join.peering",
    "own.run": "join.run",
    "api": "api.api",
    "plots": "api.plots",
    "build": "api.launch",
    "studies.report": "report.report",
    "studies.figures": "report.figures",
    "studies.recorded": "report.recorded",
    "studies.scenes": "report.scenes",
    "studies.watch": "report.watch",
    "studies.whatif": "report.whatif",
    "cli": "commands.cli",
    "net.cli": "commands.network",
    "studies.cli": "commands.studies",
    "strict": "commands.strict",
}
NAMES = {
    "base.errors": {"CrewError": "ComputeError"},
    "compute.backend": {
        "Order": "JobRequest",
        "Answer": "JobResult",
        "Crew": "ComputeBackend",
        "Event": "ComputeEvent",
    },
    "compute.source": {"Desk": "JobSource", "Hosting": "ActorSource"},
    "gossip.driver": {"Watched": "GossipDriver", "Place": "Slot"},
    "gossip.hosted": {"Parcel": "Envelope", "Hosted": "NodeLoop", "Report": "NodeReport"},
    "gossip.pairs": {"Event": "PairEvent"},
    "gossip.stacked": {"Links": "PerEdge", "Round": "RoundGraph"},
    "join.peering": {"Peering": "LoopSource"},
    "node.channels": {"Links": "LocalView", "Peer": "NodeChannels"},
    "node.node": {"Link": "Edge"},
    "on_ray.gossip": {"GossipHost": "GossipActor", "Seat": "GossipSlot"},
    "on_ray.server": {"Host": "ServerActor", "Seat": "ActorSlot", "RayCrew": "RayBackend"},
    "on_zeromq.alike": {"Seat": "PeerAddress"},
    "on_zeromq.gossip": {"Chair": "PeerSlot"},
    "on_zeromq.server": {"ZmqCrew": "ZmqBackend"},
    "protocol.channel": {"Link": "ReliableChannel"},
    "protocol.messages": {"Work": "JobMessage", "Result": "ResultMessage"},
    "protocol.peer": {"Mesh": "PeerProtocol"},
    "protocol.roster": {"Jobs": "JobBook"},
    "protocol.server": {"Hub": "ServerProtocol"},
    "protocol.slot": {"Seat": "MemberSlot"},
    "protocol.wire": {"Parcel": "Frames", "Message": "Received"},
    "protocol.worker": {"Spoke": "WorkerProtocol"},
    "report.recorded": {"Run": "RecordedRun"},
    "compute.jobs": {"Note": "TraceNote"},
    "experiment.engines": {"Backend": "Engine"},
    "server.loop": {"Engine": "ServerLoop"},
    "studies.cell": {"Job": "CellJob"},
    "transport.keys": {"Identity": "KeyPair"},
}


def attributes(old: str) -> Callable[[str], Any]:
    """The ``__getattr__`` of what was the module ``old``: of names where they are now."""
    new = MODULES[old]

    def get(name: str) -> Any:
        folders = vars(sys.modules[HERE + old]).get("__path__", ())
        if any(Path(folder, f"{name}.py").exists() for folder in folders):
            raise AttributeError(name)  # a module of the room, which is found without this
        now = NAMES.get(new, {}).get(name, name)
        value = None if name.startswith("__") else getattr(import_module(HERE + new), now, None)
        if value is None or isinstance(value, ModuleType):
            raise AttributeError(f"module {HERE + old!r} has no attribute {name!r}")
        text = f"{HERE}{old}.{name} is private, and moved: {HERE}{new}.{now}; see offbeat.extend"
        warnings.warn(text, DeprecationWarning, stacklevel=2)
        return value

    return get


def renamed(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """The ``__getattr__`` of a public module of which some ``names`` were others."""

    def get(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        text = f"{module}.{name} is called {names[name]} now"
        warnings.warn(text, DeprecationWarning, stacklevel=2)
        return getattr(import_module(module), names[name])

    return get


class Moved(MetaPathFinder, Loader):
    """Finds modules that are no files any more, and packages of them."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of ``fullname``, where it is an old one."""
        old = fullname.removeprefix(HERE)
        package = any(known.startswith(f"{old}.") for known in MODULES)
        if not fullname.startswith(HERE) or not (old in MODULES or package):
            return None
        return ModuleSpec(fullname, self, is_package=package)

    def exec_module(self, module: ModuleType) -> None:
        """Have it hand on what is elsewhere now."""
        old = module.__name__.removeprefix(HERE)
        if old in MODULES:
            module.__getattr__ = attributes(old)  # type: ignore[method-assign]


sys.meta_path.append(Moved())  # after all others: what is there is found first
