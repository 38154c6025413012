"""Where a flag's value is from: the command line, a variable, the file, or its default."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from llumnix.errors import UsageError
from llumnix.flag_sources import layered, suit_device
from llumnix.settings_shown import settings_shown


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("model_tag", nargs="?")
    parser.add_argument("--model")
    parser.add_argument("--config")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--max-model-len", "-mml", type=int)
    parser.add_argument("--insecure", action="store_true")
    parser.add_argument("--enforce-eager", action=argparse.BooleanOptionalAction)
    parser.add_argument("--priority-class", action="append")
    parser.add_argument("--api-key", nargs="+")
    parser.add_argument("--api-key-file")
    parser.add_argument("--admin-api-key", action="append")
    parser.add_argument("--admin-api-key-file")
    parser.add_argument("--metrics-port", type=int)
    parser.add_argument("--survival", choices=["on", "off"])
    parser.add_argument("--compilation-config")
    parser.add_argument("--scheduler-config", "--scheduler")
    return parser


def read(
    parser: argparse.ArgumentParser,
    words: str = "",
    file: tuple[Path, str] | None = None,
    **environ: str,
) -> tuple[dict[str, Any], dict[str, str]]:
    """What the parser reads, without defaults, and the sources."""
    argv = ["serve", *words.split()]
    if file is not None:
        path = file[0] / "flags.yaml"
        path.write_text(file[1])
        argv += ["--config", str(path)]
    names = {k: k if k.startswith("VLLM_") else f"LLUMNIX_{k}" for k in environ}
    got = layered(argv, parser, {names[k]: v for k, v in environ.items()})
    given = vars(parser.parse_args(got.words[1:]))
    nothing = vars(parser.parse_args([]))
    sources = {k: v.rpartition("/")[2] for k, v in got.sources.items()}
    return {k: v for k, v in given.items() if v != nothing[k]}, sources


def test_the_command_line_goes_before_variables_and_these_before_the_file(
    parser: argparse.ArgumentParser, tmp_path: Path
) -> None:
    file = (tmp_path, "port: 1\nmax-model-len: 1\nsurvival: off\nmodel: from-file\n")
    values, sources = read(parser, "--port 3", file, PORT="2", MAX_MODEL_LEN="2")
    assert values == {"model_tag": "from-file", "port": 3, "max_model_len": 2, "survival": "off"}
    assert sources == {
        "port": "command line", "max_model_len": "LLUMNIX_MAX_MODEL_LEN",
        "survival": "flags.yaml", "model": "flags.yaml",
    }  # fmt: skip


def test_lists_are_not_joined_from_several_places(
    parser: argparse.ArgumentParser, tmp_path: Path
) -> None:
    file = (tmp_path, "priority-class: [a=1, b=2]\napi_key: [x, y]\n")
    values, _ = read(parser, "", file)
    assert values == {"priority_class": ["a=1", "b=2"], "api_key": ["x", "y"]}
    values, _ = read(parser, "--priority-class c=3", file, API_KEY='["z", "w"]')
    assert values == {"priority_class": ["c=3"], "api_key": ["z", "w"]}
    assert read(parser, PRIORITY_CLASS="d=4")[0] == {"priority_class": ["d=4"]}


@pytest.mark.parametrize("words", ["--max-model-len=5", "--max_model_len 5", "-mml 5", "--max-m 5"])
def test_a_flag_is_known_however_it_is_written(parser: argparse.ArgumentParser, words: str) -> None:
    words = words.replace("_", "-")  # As vLLM's parser reads it.
    assert read(parser, words, MAX_MODEL_LEN="7")[0] == {"max_model_len": 5}


def test_a_dotted_flag_stands_for_the_whole(parser: argparse.ArgumentParser) -> None:
    got = layered(
        ["serve", "--compilation-config.mode", "3"],
        parser,
        {"LLUMNIX_COMPILATION_CONFIG": "{}"},
    )
    assert got.words == ["serve", "--compilation-config.mode", "3"]


def test_switches_are_true_or_false(parser: argparse.ArgumentParser, tmp_path: Path) -> None:
    file = (tmp_path, "insecure: true\nenforce-eager: false\n")
    assert read(parser, "", file)[0] == {"insecure": True, "enforce_eager": False}
    assert read(parser, INSECURE="no", ENFORCE_EAGER="1")[0] == {"enforce_eager": True}
    with pytest.raises(UsageError, match="LLUMNIX_INSECURE: it is a switch, so write true"):
        read(parser, INSECURE="perhaps")
    with pytest.raises(UsageError, match="--insecure is a switch, so write true or false"):
        read(parser, "", (tmp_path, "insecure: 1\n"))


def test_yamls_own_reading_of_on_is_undone(parser: argparse.ArgumentParser, tmp_path: Path) -> None:
    assert read(parser, "", (tmp_path, "survival: on\n"))[0] == {"survival": "on"}


def test_a_mapping_is_passed_on_as_json(parser: argparse.ArgumentParser, tmp_path: Path) -> None:
    file = (tmp_path, "compilation-config: {mode: 3, custom: [a]}\n")
    assert read(parser, "", file)[0] == {"compilation_config": '{"mode": 3, "custom": ["a"]}'}


def test_the_model_is_the_command_lines_the_variables_or_the_files(
    parser: argparse.ArgumentParser, tmp_path: Path
) -> None:
    file = (tmp_path, "model_tag: file\n")
    assert read(parser, "given --port 1", file, MODEL="variable")[0]["model_tag"] == "given"
    assert read(parser, "--port 1", file, MODEL="variable")[0]["model_tag"] == "variable"
    assert read(parser, "--port 1", file)[0]["model_tag"] == "file"
    assert read(parser, "--model m", file)[0] == {"model": "m"}


def test_the_file_may_be_named_by_a_variable(
    parser: argparse.ArgumentParser, tmp_path: Path
) -> None:
    (tmp_path / "f.yml").write_text("port: 5")
    assert read(parser, CONFIG=str(tmp_path / "f.yml"))[0] == {"port": 5}
    with pytest.raises(UsageError, match="LLUMNIX_CONFIG /nowhere cannot be read"):
        read(parser, CONFIG="/nowhere")


@pytest.mark.parametrize(
    ("words", "text", "said"),
    [
        ("--config", None, "--config: name the file"),
        ("--config --port 1", None, "--config: name the file"),
        ("--config a --config=b", None, "--config is given twice: put all of it into one file"),
        ("--config /nowhere", None, r"--config /nowhere cannot be read \(No such file"),
        ("", "api-key: [sesame", r"flags.yaml is not YAML \(line 1\)$"),
        ("", "[a]", "flags.yaml: write a `flag: value` a line"),
        ("", "prot: 1", "no flag is called 'prot'; did you mean port?"),
        ("", "frobnicate: 1", "no flag is called 'frobnicate'; see --help=all"),
        ("", "{port: 1, api-key:sesame}", "called 'api-key:'; is there a space after its colon?"),
        ("", "port: 1\n\nport: 2", "flags.yaml: lines 1 and 3 have the same name; keep one"),
        ("", "api-key: a\napi_key: sesame", "api-key and api_key are one flag; give one of the"),
        ("", "scheduler: {}\nscheduler-config: a", "scheduler and scheduler-config are one flag"),
        ("", "model: a\nmodel-tag: b", "model and model-tag are one flag"),
        ("", "config: x", "no flag is called 'config'"),
    ],
)
def test_a_bad_file_is_told_in_one_line(
    parser: argparse.ArgumentParser, tmp_path: Path, words: str, text: str | None, said: str
) -> None:
    with pytest.raises(UsageError, match=said) as refused:
        read(parser, words, None if text is None else (tmp_path, text))
    assert "\n" not in str(refused.value)
    assert "sesame" not in str(refused.value)


def test_two_variables_of_one_flag_are_refused(parser: argparse.ArgumentParser) -> None:
    with pytest.raises(UsageError) as refused:
        read(parser, SCHEDULER="{}", SCHEDULER_CONFIG="knobs.yaml")
    assert str(refused.value) == (
        "the environment: LLUMNIX_SCHEDULER and LLUMNIX_SCHEDULER_CONFIG are one flag; give one of "
        "the two"
    )


def test_the_keys_of_a_schedulers_tree_are_not_shown() -> None:
    """A --config file's `scheduler:` is a text by then."""
    tree = {"policy": "llumnix", "priorities": {"key_caps": {"sesame": "high"}}}
    args = argparse.Namespace(scheduler_config=json.dumps(tree), port=1)
    rows = settings_shown(args, argparse.Namespace(port=1), {"scheduler_config": "the file"})
    assert "sesame" not in json.dumps(rows)
    assert rows[0]["value"]["policy"] == "llumnix"
    path = argparse.Namespace(scheduler_config="knobs.yaml")
    (row,) = settings_shown(path, argparse.Namespace(), {})
    assert row["value"] == "knobs.yaml"


