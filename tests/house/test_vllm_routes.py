"""Which of vLLM's routes an ordinary API key may use. A route that vLLM adds or renames fails here
by name; until it is listed, only an administrator may use it."""

from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import httpx
import pytest

pytest.importorskip("vllm")

from starlette.middleware.cors import CORSMiddleware
from vllm import tasks
from vllm.entrypoints.launchers.app import build_app

from llumnix.frontend.arguments import parse
from llumnix.frontend.http.access import CLIENT_PATHS, needs_admin
from llumnix.frontend.http.server import GATE

CLIENTS = {
    "/classify", "/detokenize", "/docs", "/docs/oauth2-redirect", "/generative_scoring", "/health",
    "/inference/v1/generate", "/invocations", "/load", "/metrics", "/openapi.json", "/ping",
    "/pooling", "/rerank", "/score", "/static/x", "/tokenize", "/tokenizer_info",
    "/v1/audio/transcriptions", "/v1/audio/translations", "/v1/chat/completions",
    "/v1/chat/completions/batch", "/v1/chat/completions/derender", "/v1/chat/completions/render",
    "/v1/completions", "/v1/completions/derender", "/v1/completions/render", "/v1/decisions",
    "/v1/embeddings",
    "/v1/messages", "/v1/messages/count_tokens", "/v1/messages/render", "/v1/models",
    "/v1/realtime", "/v1/rerank", "/v1/responses", "/v1/responses/render",
    "/v1/responses/{response_id}", "/v1/responses/{response_id}/cancel", "/v1/score",
    "/v1/systemone", "/v2/embed", "/v2/rerank", "/version",
}  # fmt: skip
ADMINISTRATORS = {
    "/abort_requests", "/adapters", "/adapters/{adapter_name}", "/collective_rpc",
    "/finish_weight_update", "/get_world_size", "/inference/v1/abort_requests",
    "/init_weight_transfer_engine", "/is_paused", "/is_scaling_elastic_ep", "/is_sleeping",
    "/kv_event_sources", "/pause", "/release_kv_cache_memory", "/reset_encoder_cache",
    "/reset_mm_cache", "/reset_prefix_cache", "/resume", "/scale_elastic_ep", "/server_info",
    "/shutdown_weight_transfer_engine", "/sleep", "/start_draft_weight_update", "/start_profile",
    "/start_weight_update", "/stop_profile", "/update_weight_version", "/update_weights",
    "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/wake_up", "/weight_checker",
    "/weight_info",
}  # fmt: skip


@pytest.fixture(scope="module")
def application(tiny_model: Path) -> Any:
    """vLLM's application for every task at once, its development routes included."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_SERVER_DEV_MODE", "1")
        patch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
        words = [
            "--enable-offline-docs", "--enable-scale-out", "--enable-tokenizer-info-endpoint",
            "--allowed-origins", '["http://a"]',
        ]  # fmt: skip
        command = parse(["serve", str(tiny_model), *words], say=lambda _: None)
        command.args.middleware = [GATE]
        every = {t for name in vars(tasks) for t in get_args(getattr(tasks, name))}
        app = build_app(
            command.args,
            tuple(t for t in every if isinstance(t, str)),
            command.vllm_config.model_config,
        )
        from vllm.entrypoints.serve.profile.api_router import router

        app.include_router(router)  # Only with a profiler's configuration.
        yield app


def test_every_route_of_vllms_is_listed(application: Any) -> None:
    paths = {getattr(route, "path", None) for route in application.routes} - {None}
    paths = {path.replace("/static", "/static/x") for path in paths}
    assert {
        p for p in paths if not needs_admin("POST", p + "x" * p.endswith("/"))
    } == CLIENTS & paths
    assert {p for p in paths if needs_admin("GET", p)} == ADMINISTRATORS & paths
    unlisted = paths - CLIENTS - ADMINISTRATORS
    assert unlisted == set(), "say in frontend/http/access.py and here who may use them"
    assert len(ADMINISTRATORS - paths) <= 2, ADMINISTRATORS - paths


def test_the_lists_agree() -> None:
    assert not [p for p in CLIENTS if needs_admin("POST", p)]
    assert not [p for p in ADMINISTRATORS if not needs_admin("GET", p)]
    ours = {p for p in CLIENT_PATHS if p.startswith("/llumnix/")}
    assert CLIENT_PATHS - ours - CLIENTS == {"/redoc"}


def test_vllms_cors_is_configured_as_the_gates(application: Any) -> None:
    (cors,) = [m for m in application.user_middleware if m.cls is CORSMiddleware]
    args = application.state.args
    assert cors.kwargs == {
        "allow_origins": args.allowed_origins,
        "allow_credentials": args.allow_credentials,
        "allow_methods": args.allowed_methods,
        "allow_headers": args.allowed_headers,
    }


async def test_a_body_that_grows_too_large_is_refused_by_vllms_own_handler(
    application: Any,
) -> None:
    async def content() -> AsyncIterator[bytes]:
        for _ in range(65):
            yield b"1" * 1_000_000

    application.state.engine_client = SimpleNamespace(stopping=False, open_http=0, tracing=None)
    transport = httpx.ASGITransport(application)
    async with httpx.AsyncClient(transport=transport, base_url="http://t") as http:
        for path in ("/v1/completions", "/invocations", "/tokenize"):
            headers = {"Content-Type": "application/json", "Origin": "http://a"}
            answer = await http.post(path, headers=headers, content=content())
            assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")
            assert answer.headers["x-llumnix-reason"] == "too_large"
            assert answer.headers["access-control-allow-origin"] == "http://a"


def test_without_keys_in_its_arguments_vllm_adds_no_check_of_its_own(application: Any) -> None:
    assert "AuthenticationMiddleware" not in [m.cls.__name__ for m in application.user_middleware]
