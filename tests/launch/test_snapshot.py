import json
import subprocess

import pytest

from bitlm_dist.launch import snapshot


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """Git repository that holds the package."""
    root = tmp_path / "code"
    (root / "launch").mkdir(parents=True)
    (root / "launch" / "__init__.py").write_text("a = 1\n")
    monkeypatch.setattr(snapshot, "__file__", str(root / "launch" / "snapshot.py"))
    for words in (
        ["init", "-q"],
        ["add", "."],
        ["-c", "user.name=x", "-c", "user.email=x@y", "commit", "-qm", "first"],
    ):
        subprocess.run(["git", "-C", str(root), *words], check=True)
    return root


def test_commit_patch_and_untracked_files(checkout, tmp_path):
    snapshot.save_code(tmp_path)
    clean = json.loads((tmp_path / "code.json").read_text())
    commit = subprocess.run(
        ["git", "-C", str(checkout), "rev-parse", "HEAD"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert (clean["commit"], clean["changed"], clean["untracked"]) == (commit.strip(), False, [])
    assert not (tmp_path / "code.patch").exists()
    (checkout / "launch" / "__init__.py").write_text("a = 2\n")
    (checkout / "new.py").touch()
    snapshot.save_code(tmp_path)
    record = json.loads((tmp_path / "code.json").read_text())
    assert (record["changed"], record["untracked"]) == (True, ["new.py"])
    subprocess.run(["git", "-C", str(checkout), "checkout", "-q", "."], check=True)
    subprocess.run(["git", "-C", str(checkout), "apply", str(tmp_path / "code.patch")], check=True)
    assert (checkout / "launch" / "__init__.py").read_text() == "a = 2\n", (
        "the patch brings the code back"
    )
    subprocess.run(["git", "-C", str(checkout), "checkout", "-q", "."], check=True)
    snapshot.save_code(tmp_path)
    assert not (tmp_path / "code.patch").exists()


def test_an_installed_package_has_its_version_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(snapshot, "__file__", str(tmp_path / "site" / "launch" / "snapshot.py"))
    snapshot.save_code(tmp_path)
    record = json.loads((tmp_path / "code.json").read_text())
    assert record["version"]
    assert (record["commit"], record["changed"], record["untracked"]) == (None, False, [])
