"""The chart, rendered. Tests that import this are skipped where Helm's wheel is missing."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
CHART = DEPLOY / "helm" / "llumnix"
CI = sorted((CHART / "ci").glob("*-values.yaml"))

helm = pytest.importorskip("helm_python", reason="needs helm-python-sdk: requirements/deploy.lock")


def render(values: dict[str, Any]) -> dict[str, str]:
    """The manifests' texts by the names of their templates."""
    with helm.Chart.load(CHART) as chart:
        return chart.render(values=values, name="llm", namespace="serving")


def objects(values: dict[str, Any]) -> list[dict[str, Any]]:
    """What would be created."""
    texts = [text for name, text in render(values).items() if name.endswith(".yaml")]
    return [found for text in texts for found in yaml.safe_load_all(text) if found]


def of_kind(kind: str, values: dict[str, Any]) -> dict[str, Any]:
    """The only one of that kind that is no headless service."""
    (found,) = [
        o for o in objects(values) if o["kind"] == kind and o["spec"].get("clusterIP") != "None"
    ]
    return found


def pods(values: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Each pod's template."""
    for found in objects(values):
        if found["kind"] == "StatefulSet":
            yield found["spec"]["template"]
        elif found["kind"] == "RayCluster":
            yield found["spec"]["headGroupSpec"]["template"]
            yield from (group["template"] for group in found["spec"]["workerGroupSpecs"])


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def config_of(values: dict[str, Any], name: str = "config.yaml") -> dict[str, Any]:
    """What `--config` is given."""
    (found,) = [o for o in objects(values) if o["kind"] == "ConfigMap" and name in o["data"]]
    return yaml.safe_load(found["data"][name])
