"""The doctor: each defect, made here, and what it says of it."""

import os
import re
import shutil
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import deploying
import pytest
import zmq
from typer.testing import CliRunner
from zmq.auth import create_certificates

from offbeat.deploy import doctor, everywhere
from offbeat.deploy.hosts import read_hosts
from offbeat.runtime.base.errors import ConfigError
from offbeat.runtime.commands.cli import app
from offbeat.runtime.transport import keys

# Runs the command here, for each target in a home folder of its own.
SSH = """#!/usr/bin/env bash
while [[ $1 == -o ]]; do shift 2; done
[[ $1 != unreachable ]] || { echo "ssh: connect to host $1: No route to host" >&2; exit 255; }
mkdir -p "$HOME/$1"
cd "$HOME/$1"
shift
exec bash -c "$*"
"""


@contextmanager
def listener(address="127.0.0.1", backlog=5):
    with closing(socket.socket()) as one:
        one.bind((address, 0))
        one.listen(backlog)
        yield one.getsockname()[1]


def free(address="127.0.0.1"):
    with listener(address) as port:
        return port


def host_file(folder, *hosts, server=None):
    """Hosts are (name, address, port)."""
    text = f'server = "{server}"\n' if server else ""
    for name, address, port in hosts:
        text += f'[[hosts]]\nname = "{name}"\naddress = "{address}"\nport = {port}\n'
    path = folder / "hosts.toml"
    path.write_text(text)
    return path


def look(path, me=None, **options):
    hosts = read_hosts(path)
    return doctor.look(hosts, doctor.this_host(hosts, me), **options)


def of(found, check):
    return [(one.state, one.said, one.mend) for one in found if one.check == check]


# -- One machine -----------------------------------------------------------------------------------


def test_a_healthy_machine(tmp_path):
    path = host_file(tmp_path, ("a", "127.0.0.1", free()), ("b", "127.0.0.2", free("127.0.0.2")))
    (tmp_path / "run.toml").write_text(deploying.PEERS)
    done = CliRunner().invoke(
        app, ["doctor", str(path), "--host", "a", "--experiment", str(tmp_path / "run.toml")]
    )
    assert done.exit_code == 0, done.output
    assert "0 of 4 checks found something wrong" in done.output
    assert re.search(r"bind +good +tcp://127.0.0.1:\d+ can be bound", done.output)
    assert re.search(r"reach +note +tcp://127.0.0.2:\d+ answers .*nobody listens", done.output)


def test_what_is_wrong_makes_the_exit_code(tmp_path):
    path = host_file(tmp_path, ("a", "127.0.0.1", free()), ("b", "nowhere.invalid", 5555))
    done = CliRunner().invoke(app, ["doctor", str(path), "--host", "a"])
    assert done.exit_code == 2
    assert "1 of 3 checks found something wrong" in done.output
    assert "b: nowhere.invalid is not known here" in done.output
    assert "enter it in DNS or /etc/hosts" in done.output


def test_names_that_are_known_are_shown(tmp_path):
    path = host_file(tmp_path, ("a", "localhost", free()))
    ((state, said, _),) = of(look(path, "a"), "names")
    assert state == "good"
    assert re.match("a: localhost is (127.0.0.1|::1)", said)


def test_a_port_that_is_taken(tmp_path):
    with listener() as port:
        path = host_file(tmp_path, ("a", "127.0.0.1", port))
        ((state, said, mend),) = of(look(path, "a"), "bind")
    assert (state, said) == ("note", f"tcp://127.0.0.1:{port} is in use")
    assert mend.startswith("fine if it is the run; else stop what listens there")


def test_an_address_of_another_machine(tmp_path):
    path = host_file(tmp_path, ("a", "192.0.2.1", 5555))
    ((state, said, mend),) = of(look(path, "a"), "bind")
    assert (state, said) == ("note", "tcp://192.0.2.1:5555 is no address of this machine")
    assert mend.startswith("fine if it is forwarded here; else give the address")


def test_it_listens_at_all_addresses_as_nodes_do():
    """A name that is 127.0.1.1 on its own machine, as Debian has it, is another elsewhere."""
    found = doctor.Found("a")
    with doctor.listening(found, ("127.0.1.1", free())) as server:
        socket.create_connection(("127.0.0.1", server.getsockname()[1]), 5).close()
    assert [one.state for one in found.all] == ["good"]


