"""The submitted batch script: golden files for three presets, shellcheck, and hostile names."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bitlm_dist.launch.cluster import Cluster, load_cluster
from bitlm_dist.launch.render import Job, render

GOLDEN = Path(__file__).parent / "golden"
SHELLCHECK = Path(sys.executable).with_name("shellcheck")
PRESETS = ["plain", "pyxis-8xh100", "numa-8xh100"]


def job(cluster, run="/shared/runs/first", nodes=16, **more):
    return Job(Path(run), (Path("/shared/data/web"),), nodes, cluster, **more)


def preset(name, **changes):
    return load_cluster(
        name, {"python": "/opt/bitlm/bin/python", "host_python": "/usr/bin/python3", **changes}
    )


def checked(script, *options):
    answer = subprocess.run(
        [SHELLCHECK, *options, "-"], input=script, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr


@pytest.mark.parametrize("name", PRESETS)
def test_scripts_of_the_presets(name):
    """After a deliberate change run it with UPDATE_GOLDEN=1, and read the difference."""
    script, file = render(job(preset(name))), GOLDEN / f"{name}.sh"
    if "UPDATE_GOLDEN" in os.environ:
        file.write_text(script)
    assert script == file.read_text()
    checked(script)


VARIANTS = [
    {"launcher": "torchrun", "requeue": False, "numa": [0, 0, 1, 1], "tasks_per_node": 4},
    {
        "launcher": "nvrx",
        "container": {
            "runtime": "apptainer",
            "image": "/images/bit lm.sif",
            "mounts": ["/scratch"],
        },
    },
    {
        "preflight": {"enabled": False},
        "modules": ["cuda/13", "gcc; rm -rf /"],
        "exclusive": True,
        "options": ["--mail-type=END"],
    },
    {
        "partition": "gpu",
        "account": "a b",
        "qos": "high",
        "constraint": "ib&a100",
        "reservation": "r",
        "memory": "500G",
    },
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_every_switch_renders_what_shellcheck_takes(changes):
    # SC2016: SLURM_NODEID must be expanded by the shell of each node
    checked(render(job(preset(None, **changes), exclude=("n3", "n7"))), "--exclude=SC2016")


def test_launchers_of_a_node_s_ranks_are_one_task_a_node():
    cluster = preset("numa-8xh100", launcher="torchrun")
    script = render(job(cluster, nodes=3))
    assert "#SBATCH --ntasks-per-node=1\n#SBATCH --cpus-per-task=96\n" in script
    assert "--nodes=3 --ntasks=3 --ntasks-per-node=1" in script
    assert "--nnodes=3 --nproc-per-node=8" in script
    assert render(job(preset("numa-8xh100"), nodes=3)).count("--ntasks=24 --ntasks-per-node=8") == 1


HOSTILE = '/tmp/it\'s $(touch pwned) `touch pwned` "x" \\ ; touch pwned # é %j'


def test_no_name_reaches_the_shell_unquoted(tmp_path):
    cluster = Cluster(
        python=HOSTILE,
        host_python=HOSTILE,
        env={"NAME": HOSTILE},
        modules=(HOSTILE,),
        partition="a; touch pwned",
    )
    script = render(job(cluster, run=HOSTILE))
    head = "".join(
        line
        for line in script.partition("mapfile -t nodes")[0].splitlines(True)
        if not line.startswith("trap")
    )
    shown = (
        'module() { printf "%s\\0" "$2"; }\n'
        + head
        + '\nprintf "%s\\0" "$run" "$python" "$host_python" "$NAME"\n'
    )
    answer = subprocess.run(
        ["bash", "-c", shown], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert answer.stdout.split("\0")[:-1] == [HOSTILE] * 5
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert list(tmp_path.iterdir()) == []
    options = [line for line in script.splitlines() if line.startswith("#SBATCH")]
    assert '#SBATCH --partition="a; touch pwned"' in options
    assert (
        f"#SBATCH --output={_quoted(HOSTILE.replace('%', '%%') + '/launch/job-%j.log')}" in options
    )


def _quoted(text):
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
