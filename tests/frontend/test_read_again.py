"""Settings that `llumnix serve` reads again: from the same places as at the start, by the same
rules."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from llumnix.errors import UsageError
from llumnix.frontend.arguments import ServeCommand, parse


class World:
    """A server's files, and its command as it was at the start."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.model = model
        self.config, self.knobs = folder / "llumnix.yaml", folder / "knobs.yaml"

    def start(self, *flags: str) -> ServeCommand:
        return parse(["serve", str(self.model), *flags], say=lambda _: None)

    def reread(self, command: ServeCommand) -> Any:
        """What a reload finds."""
        assert command.again is not None
        return command.reloading(lambda _: None)._settings.read()


@pytest.fixture
def world(tiny_model: Path, tmp_path: Path) -> World:
    return World(tiny_model, tmp_path)


def test_a_file_that_is_as_it_was_changes_nothing(world: World) -> None:
    world.config.write_text(
        "max-model-len: 256\napi-key: [sesame]\nscheduler: {migration: {gain_min: 3}}\n"
        "priority-class: ['a=-1:0.5', 'b=0']\nhf-overrides: {a: 1}\ninstances: 3\n"
        "compilation-config: {mode: 0}\nmax-instances: 5\nseed: 3\nno-ui: true\n"
    )
    command = world.start("--config", str(world.config), "--disable-log-stats")
    found = world.reread(command)
    assert (found.now, found.engines, found.start) == ([], [], [])
    assert found.settings == command.deployment.scheduler
    assert "sesame" not in repr((command.given, command.args.settings, command))


@pytest.mark.parametrize(
    ("line", "path", "value"),
    [
        ("scheduler: {migration: {gain_min: 4}}", "migration.gain_min", 4),
        ("scheduler: {admission: {queue_max: 4}}", "admission.queue_max", 4),
        ("queue-max: 4", "admission.queue_max", 4),
        ("max-instances: 4", "scaling.instances_max", 4),
    ],
)
def test_a_line_that_comes_into_the_config_file_counts(
    world: World, line: str, path: str, value: int
) -> None:
    world.config.write_text("seed: 1\n")
    command = world.start("--config", str(world.config))
    world.config.write_text(f"seed: 1\n{line}\n")
    found = world.reread(command)
    assert (found.now, found.engines, found.start) == ([path], [], [])
    section, knob = path.split(".")
    assert getattr(getattr(found.settings, section), knob) == value


def test_a_file_of_knobs_is_read_again_and_flags_win_over_it(world: World) -> None:
    world.knobs.write_text("scaling: {instances_max: 3}\n")
    flags = ["--scheduler-config", str(world.knobs), "--queue-max", "9"]
    command = world.start(*flags)
    world.knobs.write_text(
        "scaling: {instances_max: 2}\nadmission: {queue_max: 1}\nqueue: {passers: 2}\n"
    )
    found = world.reread(command)
    assert (found.now, found.engines) == (["scaling.instances_max"], ["queue.passers"])
    assert found.settings.admission.queue_max == 9
    assert found.settings.scaling.instances_max == 2


