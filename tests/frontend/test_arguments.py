"""What the parsed command line becomes: the configuration that every instance gets, and the rules
of the gate."""

import os
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm import SamplingParams, envs
from vllm.exceptions import VLLMValidationError
from vllm.v1.executor import Executor
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from llumnix.cluster.first_look import first_look
from llumnix.config import knobs
from llumnix.errors import UsageError
from llumnix.flag_sources import _by_name, variable_of
from llumnix.frontend import arguments
from llumnix.frontend.arguments import ServeCommand, parse, settle_variables
from llumnix.frontend.http.access import Access, digests


def parsed(model: Path, *flags: str) -> ServeCommand:
    return parse(["serve", str(model), *flags], say=lambda _: None)


def policy(command: ServeCommand) -> str:
    return str(command.vllm_config.scheduler_config.policy)


def test_engines_schedule_by_priority_by_default(tiny_model: Path) -> None:
    assert policy(parsed(tiny_model)) == "priority"


def test_the_users_own_scheduling_policy_is_kept(tiny_model: Path, tmp_path: Path) -> None:
    assert policy(parsed(tiny_model, "--scheduling-policy", "fcfs")) == "fcfs"
    config = tmp_path / "config.yaml"
    config.write_text("scheduling-policy: fcfs\n")
    assert policy(parsed(tiny_model, "--config", str(config))) == "fcfs"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--policy", "scls"], "--policy scls does not go with --scheduling-policy fcfs: "),
        (["--scheduler-config", '{"queue": {"slices": true}}'], "queue.slices does not go with "),
    ],
)
def test_promises_without_a_queue_that_keeps_them_are_refused(
    tiny_model: Path, flags: list[str], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        parsed(tiny_model, "--scheduling-policy", "fcfs", *flags)
    parsed(tiny_model, *flags)


@pytest.mark.parametrize(("name", "told"), [("llumnix", 1), ("infaas++", 0)])
def test_a_queue_by_arrival_alone_is_told_where_the_policy_has_rules_for_it(
    tiny_model: Path, name: str, told: int
) -> None:
    said: list[str] = []
    words = ["--policy", name, "--scheduling-policy", "fcfs"]
    parse(["serve", str(tiny_model), *words], say=said.append)
    assert len([line for line in said if "by arrival alone" in line]) == told


UNIPROC = "vllm.v1.executor.uniproc_executor"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("MP", "there is none of that name"),
        ("multiproc", "there is none of that name"),
        ("nowhere.Executor", "it cannot be used (No module named 'nowhere')"),
        (f"{UNIPROC}.Nope", f"it cannot be used (module '{UNIPROC}' has no attribute 'Nope')"),
        (f"{UNIPROC}.torch", "it cannot be used (issubclass() arg 1 must be a class)"),
        ("pathlib.Path", "it cannot be used (distributed_executor_backend must be a subclass of "),
        (".MP", "it cannot be used (Empty module name)"),
    ],
)
def test_what_is_no_executor_is_refused_with_what_there_is(
    tiny_model: Path, name: str, why: str
) -> None:
    with pytest.raises(UsageError) as refused:
        parsed(tiny_model, "--distributed-executor-backend", name)
    assert str(refused.value).startswith(f"--distributed-executor-backend {name}: {why}")
    fix = "; use mp or uni, or the path of a class of executors, like package.module.Name"
    assert str(refused.value).endswith(fix)


class OwnExecutor(UniProcExecutor):
    """A user's."""


@pytest.mark.parametrize(
    ("name", "found"),
    # On a CPU vLLM itself makes `uni` one with a process of its own.
    [
        ("uni", MultiprocExecutor),
        ("mp", MultiprocExecutor),
        (f"{__name__}.OwnExecutor", OwnExecutor),
    ],
)
def test_an_executor_that_vllm_takes_is_the_instances(
    tiny_model: Path, name: str, found: type[Executor]
) -> None:
    command = parsed(tiny_model, "--distributed-executor-backend", name)
    assert Executor.get_class(command.vllm_config) is found


@pytest.mark.parametrize(
    "name", ["ray", "external_launcher", f"{UNIPROC}.ExecutorWithExternalLauncher"]
)
def test_executors_whose_workers_come_from_elsewhere_are_refused(
    tiny_model: Path, name: str
) -> None:
    with pytest.raises(UsageError, match=rf"distributed-executor-backend {name}: .*use mp"):
        parsed(tiny_model, "--distributed-executor-backend", name)


