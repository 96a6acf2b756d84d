"""Gossip: methods without a server, over graphs."""

from offbeat.algorithms.base import ALGORITHMS
from offbeat.algorithms.gossip.cedas import cedas
from offbeat.algorithms.gossip.choco import choco
from offbeat.algorithms.gossip.contract import Channel, Gossip, Node, Points
from offbeat.algorithms.gossip.deepsqueeze import deepsqueeze
from offbeat.algorithms.gossip.dsgd import ad_psgd, dsgd
from offbeat.algorithms.gossip.exact_diffusion import exact_diffusion
from offbeat.algorithms.gossip.motef import beer, motef, motef_vr
from offbeat.algorithms.gossip.noloco import noloco
from offbeat.algorithms.gossip.push import gradient_push
from offbeat.algorithms.gossip.tracking import dsgt, momentum_tracking

__all__ = [
    "ALGORITHMS",
    "Channel",
    "Gossip",
    "Node",
    "Points",
    "ad_psgd",
    "beer",
    "cedas",
    "choco",
    "deepsqueeze",
    "dsgd",
    "dsgt",
    "exact_diffusion",
    "gradient_push",
    "momentum_tracking",
    "motef",
    "motef_vr",
    "noloco",
]
