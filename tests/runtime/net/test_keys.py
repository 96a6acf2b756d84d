"""Keys: who is let in, who is not, and what is never shown."""

import errno
import stat
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
import zmq

from offbeat.runtime.base.errors import ConfigError, Refused
from offbeat.runtime.transport import keys


@pytest.fixture
def folder(tmp_path):
    for name in (keys.SERVER, "a", "b"):
        keys.new(tmp_path, name)
    keys.authorize(tmp_path, "ann", keys.show(tmp_path, "a"))
    return tmp_path


@pytest.fixture
def context():
    """A context, and a stack on which sockets and gates are closed before it."""
    with zmq.Context() as context, ExitStack() as stack:
        yield SimpleNamespace(
            zmq=context, stack=stack, socket=lambda kind: stack.enter_context(context.socket(kind))
        )


def test_secrets_are_for_their_owner_alone(folder):
    path = folder / "a.key_secret"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    own = keys.identity(folder, "a")
    assert own.secret.decode() not in repr(own)
    assert own.secret.decode() not in keys.show(folder, "a")
    path.chmod(0o640)
    with pytest.raises(ConfigError, match=f"others can read this secret; run: chmod 600 {path}"):
        keys.identity(folder, "a")


def test_mistakes_are_told(folder):
    with pytest.raises(ConfigError, match="exists; remove it first"):
        keys.new(folder, "a")
    with pytest.raises(ConfigError, match="make it with: offbeat keys new carl"):
        keys.identity(folder, "carl")
    with pytest.raises(ConfigError, match=r'"\.\./x" is no name for a key'):
        keys.new(folder, "../x")
    with pytest.raises(ConfigError, match="the key: is no CURVE key of 40 characters"):
        keys.authorize(folder, "carl", "short")
    with pytest.raises(ConfigError, match="that key is authorized already, as ann"):
        keys.authorize(folder, "carl", keys.show(folder, "a"))
    with pytest.raises(ConfigError, match="the server's public key is missing"):
        keys.server_key(folder / "elsewhere")


def test_the_only_keys_of_a_folder_need_no_name(tmp_path):
    with pytest.raises(ConfigError, match="has no secret key; say whose"):
        keys.identity(tmp_path, "")
    keys.new(tmp_path, "w1")
    assert keys.identity(tmp_path, "") == keys.identity(tmp_path, "w1")
    keys.new(tmp_path, "w2")
    with pytest.raises(ConfigError, match="has the keys of w1, w2; say whose"):
        keys.identity(tmp_path, "")


@pytest.mark.parametrize(
    ("endpoint", "alone"),
    [("tcp://127.0.0.1:1", True), ("tcp://[::1]:1", True), ("tcp://localhost:1", True),
     ("ipc:///tmp/x", True), ("tcp://0.0.0.0:1", False), ("tcp://*:1", False),
     ("tcp://10.0.0.1:1", False), ("tcp://example.org:1", False)],
)  # fmt: skip
def test_only_loopback_goes_without_keys(endpoint, alone, folder):
    assert keys.loopback(endpoint) == alone
    keys.check_bind(endpoint, folder)
    if not alone:
        with pytest.raises(ConfigError, match="make keys with offbeat keys new server"):
            keys.check_bind(endpoint, None)


@pytest.mark.parametrize("bad", ["127.0.0.1:5555", "node7"])
def test_what_is_no_address_is_not_called_one_of_the_network(bad):
    with pytest.raises(ConfigError, match=f'{bad}: is no address; write it as "tcp://host:5555"'):
        keys.check_bind(bad, None)


def serve(context, folder):
    gate = keys.Gate(context.zmq, folder)
    context.stack.callback(gate.close)
    socket = context.socket(zmq.ROUTER)
    socket.linger = 0
    own = keys.identity(folder, keys.SERVER)
    keys.as_server(socket, own)
    endpoint = f"tcp://127.0.0.1:{socket.bind_to_random_port('tcp://127.0.0.1')}"
    return gate, socket, endpoint, own.public


def knock(context, endpoint, own=None, server=None):
    """The first word of the handshake's end, as the client's monitor has it."""
    socket = context.socket(zmq.DEALER)
    socket.linger = 0
    if own is not None:
        keys.as_client(socket, own, server)
    monitor = socket.get_monitor_socket()
    socket.connect(endpoint)
    socket.send(b"hello")
    ends = keys.REFUSED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    while monitor.poll(5000):
        event = keys.recv_monitor_message(monitor)["event"]
        if event & (ends | zmq.EVENT_DISCONNECTED):
            break
    socket.disable_monitor()
    monitor.close()
    return event


