"""Who may take part: CURVE keys in files, and the list of public keys that a server lets in.

A folder of keys has ``NAME.key`` (public), ``NAME.key_secret`` (0600) and ``authorized/NAME.key``,
the public keys of others under the names by which this side knows them.  Who a message is from is
what its key says, never what it says itself.
"""

import ipaddress
import os
import re
import stat
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from logging import getLogger
from pathlib import Path
from urllib.parse import urlsplit

import zmq
from zmq.auth import create_certificates, load_certificate
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

from offbeat.runtime.base.errors import ConfigError, Refused, passes
from offbeat.runtime.run.checkpoint import write_whole

log = getLogger("offbeat.net")
SERVER = "server"  # the name under which workers know the server's key
DOMAIN = b"offbeat"
AUTHORIZED = "authorized"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
SELF_TEST_S = 5.0
HANDSHAKE_MS = 3000
REFUSED = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL


@dataclass(frozen=True)
class KeyPair:
    """One node's own keys, in the text form of ZeroMQ (Z85)."""

    name: str
    public: bytes
    secret: bytes = field(repr=False)


def new(folder: Path, name: str) -> Path:
    """Make keys for ``name``; answers the file of the public one."""
    secret = folder / f"{_name(name)}.key_secret"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Made before it is filled, so that nobody else can ever read it.
        os.close(os.open(secret, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        raise ConfigError(f"{secret} exists; remove it first, or choose another name") from None
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written ({error.strerror})") from None
    while True:
        public, _ = create_certificates(folder, name)
        if not show(folder, name).startswith("-"):  # which shells and programs take for an option
            return Path(public)


def show(folder: Path, name: str) -> str:
    """The public key of ``name``."""
    return _public(folder / f"{_name(name)}.key").decode()


def authorize(folder: Path, name: str, key: str) -> Path:
    """Let in who has the secret of public ``key``, and call it ``name``."""
    path = folder / AUTHORIZED / f"{_name(name)}.key"
    _check(key, "the key")
    others = {known.decode(): who for known, who in authorized(folder).items()}
    if others.get(key, name) != name:
        raise ConfigError(f"that key is authorized already, as {others[key]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, f'curve\n    public-key = "{key}"\n'.encode())  # servers look at it
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from None
    return path


def authorized(folder: Path) -> dict[bytes, str]:
    """Public key -> name, of who may take part."""
    return {_public(path): path.stem for path in sorted((folder / AUTHORIZED).glob("*.key"))}


def _signature(folder: Path) -> dict[str, tuple[int, int, int]]:
    """What changes when the list of a folder does, without reading it."""
    with suppress(FileNotFoundError), os.scandir(folder / AUTHORIZED) as entries:
        known = [(entry.name, entry.stat()) for entry in entries]
        return {name: (s.st_mtime_ns, s.st_size, s.st_ino) for name, s in known}
    return {}


def identity(folder: Path, name: str) -> KeyPair:
    """The keys of this node; without a name, the only ones in the folder.

    Raises:
        ConfigError: there are none, or others could read the secret one.
    """
    if not name:
        names = sorted(path.stem for path in folder.glob("*.key_secret"))
        if len(names) != 1:
            there = f"has the keys of {', '.join(names)}" if names else "has no secret key"
            raise ConfigError(f"{folder}: {there}; say whose to use with --name NAME")
        (name,) = names
    path = folder / f"{_name(name)}.key_secret"
    if not path.exists():
        raise ConfigError(f"{path}: there is no such key; make it with: offbeat keys new {name}")
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise ConfigError(f"{path}: others can read this secret; run: chmod 600 {path}")
    public, secret = _load(path)
    if secret is None:
        raise ConfigError(f"{path}: holds no secret key")
    return KeyPair(name, public, secret)


def server_key(folder: Path) -> bytes:
    """The public key that the server has to have."""
    for path in (folder / AUTHORIZED / f"{SERVER}.key", folder / f"{SERVER}.key"):
        if path.exists():
            return _public(path)
    raise ConfigError(
        f"{folder}: the server's public key is missing; there, offbeat keys show server prints it, "
        f"and here: offbeat keys authorize {SERVER} KEY"
    )


def public(folder: Path, name: str) -> bytes:
    """The public key that node ``name`` has to have."""
    path = folder / AUTHORIZED / f"{_name(name)}.key"
    if not path.exists():
        raise ConfigError(
            f"{folder}: the public key of {name} is missing; there, offbeat keys show {name} "
            f"prints it, and here: offbeat keys authorize {name} KEY"
        )
    return _public(path)


def knock(endpoint: str) -> str:
    """Where this machine itself reaches what listens at ``endpoint``."""
    for everywhere in ("tcp://0.0.0.0:", "tcp://[::]:", "tcp://*:"):
        if endpoint.startswith(everywhere):
            return "tcp://127.0.0.1:" + endpoint.removeprefix(everywhere)
    return endpoint


def _name(name: str) -> str:
    if not NAME.fullmatch(name):
        raise ConfigError(f'"{name}" is no name for a key; take letters, digits, dots and dashes')
    return name


def _public(path: Path) -> bytes:
    return _load(path)[0]


def _load(path: Path) -> tuple[bytes, bytes | None]:
    try:
        public, secret = load_certificate(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    for key in (public, secret):
        if key is not None:
            _check(key.decode(errors="replace"), str(path))
    return public, secret


def _check(key: str, where: str) -> None:
    try:
        good = len(z85.decode(key.encode())) == 32
    except (ValueError, KeyError):
        good = False
    if not good:  # what it is instead may be a secret
        raise ConfigError(f"{where}: is no CURVE key of 40 characters")


def loopback(endpoint: str) -> bool:
    """Whether only this machine can reach ``endpoint``.

    >>> [loopback(e) for e in ("tcp://127.0.0.1:5555", "ipc:///tmp/run", "tcp://0.0.0.0:5555")]
    [True, True, False]
    """
    if endpoint.startswith(("ipc://", "inproc://")):
        return True
    host = urlsplit(endpoint).hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_bind(endpoint: str, folder: Path | None) -> None:
    """Refuse to listen to the network without keys."""
    if "://" not in endpoint:
        raise ConfigError(f'{endpoint}: is no address; write it as "tcp://host:5555"')
    if folder is None and not loopback(endpoint):
        raise ConfigError(
            f"{endpoint} can be reached by others: make keys with offbeat keys new {SERVER}, let "
            f"workers in with offbeat keys authorize NAME KEY, and give --keys FOLDER; or bind "
            "tcp://127.0.0.1:5555"
        )


def as_client(socket: zmq.Socket, own: KeyPair, server: bytes) -> None:
    """Have ``socket`` prove who it is, and talk to ``server`` only."""
    socket.curve_publickey, socket.curve_secretkey = own.public, own.secret
    socket.curve_serverkey = server


def as_server(socket: zmq.Socket, own: KeyPair) -> None:
    """Have ``socket`` let in only whom the context's ``Gate`` knows."""
    socket.curve_publickey, socket.curve_secretkey = own.public, own.secret
    socket.curve_server = True
    socket.zap_domain = DOMAIN
    socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)


class _Names(ThreadAuthenticator):
    """Lets in the keys that are listed; messages carry theirs, whose name may change."""

    names: Mapping[bytes, str] = {}

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether ``key`` may come in; called by pyzmq."""
        return key in self.names

    def curve_user_id(self, client_public_key: bytes) -> str:
        """What messages of this key carry as User-Id: itself."""
        return z85.encode(client_public_key).decode()


class Gate:
    """Lets in whose key is in the folder's list, for all sockets of a context.

    Args:
        context: whose sockets.
        folder: of keys; looked at again now and then.
    """

    def __init__(self, context: zmq.Context, folder: Path) -> None:
        self._folder, self._context = folder, context
        self._thread = _Names(context)
        self._listed = _signature(folder)
        self._thread.names = authorized(folder)
        self._thread.start()
        self._thread.configure_curve_callback(DOMAIN.decode(), self._thread)

    def who(self, frame: zmq.Frame) -> str:
        """The name under which the key of who sent ``frame`` is listed; "": it is not any more."""
        return self._thread.names.get(str(frame.get("User-Id")).encode(), "")

    def revoked(self) -> set[str]:
        """Names whose keys are not in the list any more since this was asked last.

        Raises:
            Refused: nothing checks keys any more.
        """
        if not self._thread.is_alive():
            raise Refused(
                "the thread that checks keys has ended, so nobody new could join; start this "
                "process again, and it goes on where it was"
            )
        before, now = self._thread.names, dict[bytes, str]()
        try:
            if (listed := _signature(self._folder)) == self._listed:
                return set()
            for path in sorted((self._folder / AUTHORIZED).glob("*.key")):
                try:
                    now[_public(path)] = path.stem
                except ConfigError as error:  # being written, or removed; a run does not end for it
                    if passes(error):
                        raise
                    log.warning("%s; nobody comes in under that name", error)
        except (ConfigError, OSError) as error:
            if passes(error):
                return set()  # the list is as it was; the next look reads it
            raise
        self._listed = listed
        self._thread.names = now
        return set(before.values()) - set(now.values()) | {
            name for key, name in before.items() if now.get(key) != name
        }

    def self_test(self, endpoint: str, server: bytes) -> None:
        """Knock with a random key.

        Raises:
            Refused: it was let in, or nobody answered.
        """
        public, secret = zmq.curve_keypair()
        socket = self._context.socket(zmq.DEALER)
        socket.linger = 0
        as_client(socket, KeyPair("nobody", public, secret), server)
        monitor = socket.get_monitor_socket()
        try:
            socket.connect(endpoint)
            end_s = time.monotonic() + SELF_TEST_S
            while (left_s := end_s - time.monotonic()) > 0:
                if not monitor.poll(left_s * 1000):
                    break
                event = recv_monitor_message(monitor)["event"]
                if event & REFUSED:
                    return
                if event & zmq.EVENT_HANDSHAKE_SUCCEEDED:
                    raise Refused(f"{endpoint} lets in a key that nobody listed; it is not safe")
            raise Refused(f"{endpoint}: whether keys are checked could not be seen; nobody answers")
        finally:
            socket.disable_monitor()
            monitor.close()
            socket.close()

    def close(self) -> None:
        """Let nobody in any more."""
        if self._thread.pipe and not self._thread.is_alive():  # nobody would read what stop sends
            self._thread.pipe.close(0)
            self._thread.pipe = None  # type: ignore[assignment]
        self._thread.stop()