def test_a_variable_that_is_nearly_a_flags_is_told(parser: argparse.ArgumentParser) -> None:
    environ = {"LLUMNIX_MAX_MODEL_LENGTH": "1", "LLUMNIX_URL": "u", "LLUMNIX_TRACES": "t"}
    got = layered(["serve"], parser, environ)
    assert got.warnings == [
        "warning: LLUMNIX_MAX_MODEL_LENGTH sets nothing; did you mean LLUMNIX_MAX_MODEL_LEN?"
    ]
    assert got.words == ["serve"]


def test_an_empty_variable_says_nothing(parser: argparse.ArgumentParser) -> None:
    assert read(parser, PORT="", CONFIG="")[0] == {}


def test_the_first_look_leaves_out_what_it_does_not_know(
    parser: argparse.ArgumentParser, tmp_path: Path
) -> None:
    (tmp_path / "f.yaml").write_text("port: 5\ntensor-parallel-size: 2\n")
    argv = ["serve", "m", "--config", str(tmp_path / "f.yaml"), "--seed", "1"]
    got = layered(argv, parser, {}, strict=False)
    assert got.words == ["serve", "m", "--port=5", "--seed", "1"]


@pytest.mark.parametrize(
    ("words", "environ", "keys"),
    [
        ("", {}, {"api_key": ["file"], "admin_api_key": ["file"]}),
        ("", {"VLLM_API_KEY": "[v"}, {"api_key": ["[v"], "admin_api_key": ["file"]}),
        ("", {"VLLM_API_KEY": "v", "API_KEY": "l"}, {"api_key": ["l"], "admin_api_key": ["file"]}),
        ("", {"VLLM_API_KEY": "v", "API_KEY_FILE": "/l"}, {"api_key_file": "/l"}),
        ("", {"ADMIN_API_KEY": "l"}, {"admin_api_key": ["l"]}),
        ("", {"ADMIN_API_KEY_FILE": "/l"}, {"admin_api_key_file": "/l"}),
        ("--admin-api-key-file /f", {"ADMIN_API_KEY": "l"}, {"admin_api_key_file": "/f"}),
        ("--admin-api-key f", {"ADMIN_API_KEY": "l"}, {"admin_api_key": ["f"]}),
        ("--api-key f", {"VLLM_API_KEY": "v", "API_KEY_FILE": "/l"}, {"api_key": ["f"]}),
        (
            "--api-key f --api-key-file /f",
            {"ADMIN_API_KEY": "l", "ADMIN_API_KEY_FILE": "/l"},
            {
                "api_key": ["f"], "api_key_file": "/f",
                "admin_api_key": ["l"], "admin_api_key_file": "/l",
            },
        ),
    ],
)  # fmt: skip
def test_keys_are_those_of_the_first_place_that_has_some(
    parser: argparse.ArgumentParser,
    tmp_path: Path,
    words: str,
    environ: dict[str, str],
    keys: dict[str, Any],
) -> None:
    file = (tmp_path, "api-key: [file]\nadmin-api-key: [file]\nport: 1\n")
    found = read(parser, words, file, **environ)[0]
    assert found.pop("port") == 1
    others = {"api_key": ["file"], "admin_api_key": ["file"]}
    for name in list(others):
        if keys.keys() & {name, f"{name}_file"}:
            del others[name]
    assert found == others | keys