def test_a_firewall_that_swallows(tmp_path, monkeypatch):
    """A full backlog drops what knocks, as a firewall does."""
    monkeypatch.setattr(doctor, "CONNECT_S", 0.5)
    with listener(backlog=0) as port:
        waiting = []
        try:
            for _ in range(3):
                one = socket.socket()
                waiting.append(one)
                one.setblocking(False)
                one.connect_ex(("127.0.0.1", port))
            path = host_file(
                tmp_path, ("a", "127.0.0.2", free("127.0.0.2")), ("b", "127.0.0.1", port)
            )
            ((state, said, mend),) = of(look(path, "a"), "reach")
        finally:
            for one in waiting:
                one.close()
    assert (state, said) == ("wrong", f"tcp://127.0.0.1:{port} does not answer in 0.5 s")
    assert f"let TCP port {port} through the firewalls" in mend


def test_only_the_server_has_to_be_reached_where_there_is_one(tmp_path):
    hosts = [(name, f"127.0.0.{i}", free()) for i, name in enumerate("abc", 1)]
    path = host_file(tmp_path, *hosts, server="b")
    assert len(of(look(path, "a"), "reach")) == 1
    assert of(look(path, "a"), "bind") == []
    assert of(look(path, "b"), "reach") == []
    assert len(of(look(path, "b"), "bind")) == 1


@pytest.fixture
def router():
    """A ROUTER socket; call it with the secret key's text for CURVE."""
    context = zmq.Context()
    socket = context.socket(zmq.ROUTER)

    def bound(curve=False):
        if curve:
            socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()
            socket.curve_server = True
        return socket.bind_to_random_port("tcp://127.0.0.1")

    yield bound
    socket.close(0)
    context.term()


@pytest.mark.parametrize(
    ("curve", "keys", "state", "said"),
    [
        (False, False, "good", r"in \d+\.\d ms, NULL"),
        (True, True, "good", r"in \d+\.\d ms, CURVE"),
        (False, True, "wrong", r"listens without keys \(NULL\)"),
    ],
)
def test_what_zeromq_says_first(curve, keys, state, said, router, tmp_path):
    port = router(curve)
    path = host_file(tmp_path, ("a", "127.0.0.2", free("127.0.0.2")), ("b", "127.0.0.1", port))
    found = look(path, "a", keys=tmp_path if keys else None)
    ((got, words, _),) = of(found, "reach")
    assert got == state
    assert re.search(said, words)


@pytest.mark.parametrize(
    ("first", "said"),
    [
        (b"SSH-2.0-OpenSSH\r\n", "is taken by something that is not offbeat"),
        (b"", "takes connections, but says nothing in 0.3 s"),
    ],
)
def test_a_port_that_another_program_has(first, said, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "CONNECT_S", 0.3)
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
        path = host_file(tmp_path, ("a", "127.0.0.2", free("127.0.0.2")), ("b", "127.0.0.1", port))
        with ThreadPoolExecutor(1) as pool:
            found = pool.submit(look, path, "a")
            kept = [server.accept()[0] for _ in range(doctor.TRIES)]
            kept[-1].sendall(first)
            ((state, got, mend),) = of(found.result(), "reach")
        for one in kept:
            one.close()
    assert (state, got) == ("wrong", f"tcp://127.0.0.1:{port} {said}")
    assert mend


def test_which_host_this_is(tmp_path):
    path = host_file(tmp_path, ("a", "192.0.2.1", 1), ("b", "127.0.0.1", 2))
    assert doctor.this_host(read_hosts(path), None).name == "b"
    assert doctor.this_host(read_hosts(path), "a").name == "a"
    with pytest.raises(ConfigError, match='no host is called "c"'):
        doctor.this_host(read_hosts(path), "c")
    path = host_file(tmp_path, ("a", "192.0.2.1", 1))
    assert doctor.this_host(read_hosts(path), None) is None


def test_an_experiment_is_read_as_machines_run_it(tmp_path):
    path = host_file(tmp_path, ("a", "127.0.0.1", free()))
    text = deploying.SERVER.replace("workers = 3", 'workers = 3\nspeeds = "real"')
    (tmp_path / "run.toml").write_text(text)
    ((state, said, _),) = of(look(path, "a", experiment=tmp_path / "run.toml"), "experiment")
    assert (state, "run.toml is " in said) == ("good", True)


def test_files_are_compared_by_what_is_in_them(tmp_path, monkeypatch):
    told = {}
    for name, label in (("a", 1), ("b", 1), ("c", 0)):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        Path("d.svm").write_text(f"0 1:1\n{label} 1:2\n1 1:3\n" * 2)
        data = 'name = "logistic"\ndata = "d.svm"\n'
        Path("run.toml").write_text(deploying.SERVER.replace(deploying.QUADRATIC, data))
        settings = doctor.fingerprint(Path("run.toml"))
        told[name] = {"versions": {}, "keys": {}, "settings": settings}
    everywhere.compare(found := [], told)
    ((host, check, state, said, _),) = found
    assert (host, check, state) == ("c", "experiment", "wrong")
    assert re.search(r"task\.data is \w{32}, elsewhere \w{32}", said)
    told = of(
        look(host_file(tmp_path, ("a", "127.0.0.1", free())), "a", experiment=Path("run.toml")),
        "files",
    )
    assert told == [("good", "1 that it reads are there, 0.0 MB", "")]


