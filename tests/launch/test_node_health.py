import json

from bitlm_dist.launch.node_health import bad_nodes

LIMITS = {"seconds": 60, "disk_gb": 10, "clock_seconds": 5, "gemm": 0.7, "bandwidth": 0.5}
GOOD = {"error": "", "disk_gb": 100.0, "clock": 1000.0, "gemm": 600.0, "bandwidth": 40.0}


def judged(tmp_path, **changes):
    nodes = [f"n{i}" for i in range(5)]
    for node in nodes:
        values = {**GOOD, **changes.get(node, {})}
        if changes.get(node, {}) is not None:
            (tmp_path / f"{node}.json").write_text(json.dumps(values))
    return bad_nodes(tmp_path, nodes, LIMITS)


def test_equal_nodes_are_good(tmp_path):
    assert judged(tmp_path) == {}


def test_each_fault_is_named_with_its_node(tmp_path):
    assert judged(tmp_path, n1={"gemm": 300.0}) == {
        "n1": "matrix products at 300 TFLOP/s, the median node has 600"
    }
    assert judged(tmp_path, n2={"bandwidth": 19.0}) == {
        "n2": "links at 19 GB/s, the median node has 40"
    }
    assert judged(tmp_path, n3={"clock": 990.0}) == {
        "n3": "its clock is 10.0 s away from the others'"
    }
    assert judged(tmp_path, n4={"disk_gb": 3.0}) == {
        "n4": "3.0 GB free for the run folder, expected 10"
    }
    assert judged(tmp_path, n0={"error": "has 7 GPUs, expected 8"}) == {
        "n0": "has 7 GPUs, expected 8"
    }


def test_a_node_without_a_word_is_broken_and_no_yardstick(tmp_path):
    (tmp_path / "n1.json").write_text("{")
    for node in ("n0", "n2", "n3", "n4"):
        (tmp_path / f"{node}.json").write_text(
            json.dumps({**GOOD, "clock": None, "bandwidth": None})
        )
    found = bad_nodes(tmp_path, ["n0", "n1", "n2", "n3", "n4", "n5"], LIMITS)
    assert found == dict.fromkeys(("n1", "n5"), "no measurements within 60 s")


def test_few_nodes_are_no_yardstick_for_speed(tmp_path):
    for node, speed in (("n0", 600.0), ("n1", 600.0), ("n2", 100.0)):
        (tmp_path / f"{node}.json").write_text(json.dumps({**GOOD, "gemm": speed}))
    assert bad_nodes(tmp_path, ["n0", "n1", "n2"], LIMITS) == {}


def test_one_node_alone_is_its_own_median(tmp_path):
    (tmp_path / "n0.json").write_text(json.dumps({**GOOD, "clock": None, "bandwidth": None}))
    assert bad_nodes(tmp_path, ["n0"], LIMITS) == {}
