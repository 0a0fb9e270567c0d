import os
from unittest import mock

import pytest

from bitlm_dist.__main__ import main
from bitlm_dist.errors import UserError
from bitlm_dist.launch.cluster import CLUSTERS, load_cluster


@pytest.mark.parametrize("name", sorted(path.stem for path in CLUSTERS.glob("*.yaml")))
def test_shipped_clusters_load(name):
    assert load_cluster(name, {"time": "1-00:30:00"}).walltime_seconds == 88_200


def test_ranks_of_a_node():
    assert load_cluster(None, {}).ranks_per_node == 1
    assert load_cluster(None, {"gpus_per_node": 8}).ranks_per_node == 8
    assert load_cluster(None, {"gpus_per_node": 8, "tasks_per_node": 4}).ranks_per_node == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"time": "2h"}, "time = 2h .command line.: expected HH:MM:SS"),
        (
            {"time": "0:08:00"},
            "time = 0:08:00 leaves no time to train: it must be above signal_before_timeout",
        ),
        ({"gpu": 8}, "gpu = 8 .command line.: extra inputs are not permitted"),
        ({"env": {"A B": "x"}}, "'A B' is not a variable name"),
        ({"partition": "a\nb"}, "expected one line"),
        ({"numa": [0, 1]}, "numa names 2 NUMA nodes, for 1 ranks"),
        (
            {"watch": {"heartbeat_interval": 60, "heartbeat_timeout": 120}},
            "watch.heartbeat_timeout = 120.0 must be at least three times watch.heartbeat_interval",
        ),
        ({"launcher": "mpirun"}, "launcher = mpirun"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    with pytest.raises(UserError, match=message):
        load_cluster(None, changes)


def test_files_that_are_none(tmp_path):
    with pytest.raises(
        UserError, match="no such file; shipped with the package: numa-8xh100, plain, pyxis-8xh100"
    ):
        load_cluster("nowhere", {})
    file = tmp_path / "mine.yaml"
    for text, message in (
        ("a: [", "is no valid YAML"),
        ("- a", "must hold `key: value` lines, found a list"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            load_cluster(str(file), {})
    file.write_text("")
    assert load_cluster(str(file), {"account": "x"}).account == "x"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("signal_lead: 60", "signal_lead (FILE:1): it was renamed to signal_before_timeout"),
        ("pause: 2", "pause (FILE:1): it was renamed to restart_backoff"),
        ("watch: {beat: 2}", "watch.beat (FILE:1): it was renamed to watch.heartbeat_interval"),
        (
            "watch:\n  frozen: 60",
            "watch.frozen (FILE:2): it was renamed to watch.heartbeat_timeout",
        ),
        ("watch.stalled: 60", "watch.stalled (FILE:1): it was renamed to watch.step_timeout"),
        ("watch: {start: 60}", "watch.start (FILE:1): it was renamed to watch.startup_timeout"),
    ],
)
def test_a_key_of_an_earlier_version_is_refused_with_its_new_name(text, message, tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    argv = ["bitlm", "launch", "local", "quickstart", "--cluster", str(file)]
    with (
        mock.patch("sys.argv", argv),
        mock.patch.dict(os.environ),
        pytest.raises(SystemExit) as exit,
    ):
        main()
    assert exit.value.code == 2
    expected = f"bitlm: unknown key {message}".replace("FILE", str(file))
    assert capsys.readouterr().err == expected + "\n"
