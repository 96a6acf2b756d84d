"""`offbeat doctor`: what stands in the way of a run on the machines of a host file.

Every check answers findings; what is wrong comes with what to mend.  A machine looks at itself and
at the way to all others; ``deploy.everywhere`` has every machine do so.
"""

import errno
import hashlib
import json
import platform
import socket
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import zmq
from zmq.auth import load_certificate

from offbeat.algorithms.gossip import Gossip
from offbeat.deploy.hosts import Host, Hosts, endpoint
from offbeat.deploy.plan import SERVER, as_run
from offbeat.runtime.base.errors import ConfigError, nearest
from offbeat.runtime.experiment import files
from offbeat.runtime.transport import keys as keyring

CONNECT_S = 3.0  # for a host to answer
TRIES = 3  # of which the fastest is the latency
AT_ONCE = 32  # connections
PROBE_BYTES = 2**24  # sent to measure bandwidth
PROBE_S = 10.0  # for that
PACKAGES = ("offbeat", "torch", "numpy", "pyzmq", "msgpack")
DOCTOR = b"offbeat doctor\n"  # what it says to who connects
# A connection of ZeroMQ begins with this; the answer's bytes 12 to 31 name the mechanism.
SIGNATURE = b"\xff\0\0\0\0\0\0\0\x01\x7f\x03"
Address = tuple[str, int]


class Finding(NamedTuple):
    """What one check found."""

    host: str
    """Where it was looked."""
    check: str
    state: str
    """good, note or wrong"""
    said: str
    mend: str = ""


class Found:
    """Collects findings of one host."""

    def __init__(self, host: str) -> None:
        self.host = host
        self.all: list[Finding] = []

    def good(self, check: str, said: str) -> None:
        """All is well."""
        self.all.append(Finding(self.host, check, "good", said))

    def note(self, check: str, said: str, mend: str = "") -> None:
        """It may be meant."""
        self.all.append(Finding(self.host, check, "note", said, mend))

    def wrong(self, check: str, said: str, mend: str) -> None:
        """The run would not work."""
        self.all.append(Finding(self.host, check, "wrong", said, mend))


def this_host(hosts: Hosts, named: str | None) -> Host | None:
    """The host this is: as it was named, else by its addresses; None: none of them."""
    if named is not None:
        names = {host.name: host for host in hosts.hosts}
        if named not in names:
            raise ConfigError(f'no host is called "{named}"{nearest(named, names)}')
        return names[named]
    own = {a.address for found in psutil.net_if_addrs().values() for a in found}
    own |= {socket.gethostname(), socket.getfqdn()}
    mine = [host for host in hosts.hosts if host.address in own]
    return mine[0] if len(mine) == 1 else None


def ears(hosts: Hosts, host: Host) -> list[Address]:
    """Where the nodes of ``host`` listen; only the server does, where there is one."""
    if hosts.server is not None:
        return [(host.address, host.port)] if host is hosts.server else []
    return [(node.address, node.port) for node in host.nodes()]


