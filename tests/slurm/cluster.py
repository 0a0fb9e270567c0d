"""A real Slurm cluster of a few nodes on one machine, for tests: as root, with the packages of Debian or Ubuntu.

Every daemon runs in namespaces of its own (hostname, mounts, processes). A node is thus what a job sees of one: it has a name,
resolves the names of the others by a hosts file that nobody else sees, and dies as a whole with its first process. All state is in
one temporary folder and all ports are random, so that clusters beside each other do not meet.
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
# With the first process of a process namespace the kernel kills all others; unshare dies with this program, even by kill -9.
# Mounts that the machine gets later are seen by the nodes (slave), never the reverse.
NAMESPACES = ["setpriv", "--pdeathsig=KILL", "unshare", "--uts", "--pid", "--kill-child", "--mount-proc", "--propagation=slave"]
# The shell stays, as the first process must reap orphans. Not in the background: a job would inherit SIGINT as ignored.
# Shared memory is the node's own, as on a machine: what killed jobs leave there goes with it.
INSIDE = [
    *("sh", "-c"),
    'set -e; mount --bind "$1" /etc/hosts; mount -t tmpfs shm /dev/shm; hostname "$2"; shift 2; "$@"; exit',
    "sh",
]
FINAL = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT"}  # unless requeued

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
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_interval=1,sched_min_interval=0,requeue_delay=0
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
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=10
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""
NODE = (
    "NodeName={name} NodeHostname={name} NodeAddr={address} Port={port} CPUs={cpus} Boards=1 SocketsPerBoard=1"
    " CoresPerSocket={cpus} ThreadsPerCore=1 RealMemory=4000 Gres=gpu:{gpus} State=UNKNOWN\n"
)


def missing() -> str | None:
    """Why no cluster can be started here; None where one can."""
    if os.uname().sysname != "Linux":
        return "Slurm runs on Linux only"
    if os.geteuid() != 0:
        return "a Slurm cluster needs root"
    packages = [package for package, programs in PACKAGES.items() if not all(map(shutil.which, programs))]
    if not list(Path("/usr/lib").glob("*/slurm*/auth_munge.so")):
        packages.append(PLUGINS)
    if packages:
        return f"a Slurm cluster needs the packages {' '.join(packages)}"
    probe = subprocess.run([*NAMESPACES, *INSIDE, "/etc/hosts", "probe", "true"], capture_output=True, text=True)
    return f"a Slurm cluster needs the right to make namespaces: {probe.stderr.strip()}" if probe.returncode else None


def install() -> str | None:
    """Install what is missing with apt, where that can be done, and start no service; returns missing()."""
    reason = missing()
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
        for service in services if shutil.which("systemctl") else []:
            subprocess.run(["systemctl", "disable", "--now", service], capture_output=True)  # nor at the next boot
    finally:
        if own_policy:
            POLICY.unlink()
    reason = missing()
    return reason and f"{reason}; apt-get: {_tail(done.stderr, 3)}"


class Cluster:
    """Nodes n0, n1, … with the partitions `main` (the default) and `high`, whose jobs preempt those of `main`.

    `folder` is where the folder with all state is made, by default with the temporary files; it must be short, for sockets.
    """

    def __init__(self, nodes: int = 4, cpus_per_node: int = 2, gpus_per_node: int = 0, folder: Path | None = None) -> None:
        self.names = [f"n{i}" for i in range(nodes)]
        self.cpus_per_node = cpus_per_node
        self.gpus_per_node = gpus_per_node
        self.folder = folder
        self.state: Path | None = None
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def environment(self) -> dict[str, str]:
        """Environment for client commands: this cluster, and nothing of a job that we may be in."""
        outer = {key: value for key, value in os.environ.items() if not re.match("S(LURM|BATCH|RUN|ALLOC|QUEUE|INFO|CANCEL)", key)}
        return {**outer, "SLURM_CONF": str(self._state / "slurm.conf")}

    # --- start and stop -----------------------------------------------------------------------------------------------------

    def start(self, timeout: float = 60) -> None:
        """Start all daemons and wait until the nodes are idle. Must be called by a thread that outlives the cluster."""
        assert self.state is None, "started already"
        atexit.register(self.stop)
        self.state = Path(tempfile.mkdtemp(prefix="slurm-", dir=self.folder))
        try:
            if len(str(self.state)) > 76:
                raise ValueError(f"{self.state} is too long for the sockets in it (76 characters): set TMPDIR or another folder")
            self._configure()
            munge = self._state / "munge"
            files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "seed-file": "seed", "log-file": "log"}
            options = [f"--{option}={munge / file}" for option, file in files.items()]
            self._spawn("munge", ["munged", "--foreground", "--force", *options])  # forced, as nobody else may enter the folder
            self._until((munge / "socket").exists, timeout, "munged makes its socket")
            self._spawn("control", ["slurmctld", "-D", "-f", f"{self.state}/slurm.conf"])
            for name in self.names:
                self._boot(name)
            self.idle(timeout)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End every process of the cluster and of its jobs, and remove its folder."""
        for name in list(self._daemons):
            self._kill(name)
        if self.state is not None:
            shutil.rmtree(self.state)
            self.state = None
        atexit.unregister(self.stop)

    def kill_node(self, node: int) -> None:
        """The node loses power: its slurmd and all that runs on it are gone at once. The controller notices within a minute."""
        self._kill(self.names[node])

    def restart_node(self, node: int) -> None:
        """Switch a node on that was killed; by then the controller has noticed, so its jobs are requeued."""
        # A boot takes longer than SlurmdTimeout. Of one that does not, Slurm would hardly notice: it searches lost jobs after a
        # minute, and lost tasks on nodes that do not run the batch shell never.
        self.run("scontrol", "update", f"NodeName={self.names[node]}", "State=DOWN", "Reason=killed")
        self._boot(self.names[node])

    # --- clients ------------------------------------------------------------------------------------------------------------

    def run(self, *words: str, check: bool = True, script: str | None = None) -> str:
        """Output of a client command that reads `script`; with check=False also that of one that fails, with its errors."""
        done = subprocess.run(words, input=script or "", capture_output=True, text=True, env=self.environment, timeout=120)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(words)} ended with {done.returncode}: {done.stderr}{done.stdout}")
        return done.stdout if check else done.stdout + done.stderr

    def submit(self, script: str, *options: str, output: Path) -> str:
        """Id of a new job whose batch shell is bash with this text; sbatch's options may precede."""
        text = f"#!/bin/bash\n{script}\n"
        return self.run("sbatch", "--parsable", f"--output={output}", "--open-mode=append", *options, script=text).strip()

    def show(self, job: str) -> dict[str, str]:
        """What scontrol says of a job (for an array, of its first task that is listed)."""
        return self._records(job)[0]

    def wait(self, job: str, states: Iterable[str] = ("COMPLETED",), timeout: float = 60) -> str:
        """Wait until the job (of an array: every task) is in one of `states`; returns the state."""
        states, start = set(states), time.monotonic()
        while True:
            records = self._records(job)
            others = [record for record in records if record["JobState"] not in states]
            if not others:
                return records[0]["JobState"]
            waited = time.monotonic() - start
            if waited > timeout or any(record["JobState"] in FINAL for record in others):
                stories = "\n".join(map(_story, others))
                raise AssertionError(f"not {' or '.join(sorted(states))} after {waited:.1f} s: {stories}")
            time.sleep(0.1)

    def pids(self, job: str, step: str = r"\d+") -> dict[str, list[int]]:
        """Processes that a running job's steps started, by node and seen from outside; step="batch" is the batch shell."""
        return {name: found for name in self.names if (found := list(self._tasks(name, rf"slurmstepd: \[{job}\.{step}\]")))}

    def slurmd(self, name: str) -> int:
        """A process inside a node's namespaces, as seen from outside: for nsenter."""
        return psutil.Process(self._daemons[name].pid).children()[0].pid

    def clear(self, timeout: float = 60) -> None:
        """Cancel every job, without the time that it has to end by itself, and wait until all nodes are idle."""
        if jobs := self.run("squeue", "--noheader", "--format=%A").split():
            self.run("scancel", *jobs, check=False)  # fails for a job that has just ended
        for name in self.names:
            for pid in self._tasks(name, "slurmstepd: ", recursive=True):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.idle(timeout)

    def idle(self, timeout: float = 60) -> None:
        """Wait until all nodes are idle, after switching on those that were killed and resuming those down or drained."""
        for node, name in enumerate(self.names):
            if name not in self._daemons:
                self.restart_node(node)
        self._until(self._resumed, timeout, "all nodes are idle")

    # --- inside -------------------------------------------------------------------------------------------------------------

    @property
    def _state(self) -> Path:
        assert self.state is not None, "the cluster is not started"
        return self.state

    def _configure(self) -> None:
        """Write slurm.conf, the nodes' hosts file, munge's key and the GPUs' device files."""
        ports = free_ports(1 + len(self.names))
        config = CONFIG.format(state=self.state, port=ports[0], first_job=random.SystemRandom().randrange(10_000, 10_000_000))
        hosts = Path("/etc/hosts").read_text() + "\n127.0.0.1 control munge\n"
        for node, (name, port) in enumerate(zip(self.names, ports[1:], strict=True)):
            address = f"127.0.1.{node + 1}"
            hosts += f"{address} {name}\n"
            config += NODE.format(name=name, address=address, port=port, cpus=self.cpus_per_node, gpus=self.gpus_per_node)
        (self._state / "slurm.conf").write_text(config)
        (self._state / "hosts").write_text(hosts)
        for part in ("munge", "control", "spool", "devices"):
            (self._state / part).mkdir(mode=0o700)
        (self._state / "munge" / "key").touch(mode=0o600)
        (self._state / "munge" / "key").write_bytes(os.urandom(128))
        for gpu in range(self.gpus_per_node):  # a copy of /dev/null: slurmd wants a device
            os.mknod(self._state / "devices" / f"nvidia{gpu}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        files = f"{self.state}/devices/nvidia[0-{self.gpus_per_node - 1}]"
        gpus = f"AutoDetect=off\nName=gpu File={files} Flags=nvidia_gpu_env\n"
        (self._state / "gres.conf").write_text(gpus if self.gpus_per_node else "AutoDetect=off\n")

    def _boot(self, name: str) -> None:
        assert name not in self._daemons, f"{name} runs"
        self._spawn(name, ["slurmd", "-D", "-f", f"{self.state}/slurm.conf", "-N", name])

    def _spawn(self, name: str, command: list[str]) -> None:
        """Start a daemon in namespaces of its own, with this name as its hostname."""
        words = [*NAMESPACES, *INSIDE, f"{self.state}/hosts", name, *command]
        with (self._state / f"{name}.log").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.environment, cwd="/", start_new_session=True
            )

    def _kill(self, name: str) -> None:
        """End a daemon and all that it started."""
        daemon = self._daemons.pop(name)
        if daemon.poll() is None:
            # unshare ends after its child, the first process of the namespace, and that one only after all others in there
            first = [process.pid for process in psutil.Process(daemon.pid).children()]
            for pid in first or [daemon.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        daemon.wait()

    def _tasks(self, name: str, title: str, recursive: bool = False) -> Iterator[int]:
        """Children of the slurmstepds on a node whose title matches."""
        with contextlib.suppress(psutil.NoSuchProcess, KeyError):  # the node may be off
            for process in psutil.Process(self._daemons[name].pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if re.match(title, " ".join(process.cmdline())):
                        yield from (child.pid for child in process.children(recursive=recursive))

    def _records(self, job: str) -> list[dict[str, str]]:
        records = []
        for line in self.run("scontrol", "show", "job", "--oneliner", job).splitlines():
            _, *words = re.split(r"(?:^| )([A-Z][\w:/]*)=", line.strip())  # values may hold spaces and =
            records.append(dict(zip(words[::2], words[1::2], strict=True)))
        return records

    def _resumed(self) -> bool:
        """Whether all nodes are idle; resumes those that a job or a lost connection put aside."""
        lines = self.run("sinfo", "--noheader", "--Node", "--partition=main", "--format=%N %T", check=False).splitlines()
        states = dict(line.split(maxsplit=1) for line in lines if line.split()[:1] and line.split()[0] in self.names)
        for name, state in states.items():
            if re.match("down|drained|draining|fail", state):
                self.run("scontrol", "update", f"NodeName={name}", "State=RESUME", check=False)
        return states == dict.fromkeys(self.names, "idle")

    def _until(self, condition: Callable[[], bool], timeout: float, what: str) -> None:
        end = time.monotonic() + timeout
        while not condition():
            dead = [name for name, daemon in self._daemons.items() if daemon.poll() is not None]
            if dead or time.monotonic() > end:
                logs = [log for log in (*self._state.glob("*.log"), self._state / "munge" / "log") if log.exists()]
                logs = [log for log in logs if log.stem in dead] or logs
                trouble = f"{' '.join(dead)} ended" if dead else f"waited {timeout} s"
                raise RuntimeError("\n".join([f"{trouble} before {what}", *(f"{log}: {_tail(log.read_text())}" for log in logs)]))
            time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    """Ports below those that outgoing connections take. Random, as nothing holds one before its daemon does."""
    ports: list[int] = []
    for port in random.SystemRandom().sample(range(10_000, 30_000), 20 * count):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            ports.append(port)
        if len(ports) == count:
            return ports
    raise RuntimeError("no free ports")


def _story(record: Mapping[str, str]) -> str:
    """What one needs to know of a job that ended otherwise."""
    output = Path(record.get("StdOut", ""))
    text = _tail(output.read_text(errors="replace")) if output.is_file() else "(none)"
    keys = ("JobId", "JobState", "Reason", "ExitCode", "Restarts", "NodeList")
    return " ".join(f"{key}={record.get(key, '')}" for key in keys) + f"\noutput: {text}"


def _tail(text: str, lines: int = 20) -> str:
    return "\n".join(text.strip().splitlines()[-lines:])