def test_service_links_of_kubernetes_are_no_flags(parser: argparse.ArgumentParser) -> None:
    """What a pod gets beside services called llumnix and llumnix-metrics."""
    environ = {
        "LLUMNIX_PORT": "tcp://10.0.0.1:8000",
        "LLUMNIX_PORT_8000_TCP": "tcp://10.0.0.1:8000",
        "LLUMNIX_PORT_8000_TCP_PROTO": "tcp",
        "LLUMNIX_PORT_8000_TCP_PORT": "8000",
        "LLUMNIX_PORT_8000_TCP_ADDR": "10.0.0.1",
        "LLUMNIX_SERVICE_HOST": "10.0.0.1",
        "LLUMNIX_SERVICE_PORT": "8000",
        "LLUMNIX_SERVICE_PORT_HTTP": "8000",
        "LLUMNIX_METRICS_PORT": "udp://[fd00::1]:29000",
        "LLUMNIX_METRICS_SERVICE_PORT": "29000",
        "LLUMNIX_INSTANCES_PORT": "tcp://10.0.0.1:8000",
    }
    got = layered(["serve"], parser, environ)
    assert (got.words, got.sources) == (["serve"], {})
    fix = "on the command line, or enableServiceLinks: false"
    assert got.warnings == [
        "warning: LLUMNIX_PORT=tcp://10.0.0.1:8000 is a service link of Kubernetes and sets "
        f"nothing; give --port {fix}",
        "warning: LLUMNIX_METRICS_PORT=udp://[fd00::1]:29000 is a service link of Kubernetes and "
        f"sets nothing; give --metrics-port {fix}",
    ]
    assert layered(["serve"], parser, {"LLUMNIX_PORT": "81"}).words == ["serve", "--port=81"]


