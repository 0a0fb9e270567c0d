import os

import pytest

from .cluster import Cluster, install


@pytest.fixture(scope="session")
def make_cluster(tmp_path_factory):
    """Function that builds a cluster, not started yet.

    Skips the test if no cluster can be started here, or fails it if BITLM_SLURM=require.
    """
    if reason := install():
        (pytest.fail if os.environ.get("BITLM_SLURM") == "require" else pytest.skip)(reason)

    # pytest removes its folders of earlier runs, also of killed ones
    return lambda **arguments: Cluster(folder=tmp_path_factory.mktemp("slurm"), **arguments)


@pytest.fixture(scope="session")
def cluster(make_cluster):
    """Started cluster of four nodes, shared by the session."""
    cluster = make_cluster()
    cluster.start()
    yield cluster
    cluster.stop()


@pytest.fixture(autouse=True)
def tidy(request):
    """Empty the queue and wait until all nodes are idle after each test."""
    yield
    if "cluster" in request.fixturenames:
        request.getfixturevalue("cluster").clear()
