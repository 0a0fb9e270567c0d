import pytest
from bitlm_dist.launch.cluster import CLUSTERS, load_cluster

from bitlm_dist.errors import UserError


@pytest.mark.parametrize("name", sorted(path.stem for path in CLUSTERS.glob("*.yaml")))
def test_shipped_clusters_load(name):
    assert load_cluster(name, {"time": "1-00:30:00"}).seconds == 88_200


def test_ranks_of_a_node():
    assert load_cluster(None, {}).ranks_per_node == 1
    assert load_cluster(None, {"gpus_per_node": 8}).ranks_per_node == 8
    assert load_cluster(None, {"gpus_per_node": 8, "tasks_per_node": 4}).ranks_per_node == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"time": "2h"}, "time = '2h' .command line.: expected HH:MM:SS"),
        ({"time": "0:08:00"}, "time = 0:08:00 leaves nothing to train in: it must be above signal_lead"),
        ({"gpu": 8}, "gpu = 8 .command line.: extra inputs are not permitted"),
        ({"env": {"A B": "x"}}, "'A B' is no name of a variable"),
        ({"partition": "a\nb"}, "expected one line"),
        ({"numa": [0, 1]}, "numa names 2 NUMA nodes, for 1 ranks"),
        ({"watch": {"beat": 60, "frozen": 120}}, "watch.frozen = 120.0 must be at least three times watch.beat"),
        ({"launcher": "mpirun"}, "launcher = 'mpirun'"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    with pytest.raises(UserError, match=message):
        load_cluster(None, changes)


def test_files_that_are_none(tmp_path):
    with pytest.raises(UserError, match="no such file; shipped with the package: numa-8xh100, plain, pyxis-8xh100"):
        load_cluster("nowhere", {})
    file = tmp_path / "mine.yaml"
    for text, message in (("a: [", "is no valid YAML"), ("- a", "must hold `key: value` lines, found a list")):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            load_cluster(str(file), {})
    file.write_text("")
    assert load_cluster(str(file), {"account": "x"}).account == "x"
