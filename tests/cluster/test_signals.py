"""A stop is cleaned up after, however often and by whatever signal it is asked for."""

import os
import signal
import subprocess
import sys

import pytest

SERVE = """
import asyncio, os, signal, sys, uvloop
from llumnix.cluster import signals

async def run():
    loop = asyncio.get_running_loop()
    served = asyncio.Event()

    def told():
        print("told", flush=True)
        served.set()

    try:
        print("starting", flush=True)
        if sys.argv[1] == "serving":
            signals.pass_hangup_on(loop)
            # As vLLM does once it serves.
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, told)
            print("serving", flush=True)
            await served.wait()
        else:
            await asyncio.Event().wait()
    finally:
        again()
        signals.ignore(loop)
        again()
        await asyncio.sleep(0.05)
        print("fleet closed", flush=True)

def again():
    for number in signals.STOP_SIGNALS:
        os.kill(os.getpid(), number)

class Last:
    # Goes when Python has given up its handlers.

    def __del__(self, kill=os.kill, pid=os.getpid(), numbers=signals.STOP_SIGNALS):
        for number in numbers:
            kill(pid, number)

last = Last()
signals.ignore_at_end()
signals.interrupt()
try:
    uvloop.run(run())
except KeyboardInterrupt:
    print("interrupted", flush=True)
finally:
    again()
    signals.ignore()
    again()
    print("all gone", flush=True)
"""
FIRST = {"starting": [], "serving": ["serving"]}
NEXT = {"starting": [], "serving": ["told"]}
LAST = {"starting": ["interrupted"], "serving": []}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("state", ["starting", "serving"])
def test_the_first_one_stops_it_and_none_cuts_the_cleanup_short(
    number: signal.Signals, state: str
) -> None:
    words = [sys.executable, "-c", SERVE, state]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in ["starting", *FIRST[state]]:
            assert process.stdout.readline().strip() == line
        process.send_signal(number)
        said = process.communicate()[0].split("\n")
    assert said == [*NEXT[state], "fleet closed", *LAST[state], "all gone", ""]
    assert process.returncode == 0


GROUP = """
import os, signal, subprocess, sys
from llumnix.cluster import signals
child = "import signal, sys, time; "
deaf = child + "print('deaf', flush=True); sys.stdin.read(); print('read on', flush=True)"
hears = child + (
    "signal.signal(signal.SIGTERM, lambda *_: print('heard', flush=True)); "
    "signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM}); "
    "print('hears', flush=True); sys.stdin.read()"
)
signals.ignore()
with signals.kept_from_children():
    children = [
        subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1)  # -1: a pipe.
        for code in (deaf, hears)
    ]
print(signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set(), flush=True)
for one in children:
    one.stdout.readline()
for number in signals.STOP_SIGNALS:
    os.killpg(0, number)
print(children[1].stdout.readline().decode().strip(), flush=True)
print(children[0].communicate()[0].decode().strip(), children[0].returncode, flush=True)
children[1].communicate()
"""


def test_a_signal_to_all_processes_reaches_only_those_that_listen() -> None:
    words = [sys.executable, "-c", GROUP]
    done = subprocess.run(words, capture_output=True, text=True, start_new_session=True)
    assert done.stdout.split("\n") == ["True", "heard", "read on 0", ""], done.stderr


def test_under_nohup_the_terminals_end_is_nothing() -> None:
    code = (
        "import os, signal; from llumnix.cluster import signals; "
        "signal.signal(signal.SIGHUP, signal.SIG_IGN); signals.interrupt(); "
        "os.kill(os.getpid(), signal.SIGHUP); print('on')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "on\n")


RELOADING = """
import asyncio, os, signal, sys
from llumnix.cluster import signals
from llumnix.errors import UsageError

async def run():
    loop, asked = asyncio.get_running_loop(), []
    loop.add_signal_handler(signal.SIGTERM, lambda: print("told to stop", flush=True))

    async def reload():
        asked.append(1)
        if len(asked) == 2:
            raise UsageError("a bad file")
        print("reloaded", flush=True)

    signals.pass_hangup_on(loop, reload)
    for _ in range(3):
        os.kill(os.getpid(), signal.SIGHUP)
        await asyncio.sleep(0.05)

asyncio.run(run())
"""


def test_where_there_is_no_terminal_a_hangup_reloads_and_a_bad_file_ends_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-c", RELOADING], capture_output=True, text=True, start_new_session=True
    )
    assert done.stdout == "reloaded\nreloaded\n", done.stderr
    assert "Not reloaded: a bad file" in done.stderr


def test_a_service_manager_that_has_nothing_to_reload_stops_nothing() -> None:
    """`systemctl reload` sends a hangup, whether the service has --keys or not."""
    done = subprocess.run(
        [sys.executable, "-c", RELOADING.replace("loop, reload)", "loop)")],
        env={**os.environ, "NOTIFY_SOCKET": "/run/systemd/notify"},
        capture_output=True,
        text=True,
        start_new_session=True,
    )
    assert done.stdout == ""
    assert done.stderr.count("Nothing to reload: no --keys, --scheduler-config or --config.") == 3


def test_where_there_is_a_terminal_a_hangup_stops() -> None:
    import os
    import pty

    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", RELOADING])
    said = b""
    try:
        while part := os.read(terminal, 1000):
            said += part
    except OSError:  # It has ended.
        pass
    os.waitpid(pid, 0)
    assert said.split() == [b"told", b"to", b"stop"] * 3
