"""`llumnix completion`: what a shell offers at a TAB."""

import shutil
import subprocess

import pytest

from llumnix.cli import COMMANDS, main
from llumnix.commands.completing import script

FLAGS = {"serve": ("--port", "--instances"), "config": ("--json",), "status": ("--url", "--json")}


def offered(script: str, *words: str) -> set[str]:
    """What bash offers for the last of these words."""
    line = " ".join(f"'{word}'" for word in words)
    program = (
        f"{script}\nCOMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _llumnix; "
        "printf '%s\\n' \"${COMPREPLY[@]}\"; complete -p llumnix >&2"
    )
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    assert "_llumnix llumnix" in done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["llumnix", ""], "serve config status"),
        (["llumnix", "s"], "serve status"),
        (["llumnix", "serve", "--i"], "--instances"),
        (["llumnix", "serve", "m", "--"], "--port --instances"),
        (["llumnix", "serve", "m"], ""),
        (["llumnix", "config", "c"], "check"),
        (["llumnix", "config", "check", "--"], "--json"),
        (["llumnix", "status", "-"], "--url --json"),
        (["llumnix", "unknown", "--"], ""),
    ],
)
def test_commands_and_their_flags_are_offered(words: list[str], found: str) -> None:
    assert offered(script(FLAGS), *words) == set(found.split())


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_the_script_knows_all_commands_and_vllms_flags(
    capsys: pytest.CaptureFixture[str], shell: str
) -> None:
    pytest.importorskip("vllm")
    assert main(["completion", shell]) == 0
    written = capsys.readouterr().out
    assert written.startswith("autoload") is (shell == "zsh")
    written = written[written.index("_llumnix()") :]
    assert offered(written, "llumnix", "") == set(COMMANDS)
    assert {"--max-model-len", "--instances", "--keys"} <= offered(written, "llumnix", "serve", "-")
    assert {"--url", "--class", "--key"} <= offered(written, "llumnix", "requests", "-")
    assert {"--one-by-one", "--node"} <= offered(written, "llumnix", "restart", "-")
    if shell == "zsh" and shutil.which("zsh"):
        assert subprocess.run(["zsh", "-nc", written]).returncode == 0
