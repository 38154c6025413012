"""A double of the kubelet: does to a real process what Kubernetes' does to a container, as its
rendered manifest says: startup probe first, then liveness and readiness; at the end preStop,
SIGTERM, and SIGKILL when the grace is over. Images, mounts and limits are not played: paths of
mounts are replaced by folders of the test."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from support.managed import environment
from support.server import descendants


@dataclass
class Container:
    """The only container of a pod, and what became of it."""

    spec: dict[str, Any]  # the pod's
    instead: dict[str, str]  # words of the manifest, such as mount paths, and what they are here
    log: Path
    more_env: dict[str, str] = field(default_factory=dict)
    process: Any = None
    started: bool = False  # its startup probe has succeeded
    ready: bool = False
    became_ready: list[bool] = field(default_factory=list)  # each change
    why_killed: str | None = None
    processes: set[int] = field(default_factory=set)  # of its container, when it was stopped
    # The kubelet asks a pod that is to go whether it is ready, and no more whether it lives.
    _leaving: threading.Event = field(default_factory=threading.Event)
    _over: threading.Event = field(default_factory=threading.Event)
    _probing: Any = None

    @property
    def _it(self) -> dict[str, Any]:
        (container,) = self.spec["containers"]
        return container

    def ports(self, name: str) -> list[int]:
        """Those of that name."""
        return [port["containerPort"] for port in self._it["ports"] if port["name"] == name]

    def _words(self, words: list[str]) -> list[str]:
        for old, new in self.instead.items():
            words = [word.replace(old, new) for word in words]
        return words

    def _environment(self) -> dict[str, str]:
        """What the manifest sets, and what an operator adds; programs are the tests' own."""
        given = {}
        for one in self._it.get("env") or []:
            if "value" in one:
                given[one["name"]] = self._words([one["value"]])[0]
            else:
                assert one["valueFrom"]["fieldRef"]["fieldPath"] == "status.podIP"
                given[one["name"]] = "127.0.0.1"
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return environment(**given, **self.more_env, PATH=path)

    def start(self) -> "Container":
        self._over.clear()
        self._leaving.clear()
        words = self._words([*self._it["command"], *self._it["args"]])
        assert words[:2] == ["tini", "--"]
        # Outside a container tini is not the first process, so that it must be told to reap.
        words[:2] = ["tini", "-s", "--"] if shutil.which("tini") else []
        with self.log.open("w") as out:
            self.process = subprocess.Popen(
                words, env=self._environment(), stdout=out, stderr=out, start_new_session=True
            )
        self._probing = threading.Thread(target=self._probe, daemon=True)
        self._probing.start()
        return self

    def _probe(self) -> None:
        with httpx.Client(trust_env=False) as client:
            if self._until("startupProbe", client):
                self.started = True
            failures = {"livenessProbe": 0, "readinessProbe": 0}
            while not self._over.is_set() and self.why_killed is None:
                for name in failures:
                    good = self._ask(self._it[name], client)
                    failures[name] = 0 if good else failures[name] + 1
                    out = failures[name] >= self._it[name]["failureThreshold"]
                    if name == "readinessProbe" and (good or out):
                        self._set_ready(good)
                    elif name == "livenessProbe" and out and not self._leaving.is_set():
                        self._kill("its liveness probe failed")
                self._over.wait(self._it["livenessProbe"]["periodSeconds"])

    def _until(self, name: str, client: httpx.Client) -> bool:
        """Whether that probe succeeds before it has failed too often."""
        for _ in range(self._it[name]["failureThreshold"]):
            if self._over.is_set():
                return False
            if self._ask(self._it[name], client):
                return True
            self._over.wait(self._it[name]["periodSeconds"])
        self._kill(f"its {name} never succeeded")
        return False

    def _ask(self, probe: dict[str, Any], client: httpx.Client) -> bool:
        wanted = probe["httpGet"]
        (port,) = self.ports(wanted["port"])
        url = f"http://127.0.0.1:{port}{wanted['path']}"
        try:
            return 200 <= client.get(url, timeout=probe["timeoutSeconds"]).status_code < 400
        except httpx.HTTPError:
            return False

    def _set_ready(self, ready: bool) -> None:
        if ready != self.ready:
            self.became_ready.append(ready)
        self.ready = ready

    def _kill(self, why: str) -> None:
        self.why_killed = why
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def pre_stop(self, grace_s: float) -> str | None:
        """Runs the hook of the manifest, if it has one; what that printed."""
        hook = self._it.get("lifecycle", {}).get("preStop", {}).get("exec")
        if hook is None:
            return None
        done = subprocess.run(
            self._words(hook["command"]),
            env=self._environment(),
            timeout=grace_s,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout + done.stderr

    def stop(self) -> tuple[int, float]:
        """Ends the pod; returns the exit status, and the seconds that it took."""
        self._leaving.set()
        began_s = time.monotonic()
        grace_s = self.spec["terminationGracePeriodSeconds"]
        self.processes |= descendants(self.process.pid)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.pre_stop(grace_s)
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(began_s + grace_s - time.monotonic())
        except subprocess.TimeoutExpired:
            self._kill("its grace was over")
            self.process.wait()
        took_s = time.monotonic() - began_s
        self._stop_probing()
        return self.process.returncode, took_s

    def _stop_probing(self) -> None:
        self._over.set()
        self._probing.join()

    def close(self) -> None:
        """Ends what is left, as the end of a container's first process does."""
        self._stop_probing()
        for pid in {*self.processes, *descendants(self.process.pid), self.process.pid}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
