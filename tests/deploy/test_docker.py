"""The images and the unit: neither Docker nor systemd runs here, so they are compared with the project."""

from __future__ import annotations

import http.server
import os
import re
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from tests.deploy.clean_root import settings_of, stages_of

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "deploy/docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
UNIT = (ROOT / "deploy/systemd/inflightd.service").read_text()
IMAGE = settings_of(stages_of(DOCKERFILE), "gpu")


def test_dockerfile_is_clean() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.exists():
        pytest.skip("hadolint has no wheel for this platform")
    done = subprocess.run([hadolint, DOCKER / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_everything_that_is_copied_is_there_and_let_through() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = set()
    for sources in re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE):
        copied |= set(sources.split())
    assert copied == allowed
    assert all((ROOT / name).exists() for name in copied)


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_compose_files_build_stages_and_mount_folders_that_exist(name: str) -> None:
    stages = set(re.findall(r"^FROM \S+ AS (\S+)$", DOCKERFILE, re.MULTILINE))
    services = yaml.safe_load((DOCKER / name).read_text())["services"]
    assert services["inflightd"]["build"]["target"] in stages
    for service in services.values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (DOCKER / source).resolve().exists(), source


def test_images_do_not_run_as_root_and_stop_in_time() -> None:
    from server.config import ServerConfig

    runtime = DOCKERFILE.split(" AS runtime")[1]
    assert re.search(r"^USER 10001:10001$", runtime, re.MULTILINE)
    service = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]["inflightd"]
    assert int(service["stop_grace_period"].removesuffix("s")) > ServerConfig().shutdown_timeout
    assert service["read_only"]
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])


def test_everything_that_is_fetched_or_compiled_stays_in_the_volume() -> None:
    """Nothing else can be written, neither in a container, nor in a pod, nor by the unit of systemd."""
    unit = dict(re.findall(r"^Environment=(\w+)=(\S+)$", UNIT, re.MULTILINE))
    (deployment,) = (
        manifest
        for manifest in yaml.safe_load_all((ROOT / "deploy/helm/rendered/default.yaml").read_text())
        if manifest["kind"] == "Deployment"
    )
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    pod = IMAGE.environment | {each["name"]: each["value"] for each in container["env"]}
    script = (
        "from huggingface_hub import constants as hub; from server import model_source;"
        "from engine_runtime.executors.tensorrt import engine_cache;"
        "print(hub.HF_HUB_CACHE, hub.HF_XET_CACHE, engine_cache.default_cache_folder(),"
        " model_source.cache_directory())"
    )
    for settings, volume in (
        (IMAGE.environment, "/var/cache/inflightd"),
        (unit, "/var/cache/inflightd"),
        (pod, "/cache"),
    ):
        environment = {"HOME": "/none", "PYTHONPATH": str(ROOT)} | settings
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        for folder in done.stdout.split():
            assert Path(folder).is_relative_to(volume), folder
    assert IMAGE.volumes == ("/var/cache/inflightd",)
    assert "CacheDirectory=inflightd\n" in UNIT
    assert {"name": "cache", "mountPath": "/cache"} in container["volumeMounts"]


@pytest.mark.parametrize("arguments", [["--port=x"], ["--ssl-keyfile=k.pem"]], ids=" ".join)
def test_systemd_does_not_try_wrong_settings_again(arguments: list[str]) -> None:
    from server.cli import main

    (status,) = re.findall(r"^RestartPreventExitStatus=(\d+)$", UNIT, re.MULTILINE)
    assert main(["serve", *arguments]) == int(status)


@contextmanager
def alive(status: int, certificate: tuple[str, str] | None = None) -> Iterator[int]:
    """The port of a server whose liveness is ``status``."""

    class Liveness(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health/live" else 404)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Liveness) as server:
        if certificate is not None:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(*certificate)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def health_check(port: int, certfile: str = "") -> int:
    program, *arguments = IMAGE.healthcheck
    assert program == "python"
    settings = {"INFLIGHTD_PORT": str(port)} | ({"INFLIGHTD_SSL_CERTFILE": certfile} if certfile else {})
    done = subprocess.run(
        [sys.executable, *arguments], env=os.environ | settings, check=False, capture_output=True
    )
    return done.returncode


def test_a_container_has_as_long_as_a_pod_to_fetch_its_model() -> None:
    chart = yaml.safe_load((ROOT / "deploy/helm/inflightd/values.yaml").read_text())
    startup = chart["probes"]["startup"]
    (minutes,) = re.findall(r"^HEALTHCHECK .*--start-period=(\d+)m ", DOCKERFILE, re.MULTILINE)
    assert int(minutes) * 60 == startup["periodSeconds"] * startup["failureThreshold"]


def test_the_health_check_tells_the_living_from_the_dead(certificate: tuple[str, str]) -> None:
    with alive(200) as port:
        assert health_check(port) == 0
    assert health_check(port) != 0
    with alive(503) as port:
        assert health_check(port) != 0
    with alive(200, certificate) as port:
        assert health_check(port, certificate[0]) == 0
