"""Renders the chart with Helm's own code (PyPI: helm-python-sdk): ``python -m tests.deploy.chart`` writes
``deploy/helm/rendered`` again."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

HELM = Path(__file__).parents[2] / "deploy/helm"
CHART = HELM / "inflightd"
RENDERED = HELM / "rendered"
HAS_HELM = importlib.util.find_spec("helm_python") is not None

# What is switched on by each value at least once.
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "hpa": {
        "autoscaling": {"kind": "hpa", "maxReplicas": 8},
        "cache": {"kind": "memory"},
        "networkPolicy": {"clients": [{"namespaceSelector": {"matchLabels": {"name": "apps"}}}]},
    },
    "gateway": {
        "image": {"tag": "gpu"},
        "model": "Qwen/Qwen3-8B",
        "gpus": 1,
        "flags": {
            "max-num-seqs": 256,
            "served-model-name": "chat",
            "max-queued-tokens": 2**21,
            "gpu-memory-utilization": 0.85,
            "strict-fields": True,
        },
        "environment": [
            {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}},
        ],
        "metricsPrefix": "vllm",
        "apiKeys": {"existingSecret": "inflightd-keys", "probeSecretKey": "probe"},
        "cache": {"kind": "ephemeral", "size": "60Gi"},
        "autoscaling": {"kind": "keda"},
        "podMonitor": {"enabled": True},
        "inferencePool": {"enabled": True},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
    },
}


def rendered(values: dict[str, Any]) -> str:
    """All manifests of a release ``inflightd`` in the namespace ``models``. Raises HelmError."""
    import helm_python

    with helm_python.Chart.load(CHART) as chart:
        chart.validate_schema(values)
        files = chart.render(values, name="inflightd", namespace="models")
    return "".join(
        f"---\n# {Path(name).name}\n{text.strip()}\n"
        for name, text in sorted(files.items())
        if text.strip() and not name.endswith("NOTES.txt")
    )


if __name__ == "__main__":
    RENDERED.mkdir(exist_ok=True)
    for variant, given in VARIANTS.items():
        (RENDERED / f"{variant}.yaml").write_text(rendered(given))
