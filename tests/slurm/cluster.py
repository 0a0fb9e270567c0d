"""A real Slurm cluster of a few nodes on one machine, for tests.

It needs root and the packages of Debian or Ubuntu. Every daemon runs in its own namespaces
(hostname, mounts, processes). So a job sees a node as on a real cluster: it has a name, resolves
the names of the others by a private hosts file, and dies as a whole with its first process. All
state is in one temporary folder and all ports are random, so several clusters can run side by side.
"""

import atexit
import contextlib
import os
import random
import re
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import psutil

PACKAGES = {
    "slurmctld": ["slurmctld"],
    "slurmd": ["slurmd"],
    "slurm-client": ["sbatch", "srun", "scontrol", "squeue", "sinfo", "scancel"],
    "munge": ["munged"],
    "util-linux": ["unshare", "setpriv", "mount"],
}
PLUGINS = "slurm-wlm-basic-plugins"  # has no program to look for
APT = ["slurmctld", "slurmd", "slurm-client", "munge", PLUGINS, "iproute2"]
POLICY = Path("/usr/sbin/policy-rc.d")  # Debian asks it before a package starts a service

# When the first process of a process namespace dies, the kernel kills all others; unshare dies with
# this program, even by kill -9. Later mounts of the machine appear in the nodes (slave), but never
# the reverse.
NAMESPACES = [
    "setpriv",
    "--pdeathsig=KILL",
    "unshare",
    "--uts",
    "--pid",
    "--kill-child",
    "--mount-proc",
    "--propagation=slave",
]

# The shell stays, as the first process must reap orphans. It does not run the daemon in the
# background: jobs would inherit an ignored SIGINT. Each node has its own shared memory, as a real
# machine has, so leftovers of killed jobs are removed with the node.
INSIDE = [
    *("sh", "-c"),
    'set -e; mount --bind "$1" /etc/hosts; mount -t tmpfs shm /dev/shm; hostname "$2"; shift 2; '
    '"$@"; exit',
    "sh",
]

# states of a job that has ended, unless it is requeued
FINAL = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "TIMEOUT",
}

