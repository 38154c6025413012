"""vLLM's API through two instances, with the clients that people use."""

import json
from concurrent.futures import ThreadPoolExecutor, wait

import httpx
import openai
import pytest

from llumnix.vllm_seam import RELEASE
from support.server import Server, eventually
from support.streaming import all_at_once
from support.versions import by_version

pytestmark = pytest.mark.live

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 8}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
ASK = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


def test_models_names_what_is_served(client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == ["tiny", "adapter"]


def test_chat_and_its_stream_say_the_same(client: openai.OpenAI) -> None:
    settings = {"model": "tiny", "messages": ASK, "max_tokens": 24, "temperature": 0}
    whole = client.chat.completions.create(**settings)
    pieces = list(
        client.chat.completions.create(
            **settings, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(p.choices[0].delta.content or "" for p in pieces if p.choices)
    assert text == whole.choices[0].message.content
    assert pieces[-1].usage == whole.usage
    assert whole.usage.completion_tokens == 24


def by_instance(server: Server, prompt: str, tokens: int, **more: str) -> dict[str, str]:
    """What each instance answers of six requests at once: one by one all would go to the same."""
    answers = all_at_once([lambda: server.complete(prompt, tokens, **more)] * 6)
    return {a.headers["x-llumnix-instance"]: a.json()["choices"][0]["text"] for a in answers}


def test_both_instances_answer_alike(server: Server) -> None:
    answers = by_instance(server, "the same on each", 16)
    assert set(answers) == {"i0", "i1"}
    assert answers["i0"] == answers["i1"]


def test_a_named_tool_is_called(client: openai.OpenAI) -> None:
    chosen = {"type": "function", "function": {"name": "weather"}}
    answer = client.chat.completions.create(
        model="tiny", messages=ASK, tools=[WEATHER], tool_choice=chosen, max_tokens=200, seed=3
    )
    call = answer.choices[0].message.tool_calls[0]
    assert call.function.name == "weather"
    json.loads(call.function.arguments)


def test_a_json_schema_is_kept(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"enum": [1, 2, 3]}},
        "required": ["n"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model="tiny",
        messages=ASK,
        max_tokens=100,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
    )
    assert json.loads(answer.choices[0].message.content)["n"] in (1, 2, 3)


def test_logprobs_come_for_every_token(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=ASK, max_tokens=5, logprobs=True, top_logprobs=3, temperature=0
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == 5
    assert all(len(t.top_logprobs) == 3 and t.logprob <= 0 for t in content)


def test_n_gives_that_many_choices_and_rows(server: Server, client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model="tiny",
        prompt="x",
        n=2,
        max_tokens=1500,
        seed=5,
        stream=True,
        extra_headers={"X-Request-Id": "pair-of-them"},
        extra_body={"ignore_eos": True},
    )

    def rows() -> list[int]:
        return [r["prompt_tokens"] for r in server.requests() if r["id"] == "pair-of-them"]

    eventually(lambda: rows() == [1, 1], 5, "a row for each of the two")
    seen: set[int] = set()
    for piece in stream:
        seen |= {choice.index for choice in piece.choices}
        if len(seen) == 2:
            break
    stream.close()
    assert seen == {0, 1}
    eventually(lambda: rows() == [], 5, "both have ended")


def test_responses_and_messages_answer(client: openai.OpenAI, server: Server) -> None:
    answer = client.responses.create(model="tiny", input="hello", max_output_tokens=12)
    assert answer.status in ("completed", "incomplete")
    body = {"model": "tiny", "max_tokens": 8, "messages": ASK}
    assert server.http.post("/v1/messages", json=body).json()["type"] == "message"


def test_the_small_routes_answer(server: Server) -> None:
    http = server.http
    tokens = http.post("/tokenize", json={"model": "tiny", "prompt": "abc"}).json()
    assert tokens["count"] == 3
    back = http.post("/detokenize", json={"model": "tiny", "tokens": tokens["tokens"]})
    assert back.json()["prompt"] == "abc"
    assert http.get("/health").status_code == 200
    assert http.get("/version").json()["version"] == RELEASE
    assert http.post("/reset_prefix_cache").status_code == 200
    assert http.get("/is_sleeping").json() == {"is_sleeping": False}


def test_a_users_pause_holds_all_instances_until_he_resumes(server: Server) -> None:
    """New requests wait; since vLLM 0.33 they are refused."""
    http, body = server.http, {"model": "tiny", "prompt": "x", "max_tokens": 2}
    with ThreadPoolExecutor() as pool:
        assert http.post("/pause").status_code == 200
        try:
            asked = [pool.submit(http.post, "/v1/completions", json=body) for _ in range(6)]
            done, _ = wait(asked, timeout=by_version(1, 30))
            assert {f.result().status_code for f in done} == by_version(set(), {503})
            assert http.get("/is_paused").json() == {"is_paused": True}
        finally:
            assert http.post("/resume").status_code == 200
        assert {f.result().status_code for f in asked} == by_version({200}, {503})
    assert {row["state"] for row in server.instances().values()} == {"serving"}
    assert server.complete().status_code == 200


def test_metrics_tell_the_instances_apart(server: Server) -> None:
    for _ in range(4):
        server.complete()
    text = server.http.get("/metrics").text
    for engine in ("0", "1"):
        lines = [
            line
            for line in text.splitlines()
            if line.startswith("vllm:generation_tokens_total") and f'engine="{engine}"' in line
        ]
        assert len(lines) == 1
        assert float(lines[0].split()[-1]) > 0


def test_a_lora_adapter_is_loaded_into_and_removed_from_all(server: Server, lora) -> None:
    http = server.http
    load = {"lora_name": "second", "lora_path": str(lora)}
    assert http.post("/v1/load_lora_adapter", json=load).status_code == 200
    base = server.complete("adapted?", 12).json()["choices"][0]["text"]
    seen = by_instance(server, "adapted?", 12, model="second")
    assert set(seen) == {"i0", "i1"}
    assert len(set(seen.values())) == 1
    assert base not in seen.values()
    unload = {"lora_name": "second"}
    assert http.post("/v1/unload_lora_adapter", json=unload).status_code == 200
    assert server.complete("adapted?", 12, model="second").status_code == 404


def test_a_stream_names_its_instance_and_is_listed_under_the_clients_id(server: Server) -> None:
    body = {"prompt": "list me", "max_tokens": 300, "stream": True, "ignore_eos": True}
    headers = {"X-Request-Id": "my-own-id"}
    with httpx.stream(
        "POST", server.url + "/v1/completions", json=body, headers=headers, timeout=60
    ) as response:
        instance = response.headers["x-llumnix-instance"]
        lines = response.iter_lines()
        for _ in range(8):
            next(lines)
        row = next(r for r in server.requests() if r["id"] == "my-own-id")
        load = server.instances()[instance]
        for _ in lines:
            pass
    assert row["instance"] == instance
    assert row["prompt_tokens"] == len("list me")
    assert 0 < row["output_tokens"] < 300
    assert row["priority"] == 0
    assert row["age_s"] > 0
    assert load["running"] == 1
    assert load["in_flight"] == 1
    eventually(lambda: server.instances()[instance]["running"] == 0, 5)
    assert server.requests() == []


def test_a_client_that_hangs_up_frees_its_request(server: Server) -> None:
    body = {"prompt": "bye", "max_tokens": 1500, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", server.url + "/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        assert "error" not in next(lines)
        assert len(server.requests()) == 1
    eventually(lambda: server.requests() == [], 5)
    eventually(
        lambda: all(
            (i["running"], i["waiting"], i["kv_tokens_used"]) == (0, 0, 0)
            for i in server.instances().values()
        ),
        5,
        "its blocks are free again",
    )


def test_a_burst_is_spread_by_bookings(server: Server) -> None:
    """All arrive before any load report can name them."""
    bodies = [{"prompt": f"burst {i}", "max_tokens": 40, "ignore_eos": True} for i in range(12)]

    async def burst() -> list[str]:
        import asyncio

        async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
            answers = await asyncio.gather(*(http.post("/v1/completions", json=b) for b in bodies))
        return [a.headers["x-llumnix-instance"] for a in answers]

    import asyncio

    placed = asyncio.run(burst())
    assert sorted(placed.count(i) for i in ("i0", "i1")) == [6, 6]


def test_bad_requests_get_vllms_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="nothing", messages=ASK)
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="tiny", prompt="x" * 5000, max_tokens=10)


ODD = [
    {"temperature": -1},
    {"top_k": -2},
    {"n": 10**6},
    {"logprobs": 10**6},
    {"prompt": []},
    {"prompt": [10**6]},
    {"prompt": [2**63]},
    {"seed": 2**70},
    {"logit_bias": {"999999": 5}},
    {"allowed_token_ids": [10**6]},
    {"structured_outputs": {"regex": "("}},
    {"structured_outputs": {"regex": "(a{1,900}){1,900}"}},
    {"structured_outputs": {"grammar": "root ::= ("}},
    {"structured_outputs": {"choice": []}},
]


def test_odd_parameters_are_answered_and_end_no_engine(server: Server) -> None:
    pids = {i["pid"] for i in server.instances().values()}
    for odd in ODD:
        body = {"prompt": "hi", "max_tokens": 2, **odd}
        answer = server.http.post("/v1/completions", json=body)
        assert 200 <= answer.status_code < 500, (odd, answer.text)
        assert isinstance(answer.json(), dict)
    assert {i["pid"] for i in server.instances().values()} == pids
    assert server.complete().status_code == 200


def test_what_has_no_meaning_over_several_instances_says_so(server: Server) -> None:
    answer = server.http.post("/scale_elastic_ep", json={"new_data_parallel_size": 2})
    assert answer.status_code == 400, answer.text
    assert "POST /llumnix/v1/instances" in answer.text
