"""What is asked for: experiments, their options and files, and what is refused."""

from offbeat.runtime.moved import attributes

__getattr__ = attributes("experiment")
