"""A SuperLink and SuperNodes on loopback, each a process of its own, ended by its number."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def offline(home):
    """Return an environment in which Flower calls nobody and writes nothing outside a folder."""
    return {
        **os.environ,
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "FLWR_HOME": str(home),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }


class Network:
    """Use as a context: whatever it started is killed at its end."""

    def __init__(self, folder):
        self.folder = folder
        self.port = free_port()
        self.processes = []
        self.environment = offline(folder / "home")
        (folder / "home").mkdir(parents=True)
        (folder / "home" / "config.toml").write_text(
            f'[superlink]\ndefault = "lo"\n\n[superlink.lo]\naddress = "127.0.0.1:{self.port}"\n'
            "insecure = true\n"
        )

    def __enter__(self):
        self.start(
            "superlink",
            *("flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(self.port)),
            "--disable-runtime-dependency-installation",
        )
        self._wait_for_port()
        return self

    def __exit__(self, *_):
        for process in reversed(self.processes):
            self.kill(process)

    def node(self, partition, port=None):
        """Start a SuperNode; it talks to ``port``, by default the SuperLink's."""
        return self.start(
            f"node-{partition}-{len(self.processes)}",
            *("flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port or self.port}"),
            *("--port", str(free_port()), "--node-config", f"partition-id={partition}"),
        )

    def run(self, app, timeout):
        """Run an app to its end; return what it printed."""
        command = ["flwr", "run", str(app), "lo", "--stream"]
        done = subprocess.run(
            command,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        return done.stdout + done.stderr

    def start(self, name, *command, **environment):
        with (self.folder / f"{name}.log").open("w") as log:
            process = subprocess.Popen(
                command,
                env={**self.environment, **environment},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def kill(self, process):
        """Kill a process and what it started, without a word."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def _wait_for_port(self):
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                return
            time.sleep(0.1)
        raise TimeoutError((self.folder / "superlink.log").read_text())

    def logs(self):
        return "\n".join(f"{p.name}:\n{p.read_text()}" for p in sorted(self.folder.glob("*.log")))
