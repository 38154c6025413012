"""A made-up result of a simulation, in the report's form and with figures that look real.

The crowd on the instances is a random walk whose level follows the rate; policies differ in how far
they spread it. Nothing here is a claim about a policy.
"""

import math
import random
from typing import Any

# Share of the whole load that a policy can carry before it queues, and how uneven it leaves it.
POLICIES = {"llumnix": (1.0, 0.05), "infaas++": (0.93, 0.12), "round-robin": (0.85, 0.2)}
WHY = "freeness 12.5 below 31.0; the pair gains 9.2 steps beyond the cost of 1.4"


def fake_result(
    *,
    policies: tuple[str, ...] = tuple(POLICIES),
    rates: tuple[float, ...] = (2.0, 3.0, 4.0, 5.0),
    seeds: int = 3,
    instances: int = 16,
    samples: int = 900,
    classes: bool = False,
    scaling: bool = False,
    trace: str = "L-L",
) -> dict[str, Any]:
    """Runs of all policies, rates and seeds; the first seed's have details."""
    runs = []
    for rate in rates:
        for policy in policies:
            for seed in range(seeds):
                rng = random.Random(f"{trace} {rate} {policy} {seed}")
                load = 0.18 * rate
                run: dict[str, Any] = {
                    "policy": policy,
                    "trace": trace,
                    "rate": rate,
                    "seed": seed,
                    "instances": instances,
                    "metrics": _metrics(rng, policy, load, instances, scaling),
                }
                if classes:
                    run["metrics"]["classes"] = {
                        "high": _latencies(rng, policy, load * 0.6),
                        "normal": _latencies(rng, policy, load * 1.02),
                    }
                if seed == 0:
                    run["details"] = _details(rng, policy, load, instances, samples, scaling)
                runs.append(run)
    about = {
        "profile": "llama-7b on A10, 13,616 tokens of KV memory an instance",
        "command": f"llumnix simulate --trace {trace} --instances {instances} --seeds {seeds}",
    }
    return {"runs": runs, "wall_s": 12.34, "about": about}


def _latencies(rng: random.Random, policy: str, load: float) -> dict[str, Any]:
    room, uneven = POLICIES.get(policy, (0.9, 0.1))
    full = 1 / (1 + math.exp(-14 * (load / room - 0.82)))
    noise = rng.uniform(0.85, 1.18)
    ttft = (0.08 + 6 * full * (0.4 + 4 * uneven)) * noise
    tpot = (0.031 + 0.02 * full + 0.03 * uneven) * rng.uniform(0.96, 1.05)
    e2e = ttft + 260 * tpot
    return {
        "ttft_s": {"mean": ttft, "p50": ttft * 0.4, "p99": ttft * (3 + 40 * uneven)},
        "tpot_s": {"mean": tpot, "p50": tpot * 0.9, "p99": tpot * (1.5 + 9 * uneven)},
        "e2e_s": {"mean": e2e, "p50": e2e * 0.8, "p99": e2e * 3.4},
    }


def _metrics(
    rng: random.Random, policy: str, load: float, instances: int, scaling: bool
) -> dict[str, Any]:
    room, uneven = POLICIES.get(policy, (0.9, 0.1))
    full = max(0.0, load / room - 0.6)
    return {
        **_latencies(rng, policy, load),
        "preemption_loss_s": {"mean": 9 * full * uneven * rng.uniform(0.7, 1.3)},
        "fragmentation_blocked": {"mean": 0.01 + 0.6 * full * uneven},
        "instances_mean": instances * (rng.uniform(0.6, 0.8) if scaling else 1.0),
        "migrations": int(2200 * full) if policy == "llumnix" else 0,
        "preemptions": int(900 * full * uneven),
        "requests_done": 10_000,
        "requests_failed": 0,
    }


