"""The host file: which machines take part in a run, and where each of them is heard."""

import ipaddress
import re
import tomllib
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tomli_w
from pydantic import AfterValidator, Field

from offbeat.runtime.base.errors import ConfigError, nearest
from offbeat.runtime.base.registry import settings

PORT = 5555
MOST_HOSTS = 4096
MOST_SLOTS = 128  # of one host
MOST_NAME = 40  # what is put behind it still makes a label of at most 63 characters
NAME = re.compile(rf"[a-z]([a-z0-9-]{{0,{MOST_NAME - 2}}}[a-z0-9])?")
LABEL = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9])?"
ADDRESS = re.compile(rf"{LABEL}(\.{LABEL})*")
DEVICE = re.compile(r"cpu|cuda|cuda:\d{1,2}")
REMOTE = re.compile(rf"([a-z_][a-z0-9_-]*@)?{ADDRESS.pattern}")


def name(text: str) -> str:
    """``text``, which files, units and DNS can take as a name.

    >>> name("gpu-1")
    'gpu-1'
    >>> name("GPU 1")
    Traceback (most recent call last):
    ...
    offbeat.ConfigError: "GPU 1" is no name; take lower-case letters, digits and \
hyphens, a letter first, at most 40
    """
    if not NAME.fullmatch(text):
        raise ConfigError(
            f'"{text}" is no name; take lower-case letters, digits and hyphens, a letter first, '
            f"at most {MOST_NAME}"
        )
    return text


def _address(text: str) -> str:
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        pass
    if not ADDRESS.fullmatch(text) or re.fullmatch(r"[\d.]+", text):
        raise ConfigError(f'"{text}" is no address; give a host name, IPv4 or IPv6 address')
    return text


def _device(text: str) -> str:
    if not DEVICE.fullmatch(text):
        raise ConfigError(f'"{text}" is no device; give cpu, cuda (one a slot) or cuda:0')
    return text


def _remote(text: str) -> str:
    if not REMOTE.fullmatch(text):
        raise ConfigError(f'"{text}" is nothing that ssh connects to; give host or user@host')
    return text


Name = Annotated[str, AfterValidator(name)]
Port = Annotated[int, Field(ge=1, le=65535)]


@settings
class Host:
    """One machine.

    Args:
        name: of the host; of its node, too, where it has one slot.
        address: under which the other hosts reach it.
        port: of its first node; those of the others follow. The server listens on it, too.
        device: of its nodes: cpu, cuda (slot 0 on cuda:0, slot 1 on cuda:1, ...) or cuda:0.
        slots: nodes that run there; 0: it only serves.
        ssh: how the launcher gets there, as user@host; by its address, where nothing is said.
    """

    name: Name
    address: Annotated[str, AfterValidator(_address)]
    port: Port = PORT
    device: Annotated[str, AfterValidator(_device)] = "cpu"
    slots: Annotated[int, Field(ge=0, le=MOST_SLOTS)] = 1
    ssh: Annotated[str, AfterValidator(_remote)] | None = None

    @property
    def remote(self) -> str:
        """What ssh connects to."""
        return self.ssh or self.address

    def nodes(self) -> "list[HostNode]":
        """Its nodes, ``gpu1`` or ``gpu1-0``, ``gpu1-1``, ..., in order."""
        return [
            HostNode(
                f"{self.name}-{slot}" if self.slots > 1 else self.name,
                self.name,
                self.address,
                self.port + slot,
                f"cuda:{slot}" if self.device == "cuda" else self.device,
            )
            for slot in range(self.slots)
        ]


class HostNode(NamedTuple):
    """A participant: a worker of a server, or a peer."""

    name: str
    host: str
    address: str
    port: int
    device: str

    @property
    def endpoint(self) -> str:
        """Where it is reached, as ZeroMQ writes it.

        >>> HostNode("a", "a", "::1", 5555, "cpu").endpoint
        'tcp://[::1]:5555'
        """
        return endpoint(self.address, self.port)