def test_who_is_listed_comes_in_under_the_name_of_its_key(folder, context):
    gate, socket, endpoint, server = serve(context, folder)
    gate.self_test(endpoint, server)
    event = knock(context, endpoint, keys.identity(folder, "a"), server)
    assert event == zmq.EVENT_HANDSHAKE_SUCCEEDED
    assert socket.poll(5000)
    frames = socket.recv_multipart(copy=False)
    assert {gate.who(frame) for frame in frames} == {"ann"}
    (folder / keys.AUTHORIZED / "ann.key").unlink()
    assert gate.revoked() == {"ann"}
    assert gate.who(frames[0]) == ""  # also where the connection is still there
    keys.authorize(folder, "ann", keys.show(folder, "b"))
    gate.revoked()
    assert gate.who(frames[0]) == ""  # the name is another key's now
    keys.authorize(folder, "anna", keys.show(folder, "a"))
    gate.revoked()
    assert gate.who(frames[0]) == "anna"


def test_others_are_refused(folder, context):
    _, socket, endpoint, server = serve(context, folder)
    for own, key, expected in [
        (keys.identity(folder, "b"), server, zmq.EVENT_HANDSHAKE_FAILED_AUTH),  # not listed
        (keys.identity(folder, "a"), keys.identity(folder, "b").public, None),  # another server's
        (None, None, None),  # no keys at all
    ]:
        event = knock(context, endpoint, own, key)
        assert event != zmq.EVENT_HANDSHAKE_SUCCEEDED
        assert expected in (None, event)
    assert not socket.poll(200)  # nothing of it came here


def test_a_server_whose_keys_are_not_checked_finds_out(folder, context):
    socket = context.socket(zmq.ROUTER)
    own = keys.identity(folder, keys.SERVER)
    socket.curve_secretkey, socket.curve_server = own.secret, True  # as many examples have it
    endpoint = f"tcp://127.0.0.1:{socket.bind_to_random_port('tcp://127.0.0.1')}"
    with pytest.raises(Refused, match="lets in a key that nobody listed"):
        keys.Gate.self_test(SimpleNamespace(_context=context.zmq), endpoint, own.public)


def test_where_nothing_checks_keys_nobody_comes_in(folder, context):
    socket = context.socket(zmq.ROUTER)
    own = keys.identity(folder, keys.SERVER)
    keys.as_server(socket, own)
    endpoint = f"tcp://127.0.0.1:{socket.bind_to_random_port('tcp://127.0.0.1')}"
    event = knock(context, endpoint, keys.identity(folder, "a"), own.public)
    assert event != zmq.EVENT_HANDSHAKE_SUCCEEDED
    assert not socket.poll(200)


def test_a_key_taken_off_the_list_is_told_once_and_not_let_in_again(folder, context):
    gate, _, endpoint, server = serve(context, folder)
    assert gate.revoked() == set()
    (folder / keys.AUTHORIZED / "ann.key").unlink()
    assert gate.revoked() == {"ann"}
    assert gate.revoked() == set()
    event = knock(context, endpoint, keys.identity(folder, "a"), server)
    assert event == zmq.EVENT_HANDSHAKE_FAILED_AUTH


def test_a_dead_authenticator_is_noticed(folder, context):
    gate, *_ = serve(context, folder)
    assert gate.revoked() == set()
    gate._thread.pipe.send(b"TERMINATE")
    gate._thread.thread.join(5.0)
    with pytest.raises(Refused, match="the thread that checks keys has ended"):
        gate.revoked()


def test_a_list_that_cannot_be_read_lets_nobody_in_and_ends_nothing(folder, context, caplog):
    gate, _, _, _ = serve(context, folder)
    path = folder / keys.AUTHORIZED / "ann.key"
    good = path.read_text()
    path.write_text("half a ")
    assert gate.revoked() == {"ann"}
    assert "nobody comes in under that name" in caplog.text
    path.write_text(good)
    assert gate.revoked() == set()
    assert gate._thread.names == keys.authorized(folder)


def test_no_key_that_is_made_begins_with_a_dash(tmp_path, monkeypatch):
    made, make = [], keys.create_certificates

    def create(folder, name):
        path = make(folder, name)
        if len(made) < 2:  # as one of ninety does
            text = Path(path[0]).read_text()
            public = keys.show(folder, name)
            Path(path[0]).write_text(text.replace(public, "-" + public[1:]))
        made.append(path)
        return path

    monkeypatch.setattr(keys, "create_certificates", create)
    keys.new(tmp_path, "a")
    assert len(made) == 3
    assert not keys.show(tmp_path, "a").startswith("-")
    assert (tmp_path / "a.key_secret").stat().st_mode & 0o777 == 0o600


def test_where_no_file_can_be_opened_nobody_is_revoked(folder, context, monkeypatch):
    gate = keys.Gate(context.zmq, folder)
    context.stack.callback(gate.close)
    keys.authorize(folder, "bob", keys.show(folder, "b"))
    load = keys.load_certificate

    def short(path):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(keys, "load_certificate", short)
    assert gate.revoked() == set()
    assert set(gate._thread.names.values()) == {"ann"}
    monkeypatch.setattr(keys, "load_certificate", load)
    assert gate.revoked() == set()
    assert set(gate._thread.names.values()) == {"ann", "bob"}  # looked at again
