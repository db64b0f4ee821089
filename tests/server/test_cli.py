from __future__ import annotations

import subprocess
import sys

import pytest

from server import cli
from server.config import ServerConfig


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("inflightd 0.")


def test_help_names_every_flag_and_its_variable(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    text = capsys.readouterr().out
    for name in ServerConfig.__dataclass_fields__:
        if name != "model":
            assert "--" + name.replace("_", "-") in text
    assert "INFLIGHTD_PORT" in text
    assert max(map(len, text.splitlines())) <= 100


def test_a_wrong_value_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "--port", "x"]) == 2
    assert capsys.readouterr().err == "inflightd serve: --port: 'x' is not a whole number\n"


def test_a_missing_model_is_said_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "no-such.gguf", "--port", "0"]) == 1
    assert capsys.readouterr().err.startswith("inflightd serve: There is no file or folder no-such.gguf")


def test_help_is_quick_for_it_loads_nothing_heavy() -> None:
    script = (
        "import sys; from server import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not {"fastapi", "numpy", "onnxruntime", "zmq", "httpx"} & set(done.stderr.split())