def test_hosts_that_are_no_nodes_of_the_graph(tmp_path):
    path = host_file(tmp_path, ("a", "127.0.0.1", free()), ("b", "127.0.0.2", free("127.0.0.2")))
    (tmp_path / "graph.csv").write_text("a,c\n")
    graph = f'topology = "file:{tmp_path}/graph.csv"\n'
    (tmp_path / "run.toml").write_text(f'task = "quadratic"\nalgorithm = "dsgd"\n{graph}')
    ((state, said, _),) = of(look(path, "a", experiment=tmp_path / "run.toml"), "experiment")
    assert (state, said[:48]) == ("wrong", 'no host is called "c", as a node of the graph is')


def test_an_experiment_that_cannot_be_read(tmp_path):
    path = host_file(tmp_path, ("a", "127.0.0.1", free()))
    (tmp_path / "run.toml").write_text(deploying.SERVER.replace('"pure"', '"pur"'))
    ((state, said, _),) = of(look(path, "a", experiment=tmp_path / "run.toml"), "experiment")
    assert state == "wrong"
    assert 'no algorithm is called "pur"; did you mean "pure"?' in said


# -- Keys ------------------------------------------------------------------------------------------


@pytest.fixture
def keyed(tmp_path):
    """A host file of two peers, and the keys of the first; answers what is found of them."""
    path = host_file(tmp_path, ("a", "127.0.0.1", free()), ("b", "127.0.0.2", free("127.0.0.2")))
    keys = tmp_path / "keys"
    (keys / "authorized").mkdir(parents=True)
    create_certificates(keys, "a")
    create_certificates(keys / "authorized", "b")
    (keys / "a.key_secret").chmod(0o600)

    def found():
        ((state, said, mend),) = of(look(path, "a", keys=keys), "keys")
        return state, said.replace(str(keys), "KEYS"), mend.replace(str(keys), "KEYS")

    return keys, found


def test_good_keys(keyed):
    assert keyed[1]()[0] == "good"


def test_keys_may_lie_in_a_folder_a_node(keyed, tmp_path):
    keys, found = keyed
    keys.rename(tmp_path / "a")
    keys.mkdir()
    (tmp_path / "a").rename(keys / "a")
    assert found()[:2] == ("good", "KEYS/a: those of a, and whom it has to know")


@pytest.mark.parametrize(
    ("spoil", "said", "mend"),
    [
        (
            lambda keys: (keys / "a.key_secret").unlink(),
            "KEYS/a.key_secret: cannot be read (No such file or directory)",
            "offbeat keys new a --keys KEYS",
        ),
        (
            lambda keys: (keys / "a.key_secret").chmod(0o640),
            "KEYS/a.key_secret: others can read it (mode 0640)",
            "chmod 600 KEYS/a.key_secret; better, make new keys",
        ),
        (
            lambda keys: (keys / "a.key_secret").write_text("curve\n"),
            "is no key",
            "remove it; offbeat keys new a --keys KEYS",
        ),
        (
            lambda keys: (keys / "authorized" / "b.key").unlink(),
            "KEYS: lacks the public key of b",
            "offbeat keys authorize b KEY --keys KEYS",
        ),
    ],
)
def test_bad_keys(spoil, said, mend, keyed):
    keys, found = keyed
    spoil(keys)
    state, found_said, found_mend = found()
    assert state == "wrong"
    assert said in found_said
    assert found_mend == mend


def test_a_secret_beside_another_public_key(keyed):
    keys, found = keyed
    other = Path(create_certificates(keys, "c")[1])
    secret = (keys / "a.key_secret").read_text()
    pattern = r'secret-key = "(.*)"'
    theirs = re.search(pattern, other.read_text())[1]
    (keys / "a.key_secret").write_text(secret.replace(re.search(pattern, secret)[1], theirs))
    state, said, _ = found()
    assert state == "wrong"
    assert "its secret and its public key do not belong together" in said
    assert theirs not in said


# -- All machines ----------------------------------------------------------------------------------


@pytest.fixture
def examine(tmp_path, monkeypatch):
    """Runs the doctor from all of three hosts, each with the experiment."""
    deploying.program(tmp_path / "bin", "ssh", SSH)
    deploying.program(
        tmp_path / "bin",
        "offbeat",
        f'#!/bin/sh\nexec {sys.executable} -m offbeat.runtime.commands.cli "$@"\n',
    )
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    hosts = [(name, f"127.0.0.{i}", free(f"127.0.0.{i}")) for i, name in enumerate("ab", 1)]
    path = host_file(tmp_path, *hosts)
    for _, address, _ in hosts:
        folder = tmp_path / "home" / address / "run"
        folder.mkdir(parents=True)
        (folder / "experiment.toml").write_text(deploying.PEERS)

    def found():
        return everywhere.everywhere(
            read_hosts(path), offbeat="offbeat", folder="run", keys=None,
            experiment="experiment.toml",
        )  # fmt: skip

    return tmp_path, path, found


