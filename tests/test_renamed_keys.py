"""What becomes of a key of any earlier version: tests/config_keys.txt lists all that ever were."""

from pathlib import Path

import pytest
import yaml

from bitlm_dist import renamed_keys
from bitlm_dist.config_loading import (
    all_keys,
    build_config,
    load_config,
    load_run_config,
    unflatten,
)
from bitlm_dist.errors import UserError
from bitlm_dist.renamed_keys import (
    REMOVED_KEYS,
    RENAMED_KEYS,
    last_name,
    old_key_message,
    with_current_keys,
)

EVER = (Path(__file__).parent / "config_keys.txt").read_text().split()


def test_the_list_holds_every_key_that_there_is_or_was():
    assert sorted({*all_keys(), *RENAMED_KEYS, *REMOVED_KEYS}) == EVER, (
        "tests/config_keys.txt: add new keys, and leave the others"
    )


@pytest.mark.parametrize("key", EVER)
def test_a_key_is_valid_renamed_to_a_valid_one_or_removed(key):
    keys = set(all_keys())
    states = (key in keys, last_name(key) in keys - {key}, last_name(key) in REMOVED_KEYS)
    assert states.count(True) == 1

    if key in keys:
        assert old_key_message(key, "x") is None
    else:
        with pytest.raises(UserError, match=r"it was (renamed to|removed: ) ?\w") as caught:
            build_config({key: 1}, {key: "x"})
        assert str(caught.value).startswith(f"unknown key {key} (x): ")


def test_chains_are_followed_to_their_end(monkeypatch):
    monkeypatch.setattr(renamed_keys, "RENAMED_KEYS", {"a": "b", "b": "c", "x": "y"})
    monkeypatch.setattr(renamed_keys, "REMOVED_KEYS", {"y": "it did nothing"})

    assert old_key_message("a", "f:1") == "unknown key a (f:1): it was renamed to c"
    assert old_key_message("b", "f:1") == "unknown key b (f:1): it was renamed to c"
    for key in ("x", "y"):
        assert (
            old_key_message(key, "f:1")
            == f"unknown key {key} (f:1): it was removed: it did nothing"
        )
    assert old_key_message("c", "f:1") is None
    assert with_current_keys({"a": 1, "x": 2, "y": 3, "z": 4}) == {"c": 1, "z": 4}


@pytest.mark.parametrize("key", REMOVED_KEYS)
def test_a_removed_key_is_dropped_where_bitlm_wrote_it(key, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(unflatten({key: True, "training.steps": 7})))
    with pytest.raises(UserError, match=f"^unknown key {key} .*: it was removed: "):
        load_config(file)

    (tmp_path / "environment.json").write_text("{}")
    assert load_run_config(tmp_path) == build_config({"training.steps": 7})
    with pytest.raises(UserError, match="it was removed"):
        load_run_config(tmp_path, [f"--{key}", "true"])
