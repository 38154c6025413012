"""Writes made-up traces of prompts that share their beginnings, for the simulator and live.py.

- `chats.jsonl`: conversations. Each turn's prompt is all that was said before, and more; the next
  turn comes when the answer has been read.
- `tools.jsonl`: questions to applications, each of which has a long system prompt.

The public traces with prefixes (Mooncake's) share little but one system prompt in windows of some
hundred requests.

    python benchmarks/shared_prefixes.py FOLDER
"""

import argparse
import json
import random
from pathlib import Path
from typing import NamedTuple

BLOCK_TOKENS = 512
"""As in Mooncake's traces."""
CHATS, TURNS_MAX = 500, 11
CHATS_PER_S = 2.0
FIRST, MORE, ANSWER = (500, 2500), (100, 600), (50, 400)
"""Tokens of a first question, of a later one, and of an answer."""
READING_S = 8.0
APPLICATIONS, SYSTEM_TOKENS = 64, 4096
QUESTIONS, QUESTIONS_PER_S, QUESTION = 3000, 16.0, (50, 450)


class Row(NamedTuple):
    """One request; `hash_ids` name the blocks of its prompt."""

    arrival_s: float
    input_tokens: int
    output_tokens: int
    hash_ids: list[int]


def chats(dice: random.Random) -> list[Row]:
    rows: list[Row] = []
    start_s, block = 0.0, 0
    for _ in range(CHATS):
        start_s += dice.expovariate(CHATS_PER_S)
        at_s, said, blocks = start_s, dice.randint(*FIRST), list[int]()
        for _ in range(dice.randint(1, TURNS_MAX)):
            while len(blocks) < said // BLOCK_TOKENS:
                block += 1
                blocks.append(block)
            answer = dice.randint(*ANSWER)
            rows.append(Row(at_s, said, answer, _whole(blocks, said, len(rows))))
            at_s += 0.5 + 0.01 * answer + dice.expovariate(1 / READING_S)
            said += answer + dice.randint(*MORE)
    return sorted(rows)


def tools(dice: random.Random) -> list[Row]:
    rows: list[Row] = []
    at_s = 0.0
    for number in range(QUESTIONS):
        at_s += dice.expovariate(QUESTIONS_PER_S)
        first = dice.randrange(APPLICATIONS) * SYSTEM_TOKENS
        blocks = list(range(first, first + SYSTEM_TOKENS // BLOCK_TOKENS))
        tokens = SYSTEM_TOKENS + dice.randint(*QUESTION)
        rows.append(Row(at_s, tokens, dice.randint(*ANSWER), _whole(blocks, tokens, number)))
    return rows


def _whole(blocks: list[int], tokens: int, request: int) -> list[int]:
    """With the last block, if it is not full, under a name that no other request has."""
    return [*blocks, -1 - request] if tokens % BLOCK_TOKENS else list(blocks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, made in (("chats", chats(random.Random(1))), ("tools", tools(random.Random(1)))):
        lines = (json.dumps({**r._asdict(), "arrival_s": round(r.arrival_s, 3)}) for r in made)
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