def test_what_differs_from_vllms_defaults_is_in_the_configuration(tiny_model: Path) -> None:
    command = parsed(tiny_model)
    assert command.args.host == "127.0.0.1"
    assert command.args.shutdown_timeout == 30
    assert command.vllm_config.cache_config.kv_cache_memory_bytes == 2**30
    assert command.vllm_config.model_config.enforce_eager
    assert not command.vllm_config.model_config.multimodal_config


def test_the_demo_model_runs_in_float32_on_a_cpu(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arguments, "prepare_demo_model", lambda say: tiny_model)
    dtypes = [
        str(parse(["serve", *flags], say=lambda _: None).vllm_config.model_config.dtype)
        for flags in ([], ["--dtype", "bfloat16"])
    ]
    assert dtypes == ["torch.float32", "torch.bfloat16"]


def test_n_is_bounded_as_openai_bounds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_MAX_N_SEQUENCES", "")  # So that it is taken back afterwards.
    del os.environ["VLLM_MAX_N_SEQUENCES"]
    settle_variables()
    assert SamplingParams(n=128).n == 128
    with pytest.raises(VLLMValidationError, match="n must be at most 128, got 129"):
        SamplingParams(n=129)
    os.environ["VLLM_MAX_N_SEQUENCES"] = "200"
    settle_variables()
    assert SamplingParams(n=200).n == 200


def test_clients_close_idle_connections_before_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "")  # So that it is taken back afterwards.
    del os.environ["VLLM_HTTP_TIMEOUT_KEEP_ALIVE"]
    settle_variables()
    assert envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE > 90  # Go's clients; others close theirs sooner.
    os.environ["VLLM_HTTP_TIMEOUT_KEEP_ALIVE"] = "7"
    settle_variables()
    assert envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE == 7


# -- who may do what


def access(model: Path, *flags: str, said: list[str] | None = None) -> Access:
    command = parse(["serve", str(model), *flags], say=(said if said is not None else []).append)
    found: Access = command.args.access
    return found


