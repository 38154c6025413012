"""`llumnix doctor` and `llumnix version`."""

import json
import re
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
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
    if isinstance(value, OSError):

        def given(*_: Any) -> Any:
            raise value

    monkeypatch.setattr(f"llumnix.commands.doctor.{name}", given)
    found = getattr(doctor, check)()
    assert found.verdict == verdict
    assert fix in found.fix


EACH = 10 * (16 + 24) * 2**20


@pytest.mark.parametrize(
    ("gpus", "workers", "most", "gigabytes"),
    [
        (0, None, 2 * EACH, 1),
        (0, 3, 3 * EACH, 2),
        (1, None, EACH, 1),
        (8, None, 8 * EACH + 10**9, 5),
        (8, 2, 2 * EACH + 10**9, 2),
    ],
)
def test_shared_memory_is_wanted_for_each_worker(
    monkeypatch: pytest.MonkeyPatch, gpus: int, workers: int | None, most: int, gigabytes: int
) -> None:
    monkeypatch.setattr(
        doctor, "_gpu_devices", lambda: [Path(f"/dev/nvidia{n}") for n in range(gpus)]
    )
    monkeypatch.delenv("VLLM_MQ_MAX_CHUNK_BYTES_MB", raising=False)
    most += 80 * 2**20
    for free, verdict in ((most, "OK"), (most - 1, "WARN"), (240 * 2**20, "FAIL")):
        usage = SimpleNamespace(free=free)
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _, usage=usage: usage)
        (found,) = [f for f in doctor.look(workers) if f.what == "shared memory"]
        assert found.verdict == verdict
        if verdict != "OK":
            assert f"--shm-size {gigabytes}g for Docker" in found.fix
            assert f"{workers or gpus or 2} workers may take {most / 1e9:.2f}" in found.text


def test_a_user_says_how_many_workers_there_will_be(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "--json", "--workers", "700"])
    findings = {f["what"]: f for f in json.loads(capsys.readouterr().out)}
    assert "of which 700 workers may take" in findings["shared memory"]["text"]


def test_larger_messages_to_workers_want_more_shared_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor, "_gpu_devices", list)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))
    monkeypatch.setenv("VLLM_MQ_MAX_CHUNK_BYTES_MB", "100")
    found = doctor._shared_memory(1)
    assert found.verdict == "FAIL"
    assert found.text.endswith("vLLM starts no worker where less than 1.05 GB are free")


def test_a_host_without_workers_is_no_question(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--workers", "0"])
    assert ended.value.code == 2
    assert "--workers must be 1 or more" in capsys.readouterr().err


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


def test_a_user_without_a_home_folder_is_told_what_to_set(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("LLUMNIX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    assert main(["doctor", "--json"]) == 0
    findings = {f["what"]: f for f in json.loads(capsys.readouterr().out)}
    assert len(findings) > 5
    assert findings["cache folder"] == {
        "what": "cache folder",
        "verdict": "WARN",
        "text": "you have no home folder here",
        "fix": "set LLUMNIX_CACHE to a folder of yours",
    }


MATRIX = """
 \tGPU0\tGPU1\t
 GPU0\tX\t{0}\t
 GPU1\t{0}\tX\t

Legend:

  X    = Self
  OK   = Status Ok
  CNS  = Chipset not supported
  GNS  = GPU not supported
  TNS  = Topology not supported
  NS   = Not supported
  DR   = Disabled by regkey
  U    = Unknown
"""
"""What `nvidia-smi topo -p2p r` prints."""


def test_gpus_that_do_not_reach_each_other_are_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for word, verdict in (("OK", "OK"), ("NS", "WARN"), ("CNS", "WARN")):
        tool.write_text(
            '#!/bin/sh\nif [ "$1" = -L ]; then printf "GPU 0: H\\nGPU 1: H\\n"\n'
            f"else printf '{MATRIX.format(word)}'\nfi\n"
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