def look(
    hosts: Hosts,
    here: Host | None,
    *,
    keys: Path | None = None,
    experiment: Path | None = None,
    bind: bool = True,
) -> list[Finding]:
    """All that can be checked from this machine.

    Args:
        hosts: of the run.
        here: the one this is, if it is one of them.
        keys: the folder of keys of its node; or one that has such a folder for every node.
        experiment: the file of the run, to see that it can be read.
        bind: try its own ports too.
    """
    found = Found(here.name if here else "here")
    if here is None:
        said = "this machine is none of the hosts, or several: only the way to them is looked at"
        found.note("host", said, "say which it is: --host NAME")
    _programs(found)
    if experiment is not None:
        _experiment(found, experiment, hosts)
    if here is not None:
        if keys is not None:
            _keys(found, hosts, here, keys)
        if bind:
            for ear in ears(hosts, here):
                with listening(found, ear):
                    pass
    known = [host for host in hosts.hosts if _resolves(found, host)]
    others = [ear for host in known if host is not here for ear in ears(hosts, host)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        answers = list(pool.map(_reach, others))
    for answer in answers:
        _tell(found, answer, keys is not None)
    return found.all


def versions() -> dict[str, str]:
    """Of what a run depends on."""
    said = {"python": platform.python_version(), "libzmq": zmq.zmq_version()}
    for package in PACKAGES:
        try:
            said[package] = version(package)
        except PackageNotFoundError:
            said[package] = "missing"
    return said


def _programs(found: Found) -> None:
    said = versions()
    if missing := [package for package, number in said.items() if number == "missing"]:
        found.wrong("versions", f"{missing[0]} is not installed", f"pip install {missing[0]}")
    elif not zmq.has("curve"):
        said_zmq = f"libzmq {zmq.zmq_version()} has no CURVE, so nothing can be encrypted"
        found.wrong("versions", said_zmq, "install pyzmq from its wheel: pip install pyzmq")
    else:
        found.good("versions", ", ".join(f"{name} {number}" for name, number in said.items()))


def fingerprint(experiment: Path) -> dict[str, Any]:
    """Dotted key -> value of everything the run in a file depends on."""
    _, (one, *more) = as_run(experiment)
    if more:
        raise ConfigError(f"{experiment}: describes {1 + len(more)} runs; give a file of one")
    table = files.rewritten(one.table(), files.content)  # wherever they are on a host
    return {key: value for key, value in files.flat(table) if not key.startswith("files.")}


def is_gossip(experiment: Path) -> bool:
    """Whether the run in a file has peers only; False where the file cannot be read."""
    try:
        return all(isinstance(one.algorithm, Gossip) for one in as_run(experiment)[1])
    except ConfigError:  # one of the findings says so
        return False


def digest(settings: Mapping[str, Any]) -> str:
    """Twelve digits that tell configurations apart.

    >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1})
    True
    """
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _experiment(found: Found, experiment: Path, hosts: Hosts) -> None:
    try:
        known = digest(fingerprint(experiment))
        one = as_run(experiment)[1][0]
        if isinstance(one.algorithm, Gossip) and one.topology is not None:
            one.topology.seated({node.name: node for node in hosts.nodes()})
        found.good("experiment", f"{experiment} is {known}")
        if read := one.files():
            size = sum(path.stat().st_size for path in read) / 1e6
            found.good("files", f"{len(read)} that it reads are there, {size:,.1f} MB")
    except ConfigError as error:
        found.wrong("experiment", str(error), "mend the file, and bring it to all hosts")


def _folders(hosts: Hosts, here: Host, folder: Path) -> dict[str, Path]:
    """Where the keys of each node of ``here`` are."""
    mine = [node.name for node in here.nodes()] + [SERVER] * (here is hosts.server)
    return {node: folder / node if (folder / node).is_dir() else folder for node in mine}


def public_keys(hosts: Hosts, here: Host, folder: Path) -> dict[str, dict[str, str]]:
    """For each node of ``here``: its own public key, and those it lists, by whose they are."""
    found = {}
    for node, inner in _folders(hosts, here, folder).items():
        with suppress(ConfigError):  # what cannot be read is a finding
            listed = {name: key.decode() for key, name in keyring.authorized(inner).items()}
            found[node] = listed | {node: keyring.show(inner, node)}
    return found


def _keys(found: Found, hosts: Hosts, here: Host, folder: Path) -> None:
    """The own secret, that nobody else can read it, and the public keys of who is spoken to."""
    names = [node.name for node in hosts.nodes()]
    for node, inner in _folders(hosts, here, folder).items():
        if hosts.server is None:
            needed = [name for name in names if name != node]
        else:
            needed = names if node == SERVER else [SERVER]
        _keys_of(found, node, inner, needed)


def _keys_of(found: Found, node: str, folder: Path, needed: Iterable[str]) -> None:
    secret = folder / f"{node}.key_secret"
    try:
        mode = stat.S_IMODE(secret.stat().st_mode)
        public, private = load_certificate(secret)
    except OSError as error:
        said = f"{secret}: cannot be read ({error.strerror})"
        return found.wrong("keys", said, f"offbeat keys new {node} --keys {folder}")
    except ValueError as error:
        said = f"{secret}: is no key ({error})"
        return found.wrong("keys", said, f"remove it; offbeat keys new {node} --keys {folder}")
    if mode & 0o077:
        said = f"{secret}: others can read it (mode {mode:04o})"
        return found.wrong("keys", said, f"chmod 600 {secret}; better, make new keys")
    if private is None or zmq.curve_public(private) != public:
        said = f"{secret}: its secret and its public key do not belong together"
        return found.wrong("keys", said, f"remove it; offbeat keys new {node} --keys {folder}")
    lacking = [
        name
        for name in needed
        if not (folder / "authorized" / f"{name}.key").is_file()
        and not (folder / f"{name}.key").is_file()
    ]
    if lacking:
        said = f"{folder}: lacks the public key of {', '.join(lacking[:5])}"
        said += f" and {len(lacking) - 5} more" if len(lacking) > 5 else ""
        mend = f"offbeat keys authorize {lacking[0]} KEY --keys {folder}"
        return found.wrong("keys", said, mend)
    return found.good("keys", f"{folder}: those of {node}, and whom it has to know")


def _resolves(found: Found, host: Host) -> bool:
    try:
        to = {str(info[4][0]) for info in socket.getaddrinfo(host.address, host.port)}
    except OSError as error:
        said = f"{host.name}: {host.address} is not known here ({error.strerror})"
        found.wrong("names", said, "enter it in DNS or /etc/hosts, or give an IP address")
        return False
    if to != {host.address}:
        found.good("names", f"{host.name}: {host.address} is {', '.join(sorted(to))}")
    return True


@contextmanager
def listening(found: Found, ear: Address) -> Iterator[socket.socket | None]:
    """Listens as nodes with keys do, at all addresses, and says whether that can be done."""
    where = endpoint(*ear)
    with ExitStack() as stack:
        server = None
        try:
            family, _, _, _, to = socket.getaddrinfo(*ear, type=socket.SOCK_STREAM)[0]
            both = socket.has_dualstack_ipv6()
            everywhere = socket.AF_INET6 if both else socket.AF_INET
            server = stack.enter_context(
                socket.create_server(("", ear[1]), family=everywhere, dualstack_ipv6=both)
            )
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.bind((to[0], 0))
            found.good("bind", f"{where} can be bound")
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                found.note(
                    "bind",
                    f"{where} is in use",
                    "fine if it is the run; else stop what listens there, or give another port",
                )
            elif error.errno == errno.EADDRNOTAVAIL:
                found.note(
                    "bind",
                    f"{where} is no address of this machine",
                    "fine if it is forwarded here; else give the address at which the others "
                    "reach it (ip address shows its own)",
                )
            elif error.errno == errno.EACCES:
                found.wrong("bind", f"{where} is not allowed", "give a port above 1023")
            else:
                found.wrong("bind", f"{where}: {error.strerror}", "mend its address or port")
        yield server


class Reached(NamedTuple):
    """How a connection went."""

    ear: Address
    error: OSError | None
    latency_s: float
    greeting: bytes = b""


def _reach(ear: Address) -> Reached:
    latency_s, greeting = float("inf"), b""
    for left in reversed(range(TRIES)):
        began_s = time.monotonic()
        try:
            one = socket.create_connection(ear, CONNECT_S)
        except OSError as error:
            return Reached(ear, error, time.monotonic() - began_s)
        with one:
            latency_s = min(latency_s, time.monotonic() - began_s)
            if not left:
                greeting = _greeting(one)
    return Reached(ear, None, latency_s, greeting)


def _greeting(one: socket.socket) -> bytes:
    """What the other side says first; b"" if nothing."""
    said = b""
    try:
        one.sendall(SIGNATURE)
        while len(said) < 32 and not said.startswith(DOCTOR):
            if not (more := one.recv(64)):
                break
            said += more
    except OSError:  # too slow, or closed: what it said tells
        pass
    return said


def _tell(found: Found, reached: Reached, keys: bool) -> None:
    where, error, ms = endpoint(*reached.ear), reached.error, 1000 * reached.latency_s
    if isinstance(error, ConnectionRefusedError):
        said = f"{where} answers in {ms:.1f} ms, but nobody listens there"
        return found.note("reach", said, "start the node, or look from all hosts: --from-all")
    if isinstance(error, TimeoutError):
        said = f"{where} does not answer in {CONNECT_S:g} s"
        mend = f"is it up? let TCP port {reached.ear[1]} through the firewalls on the way"
        return found.wrong("reach", said, mend)
    if error is not None:
        said = f"{where}: {error.strerror or error}"
        return found.wrong("reach", said, "is it up, and is there a route to it?")
    greeting = reached.greeting
    if greeting.startswith(DOCTOR):
        said = f"{where} in {ms:.1f} ms, {_bandwidth(reached.ear) / 1e6:,.0f} MB/s"
        return found.good("reach", said)
    if not greeting:
        said = f"{where} takes connections, but says nothing in {CONNECT_S:g} s"
        return found.wrong("reach", said, "see what listens there, and whether it hangs: ss -ltnp")
    if len(greeting) < 32 or greeting[0] != 0xFF:
        said = f"{where} is taken by something that is not offbeat"
        return found.wrong("reach", said, "stop it, or give the host another port")
    mechanism = greeting[12:32].rstrip(b"\0").decode("ascii", "replace")
    if keys and mechanism != "CURVE":
        said = f"{where} listens without keys ({mechanism})"
        return found.wrong("reach", said, "start it with --keys, too")
    return found.good("reach", f"{where} in {ms:.1f} ms, {mechanism}")


def _bandwidth(ear: Address) -> float:
    """Bytes a second to a doctor that listens; 0 if it stopped."""
    began_s = time.monotonic()
    try:
        with socket.create_connection(ear, CONNECT_S) as one:
            one.settimeout(PROBE_S)
            one.sendall(bytes(PROBE_BYTES))
            one.shutdown(socket.SHUT_WR)
            while one.recv(64):  # its greeting; its end says that all has come
                pass
    except OSError:  # that it could be reached is said; this is a number beside it
        return 0.0
    return PROBE_BYTES / (time.monotonic() - began_s)
