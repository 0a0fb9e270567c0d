from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitlm_dist.errors import UserError
from bitlm_dist.paths import absolute_path, escape_path, expand_path, relative_to_note


@pytest.fixture(autouse=True)
def variables(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DATA", "/disk/$odd")
    monkeypatch.delenv("NOT_SET", raising=False)


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("~", "/home/me"),
        ("~/runs/x", "/home/me/runs/x"),
        ("a/~/b", "a/~/b"),
        ("$DATA/x", "/disk/$odd/x"),
        ("${HOME}/$DATA", "/home/me//disk/$odd"),
        ("cost$", "cost$"),
        ("a$$b", "a$b"),
        ("${here}/data", "/conf/data"),
        ("${here}", "/conf"),
    ],
)
def test_what_is_replaced(text, path):
    assert expand_path(text, Path("/conf")) == path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("$NOT_SET/x", r"the variable \$NOT_SET is not set"),
        (
            "a/${NOT_SET}",
            r"the variable \$\{NOT_SET\} is not set: set it, or write \$\$ for a dollar sign",
        ),
        ("~no-such-user/x", "there is no home folder ~no-such-user: write the path in full"),
        ("${here}/x", "is not set"),
    ],
)
def test_what_has_no_value_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        expand_path(text)


@given(st.text("a$~{}/ .", max_size=12))
def test_a_stored_path_is_read_back(name):
    path = Path("/runs", name.lstrip("/"))
    assert Path(expand_path(escape_path(path))) == path


def test_absolute_paths_keep_links_but_mean_the_same_file(tmp_path, monkeypatch):
    (tmp_path / "far" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "deep")
    monkeypatch.chdir(tmp_path)
    assert absolute_path(Path("link/x")) == tmp_path / "link" / "x"
    assert absolute_path(Path("link/../x")) == tmp_path / "far" / "x"
    assert relative_to_note(Path("x")) == f" (from {tmp_path})"
    assert relative_to_note(tmp_path) == ""