def test_every_host_looks_at_every_other(examine):
    _, _, found = examine
    all_found = found()
    assert {one.state for one in all_found} == {"good"}
    reached = sorted(
        (one.host, one.said.split(" in ")[0]) for one in all_found if one.check == "reach"
    )
    assert [host for host, _ in reached] == ["a", "b"]
    assert all(
        re.search(r"in \d+\.\d ms, [\d,]+ MB/s", said)
        for _, said, _ in of(all_found, "reach")
    )  # fmt: skip
    assert [one.host for one in all_found if one.check == "bind"] == ["a", "b"]
    first, second = (said.split(" is ")[1] for _, said, _ in of(all_found, "experiment"))
    assert first == second


def test_what_tells_hosts_apart(examine):
    tmp_path, path, found = examine
    experiment = tmp_path / "home" / "127.0.0.2" / "run" / "experiment.toml"
    experiment.write_text(deploying.PEERS.replace("0.1", "0.2"))
    deploying.program(tmp_path / "bin", "date", "#!/bin/sh\necho 1.0\n")
    path.write_text(
        path.read_text() + '[[hosts]]\nname = "c"\naddress = "127.0.0.3"\nssh = "unreachable"\n'
    )
    all_found = found()
    told = of(all_found, "experiment")[-1]
    assert told[0] == "wrong"
    assert re.search(r"others have \w{12}: algorithm\.lr is 0\.2, elsewhere 0\.1", told[1])
    assert of(all_found, "ssh") == [
        (
            "wrong",
            "unreachable: the doctor cannot look there (ssh: connect to host unreachable: "
            "No route to host)",
            "let ssh unreachable in without a password, and have offbeat there (--offbeat PATH)",
        )
    ]
    clocks = [one for one in all_found if one.check == "clock"]
    assert [(one.host, one.state) for one in clocks] == [("a", "note"), ("b", "note")]
    assert all(re.match(r"its clock is [\d,]+\.\d s away", one.said) for one in clocks)


def test_versions_have_to_agree():
    same = {"offbeat": "1.0", "numpy": "2.0"}
    told = {
        name: {"versions": same | other, "keys": {}, "settings": {}}
        for name, other in {"a": {}, "b": {"offbeat": "0.9"}, "c": {"numpy": "1.9"}}.items()
    }
    found = []
    everywhere.compare(found, told)
    assert [(one.host, one.state, one.said) for one in found] == [
        ("b", "wrong", "offbeat 0.9; others have 1.0"),
        ("c", "note", "numpy 1.9; others have 2.0"),
    ]
    assert found[0].mend == "pip install offbeat==1.0"


def test_keys_have_to_be_those_of_whom_they_are_listed_for(tmp_path):
    hosts = read_hosts(
        host_file(tmp_path, *((name, "127.0.0.1", i) for i, name in enumerate("ab", 1)))
    )
    for name in "ab":
        (tmp_path / name / "authorized").mkdir(parents=True)
        create_certificates(tmp_path / name, name)
    for name, other in ("ab", "ba"):
        shutil.copy(tmp_path / other / f"{other}.key", tmp_path / name / "authorized")

    def compared():
        told = {
            host.name: {
                "versions": {}, "settings": {}, "keys": doctor.public_keys(hosts, host, tmp_path),
            }
            for host in hosts.hosts
        }  # fmt: skip
        everywhere.compare(found := [], told)
        return found

    assert compared() == []
    create_certificates(tmp_path / "b", "b")  # anew, and a was not told
    ((host, check, state, said, mend),) = compared()
    assert (host, check, state) == ("a", "keys", "wrong")
    assert said == "a lists another public key of b than it has"
    assert keys.show(tmp_path / "b", "b") in mend


def test_peers_have_no_server_to_be_reached(tmp_path):
    hosts = [(name, f"127.0.0.{i}", free(f"127.0.0.{i}")) for i, name in enumerate("abc", 1)]
    path = host_file(tmp_path, *hosts, server="b")
    found = {}
    for shape, text in deploying.SHAPES.items():
        (tmp_path / "run.toml").write_text(text)
        words = ["doctor", str(path), "--host", "a", "--experiment", str(tmp_path / "run.toml")]
        said = CliRunner().invoke(app, words).output
        found[shape] = len(re.findall("^a +reach ", said, re.MULTILINE))
    assert found == {"server": 1, "peers": 2}
