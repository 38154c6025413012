"""What a user writes into --scheduler-config and the flags beside it."""

import math
import re
from pathlib import Path

import pytest

from llumnix.config import DeploymentConfig, read_settings
from llumnix.core.settings import PriorityClass, SchedulerSettings
from llumnix.errors import UsageError


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "scheduler.yaml"
    path.write_text(text)
    return str(path)


def test_without_a_file_and_flags_the_defaults_hold() -> None:
    assert DeploymentConfig().scheduler == SchedulerSettings()


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert read_settings(written(tmp_path, "# nothing\n")) == SchedulerSettings()


def test_a_file_sets_what_it_names_and_leaves_the_rest(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "policy: cache-aware\n"
        "migration: {interval_s: 0.1, balance: true}\n"
        "priorities:\n"
        "  classes:\n"
        "    - {name: gold, priority: -5, headroom: 0.5}\n"
        "    - {name: rest, priority: 0}\n"
        "  key_caps: {abc: rest}\n",
    )
    found = read_settings(path)
    assert (found.policy, found.migration.interval_s, found.migration.balance) == (
        "cache-aware", 0.1, True,
    )  # fmt: skip
    assert found.priorities.classes == (
        PriorityClass(name="gold", priority=-5, headroom=0.5),
        PriorityClass(name="rest", priority=0),
    )
    assert found.scaling == SchedulerSettings().scaling


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "policy: round-robin\nscaling: {instances_max: 3, up_after_s: 9}\n")
    found = DeploymentConfig(
        policy="infaas++",
        max_instances=5,
        scheduler_config=path,
        priority_class=["gold=-7:0.5", "rest=3"],
    ).scheduler
    assert (found.policy, found.scaling.instances_max, found.scaling.up_after_s) == (
        "infaas++", 5, 9,
    )  # fmt: skip
    assert found.priorities.classes == (
        PriorityClass(name="gold", priority=-7, headroom=0.5),
        PriorityClass(name="rest", priority=3),
    )


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (
            "migrations: {}",
            "no knob migrations; there are: policy, priorities, queue, migration, scaling",
        ),
        ("migration: {tick: 1}", "no knob migration.tick; there are: balance, interval_s"),
        ("migration: {interval_s: fast}", "`$.migration.interval_s`"),
        ("migration: {interval_s: 99}", "migration.interval_s: 99 must be between 0.001 and 10"),
        ("migration: {gain_min: 1, gain_min: 2}", "line 1 has the same name; keep one of the two"),
        ("migration: {gain_min: .inf}", "migration.gain_min: inf must be 0 or more"),
        (
            "migration: {source_below: 1, destination_above: .inf}",
            "migration.destination_above: inf must be a finite number",
        ),
        (
            "migration: {source_below: -.inf, destination_above: 1}",
            "migration.source_below: -inf must be a finite number",
        ),
        (
            "scaling: {freeness_low: 1, freeness_high: .inf}",
            "scaling.freeness_high: inf must be a finite number",
        ),
        (
            "scaling: {freeness_low: .nan, freeness_high: 1}",
            "scaling.freeness_low: nan must be a finite number",
        ),
        ("migration: 5", "migration: expected `knob: value` lines"),
        ("- a", "the file: expected `knob: value` lines"),
        ("a: [sesame", "is not YAML (line 1)"),
        ("policy: fastest", "no policy 'fastest'; there are: llumnix, llumnix-base, infaas++"),
        ("migration: {source_below: 5}", "give both source_below and destination_above"),
        (
            "migration: {source_below: 5, destination_above: 4}",
            "destination_above (4) must not be below source_below (5)",
        ),
        (
            "scaling: {freeness_low: 5, freeness_high: 5}",
            "freeness_high (5) must be above freeness_low (5)",
        ),
        (
            "scaling: {settle_s: 5, cooldown_s: 6}",
            "scaling.settle_s is the former name of scaling.cooldown_s; give that alone",
        ),
        ("scaling: {instances_min: 2}", "--min-instances needs --max-instances"),
        ("priorities: {classes: []}", "name at least one class"),
        ("priorities: {classes: [{name: a, priority: 0, room: 1}]}", "no knob priorities.classes"),
        (
            "priorities: {classes: [{name: a, priority: 0}, {name: a, priority: 1}]}",
            "two classes have the same name",
        ),
        ("priorities: {classes: [{name: a, priority: 0, headroom: 0.5}]}", "leave it out for one"),
        (
            "priorities: {key_caps: {high: sesame}}",
            "write KEY: CLASS; the classes are: high, normal",
        ),
        (
            "priorities:\n  key_caps:\n  sesame: high",
            "no knob of that name in priorities; there are: classes, aging_s",
        ),
        ("priorities: {}\nsesame: high", "no knob of that name in the file; there are: policy"),
        ("priorities: {agin_s: 1}", "no knob priorities.agin_s"),
        ("priorities: {key_caps: {'sha256:k': high}}", "no digest of 64 hex digits follows"),
        ("priorities: {default_cap: golden}", "no class 'golden'; there are: high, normal"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, named: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(UsageError) as raised:
        DeploymentConfig(scheduler_config=path)
    assert named in str(raised.value)
    assert f"--scheduler-config {path}" in str(raised.value)
    assert "sesame" not in str(raised.value)


def test_a_mapping_may_override_a_name_that_it_merges(tmp_path: Path) -> None:
    text = (
        "migration: &a {min_stay: 1, gain_min: 2}\n"
        "scaling: {}\nsurvival: {<<: {lives: 1, wait_s: 5}, lives: 2}\n"
    )
    found = read_settings(written(tmp_path, text))
    assert (found.survival.lives, found.survival.wait_s, found.migration.gain_min) == (2, 5, 2)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("migration: {tick_s: 0.1}", "migration: {interval_s: 0.1}"),
        ("migration: {payback: 3}", "migration: {min_stay: 3}"),
        ("scaling: {low: 7, high: 9}", "scaling: {freeness_low: 7, freeness_high: 9}"),
        ("scaling: {settle_s: 5}", "scaling: {cooldown_s: 5}"),
    ],
)
def test_a_knobs_former_name_is_taken_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, old: str, new: str
) -> None:
    expected = read_settings(written(tmp_path, new))
    assert expected != SchedulerSettings()
    assert caplog.messages == []
    assert read_settings(written(tmp_path, old)) == expected
    part, *names = re.findall(r"[a-z_]+", new)
    assert [re.search(r"now called (\S+);", m)[1] for m in caplog.messages] == [
        f"{part}.{name}" for name in names
    ]


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(UsageError, match=r"nowhere\.yaml cannot be read"):
        DeploymentConfig(scheduler_config="nowhere.yaml")


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"min_instances": 2}, "--min-instances needs --max-instances"),
        ({"min_instances": 3, "max_instances": 2}, "is below --min-instances"),
        ({"instances": 5, "max_instances": 4}, "must lie between --min-instances 1"),
        ({"max_instances": 0}, "must be 1 or more"),
        ({"max_body_mb": math.inf}, "--max-body-mb inf: must be above 0, and 1000000000 at most"),
        ({"max_body_mb": math.nan}, "--max-body-mb nan: must be above 0"),
        ({"event_log_max_mb": math.inf}, "--event-log-max-mb inf: must be above 0, and"),
        ({"migration_bandwidth": math.inf}, "--migration-bandwidth inf: must be above 0; leave"),
        ({"lame_duck": math.inf}, "--lame-duck inf: must be seconds from 0 to 3600"),
        ({"ray_wait": math.nan}, "--ray-wait nan: must be seconds from 0 to 3600"),
        ({"priority_class": ["gold=-5:nan"]}, "headroom nan must be a share between 0 and 1"),
        ({"priority_class": ["gold"]}, "--priority-class gold: expected NAME=NUMBER"),
        ({"priority_class": ["gold=-5:2"]}, "headroom 2.0 must be a share between 0 and 1"),
    ],
)
def test_flags_that_do_not_go_together_are_named(given: dict, named: str) -> None:
    with pytest.raises(UsageError) as raised:
        DeploymentConfig(**given)
    assert named in str(raised.value)
