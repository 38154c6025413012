"""`llumnix doctor` and `llumnix version`."""

import json
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llumnix import __version__, versions
from llumnix.cli import main
from llumnix.commands import doctor


def test_this_host_has_no_failure_and_nothing_heavy_is_imported() -> None:
    program = (
        "import sys; from llumnix.cli import main; status = main(['doctor', '--json']); "
        "sys.exit(10 + status if {'vllm', 'ray', 'torch'} & set(sys.modules) else status)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    findings = {f["what"]: f for f in json.loads(done.stdout)}
    assert findings["versions"]["verdict"] == "OK"
    assert all(f["fix"] for f in findings.values() if f["verdict"] != "OK")


def test_what_fails_is_status_1_and_names_its_fix(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(versions, "SUPPORTED", {"ray": ("1.0",)})
    assert main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert re.search(r"^FAIL +versions .*goes with 1\.0: run `pip install 'ray==1\.0", said, re.M)


@pytest.mark.parametrize(
    ("check", "setting", "verdict", "fix"),
    [
        ("_open_files", ("resource.getrlimit", lambda _: (1024, 4096)), "WARN", "ulimit -n"),
        ("_shared_memory", ("shutil.disk_usage", 64 * 2**20), "FAIL", "--shm-size"),
        ("_shared_memory", ("shutil.disk_usage", 10**9), "WARN", "--shm-size"),
        ("_temporary_folder", ("tempfile.gettempdir", lambda: "/nowhere"), "FAIL", "TMPDIR"),
        ("_host_name", ("socket.getaddrinfo", OSError("unknown")), "WARN", "/etc/hosts"),
        ("_cores", ("os.sched_getaffinity", lambda _: {1}), "WARN", "core"),
        ("_memory", ("os.sysconf", lambda _: 2**15), "WARN", "GB"),
    ],
)
def test_a_host_that_is_too_small_is_told_what_to_do(
    monkeypatch: pytest.MonkeyPatch, check: str, setting: tuple[str, Any], verdict: str, fix: str
) -> None:
    name, value = setting
    given = value
    if isinstance(value, int):
        given = lambda _: type("Usage", (), {"free": value})  # noqa: E731
    elif isinstance(value, OSError):

        def given(*_: Any) -> Any:
            raise value

    monkeypatch.setattr(f"llumnix.commands.doctor.{name}", given)
    found = getattr(doctor, check)()
    assert found.verdict == verdict
    assert fix in found.fix


def test_a_ray_address_and_proxies_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert doctor._ray_address() is None
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    found = doctor._ray_address()
    assert found is not None
    assert "--ray-address head:6379" in found.fix
    monkeypatch.setenv("HTTPS_PROXY", "http://p")
    proxies = doctor._proxies()
    assert proxies is not None
    assert proxies.text.startswith("HTTPS_PROXY")


def test_a_check_that_breaks_is_a_warning_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def _broken() -> doctor.Finding:
        raise OSError("no such thing")

    monkeypatch.setattr(doctor, "CHECKS", (_broken, doctor._open_files))
    first, second = doctor.look()
    assert (first.what, first.verdict) == ("broken", "WARN")
    assert second.what == "open files"


def test_gpus_that_do_not_reach_each_other_are_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for matrix, verdict in (("GPU0 X OK\nGPU1 OK X", "OK"), ("GPU0 X NS\nGPU1 NS X", "WARN")):
        tool.write_text(
            "#!/bin/sh\n"
            f'if [ "$1" = -L ]; then printf "GPU 0: H\\nGPU 1: H\\n"; else printf "{matrix}"; fi\n'
        )
        tool.chmod(0o755)
        assert doctor._gpus().verdict == verdict
    tool.write_text("#!/bin/sh\necho no driver >&2; exit 9\n")
    assert doctor._gpus().verdict == "FAIL"


def test_version_says_ours_and_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["llumnix"] == __version__
    assert set(told) == {"llumnix", "commit", "vllm", "ray", "python"}
    assert main(["version"]) == 0
    line = capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == line


def test_files_that_are_open_are_counted_as_the_kernel_does() -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert str(soft) in doctor._open_files().text
