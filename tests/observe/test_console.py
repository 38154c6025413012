"""Lines to the user stop nothing when their reader is gone."""

import os
import subprocess
import sys

CODE = """
import sys
from llumnix.observe.console import say
say("hello")
sys.stdin.readline()
for _ in range(3):
    say("nobody reads this")
print("nor this", flush=True)
"""


def test_a_reader_that_has_gone_is_no_error() -> None:
    words = [sys.executable, "-c", CODE]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(words, env={**os.environ}, **pipes) as process:  # type: ignore[call-overload]
        assert process.stdout.readline() == b"llumnix: hello\n"
        process.stdout.close()
        process.stdin.write(b"go\n")
        process.stdin.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0
