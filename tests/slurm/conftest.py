import os

import pytest

from .cluster import Cluster, install


@pytest.fixture(scope="session")
def make_cluster(tmp_path_factory):
    """(arguments) -> a cluster that is not started yet; skips where none can be, or fails if BITLM_SLURM=require."""
    if reason := install():
        (pytest.fail if os.environ.get("BITLM_SLURM") == "require" else pytest.skip)(reason)
    # a folder of pytest's: it removes the folders of earlier runs, also of killed ones
    return lambda **arguments: Cluster(folder=tmp_path_factory.mktemp("slurm"), **arguments)


@pytest.fixture(scope="session")
def cluster(make_cluster):
    """The cluster of the session: four nodes."""
    cluster = make_cluster()
    cluster.start()
    yield cluster
    cluster.stop()


@pytest.fixture(autouse=True)
def tidy(request):
    """After each test nothing is in the queue and all nodes are idle."""
    yield
    if "cluster" in request.fixturenames:
        request.getfixturevalue("cluster").clear()
