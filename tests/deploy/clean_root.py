"""Carries out the Dockerfile where there is no Docker: its stages as folders, its steps by ``chroot``.

    debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv,python-is-python3 \\
        bookworm BASE
    python -m tests.deploy.clean_root --target gpu [--lend PATH[:AS] ...] BASE WORK
    python -m tests.deploy.clean_root --target gpu [--env NAME=VALUE ...] BASE WORK COMMAND ...

As root. BASE stands for the image that the Dockerfile starts from: the same Debian, and its own Python. Each
stage that the target needs is a copy of the one it is from, in WORK/STAGE; what has been carried out is not
done again. COMMAND then runs in the target as in a container of it: its user, its environment and nothing
else of this one, a root that cannot be written except for /tmp and the volume, and a /proc of its own. What
is lent is there while steps run, and no part of the image: a pip.conf, an index, certificates. HEALTHCHECK as
the command is the image's own; it finds a server of another such container: all have the machine's network.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "deploy/docker/Dockerfile"
_SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# Of the machine, while steps run.
_LENT = ("/proc", "/dev", "/dev/shm", "/etc/resolv.conf", "/etc/hosts")


@dataclass(frozen=True)
class Stage:
    """One FROM and what follows it, as (instruction, arguments)."""

    base: str
    steps: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Settings:
    """What holds at a point of a stage, what it has from its base included."""

    environment: dict[str, str] = field(default_factory=lambda: {"PATH": _SEARCH_PATH})
    folder: str = "/"
    user: str = "0:0"
    volumes: tuple[str, ...] = ()
    healthcheck: tuple[str, ...] = ()

    def after(self, instruction: str, arguments: str) -> Settings:
        """Raises ValueError for an instruction that is not known here."""
        match instruction:
            case "ENV":
                words = (word.partition("=") for word in shlex.split(arguments))
                new = {name: _expanded(value, self.environment) for name, _, value in words}
                return replace(self, environment=self.environment | new)
            case "WORKDIR":
                return replace(self, folder=arguments)
            case "USER":
                return replace(self, user=arguments)
            case "VOLUME":
                return replace(self, volumes=(*self.volumes, arguments))
            case "HEALTHCHECK":
                return replace(self, healthcheck=tuple(json.loads(arguments.partition(" CMD")[2])))
            case "RUN" | "COPY" | "ENTRYPOINT" | "CMD" | "EXPOSE" | "STOPSIGNAL":
                return self
        raise ValueError(f"{instruction} is not known here")


def _expanded(value: str, environment: dict[str, str]) -> str:
    return re.sub(r"\$(\w+)", lambda found: environment[found[1]], value)


def stages_of(dockerfile: str) -> dict[str, Stage]:
    """Name -> stage, in order.

    Raises:
        ValueError: a line that belongs to no stage, or a stage without a name.
    """
    stages: dict[str, Stage] = {}
    name = ""
    text = re.sub(r"^#.*\n", "", dockerfile, flags=re.MULTILINE)
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        instruction, _, arguments = line.strip().partition(" ")
        if instruction == "FROM":
            found = re.fullmatch(r"(\S+) AS (\S+)", arguments)
            if found is None:
                raise ValueError(f"a stage without a name: {line}")
            name = found[2]
            stages[name] = Stage(found[1])
        elif instruction:
            if not name:
                raise ValueError(f"before the first stage: {line}")
            step = (instruction, arguments.strip())
            stages[name] = replace(stages[name], steps=(*stages[name].steps, step))
    return stages


def settings_of(stages: Mapping[str, Stage], name: str) -> Settings:
    """What holds in containers of a stage."""
    stage = stages[name]
    settings = settings_of(stages, stage.base) if stage.base in stages else Settings()
    for step in stage.steps:
        settings = settings.after(*step)
    return settings


class CleanRoot:
    """The stages of a Dockerfile as folders.

    Args:
        base: a Debian root, which is only copied.
        work: where the folders of the stages are, and stay.
        lent: files and folders of this machine that steps see, ``PATH`` or ``PATH:AS``.
    """

    def __init__(self, base: Path, work: Path, lent: Sequence[str] = ()) -> None:
        self._base = base
        self._work = work
        self._lent = [*_LENT, *lent]
        self._stages = stages_of(DOCKERFILE.read_text())

    def folder(self, stage: str) -> Path:
        return self._work / stage

    def carry_out(self, name: str) -> Settings:
        """A stage, after those it is from or copies from; what then holds in its containers.

        Raises:
            CalledProcessError: a step failed.
        """
        mark = self._work / f"{name}.done"
        if not mark.exists():
            self._carry_out(name)
            mark.touch()
        return settings_of(self._stages, name)

    def _carry_out(self, name: str) -> None:
        stage, root = self._stages[name], self.folder(name)
        for other in re.findall(r"--from=(\S+)", " ".join(arguments for _, arguments in stage.steps)):
            self.carry_out(other)
        source, settings = self._base, Settings()
        if stage.base in self._stages:
            source, settings = self.folder(stage.base), self.carry_out(stage.base)
        if root.exists():
            shutil.rmtree(root)
        subprocess.run(["cp", "--archive", "--reflink=auto", source, root], check=True)
        for instruction, arguments in stage.steps:
            settings = settings.after(instruction, arguments)
            if instruction == "WORKDIR":
                (root / arguments.lstrip("/")).mkdir(parents=True, exist_ok=True)
            elif instruction == "COPY":
                self._copy(root, settings.folder, arguments)
            elif instruction == "RUN":
                self._run(name, settings, arguments)

    def _run(self, name: str, settings: Settings, command: str) -> None:
        print(f"{name}: RUN {command}", flush=True)
        root = self.folder(name)
        began = time.perf_counter()
        with self._lending(root):
            inside = _inside(root, settings, ("/bin/sh", "-c", command))
            subprocess.run(inside, check=True, env=_environment(root, settings))
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)

    def _copy(self, root: Path, folder: str, arguments: str) -> None:
        *sources, target = arguments.split()
        origin = ROOT
        if sources[0].startswith("--from="):
            origin = self.folder(sources.pop(0).removeprefix("--from="))
        into = root / folder.lstrip("/") / target if not target.startswith("/") else root / target[1:]
        for source in sources:
            path = origin / source.lstrip("/")
            end = into / path.name if target.endswith("/") else into
            if path.is_file():
                shutil.copy2(path, end)
                continue
            # As .dockerignore has it.
            skipped = shutil.ignore_patterns("__pycache__", "cubins") if origin == ROOT else None
            shutil.copytree(path, end, symlinks=True, ignore=skipped)

    @contextmanager
    def _lending(self, root: Path) -> Iterator[None]:
        with ExitStack() as undo:
            for lent in self._lent:
                path, _, place = lent.partition(":")
                target = root / (place or path)[1:]
                if not target.exists():
                    if Path(path).is_dir():
                        target.mkdir(parents=True)
                        undo.callback(target.rmdir)
                    else:
                        target.parent.mkdir(parents=True, exist_ok=True)
                        target.touch()
                        undo.callback(target.unlink)
                subprocess.run(["mount", "--bind", path, target], check=True)
                undo.callback(subprocess.run, ["umount", target], check=True)
            yield

    def run(self, name: str, command: Sequence[str], variables: Sequence[str] = ()) -> int:
        """``command`` as in a container of the stage with a root that cannot be written; its exit status.

        Args:
            variables: ``NAME=VALUE``, beside those of the stage.
        """
        settings = self.carry_out(name)
        root = self.folder(name)
        volumes = [f"mount --bind {self._volume(name, volume)} {root}{volume}" for volume in settings.volumes]
        script = [
            "set -e",
            f"mount --bind {root} {root}",
            f"mount --rbind /dev {root}/dev",
            f"mount -t proc proc {root}/proc",
            f"mount -t tmpfs tmpfs {root}/tmp",
            *volumes,
            f"mount -o remount,bind,ro {root}",
            'exec "$@"',
        ]
        unshare = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]
        prepared = ["/bin/sh", "-c", "\n".join(script), "sh"]
        inside = _inside(root, settings, command)
        environment = [f"{name}={value}" for name, value in _environment(root, settings).items()]
        return subprocess.run(
            [*unshare, *prepared, "env", "-i", *environment, *variables, *inside], check=False
        ).returncode

    def _volume(self, name: str, volume: str) -> Path:
        """An empty volume has the owner and the mode of its place in the image."""
        folder = self._work / f"{name}.volume{volume.replace('/', '-')}"
        if not folder.exists():
            subprocess.run(["cp", "--archive", self.folder(name) / volume[1:], folder], check=True)
        return folder


def _environment(root: Path, settings: Settings) -> dict[str, str]:
    """What the stage says, and the user's home."""
    user_id = settings.user.partition(":")[0]
    users = (line.split(":") for line in (root / "etc/passwd").read_text().splitlines())
    return {"HOME": next(user[5] for user in users if user[2] == user_id)} | settings.environment