@dataclass
class Connector:
    """As vLLM's KVTransferConfig."""

    name: str
    extra: dict[str, Any]
    unset: str | None = None
    inner: "Connector | None" = None


class Plain:
    def __repr__(self) -> str:
        return "Plain(api_key='sesame', more={'token': \"sesame\", 'n': 3}, password: sesame)"


def test_no_secret_within_a_configuration_object_is_shown() -> None:
    inner = Connector("inner", {"x": [{"S3_SECRET_KEY": "sesame"}], "max_tokens": 7})
    extra = {"api_key": "sesame", "url": "redis://me:sesame@h:1/0", "passwd": "sesame", "size": 4}
    args = argparse.Namespace(kv=Connector("outer", extra, inner=inner), plain=Plain())
    rows = settings_shown(args, argparse.Namespace(), {})
    assert "sesame" not in json.dumps(rows)
    assert rows[0]["value"] == {
        "name": "outer",
        "extra": {"api_key": "***", "url": "redis://***@h:1/0", "passwd": "***", "size": 4},
        "inner": {"name": "inner", "extra": {"x": [{"S3_SECRET_KEY": "***"}], "max_tokens": 7}},
    }
    assert rows[1]["value"] == "Plain(api_key=***, more={'token': ***, 'n': 3}, password: ***)"


@dataclass(frozen=True)
class Platform:
    cuda: bool
    cpu: bool = False

    def is_cpu(self) -> bool:
        return self.cpu

    def is_cuda_alike(self) -> bool:
        return self.cuda


@pytest.mark.parametrize(
    ("platform", "chosen", "gpus", "becomes"),
    [
        (Platform(cuda=True), None, 1, "mp"),
        (Platform(cuda=True), "uni", 1, "uni"),
        (Platform(cuda=True), None, 2, None),  # vLLM counts the GPUs, and chooses the same.
        (Platform(cuda=False), None, 1, None),
        (Platform(cuda=False, cpu=True), None, 1, None),
    ],
)
def test_a_gpus_model_has_a_process_of_its_own_unless_the_user_has_chosen(
    platform: Platform, chosen: str | None, gpus: int, becomes: str | None
) -> None:
    names: dict[str, Any] = {"kv_cache_memory_bytes": 1, "dtype": "auto", "enforce_eager": False}
    names |= {"tensor_parallel_size": gpus, "pipeline_parallel_size": 1}
    args = argparse.Namespace(**names, distributed_executor_backend=chosen)
    suit_device(platform, args, argparse.Namespace(**names), [], demo=False)
    assert args.distributed_executor_backend == becomes
