"""The chart: what Helm makes of it (``rendered/``) fits the server, the cluster and the gateway."""

from __future__ import annotations

import argparse
import re
from typing import Any

import pytest
import yaml

from server.config import ServerConfig
from server.config_sources import add_arguments, config_from
from server.routes import health
from tests.deploy.chart import CHART, HAS_HELM, RENDERED, VARIANTS, rendered
from tests.deploy.test_prometheus import shown_by

needs_helm = pytest.mark.skipif(not HAS_HELM, reason="Helm is not installed: pip install helm-python-sdk")
_BUILT_IN = {"v1", "apps/v1", "autoscaling/v2", "networking.k8s.io/v1", "policy/v1"}
each_variant = pytest.mark.parametrize("variant", VARIANTS)


def manifests(variant: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((RENDERED / f"{variant}.yaml").read_text()))


def the(variant: str, kind: str) -> dict[str, Any]:
    (found,) = [manifest for manifest in manifests(variant) if manifest["kind"] == kind]
    return found


def pod(variant: str) -> dict[str, Any]:
    spec: dict[str, Any] = the(variant, "Deployment")["spec"]["template"]["spec"]
    return spec


def container(variant: str) -> dict[str, Any]:
    (found,) = pod(variant)["containers"]
    return dict(found)


def config(variant: str) -> ServerConfig:
    """What the server makes of the container's arguments."""
    command, *arguments = container(variant)["args"]
    assert command == "serve"
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_arguments(parser)
    without_files = [argument for argument in arguments if not argument.startswith("--api-key-file=")]
    return config_from(parser.parse_args(without_files), {})


@needs_helm
@each_variant
def test_rendered_manifests_are_what_helm_makes_of_the_chart(variant: str) -> None:
    committed = (RENDERED / f"{variant}.yaml").read_text()
    assert rendered(VARIANTS[variant]) == committed, "python -m tests.deploy.chart writes them"


@needs_helm
def test_helm_finds_nothing_wrong() -> None:
    import helm_python

    found = helm_python.lint(CHART)
    assert not found["errors"]
    assert [message["error"] for message in found["messages"]] == ["icon is recommended"]


@needs_helm
@pytest.mark.parametrize(
    "values",
    [
        {"replica": 2}, {"flags": {"port": 9000}}, {"flags": {"api_key": "k"}},
        {"autoscaling": {"kind": "vpa"}}, {"cache": {"size": "a lot"}},
        {"metricsPrefix": "vllm:"}, {"apiKeys": {"existingSecret": "keys"}},
    ],
    ids=str,
)  # fmt: skip
def test_values_that_cannot_work_are_refused(values: dict[str, Any]) -> None:
    import helm_python

    with pytest.raises(helm_python.HelmError):
        rendered(values)


@each_variant
def test_the_cluster_takes_the_manifests(variant: str) -> None:
    """Those of Kubernetes' own kinds; the schemas of others are in the clusters that have them."""
    validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    for manifest in manifests(variant):
        if manifest["apiVersion"] in _BUILT_IN:
            validate.validate(manifest, "1.30", strict=True)


def test_alerts_find_what_the_pod_monitor_scrapes() -> None:
    labels = the("gateway", "Deployment")["spec"]["template"]["metadata"]["labels"]
    job = labels[the("gateway", "PodMonitor")["spec"]["jobLabel"]]
    alerts = (CHART.parents[1] / "prometheus/alerts.yml").read_text()
    assert set(re.findall(r'job="(\w+)"', alerts)) == {job}


def test_every_kind_is_rendered_once_at_least() -> None:
    kinds = {manifest["kind"] for variant in VARIANTS for manifest in manifests(variant)}
    assert kinds == {
        "Deployment", "Service", "ServiceAccount", "PodDisruptionBudget", "HorizontalPodAutoscaler",
        "ScaledObject", "PodMonitor", "NetworkPolicy", "PersistentVolumeClaim", "InferencePool",
    }  # fmt: skip


