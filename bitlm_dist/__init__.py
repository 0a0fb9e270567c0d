"""Pretraining stack for BitLM: blocks of tokens written at once, as bits, by diffusion."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("bitlm-dist")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "unknown"