def test_a_variable_wins_over_the_file_as_at_the_start(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLUMNIX_QUEUE_MAX", "5")
    world.config.write_text("queue-max: 6\n")
    command = world.start("--config", str(world.config))
    world.config.write_text("queue-max: 7\n")
    assert world.reread(command).now == []


@pytest.mark.parametrize(
    "variable", ["LLUMNIX_API_KEY", "LLUMNIX_ADMIN_API_KEY", "VLLM_API_KEY", "LLUMNIX_HF_TOKEN"]
)
def test_keys_by_variable_are_gone_once_they_were_read_and_not_told_as_changed(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    (tmp_path / "keys").write_text("of-the-file\n")
    monkeypatch.setenv(variable, "sesame")
    world.config.write_text(f"api-key-file: {tmp_path / 'keys'}\n")
    command = world.start("--config", str(world.config))
    assert world.reread(command).start == []


def test_flags_that_take_a_new_start_are_named(world: World) -> None:
    world.config.write_text("max-model-len: 256\nseed: 1\n")
    command = world.start("--config", str(world.config))
    world.config.write_text("max-model-len: 128\npolicy: infaas++\nsurvival: off\nport: 81\n")
    found = world.reread(command)
    assert (found.now, found.engines) == ([], [])
    assert found.start == ["policy", "survival.lives", "max-model-len", "port", "seed"]


def test_a_model_that_the_file_names_anew_counts_from_the_next_start(world: World) -> None:
    world.config.write_text(f"model: {world.model}\n")
    command = parse(["serve", "--config", str(world.config)], say=lambda _: None)
    assert world.reread(command).start == []
    world.config.write_text("model: /models/another\n")
    assert world.reread(command).start == ["model"]
    world.config.write_text("port: 81\n")
    assert world.reread(command).start == ["model", "port"]


@pytest.mark.parametrize("variable", ["LLUMNIX_API_KEY", "VLLM_API_KEY"])
def test_a_key_by_a_variable_lets_a_server_be_reached_at_a_reload_too(
    world: World, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "sesame")
    world.config.write_text("host: 0.0.0.0\n")
    command = world.start("--config", str(world.config))
    assert world.reread(command).start == []
    assert "sesame" not in repr(command.again)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("queue-max: four\n", "--queue-max: invalid int value: 'four'"),
        ("no-such-flag: 1\n", "no flag is called 'no-such-flag'"),
        ("scheduler: {migration: {gain: 1}}\n", "no knob migration.gain"),
        ("queue-max: 0\n", "admission.queue_max: 0 must be 1 or more"),
        ("policy: best\n", "argument --policy: "),
        ("a: [\n", "is not YAML"),
        ("max-instances: 1\n", "--instances 2 is what it starts with"),
        ("ready-min: 0\n", "--ready-min 0: must be 1 or more"),
        ("data-parallel-size: 2\n", "--data-parallel-size does not go with llumnix"),
        ("served-model-name: [a, --help]\n", "--help"),
        ("kv-transfer-config: {kv_role: none}\n", "kv_role"),
        ("scheduling-policy: fcfs\nscheduler: {queue: {slices: true}}\n", "queue.slices does not"),
        ("event-log: /nowhere/log\n", "its folder does not exist"),
        ("distributed-executor-backend: ray\n", "use mp"),
        ("api-key-file: /nowhere/keys\n", "--api-key-file /nowhere/keys cannot be read"),
        ("keys: /nowhere/keys.yaml\n", "--keys /nowhere/keys.yaml cannot be read"),
        ("port: 70000\n", "--port 70000: must be 1 to 65535"),
        ("host: 0.0.0.0\n", "--host 0.0.0.0 is reachable from elsewhere"),
        ("api-server-count: 0\n", "--api-server-count 0: must be 1 or more"),
        ("chat-template: /nowhere/t.jinja\n", "/nowhere/t.jinja"),
    ],
)
def test_a_bad_file_is_a_clear_line_and_ends_nothing(
    world: World, capfd: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    world.config.write_text("seed: 1\n")
    command = world.start("--config", str(world.config))
    world.config.write_text(text)
    with pytest.raises(UsageError) as refused:
        world.reread(command)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert "usage:" not in "".join(capfd.readouterr())


def test_a_file_that_is_gone_is_told(world: World) -> None:
    world.knobs.write_text("{}\n")
    command = world.start("--scheduler-config", str(world.knobs))
    world.knobs.unlink()
    with pytest.raises(UsageError, match="cannot be read"):
        world.reread(command)


@pytest.mark.parametrize("flags", [[], ["--scheduler-config", "{migration: {gain_min: 1}}"]])
def test_without_a_file_there_is_nothing_to_read_again(world: World, flags: list[str]) -> None:
    command = world.start(*flags)
    assert command.again is None
    assert not command.reloading(lambda _: None)
