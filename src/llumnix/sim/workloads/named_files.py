"""Trace files that `--trace` knows by a name.

They are not part of llumnix. They are looked for in a folder that the caller or the environment
variable LLUMNIX_TRACES names."""

import os
from dataclasses import dataclass
from pathlib import Path

from llumnix.errors import UsageError

FOLDER_VARIABLE = "LLUMNIX_TRACES"


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceFile:
    """A file with a name of its own."""

    file: str
    about: str  # a line for users; tokens are means of input and output
    grid_s: float = 0.0
    """Its arrival times are rounded to so many seconds. Requests of one instant are spread evenly
    over the time up to the next."""


FILES = {
    "azure-code": TraceFile(
        file="azure2023_code.csv.gz",
        about="Azure 2023, code: long prompts, outputs of 28 tokens, arrivals in bursts",
    ),
    "azure-conv": TraceFile(
        file="azure2023_conv.csv.gz",
        about="Azure 2023, conversations: 1,237 and 221 tokens, arrivals nearly Poisson",
    ),
    "mooncake-conversation": TraceFile(
        file="mooncake_conversation.jsonl.gz",
        about="Mooncake, conversations: 12,935 and 346 tokens, shared prefixes (blocks of 512)",
        grid_s=3.0,
    ),
    "mooncake-arxiv": TraceFile(
        file="mooncake_arxiv_first1000.jsonl.gz",
        about="Mooncake's older trace, conversations and tools: 9,792 and 199 tokens, shared "
        "prefixes (blocks of 512)",
        grid_s=3.0,
    ),
    "ragpulse": TraceFile(
        file="ragpulse.jsonl.gz",
        about="RAGPulse, questions to a university: 2,914 and 272 tokens, shared prefixes",
        grid_s=1.0,
    ),
    "arxiv-vidur": TraceFile(
        file="lengths_arxiv_vidur.csv.gz",
        about="arXiv summaries (Vidur): 2,579 and 296 tokens, no arrival times",
    ),
    "sharegpt4-sarathi": TraceFile(
        file="lengths_sharegpt4_sarathi.csv.gz",
        about="ShareGPT4 with history (Sarathi): 2,328 and 437 tokens, no arrival times",
    ),
    "sharegpt-helix": TraceFile(
        file="lengths_sharegpt_firstpair_helix.csv.gz",
        about="ShareGPT's first turns (Helix): 73 and 228 tokens, no arrival times",
    ),
}
CLIENTS = {
    f"servegen-{model}": TraceFile(
        file=f"servegen_{model}_clients.jsonl.gz",
        about=f"ServeGen, clients of Alibaba's {model}: {what}, drawn from statistics",
    )
    for model, what in {
        "m-small": "124 and 18 tokens",
        "m-mid": "305 and 52 tokens",
        "m-large": "922 and 168 tokens",
        "deepseek-r1": "1,213 and 1,992 tokens",
    }.items()
}


def named_file(name: str, folder: str | Path | None) -> Path:
    """The path of the file with that name. `folder`: None for the one that LLUMNIX_TRACES names.
    Raises UsageError if the file is not there."""
    file = {**FILES, **CLIENTS}[name].file
    folder = folder or os.environ.get(FOLDER_VARIABLE)
    fix = f"give the folder that has it with --traces DIR, or in {FOLDER_VARIABLE}"
    if not folder:
        raise UsageError(f"the trace {name} is the file {file}, not part of llumnix: {fix}")
    if not (path := Path(folder) / file).is_file():
        raise UsageError(f"the trace {name} is the file {file}, which is not in {folder}: {fix}")
    return path
