"""Compressors with a true wire format: what is counted is what travels."""

from offbeat.algorithms.compression.blocks import blocks
from offbeat.algorithms.compression.combine import compose, contractive, induced
from offbeat.algorithms.compression.contract import COMPRESSORS, Compressor, Message, decode
from offbeat.algorithms.compression.dithering import natural_dithering, qsgd, terngrad
from offbeat.algorithms.compression.halves import bf16, fp16
from offbeat.algorithms.compression.identity import identity
from offbeat.algorithms.compression.kashin import kashin
from offbeat.algorithms.compression.natural import natural
from offbeat.algorithms.compression.powersgd import powersgd
from offbeat.algorithms.compression.quantile import quantile
from offbeat.algorithms.compression.randk import randk
from offbeat.algorithms.compression.sign import scaled_sign, sign
from offbeat.algorithms.compression.threshold import bernoulli, threshold
from offbeat.algorithms.compression.topk import topk

__all__ = [
    "COMPRESSORS",
    "Compressor",
    "Message",
    "bernoulli",
    "bf16",
    "blocks",
    "compose",
    "contractive",
    "decode",
    "fp16",
    "identity",
    "induced",
    "kashin",
    "natural",
    "natural_dithering",
    "powersgd",
    "qsgd",
    "quantile",
    "randk",
    "scaled_sign",
    "sign",
    "terngrad",
    "threshold",
    "topk",
]