@each_variant
def test_the_server_takes_its_arguments_and_listens_where_the_service_looks(variant: str) -> None:
    settings = config(variant)
    (port,) = container(variant)["ports"]
    assert port == {"name": "http", "containerPort": settings.port}
    assert settings.host == "0.0.0.0"
    assert the(variant, "Service")["spec"]["ports"][0]["targetPort"] == "http"
    assert the(variant, "NetworkPolicy")["spec"]["ingress"][0]["ports"][0]["port"] == "http"
    if variant == "gateway":
        assert the(variant, "InferencePool")["spec"]["targetPorts"] == [{"number": settings.port}]
        assert (settings.model, settings.max_num_seqs) == ("Qwen/Qwen3-8B", 256)
        assert (settings.max_queued_tokens, settings.gpu_memory_utilization) == (2**21, 0.85)
        assert (settings.strict_fields, settings.served_model_name) == (True, ("chat",))
        assert the(variant, "PodMonitor")["spec"]["podMetricsEndpoints"][0]["port"] == "http"


@each_variant
def test_pods_have_time_to_end(variant: str) -> None:
    settings = config(variant)
    assert settings.pre_stop_seconds > 0
    needed = settings.pre_stop_seconds + settings.shutdown_timeout
    assert pod(variant)["terminationGracePeriodSeconds"] > needed
    readiness = container(variant)["readinessProbe"]
    assert readiness["periodSeconds"] * readiness["failureThreshold"] <= settings.pre_stop_seconds


@each_variant
def test_probes_ask_for_routes_that_exist(variant: str) -> None:
    paths = {getattr(route, "path", None) for route in health.router.routes}
    has_keys = any(argument.startswith("--api-key-file=") for argument in container(variant)["args"])
    asked = {}
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        probe = container(variant)[name]
        if "exec" in probe:
            program = probe["exec"]["command"][2]
            compile(program, name, "exec")
            asked[name] = re.search(r"127\.0\.0\.1:8000(/[a-z/]+)", program)[1]  # type: ignore[index]
            mounted = {mount["mountPath"] for mount in container(variant)["volumeMounts"]}
            assert re.search(r'open\("(.*)/probe-key"\)', program)[1] in mounted  # type: ignore[index]
        else:
            asked[name] = probe["httpGet"]["path"]
            # Without a key, only this one answers where keys are set.
            assert not has_keys or asked[name] == "/health/live"
    assert set(asked.values()) <= paths
    assert asked["livenessProbe"] == "/health/live", "a server that is not ready must not be killed for it"
    assert asked["startupProbe"] == asked["readinessProbe"] == "/health/ready"


@each_variant
def test_every_selector_selects_the_pods(variant: str) -> None:
    labels = the(variant, "Deployment")["spec"]["template"]["metadata"]["labels"].items()
    for manifest in manifests(variant):
        selector = manifest.get("spec", {}).get("selector") or manifest.get("spec", {}).get("podSelector")
        if selector:
            selected = selector.get("matchLabels", selector)
            assert selected
            assert selected.items() <= labels, manifest["kind"]


@each_variant
def test_containers_may_do_nothing_special(variant: str) -> None:
    assert pod(variant)["securityContext"]["runAsNonRoot"]
    assert pod(variant)["securityContext"]["runAsUser"] == 10001
    assert pod(variant)["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod(variant)["automountServiceAccountToken"] is False
    security = container(variant)["securityContext"]
    assert security["readOnlyRootFilesystem"]
    assert security["allowPrivilegeEscalation"] is False
    assert security["capabilities"] == {"drop": ["ALL"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container(variant)["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in pod(variant)["volumes"]}
    environment = {each["name"]: each.get("value") for each in container(variant)["env"]}
    assert environment["XDG_CACHE_HOME"] == mounts["cache"]
    assert environment["HOME"] == mounts["tmp"]


def test_autoscalers_ask_for_metrics_that_are_there() -> None:
    (metric,) = the("hpa", "HorizontalPodAutoscaler")["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] in shown_by(config("hpa").metrics_prefix)
    (trigger,) = the("gateway", "ScaledObject")["spec"]["triggers"]
    (name,) = re.findall(r"[a-z_]+:[a-z_]+", trigger["metadata"]["query"])
    assert name in shown_by(config("gateway").metrics_prefix)


def test_the_gateway_finds_the_metrics_of_its_model_server_protocol() -> None:
    """Gateway API Inference Extension, proposal 003: gauges under vLLM's names by default."""
    shown = shown_by(config("gateway").metrics_prefix)
    for name in ("vllm:num_requests_waiting", "vllm:num_requests_running", "vllm:kv_cache_usage_perc"):
        assert shown[name].startswith("gauge")
    info = shown["vllm:cache_config_info"]
    assert {'block_size="16"', 'num_gpu_blocks="128"'} <= set(re.findall(r'\w+="\w+"', info))
