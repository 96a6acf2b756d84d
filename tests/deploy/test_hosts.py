"""Host files: what they say, and what is said of wrong ones."""

import re

import deploying
import pytest
from typer.testing import CliRunner

from offbeat.deploy.hosts import MOST_HOSTS, read_hosts
from offbeat.deploy.plan import plan
from offbeat.runtime.base.errors import ConfigError
from offbeat.runtime.commands.cli import app
from offbeat.runtime.join import peering
from offbeat.runtime.join.run import _peering


@pytest.fixture
def hosts(tmp_path):
    def made(text):
        (tmp_path / "hosts.toml").write_text(text)
        return read_hosts(tmp_path / "hosts.toml")

    return made


def test_nodes_are_the_slots_of_hosts_in_order(hosts):
    read = hosts("port = 6000\n" + deploying.HOSTS)
    assert [(node.name, node.host, node.endpoint, node.device) for node in read.nodes()] == [
        ("gpu1-0", "gpu1", "tcp://10.0.0.2:6000", "cuda:0"),
        ("gpu1-1", "gpu1", "tcp://10.0.0.2:6001", "cuda:1"),
        ("cpu1", "cpu1", "tcp://[fd00::3]:6000", "cpu"),
    ]
    assert read.serving().name == "head"
    assert [host.remote for host in read.hosts] == ["10.0.0.1", "ops@gpu1", "fd00::3"]
    assert read.node("cpu1") == read.nodes()[2]
    with pytest.raises(ConfigError, match='no node is called "gpu1-2"; did you mean "gpu1-'):
        read.node("gpu1-2")


def test_hosts_are_the_nodes_of_a_graph_by_name(hosts, tmp_path, monkeypatch):
    cities = tmp_path / "cities.csv"
    cities.write_text("oslo,bern\nbern,rome\n")
    text = deploying.PEERS.replace('topology = "ring"', f"topology = \"file('{cities}')\"")
    file = tmp_path / "experiment.toml"
    file.write_text(text)
    row = '[[hosts]]\nname = "{0}"\naddress = "{0}"\n'
    listed = hosts("".join(map(row.format, ["bern", "oslo", "rome"])))
    assert plan(file, nodes=listed).participants == ("oslo", "bern", "rome")
    assert plan(file, nodes=3).participants == ("n0", "n1", "n2")  # machines made for the run
    seen = []

    class Peer:
        def __init__(self, experiment, seats, me, *rest, **options):
            seen.append(([seat.name for seat in seats], me))

        def run(self):
            return "steps"

    monkeypatch.setattr("offbeat.runtime.on_zeromq.peer.PeerProcess", Peer)
    words = ["peer", str(file), "--hosts", str(tmp_path / "hosts.toml"), "--node"]
    assert CliRunner().invoke(app, [*words, "bern"]).exit_code == 0
    assert seen == [(["oslo", "bern", "rome"], 1)]
    hosts("".join(map(row.format, ["bern", "oslo", "paris"])))
    done = CliRunner().invoke(app, [*words, "bern"])
    assert 'no host is called "rome", as a node of the graph is' in str(done.exception)
    monkeypatch.setattr(peering, "LoopSource", Peer)
    ears = {name: f"tcp://127.0.0.1:{port}" for port, name in enumerate(["bern", "oslo", "rome"])}
    _peering(file, ears, "rome", tmp_path, {"bind": "", "keys_folder": None})(None)
    assert seen[1] == (["oslo", "bern", "rome"], 2)


ONE = '[[hosts]]\nname = "a"\naddress = "10.0.0.1"\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", 'list the hosts, each as [[hosts]] with name = "a", address = "10.0.0.1"'),
        ("hosts = []", "list the hosts"),
        ("hosts = [3]", "list the hosts"),
        ("x = [", "is not TOML"),
        ("sever = 'a'\n" + ONE, 'unknown key "sever"; did you mean "server"?'),
        ("server = 'b'\n" + ONE, 'server: no host is called "b"; known: a'),
        (ONE + "prt = 1", 'unknown key "prt"; did you mean "port"?'),
        (ONE.replace('"a"', '"A"'), '"A" is no name; take lower-case letters'),
        (ONE.replace('"a"', '"a-"'), '"a-" is no name'),
        (ONE.replace("10.0.0.1", "10.0.0.256"), '"10.0.0.256" is no address'),
        (ONE.replace("10.0.0.1", "a b"), '"a b" is no address'),
        (ONE.replace("10.0.0.1", "$(reboot)"), '"$(reboot)" is no address'),
        (ONE + "port = 65536", '"port" should be less than or equal to 65535'),
        (ONE + "port = 65535\nslots = 2", '"a-1" would listen on port 65536'),
        (ONE + "slots = -1", '"slots" should be greater than or equal to 0'),
        (ONE + "slots = 0", "no host has a slot, so nobody would compute"),
        (ONE + "device = 'gpu'", '"gpu" is no device; give cpu, cuda (one a slot) or cuda:0'),
        (ONE + "ssh = '-oProxyCommand=x'", "is nothing that ssh connects to"),
        (ONE + ONE, '"a" is there 2 times'),
        (ONE + ONE.replace('"a"', '"b"'), "2 nodes would listen on tcp://10.0.0.1:5555"),
        (ONE + 'slots = 2\n[[hosts]]\nname = "a-1"\naddress = "b"', '"a-1" is there 2 times'),
        ("server = 'server'\n" + ONE.replace('"a"', '"server"'), 'no node can be called "server"'),
    ],
)
def test_mistakes_are_one_sentence_each(text, said, hosts):
    with pytest.raises(ConfigError, match=re.escape(said)) as error:
        hosts(text)
    assert "hosts.toml: " in str(error.value)


def test_all_mistakes_at_once(hosts):
    text = "sever = 1\n" + ONE.replace("10.0.0.1", "a b") + ONE.replace('"a"', '"B"')
    with pytest.raises(ConfigError) as error:
        hosts(text)
    assert len(str(error.value).splitlines()) == 3


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_hosts(tmp_path / "absent.toml")
    (tmp_path / "latin.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_hosts(tmp_path / "latin.toml")


def test_there_is_a_limit(hosts):
    each = "".join(f'[[hosts]]\nname = "h{i}"\naddress = "h{i}"\n' for i in range(MOST_HOSTS + 1))
    with pytest.raises(ConfigError, match=f"{MOST_HOSTS + 1} hosts; at most {MOST_HOSTS}"):
        hosts(each)