def test_keys_come_from_flags_files_and_else_from_variables(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nc\n\n  d  \n")
    file.chmod(0o600)
    monkeypatch.setenv("VLLM_API_KEY", "e")
    monkeypatch.setenv("LLUMNIX_ADMIN_API_KEY", "f")
    said: list[str] = []
    both = access(tiny_model, "--api-key", "a", "b", "--api-key-file", str(file), said=said)
    assert both.client_digests == digests("abcd")
    assert both.admin_digests == digests("f")
    assert said == []
    monkeypatch.setenv("VLLM_API_KEY", "e")
    file.chmod(0o644)
    other = access(tiny_model, "--admin-api-key-file", str(file), said=said)
    assert other.client_digests == digests("e")
    assert other.admin_digests == digests("cd")
    assert said == [
        f"warning: --admin-api-key-file {file} can be read by every user here; chmod 600 it"
    ]


def test_keys_are_left_neither_in_the_arguments_nor_in_the_environment(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "sesame-variable")
    monkeypatch.setenv("LLUMNIX_ADMIN_API_KEY", "sesame-variable-too")
    command = parsed(tiny_model, "--api-key", "sesame-one", "--admin-api-key", "sesame-two")
    assert "sesame" not in repr(command)
    assert not [name for name, value in os.environ.items() if "sesame" in value]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--api-key", ""], "--api-key: a key is empty"),
        (["--api-key", "sch\u00f6n"], "--api-key: a key may have letters"),
        (["--admin-api-key", "two words"], "--admin-api-key: a key may have letters"),
        (["--api-key", "x", "--admin-api-key", "y", "x"], "both an --api-key and an --admin"),
        (["--api-key-file", "/nowhere"], r"--api-key-file /nowhere cannot be read \(No such"),
        (["--admin-api-key-file", "{empty}"], "holds no key; write one a line"),
        (["--admin-api-key-file", "{binary}"], "is no text; write one key a line"),
        (["--allowed-host", "https://llm.example"], "give the name alone, without scheme"),
        (["--allowed-host", "llm.example:443"], "give the name alone, without scheme"),
        (["--max-body-mb", "0"], "--max-body-mb 0: must be above 0"),
    ],
)
def test_a_bad_key_or_file_is_told_in_one_line(
    tiny_model: Path, tmp_path: Path, flags: list[str], said: str
) -> None:
    (tmp_path / "empty").write_text("# none yet\n\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    words = [f.format(empty=tmp_path / "empty", binary=tmp_path / "binary") for f in flags]
    with pytest.raises(UsageError, match=said) as refused:
        parsed(tiny_model, *words)
    assert "\n" not in str(refused.value)


def test_beyond_loopback_a_client_does_not_administer_unless_told(tiny_model: Path) -> None:
    said: list[str] = []
    away = ["--host", "0.0.0.0", "--api-key", "a"]
    assert access(tiny_model, "--api-key", "a", said=said).clients_administer
    assert access(tiny_model, "--uds", "/tmp/x", "--api-key", "a", said=said).clients_administer
    assert access(tiny_model, *away, "--insecure", said=said).clients_administer
    assert said == []
    assert not access(tiny_model, *away, "--admin-api-key", "b", said=said).clients_administer
    assert said == []
    assert not access(tiny_model, *away, said=said).clients_administer
    assert said == [
        "warning: without an --admin-api-key nobody can add, drain or move on this server"
    ]
    with pytest.raises(UsageError, match="reachable from elsewhere"):  # The model would be open.
        parsed(tiny_model, "--host", "0.0.0.0", "--admin-api-key", "b")


def test_the_host_header_counts_on_loopback_or_where_names_are_given(tiny_model: Path) -> None:
    assert access(tiny_model).hosts == frozenset()
    assert access(tiny_model, "--uds", "/tmp/x").hosts is None
    away = ["--host", "0.0.0.0", "--insecure"]
    assert access(tiny_model, *away).hosts is None
    names = ["--allowed-host", "LLM.example", "--allowed-host", "b.example"]
    assert access(tiny_model, *away, *names).hosts == {"llm.example", "b.example"}
    assert access(tiny_model, "--allowed-origins", '["http://a"]').origins == ("http://a",)


def refused(match: str, *words: str) -> None:
    with pytest.raises(UsageError, match=match):
        parse(["serve", *words], say=lambda text: pytest.fail(f"it began: {text}"))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--config", "/nowhere.yaml"], "nowhere.yaml"),
        (["--config", "/etc/hosts"], "write a `flag: value` a line"),
        (["--port", "70000"], "--port 70000: must be 1 to 65535"),
        (["--scheduler-config", "{a: ["], r"--scheduler is not YAML \(line 1\)"),
        (["--scheduler-config", "{priorities: [1]}"], "priorities: expected `knob: value` lines"),
        (["--config", "a.yaml", "--config", "b.yaml"], "--config is given twice"),
        (["--chat-template", "/nowhere/t.jinja"], "/nowhere/t.jinja"),
        (["--chat-template", "/tmp"], "Is a directory"),
        (["--event-log", "/tmp"], "--event-log /tmp cannot be written"),
        (["--event-log", "/nowhere/log"], "its folder does not exist"),
        (["--log-dir", "/proc/logs"], "--log-dir /proc/logs cannot be made or written"),
        (["--lora-modules", "x=/nowhere", "--enable-lora"], "x=/nowhere: .*adapter_config.json"),
        (["--middleware", "nowhere.Nothing"], "--middleware nowhere.Nothing cannot be imported"),
        (["--middleware", "os.nothing"], "os.nothing cannot be imported .*package.module.Name"),
        (["--middleware", "nothing"], "nothing cannot be imported"),
        (["--tool-call-parser", "nope", "--enable-auto-tool-choice"], "invalid tool call parser"),
    ],
)
def test_what_cannot_work_is_refused_before_the_model_is_looked_at(
    flags: list[str], said: str
) -> None:
    refused(said, "nobody/no-such-model", *flags)
    if "--config" not in flags:  # Which wants a MODEL.
        refused(said, *flags)