class Hosts(NamedTuple):
    """The machines of a run; ``server`` is the one that serves, where a method has a server."""

    hosts: tuple[Host, ...]
    server: Host | None = None

    def nodes(self) -> list[HostNode]:
        """All participants, in order; see ``Topology.seated`` for which node of a graph each is."""
        return [node for host in self.hosts for node in host.nodes()]

    def node(self, wanted: str) -> HostNode:
        """A node, by its name."""
        nodes = self.nodes()
        for node in nodes:
            if node.name == wanted:
                return node
        raise ConfigError(f'no node is called "{wanted}"{nearest(wanted, [n.name for n in nodes])}')

    def toml(self) -> str:
        """The text of a host file that says the same."""
        head = {"server": self.server.name} if self.server else {}
        tables = [{k: v for k, v in vars(one).items() if v is not None} for one in self.hosts]
        return tomli_w.dumps({**head, "hosts": tables})

    def serving(self) -> Host:
        """The host of the server; a ConfigError where the file names none."""
        if self.server is None:
            raise ConfigError(
                f"the method has a server: say on which host it runs, as "
                f'server = "{self.hosts[0].name}"'
            )
        return self.server


def endpoint(address: str, port: int) -> str:
    """``tcp://address:port``, an IPv6 address in brackets."""
    return f"tcp://[{address}]:{port}" if ":" in address else f"tcp://{address}:{port}"


def read_hosts(path: Path) -> Hosts:
    """The machines that a host file lists.

    A host file is TOML: ``[[hosts]]`` with the fields of ``Host``; ``server = "name"`` says which
    of them serves; ``port = 6000`` is the port of hosts that say none.

    Raises:
        ConfigError: naming the file, and every mistake in it.
    """
    try:
        return from_table(tomllib.loads(path.read_text()))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: is not TOML: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


KEYS = ("server", "port", "hosts")


def from_table(table: Mapping[str, Any]) -> Hosts:
    """The machines that a table describes; all its mistakes are told at once."""
    mistakes = [f'unknown key "{key}"{nearest(key, KEYS)}' for key in table if key not in KEYS]
    tables = table.get("hosts")
    if not isinstance(tables, list) or not tables or not all(isinstance(t, dict) for t in tables):
        example = 'name = "a", address = "10.0.0.1"'
        raise ConfigError(
            "\n".join([*mistakes, f"list the hosts, each as [[hosts]] with {example}"])
        )
    if len(tables) > MOST_HOSTS:
        raise ConfigError(f"{len(tables)} hosts; at most {MOST_HOSTS}")
    default = {"port": table["port"]} if "port" in table else {}
    hosts = []
    for number, one in enumerate(tables):
        try:
            hosts.append(Host(**{**default, **one}))
        except ConfigError as error:
            mistakes.append(f"hosts[{number}]: {error}")
    server = next((host for host in hosts if host.name == table.get("server")), None)
    if "server" in table and server is None and not mistakes:
        names = [host.name for host in hosts]
        mistakes.append(
            f'server: no host is called "{table["server"]}"{nearest(str(table["server"]), names)}'
        )
    mistakes += _clashes(hosts, server)
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return Hosts(tuple(hosts), server)


def _clashes(hosts: list[Host], server: Host | None) -> list[str]:
    """What no host can see alone."""
    found = []
    nodes = [node for host in hosts for node in host.nodes()]
    if server is not None and any(node.name == "server" for node in nodes):
        found.append('no node can be called "server": the keys of the server are; rename its host')
    if hosts and not nodes:
        found.append("no host has a slot, so nobody would compute")
    names = sorted([node.name for node in nodes] + [host.name for host in hosts if host.slots != 1])
    found += [f'"{name}" is there {n} times' for name, n in _repeated(names)]
    ears = sorted((node.address, node.port) for node in nodes)
    if server is not None and server.slots == 0:
        ears = sorted([*ears, (server.address, server.port)])
    found += [
        f"{n} nodes would listen on {endpoint(*ear)}; give their hosts other ports"
        for ear, n in _repeated(ears)
    ]
    found += [
        f'"{node.name}" would listen on port {node.port}; give its host a lower port'
        for node in nodes
        if node.port > 65535
    ]
    return found


def _repeated(items: list[Any]) -> list[tuple[Any, int]]:
    counts = [(item, len(list(same))) for item, same in groupby(items)]
    return [(item, count) for item, count in counts if count > 1]
