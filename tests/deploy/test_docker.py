"""The images: no Docker runs here, so their recipe is linted and compared with the project."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "deploy/docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()


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
