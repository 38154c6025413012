"""The tables of docs/ that come from raw figures: each function reads files under
benchmarks/results/ and returns Markdown. scripts/draw_pages.py puts them between their markers."""

from collections.abc import Callable
from functools import partial

from raw_tables.moves import copies, drains, moves, others, steps
from raw_tables.overview import goals, index, six_figures
from raw_tables.paper import paper_gains, paper_seconds, paper_table, paper_urgent
from raw_tables.raw import RULES, SERVED_2, SERVED_4, SERVED_SHORT, SHARED, with_age
from raw_tables.serving import (
    burst_ratios,
    bursts,
    carried,
    deaths,
    decisions,
    executors,
    fed,
    front_end,
    frontends,
    full_queue,
    long_answers,
    observed,
    paced,
    ratios,
    scaling,
    serving,
    soak,
    token_cost,
)
from raw_tables.simulator import (
    admission,
    apart,
    errors,
    fidelity,
    memory,
    prompt_steps,
    published_slices,
    short_memory,
    short_memory_ratios,
    short_memory_traces,
    simulated,
    slices,
)

TABLES: dict[str, Callable[[], str]] = {
    "six figures": six_figures,
    "goals": goals,
    "memory": memory,
    "serving ratios": lambda: ratios((*SERVED_SHORT, SERVED_2[0], *SERVED_4, *SHARED)),
    "moves": lambda: moves("gpu/migration_h200_vllm033.json", "gpu/migration_h200_uni.json"),
    "others": lambda: others("gpu/migration_h200_now.json", "gpu/migration_h200_tp2.json"),
    "drains": lambda: drains(
        *(f"gpu/migration_h200_{run}.json" for run in ("now", "tp2"))
    ),
    "deaths": deaths,
    "front end": frontends,
    "executors": lambda: executors("gpu/serving_executors.json"),
    "full queue": lambda: full_queue("gpu/full_queue_memory.json", "gpu/full_queue_slots.json"),
    "burst ratios": burst_ratios,
    "mooncake 2": lambda: serving(*SERVED_2[0]),
    "sharegpt 2": lambda: ratios(SERVED_2[1:]),
    "mooncake": lambda: serving(*SERVED_4[0]),
    "sharegpt": lambda: serving(*SERVED_4[1]),
    "sharegpt short": lambda: serving(*SERVED_SHORT[0]),
    "azure short": lambda: serving(*SERVED_SHORT[1]),
    "chats": lambda: serving(*SHARED[0]),
    "tools": lambda: serving(*SHARED[1]),
    "paced": paced,
    "simulated": simulated,
    "slices": slices,
    "long answers": long_answers,
    "prompt steps": prompt_steps,
    "apart": apart,
    "admission": admission,
    "published slices": published_slices,
    "short memory": short_memory,
    "short memory ratios": short_memory_ratios,
    "short memory traces": short_memory_traces,
    "rules live": lambda: serving(*RULES),
    "fidelity h200": lambda: fidelity("fidelity_h200.json"),
    "fidelity h100": lambda: fidelity("fidelity_h100.json"),
    "fidelity paced": lambda: fidelity("fidelity.json"),
    "errors": errors,
    "copies": lambda: copies("gpu/migration.json", paper=True),
    "copies cpu": lambda: copies("migration_cpu.json", paper=False),
    "more moves": lambda: moves("gpu/migration_h200_tp2.json", "migration_cpu.json"),
    "more others": lambda: others("migration_cpu.json"),
    "steps": lambda: steps("gpu/migration_h200_steps.json"),
    "overhead": lambda: front_end("overhead.json"),
    "token cost": token_cost,
    "carried": carried,
    "observed": observed,
    "fed": fed,
    "decisions": decisions,
    "full queue cpu": lambda: full_queue("priorities.json"),
    "bursts": bursts,
    "soak": soak,
    "paper gains": paper_gains,
    "paper seconds": paper_seconds,
    "paper urgent": paper_urgent,
    "paper priorities": lambda: paper_table("priorities", 0),
    "paper scaling": lambda: paper_table("autoscaling", 0),
    "paper thresholds": lambda: paper_table("autoscaling", 1),
    "paper saved": lambda: paper_table("autoscaling", 2),
    "paper scalability": lambda: paper_table("scalability", 0),
    "scaling": scaling,
    "raw files": index,
}  # fmt: skip
SHOWN = (
    "six figures", "goals", "serving ratios", "moves", "others", "drains", "deaths", "front end",
    "full queue", "burst ratios", "scaling", "errors", "paper gains", "paper urgent", "paper saved",
)  # fmt: skip
"""Those on pages that are read. The laboratory lists the age of every file instead."""
DRAWINGS = TABLES | {name: partial(with_age, TABLES[name]) for name in SHOWN}
"""What stands between the markers, by their names."""