def _inside(root: Path, settings: Settings, command: Sequence[str]) -> list[str]:
    there = f'cd {shlex.quote(settings.folder)} && exec "$@"'
    chroot = ["/usr/sbin/chroot", f"--userspec={settings.user}", "--groups=", str(root)]
    return [*chroot, "/bin/sh", "-c", there, "sh", *command]


def main() -> int:
    parser = argparse.ArgumentParser(description="Carry out the Dockerfile in a Debian root, without Docker.")
    parser.add_argument("base", type=Path, help="a Debian root, from debootstrap")
    parser.add_argument("work", type=Path, help="where the stages are made")
    parser.add_argument("--target", required=True, help="the stage wanted")
    parser.add_argument(
        "--lend", action="append", default=[], metavar="PATH[:AS]", help="what steps see of this machine"
    )
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="for the command")
    parser.add_argument(
        "command",
        nargs=argparse.REMAINDER,
        help="what then runs in the target, HEALTHCHECK for its own; without one, nothing",
    )
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    roots = CleanRoot(arguments.base.resolve(), arguments.work.resolve(), arguments.lend)
    settings = roots.carry_out(arguments.target)
    command = arguments.command
    if command == ["HEALTHCHECK"]:
        command = settings.healthcheck
    return roots.run(arguments.target, command, arguments.env) if command else 0


if __name__ == "__main__":
    sys.exit(main())