CONFIG = """\
ClusterName=test
SlurmctldHost=control(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={state}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={state}/control
SlurmctldPidFile={state}/control.pid
SlurmdSpoolDir={state}/spool/%n
SlurmdPidFile={state}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={state}/jobs.txt
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_interval=1,sched_min_interval=0,\
requeue_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
ReturnToService=2
JobRequeue=1
KillWait=5
KillOnBadExit=1
OverTimeLimit=0
MinJobAge=600
FirstJobId={first_job}
SlurmdTimeout=10
TCPTimeout=2
MessageTimeout=10
GresTypes=gpu
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE \
GraceTime=10
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""
NODE = (
    "NodeName={name} NodeHostname={name} NodeAddr={address} Port={port} CPUs={cpus} Boards=1"
    " SocketsPerBoard=1 CoresPerSocket={cpus} ThreadsPerCore=1 RealMemory=4000 Gres=gpu:{gpus}"
    " State=UNKNOWN\n"
)


def unavailable_reason() -> str | None:
    """Reason why no cluster can be started here; None if one can."""
    if os.uname().sysname != "Linux":
        return "Slurm runs on Linux only"
    if os.geteuid() != 0:
        return "a Slurm cluster needs root"
    packages = [
        package for package, programs in PACKAGES.items() if not all(map(shutil.which, programs))
    ]
    if not list(Path("/usr/lib").glob("*/slurm*/auth_munge.so")):
        packages.append(PLUGINS)
    if packages:
        return f"a Slurm cluster needs the packages {' '.join(packages)}"
    probe = subprocess.run(
        [*NAMESPACES, *INSIDE, "/etc/hosts", "probe", "true"], capture_output=True, text=True
    )
    return (
        f"a Slurm cluster needs the right to make namespaces: {probe.stderr.strip()}"
        if probe.returncode
        else None
    )


def install() -> str | None:
    """Install missing packages with apt, if possible, without starting their services.

    Returns:
        As :func:`unavailable_reason`.
    """
    reason = unavailable_reason()
    if reason is None or "packages" not in reason or not shutil.which("apt-get"):
        return reason
    services = [name for name in ("munge", "slurmctld", "slurmd") if f"{name} " in f"{reason} "]
    own_policy = not POLICY.exists()
    if own_policy:
        POLICY.write_text("#!/bin/sh\nexit 101\n")
        POLICY.chmod(0o755)
    try:
        apt = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=120"]
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for words in (["update"], ["install", "-y", "--no-install-recommends", *APT]):
            done = subprocess.run([*apt, *words], capture_output=True, text=True, env=environment)

        # nor may they start at the next boot
        for service in services if shutil.which("systemctl") else []:
            subprocess.run(["systemctl", "disable", "--now", service], capture_output=True)
    finally:
        if own_policy:
            POLICY.unlink()
    reason = unavailable_reason()
    return reason and f"{reason}; apt-get: {_tail(done.stderr, 3)}"


class Cluster:
    """Cluster of nodes n0, n1, … with the partitions `main` (the default) and `high`.

    Jobs of `high` preempt those of `main`.

    Args:
        nodes: number of nodes.
        cpus_per_node: CPUs per node.
        gpus_per_node: fake GPUs per node.
        folder: where to create the folder with all state; None: with the temporary files. Its path
            must be short, because it holds sockets.
    """

    def __init__(
        self,
        nodes: int = 4,
        cpus_per_node: int = 2,
        gpus_per_node: int = 0,
        folder: Path | None = None,
    ) -> None:
        self.names = [f"n{i}" for i in range(nodes)]
        self.cpus_per_node = cpus_per_node
        self.gpus_per_node = gpus_per_node
        self.folder = folder
        self.state_dir: Path | None = None
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def environment(self) -> dict[str, str]:
        """Environment of client commands: this cluster, without variables of an outer job."""
        outer = {
            key: value
            for key, value in os.environ.items()
            if not re.match("S(LURM|BATCH|RUN|ALLOC|QUEUE|INFO|CANCEL)", key)
        }
        return {**outer, "SLURM_CONF": str(self._state_dir / "slurm.conf")}

    # --- start and stop ---------------------------------------------------------------------------

    def start(self, timeout: float = 60) -> None:
        """Start all daemons and wait until the nodes are idle.

        The calling thread must outlive the cluster: the daemons die with it.
        """
        assert self.state_dir is None, "started already"
        atexit.register(self.stop)
        self.state_dir = Path(tempfile.mkdtemp(prefix="slurm-", dir=self.folder))
        try:
            if len(str(self.state_dir)) > 76:
                raise ValueError(
                    f"{self.state_dir} is too long for the sockets in it (76 characters): "
                    "set TMPDIR or another folder"
                )
            self._configure()
            munge = self._state_dir / "munge"
            files = {
                "socket": "socket",
                "key-file": "key",
                "pid-file": "pid",
                "seed-file": "seed",
                "log-file": "log",
            }
            options = [f"--{option}={munge / file}" for option, file in files.items()]

            # forced, because munged expects a folder that others may enter
            self._spawn("munge", ["munged", "--foreground", "--force", *options])
            self._wait_until((munge / "socket").exists, timeout, "munged makes its socket")
            self._spawn("control", ["slurmctld", "-D", "-f", f"{self.state_dir}/slurm.conf"])
            for name in self.names:
                self._boot(name)
            self.wait_until_idle(timeout)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End every process of the cluster and of its jobs, and remove its folder."""
        for name in list(self._daemons):
            self._kill(name)
        if self.state_dir is not None:
            shutil.rmtree(self.state_dir)
            self.state_dir = None
        atexit.unregister(self.stop)

    def kill_node(self, node: int) -> None:
        """Simulate a power loss: kill a node's slurmd and all its processes at once.

        The controller notices within a minute.
        """
        self._kill(self.names[node])

    def restart_node(self, node: int) -> None:
        """Boot a killed node, after telling the controller, so that its jobs are requeued."""
        # A real boot takes longer than SlurmdTimeout. Slurm would hardly notice a faster one: it
        # looks for lost jobs after a minute, and never for lost tasks on nodes without the batch
        # shell.
        self.run(
            "scontrol", "update", f"NodeName={self.names[node]}", "State=DOWN", "Reason=killed"
        )
        self._boot(self.names[node])

    # --- clients ----------------------------------------------------------------------------------

    def run(self, *words: str, check: bool = True, script: str | None = None) -> str:
        """Run a client command.

        Args:
            words: the command.
            check: raise if it fails; otherwise its output includes its errors.
            script: its standard input.

        Returns:
            Its output.
        """
        done = subprocess.run(
            words,
            input=script or "",
            capture_output=True,
            text=True,
            env=self.environment,
            timeout=120,
        )
        if check and done.returncode:
            raise RuntimeError(
                f"{' '.join(words)} ended with {done.returncode}: {done.stderr}{done.stdout}"
            )
        return done.stdout if check else done.stdout + done.stderr

    def submit(self, script: str, *options: str, output: Path) -> str:
        """Submit a bash script, which may begin with #SBATCH lines, and return the job id."""
        text = f"#!/bin/bash\n{script}\n"
        return self.run(
            "sbatch",
            "--parsable",
            f"--output={output}",
            "--open-mode=append",
            *options,
            script=text,
        ).strip()

    def show(self, job: str) -> dict[str, str]:
        """Fields of a job from scontrol (for an array, of its first listed task)."""
        return self._records(job)[0]

    def wait(self, job: str, states: Iterable[str] = ("COMPLETED",), timeout: float = 60) -> str:
        """Wait until a job (of an array: every task) is in one of `states`; return the state."""
        states = set(states)
        start = time.monotonic()
        while True:
            records = self._records(job)
            others = [record for record in records if record["JobState"] not in states]
            if not others:
                return records[0]["JobState"]
            waited = time.monotonic() - start
            if waited > timeout or any(record["JobState"] in FINAL for record in others):
                stories = "\n".join(map(_describe_job, others))
                raise AssertionError(
                    f"not {' or '.join(sorted(states))} after {waited:.1f} s: {stories}"
                )
            time.sleep(0.1)

    def pids(self, job: str, step: str = r"\d+") -> dict[str, list[int]]:
        """Process ids of a running job's steps by node, as seen from outside the namespaces.

        The step "batch" is the batch shell.
        """
        return {
            name: found
            for name in self.names
            if (found := list(self._tasks(name, rf"slurmstepd: \[{job}\.{step}\]")))
        }

    def slurmd_pid(self, name: str) -> int:
        """Process id inside a node's namespaces, as seen from outside; for nsenter."""
        return psutil.Process(self._daemons[name].pid).children()[0].pid

    def clear(self, timeout: float = 60) -> None:
        """Cancel every job without a grace period, and wait until all nodes are idle."""
        if jobs := self.run("squeue", "--noheader", "--format=%A").split():
            self.run("scancel", *jobs, check=False)  # fails for a job that has just ended
        for name in self.names:
            for pid in self._tasks(name, "slurmstepd: ", recursive=True):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.wait_until_idle(timeout)

    def wait_until_idle(self, timeout: float = 60) -> None:
        """Boot killed nodes, resume down and drained ones, and wait until all are idle."""
        for node, name in enumerate(self.names):
            if name not in self._daemons:
                self.restart_node(node)
        self._wait_until(self._resume_and_check_idle, timeout, "all nodes are idle")

    # --- inside -----------------------------------------------------------------------------------

    @property
    def _state_dir(self) -> Path:
        assert self.state_dir is not None, "the cluster is not started"
        return self.state_dir

    def _configure(self) -> None:
        """Write slurm.conf, the nodes' hosts file, munge's key and the GPUs' device files."""
        ports = free_ports(1 + len(self.names))
        config = CONFIG.format(
            state=self.state_dir,
            port=ports[0],
            first_job=random.SystemRandom().randrange(10_000, 10_000_000),
        )
        hosts = Path("/etc/hosts").read_text() + "\n127.0.0.1 control munge\n"
        for node, (name, port) in enumerate(zip(self.names, ports[1:], strict=True)):
            address = f"127.0.1.{node + 1}"
            hosts += f"{address} {name}\n"
            config += NODE.format(
                name=name,
                address=address,
                port=port,
                cpus=self.cpus_per_node,
                gpus=self.gpus_per_node,
            )
        (self._state_dir / "slurm.conf").write_text(config)
        (self._state_dir / "hosts").write_text(hosts)
        for part in ("munge", "control", "spool", "devices"):
            (self._state_dir / part).mkdir(mode=0o700)
        (self._state_dir / "munge" / "key").touch(mode=0o600)
        (self._state_dir / "munge" / "key").write_bytes(os.urandom(128))

        # slurmd requires a device, so each one is a copy of /dev/null
        for gpu in range(self.gpus_per_node):
            os.mknod(
                self._state_dir / "devices" / f"nvidia{gpu}", 0o666 | stat.S_IFCHR, os.makedev(1, 3)
            )
        files = f"{self.state_dir}/devices/nvidia[0-{self.gpus_per_node - 1}]"
        gpus = f"AutoDetect=off\nName=gpu File={files} Flags=nvidia_gpu_env\n"
        (self._state_dir / "gres.conf").write_text(
            gpus if self.gpus_per_node else "AutoDetect=off\n"
        )

    def _boot(self, name: str) -> None:
        assert name not in self._daemons, f"{name} runs"
        self._spawn(name, ["slurmd", "-D", "-f", f"{self.state_dir}/slurm.conf", "-N", name])

    def _spawn(self, name: str, command: list[str]) -> None:
        """Start a daemon in its own namespaces, with ``name`` as its hostname."""
        words = [*NAMESPACES, *INSIDE, f"{self.state_dir}/hosts", name, *command]
        with (self._state_dir / f"{name}.log").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment,
                cwd="/",
                start_new_session=True,
            )

    def _kill(self, name: str) -> None:
        """Kill a daemon and all processes that it started."""
        daemon = self._daemons.pop(name)
        if daemon.poll() is None:
            # unshare exits after its child, the first process of the namespace, which exits only
            # after all other processes of the namespace
            first = [process.pid for process in psutil.Process(daemon.pid).children()]
            for pid in first or [daemon.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        daemon.wait()

    def _tasks(self, name: str, title: str, recursive: bool = False) -> Iterator[int]:
        """Children of a node's processes whose command line matches ``title``."""
        with contextlib.suppress(psutil.NoSuchProcess, KeyError):  # the node may be off
            for process in psutil.Process(self._daemons[name].pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if re.match(title, " ".join(process.cmdline())):
                        yield from (child.pid for child in process.children(recursive=recursive))

    def _records(self, job: str) -> list[dict[str, str]]:
        records = []
        for line in self.run("scontrol", "show", "job", "--oneliner", job).splitlines():
            # values may hold spaces and =
            _, *words = re.split(r"(?:^| )([A-Z][\w:/]*)=", line.strip())
            records.append(dict(zip(words[::2], words[1::2], strict=True)))
        return records

    def _resume_and_check_idle(self) -> bool:
        """True if all nodes are idle. Resumes those that are down or drained."""
        lines = self.run(
            "sinfo", "--noheader", "--Node", "--partition=main", "--format=%N %T", check=False
        ).splitlines()
        states = dict(
            line.split(maxsplit=1)
            for line in lines
            if line.split()[:1] and line.split()[0] in self.names
        )
        for name, state in states.items():
            if re.match("down|drained|draining|fail", state):
                self.run("scontrol", "update", f"NodeName={name}", "State=RESUME", check=False)
        return states == dict.fromkeys(self.names, "idle")

    def _wait_until(self, condition: Callable[[], bool], timeout: float, what: str) -> None:
        end = time.monotonic() + timeout
        while not condition():
            dead = [name for name, daemon in self._daemons.items() if daemon.poll() is not None]
            if dead or time.monotonic() > end:
                logs = [
                    log
                    for log in (*self._state_dir.glob("*.log"), self._state_dir / "munge" / "log")
                    if log.exists()
                ]
                logs = [log for log in logs if log.stem in dead] or logs
                trouble = f"{' '.join(dead)} ended" if dead else f"waited {timeout} s"
                raise RuntimeError(
                    "\n".join(
                        [
                            f"{trouble} before {what}",
                            *(f"{log}: {_tail(log.read_text())}" for log in logs),
                        ]
                    )
                )
            time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    """Find free ports below the range of outgoing connections.

    They are random, because nothing reserves a port until its daemon opens it.
    """
    ports: list[int] = []
    for port in random.SystemRandom().sample(range(10_000, 30_000), 20 * count):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            ports.append(port)
        if len(ports) == count:
            return ports
    raise RuntimeError("no free ports")


def _describe_job(record: Mapping[str, str]) -> str:
    """Describe a job that ended in an unexpected state."""
    output = Path(record.get("StdOut", ""))
    text = _tail(output.read_text(errors="replace")) if output.is_file() else "(none)"
    keys = ("JobId", "JobState", "Reason", "ExitCode", "Restarts", "NodeList")
    return " ".join(f"{key}={record.get(key, '')}" for key in keys) + f"\noutput: {text}"


def _tail(text: str, lines: int = 20) -> str:
    return "\n".join(text.strip().splitlines()[-lines:])
