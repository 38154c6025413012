"""What a running server reads again, all or nothing."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llumnix.core.settings import (
    AdmissionSettings,
    MigrationSettings,
    QueueSettings,
    SchedulerSettings,
    SurvivalSettings,
)
from llumnix.errors import UsageError
from llumnix.reload.key_file import KeyRing
from llumnix.reload.reloading import Reloading
from llumnix.reload.settings_file import Given, SettingsFile

BEFORE = SchedulerSettings()
GAIN = replace(BEFORE, migration=MigrationSettings(gain_min=2.0))
NOTHING: dict[str, list[str]] = {"now": [], "engines": [], "start": []}


class World:
    """A file of settings, and what was taken of it."""

    def __init__(self, ring: KeyRing | None = None) -> None:
        self.given = Given(settings=BEFORE, others={"model": "a"})
        self.bad: UsageError | None = None
        self.taken: list[SchedulerSettings] = []
        file = SettingsFile(self.given, self.read)
        self.reloading = Reloading(ring or KeyRing(), file, self.taken.append)

    def read(self) -> Given:
        if self.bad is not None:
            raise self.bad
        return self.given

    async def reload(self) -> dict[str, Any]:
        async with self.reloading.done() as changes:
            return changes


def ring(folder: Path, text: str = "ada: {key: a}\n") -> tuple[KeyRing, Path]:
    file = folder / "keys.yaml"
    file.touch(mode=0o600)
    file.write_text(text)
    return KeyRing(str(file)), file


async def test_nothing_that_has_changed_is_taken_once() -> None:
    w = World()
    assert (await w.reload())["settings"] == NOTHING
    assert w.taken == []
    w.given = Given(settings=GAIN, others={"model": "a"})
    assert (await w.reload())["settings"] == {**NOTHING, "now": ["migration.gain_min"]}
    assert (await w.reload())["settings"] == NOTHING
    assert w.taken == [GAIN]


async def test_each_knob_is_named_by_when_it_counts_and_flags_of_a_start_again_and_again() -> None:
    w = World()
    after = replace(GAIN, queue=QueueSettings(passers=1), survival=SurvivalSettings(lives=1))
    w.given = Given(settings=after, others={"dtype": "half"})
    start = ["survival.lives", "dtype", "model"]
    assert (await w.reload())["settings"] == {
        "now": ["migration.gain_min"], "engines": ["queue.passers"], "start": start,
    }  # fmt: skip
    assert w.taken == [replace(after, survival=BEFORE.survival)]
    assert (await w.reload())["settings"] == {**NOTHING, "start": start}
    assert len(w.taken) == 1
    w.given = Given(settings=w.taken[0], others={"model": "a"})
    assert (await w.reload())["settings"] == NOTHING


async def test_what_engines_go_by_is_taken_by_itself() -> None:
    w = World()
    passers = replace(BEFORE, queue=QueueSettings(passers=1))
    w.given = Given(settings=passers, others={"model": "a"})
    assert (await w.reload())["settings"] == {**NOTHING, "engines": ["queue.passers"]}
    assert w.taken == [passers]


async def test_what_counts_from_a_start_alone_is_not_taken() -> None:
    w = World()
    w.given = Given(settings=replace(BEFORE, policy="infaas++"), others={"model": "a"})
    assert (await w.reload())["settings"] == {**NOTHING, "start": ["policy"]}
    assert w.taken == []


async def test_a_setting_that_is_taken_back_counts_as_before() -> None:
    w = World()
    limited = replace(BEFORE, admission=AdmissionSettings(queue_max=3))
    for settings in (limited, BEFORE):
        w.given = Given(settings=settings, others={"model": "a"})
        assert (await w.reload())["settings"]["now"] == ["admission.queue_max"]
    assert w.taken == [limited, BEFORE]


async def test_of_two_files_a_bad_one_keeps_the_other_from_changing_anything(
    tmp_path: Path,
) -> None:
    keys, file = ring(tmp_path)
    w = World(keys)
    w.given, w.bad = Given(settings=GAIN), UsageError("bad knob")
    with pytest.raises(UsageError, match="bad knob"):
        await w.reload()
    assert keys.keys == ()
    w.bad = None
    file.write_text("ada: {}")
    with pytest.raises(UsageError, match="ada: give one of key and sha256"):
        await w.reload()
    assert w.taken == []
    file.write_text("ada: {key: a}")
    assert (await w.reload())["added"] == ["ada"]
    assert w.taken == [GAIN]


async def test_what_has_no_file_is_left_as_it_is(tmp_path: Path) -> None:
    keys, _ = ring(tmp_path)
    assert Reloading(keys)
    async with Reloading(keys).done() as changes:
        assert (changes["added"], changes["settings"]) == (["ada"], NOTHING)
    nothing = Reloading(KeyRing())
    assert not nothing
    with pytest.raises(UsageError, match="no --keys, --scheduler-config or --config file"):
        async with nothing.done():
            pass
    assert World().reloading, "settings alone are enough"


async def test_a_reload_waits_for_the_one_before() -> None:
    w, order = World(), list[str]()
    async with w.reloading.done():
        second = asyncio.create_task(w.reload())
        second.add_done_callback(lambda _: order.append("second"))
        await asyncio.sleep(0.05)
        w.given = Given(settings=GAIN)
        order.append("first")
    assert (await second)["settings"]["now"] == ["migration.gain_min"]
    assert order == ["first", "second"]
