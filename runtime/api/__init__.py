"""Run, resume, replay: results and their pictures; what launches an engine."""

from offbeat.runtime.moved import attributes

__getattr__ = attributes("api")