def _details(
    rng: random.Random, policy: str, load: float, instances: int, samples: int, scaling: bool
) -> dict[str, Any]:
    room, uneven = POLICIES.get(policy, (0.9, 0.1))
    names = [f"i{n}" for n in range(instances)]
    times = [2.0 * k for k in range(samples)]
    level, offsets = load, [rng.gauss(0, uneven) for _ in names]
    series: dict[str, Any] = {n: {"kv_used": [], "running": [], "waiting": []} for n in names}
    serving, fragmentation = [], []
    decisions: list[dict[str, Any]] = []
    migrations = []
    up = instances
    for k, now in enumerate(times):
        level += 0.08 * (load * (1 + 0.25 * math.sin(k / 60)) - level) + rng.gauss(0, 0.012)
        wanted = min(instances, max(2, round(instances * level / 0.85))) if scaling else instances
        if wanted != up and k % 15 == 0:
            kind = "add" if wanted > up else "drain"
            why = f"mean freeness {40 + 100 * (1 - level):.0f} tokens a request"
            decisions.append({"t_s": now, "kind": kind, "what": f"i{min(up, wanted)}", "why": why})
            up = wanted
        serving.append(up)
        waits = []
        for n, name in enumerate(names):
            offsets[n] += -0.04 * offsets[n] + rng.gauss(0, uneven * 0.3)
            use = level * (instances / up) + offsets[n]
            queue = max(0, round((use - room * 0.97) * 30)) if n < up else 0
            waits.append(queue)
            there = n < up
            series[name]["kv_used"].append(min(1.0, max(0.0, use)) if there else None)
            series[name]["running"].append(round(use * 22) if there else None)
            series[name]["waiting"].append(queue if there else None)
        stuck = sum(w > 0 for w in waits) / instances
        fragmentation.append(min(0.6, stuck * uneven * 2 + rng.random() * 0.01))
        if policy == "llumnix":
            for _ in range(max(0, round(rng.gauss(1.5 * level, 1)))):
                migrations.append(_migration(rng, now, offsets[:up], len(migrations)))
        if k % 3 == 0:
            what = f"r{k} to i{min(range(up), key=lambda n: offsets[n])}"
            why = f"freeness {200 * (1 - level):.1f}, the highest of {up}"
            decisions.append({"t_s": now, "kind": "dispatch", "what": what, "why": why})
    decisions += [
        {"t_s": m["t_s"], "kind": "move", "what": f"{m['source']} to {m['destination']}"}
        | {"why": m["why"]}
        for m in migrations
    ]
    fault = {"t_s": times[-1] * 0.6, "kind": "fault", "what": "i1 dies", "why": "as told"}
    decisions.append(fault)
    ttft = _latencies(rng, policy, load)["ttft_s"]["mean"]
    return {
        "t_s": times,
        "instances": series,
        "fragmentation": fragmentation,
        "serving": serving,
        "migrations": migrations,
        "decisions": sorted(decisions, key=lambda d: d["t_s"]),
        "ttft_s": [ttft * rng.lognormvariate(-0.6, 1.1) for _ in range(2000)],
        "tpot_s": [0.03 + 0.02 * load * rng.lognormvariate(0, uneven * 6) for _ in range(2000)],
    }


def _migration(rng: random.Random, now: float, offsets: list[float], number: int) -> dict[str, Any]:
    order = sorted(range(len(offsets)), key=lambda n: offsets[n])
    source = rng.choice(order[-max(1, len(order) // 3) :])
    destination = rng.choice([n for n in order if n != source][: max(1, len(order) // 3)])
    began = now + rng.uniform(0, 2)
    waiting = rng.random() < 0.12
    return {
        "t_s": began,
        "ended_s": began + (0.02 if waiting else rng.uniform(0.2, 2.5)),
        "request": f"r{number * 7}",
        "source": f"i{source}",
        "destination": f"i{destination}",
        "tokens": rng.randint(200, 6000),
        "waiting": waiting,
        "outcome": "aborted" if rng.random() < 0.04 else "migrated",
        "why": WHY,
    }