def test_the_demo_model_can_be_renamed(monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    monkeypatch.setattr(arguments, "prepare_demo_model", lambda say: tiny_model)
    for flags in (
        ["--served-model-name", "org/team/model-v1.0", "alias"],
        ["--port", "8001", "--served-model-name", "org/team/model-v1.0", "alias"],
        ["SmolLM2-135M-Instruct", "--served_model_name", "org/team/model-v1.0", "alias"],
    ):
        command = parse(["serve", *flags], say=lambda _: None)
        assert command.args.model == str(tiny_model)
        assert command.args.served_model_name == ["org/team/model-v1.0", "alias"]
    command = parse(["serve"], say=lambda _: None)
    assert command.args.served_model_name == ["SmolLM2-135M-Instruct"]


def test_a_model_that_is_named_is_no_demo_model(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Path
) -> None:
    monkeypatch.setattr(arguments, "prepare_demo_model", lambda say: pytest.fail("the demo"))
    for words in (
        [str(tiny_model), "--served-model-name", "x"],
        ["--model", str(tiny_model), "--served-model-name", "x"],
        ["--port", "8001", str(tiny_model)],
    ):
        assert parse(["serve", *words], say=lambda _: None).args.model == str(tiny_model)


def test_variables_of_tests_and_benchmarks_are_taken_for_no_flags(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LLUMNIX_SEEDS was, for --seed, and tests that want no warning failed in `make test-all`."""
    root = Path(__file__).resolve().parents[2]
    names: set[str] = set()
    for folder in ("tests", "benchmarks"):
        for file in (root / folder).rglob("*.py"):
            names |= set(re.findall(r"environ(?:\.get\(|\[)\"(LLUMNIX_\w+)", file.read_text()))
    for file in (root / "Makefile", *(root / ".ci").iterdir()):
        names |= set(re.findall(r"\b(LLUMNIX_[A-Z_]+)=", file.read_text()))
    assert {"LLUMNIX_TEST_SEEDS", "LLUMNIX_TEST_FIRST_SEED", "LLUMNIX_PACE"} <= names
    for name in names:
        monkeypatch.setenv(name, "1")
    said: list[str] = []
    parse(["serve", str(tiny_model)], say=said.append)
    assert said == []


def test_what_vllm_takes_for_a_model_is_not_called_a_missing_folder(tmp_path: Path) -> None:
    for uri in ("s3://bucket/model", "gs://bucket/model", "az://bucket/model"):
        with pytest.raises(UsageError) as refusal:
            parse(["serve", uri], say=lambda _: None)
        assert "no such folder" not in str(refusal.value)
        assert uri in str(refusal.value)
    for path in ("./nowhere", "/nowhere", "~/nowhere", "a/b/c", "~nobody/x"):
        refused("no such folder; name a folder", path)
    refused("holds no config.json", str(tmp_path))


def test_the_first_look_has_the_real_parsers_names_and_defaults() -> None:
    real = vars(arguments.make_parser().parse_args(["serve"]))
    seen = vars(first_look(["serve"]))
    assert seen == {name: real[name] for name in seen}
    words = [
        "serve",
        "m",
        "--port",
        "1",
        "--ssl_keyfile",
        "k",
        "--ssl-certfile=c",
        "--api-key",
        "a",
    ]
    words += ["--uds", "u", "--host", "h", "--insecure", "--tensor-parallel-size", "2"]
    given = vars(arguments.make_parser().parse_args(words))
    seen = vars(first_look(words))
    assert seen == {name: given[name] for name in seen}


# -- one file, and a variable for every flag


def test_a_file_and_variables_give_vllms_flags_ours_and_the_schedulers_knobs(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "all.yaml"
    file.write_text(
        f"model: {tiny_model}\nmax-model-len: 96\ninstances: 3\nenforce_eager: true\n"
        "scheduler: {migration: {gain_min: 17}, policy: least-loaded}\n"
        "override-generation-config: {temperature: 0.5}\nsurvival: on\n"
    )
    monkeypatch.setenv("LLUMNIX_MAX_NUM_SEQS", "5")
    monkeypatch.setenv("LLUMNIX_INSTANCES", "4")
    command = parse(["serve", "--config", str(file), "--instances", "2"], say=lambda _: None)
    assert command.deployment.instances == 2
    assert command.deployment.scheduler.migration.gain_min == 17
    assert command.args.policy == "least-loaded"
    assert command.vllm_config.model_config.max_model_len == 96
    assert command.vllm_config.scheduler_config.max_num_seqs == 5
    assert command.args.override_generation_config == {"temperature": 0.5}
    shown = {row["name"]: (row["value"], row["source"]) for row in command.args.settings}
    assert shown["instances"] == (2, "command line")
    assert shown["max-num-seqs"] == (5, "LLUMNIX_MAX_NUM_SEQS")
    assert shown["max-model-len"] == (96, str(file))
    assert shown["kv-cache-memory-bytes"] == (2**30, "llumnix")
    assert "port" not in shown
    assert command.args.settings == sorted(command.args.settings, key=lambda row: row["name"])


def test_every_flag_of_the_real_parser_has_a_variable_of_its_own() -> None:
    _, flags = arguments._make_parsers()
    known = _by_name(flags)
    assert {name for name, _, _ in knobs()} <= set(known)
    assert {"max_model_len", "port", "tensor_parallel_size", "scheduler", "model"} <= set(known)
    variables = {variable_of(name) for name in known}
    assert len(variables) == len(known) > 200


def test_secrets_are_shown_to_nobody(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLUMNIX_API_KEY", "sesame-1")
    monkeypatch.setenv("LLUMNIX_ADMIN_API_KEY", "sesame-2")
    command = parsed(
        tiny_model, "--hf-token", "sesame-3", "--hf-overrides", '{"my_token": "sesame"}'
    )
    assert "sesame" not in repr(command.args.settings)
    shown = {row["name"]: row for row in command.args.settings}
    assert shown["api-key"] == {"name": "api-key", "value": "***", "source": "LLUMNIX_API_KEY"}
    assert command.args.access.client_digests == digests(["sesame-1"])
    assert "LLUMNIX_API_KEY" not in os.environ


@pytest.mark.parametrize(
    "text", ["{migration: {gain_min: 3}}", '{"migration": {"gain_min": 3}}', " {migration: {}}"]
)
def test_knobs_in_braces_are_shown_whichever_way_they_are_written(
    tiny_model: Path, text: str
) -> None:
    command = parsed(tiny_model, "--scheduler-config", text)
    (shown,) = [row for row in command.args.settings if row["name"] == "scheduler-config"]
    assert isinstance(shown["value"]["migration"], dict)


def test_the_first_look_goes_by_the_file_and_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "f.yaml"
    file.write_text("port: 81\nray-address: head:1\nhost: '::1'\nkv-cache-dtype: fp8\n")
    monkeypatch.setenv("LLUMNIX_PORT", "82")
    seen = first_look(["serve", "--config", str(file)])
    assert (seen.port, seen.ray_address, seen.host) == (82, "head:1", "::1")


# -- what vLLM's flags cannot be, and what vLLM says


def test_every_flag_of_vllms_that_does_not_go_with_llumnix_is_refused_and_the_fix_named() -> None:
    parser = arguments.make_parser()
    defaults = parser.parse_args(["serve"])
    arguments._refuse_what_breaks(defaults, defaults)
    for name, fix in arguments._REFUSED.items():
        if not hasattr(defaults, name):
            continue  # Of another version of vLLM's.
        given = Namespace(**{**vars(defaults), name: "something else"})
        flag = "--" + name.replace("_", "-")
        with pytest.raises(UsageError, match=f"^{flag} does not go with llumnix: ") as refused:
            arguments._refuse_what_breaks(given, defaults)
        assert str(refused.value).endswith(fix)


def test_vllms_objections_are_one_line_and_an_unknown_model_is_called_so() -> None:
    pydantic = ValueError(
        "1 validation error for ModelConfig\n  Value error, max_model_len\n is too large "
        "[type=value_error, input_value=1,\n input_type=int]"
    )
    assert arguments._why_refused("m", pydantic) == (
        "vLLM refuses these settings for m: Value error, max_model_len is too large"
    )
    assert arguments._one_line(ValueError()) == "ValueError"
    assert len(arguments._one_line(ValueError("x" * 1000))) == 600
    for text in (
        "m is not a local folder and is not a valid model identifier listed on ...",
        "We couldn't connect to the hub", "you are OFFLINE", "404 Client Error", "Repo id must be",
    ):  # fmt: skip
        said = arguments._why_refused("m", OSError(text))
        assert said.startswith("unknown model m: it is neither a folder here nor a model")
        assert text in said


def test_json_lines_are_vllms_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import logger

    told: list[Any] = []
    monkeypatch.setattr(logger, "configure_logging", told.append)
    args: Any = Namespace()
    arguments._suit_log(args, "text")
    assert (told, vars(args)) == ([], {})
    arguments._suit_log(args, "json")
    assert told == [args.logging_config]
    assert args.logging_config.formatter == "json"


def test_the_completions_flags_are_those_of_serve() -> None:
    names = arguments.flag_names()
    assert names == sorted(names)
    assert {"--instances", "--max-model-len", "--api-key"} <= set(names)
    assert all(name.startswith("--") for name in names)
