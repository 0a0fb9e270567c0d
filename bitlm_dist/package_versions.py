"""Versions of the packages that results depend on, looked up without importing them."""

from importlib import metadata

PACKAGES = (
    "torch",
    "megatron-core",
    "deepspeed",
    "mosaicml-streaming",
    "triton",
    "numpy",
    "bitlm-dist",
)


def package_version(package: str) -> str | None:
    """The installed version of a distribution; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
