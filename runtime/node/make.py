"""One node of an experiment: synchronous or asynchronous, as it says."""

from offbeat.algorithms.gossip import Gossip
from offbeat.runtime.base.errors import ConfigError
from offbeat.runtime.compute.private import private
from offbeat.runtime.experiment.experiment import Experiment
from offbeat.runtime.node.asynchronous import PairingNode
from offbeat.runtime.node.network import Network
from offbeat.runtime.node.node import GossipNode, Setting
from offbeat.runtime.node.synchronous import RoundNode


def gossip_node(
    experiment: Experiment, i: int, *, incarnation: int = 0, joining: bool = False
) -> GossipNode:
    """Node ``i`` of a run under a real clock.

    Raises:
        ConfigError: only virtual time can do that.
    """
    e, method, topology = experiment, experiment.algorithm, experiment.topology
    assert isinstance(method, Gossip)
    assert topology is not None
    network = Network(topology, e.fleet, method, e.seed, e.asynchronous)
    if network.dropping:
        raise ConfigError(
            'on_outage = "lose" is for virtual time: here nodes are away when they are; '
            'take "pause"'
        )
    if e.replicas == "global":
        raise ConfigError('replicas = "global" is for virtual time; take "links"')
    setting = Setting(e.task, e.work, private(method), network, e.seed)
    kind: type[GossipNode] = PairingNode if e.asynchronous else RoundNode
    return kind(setting, i, incarnation=incarnation, joining=joining)
