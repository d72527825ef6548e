"""Build of llama.cpp's own server, its benchmark of batches and its quantizer: `make llama-server`.

All come from the source package that the installed llama-cpp-python was compiled from, and are linked with its
libraries: they decode with the very kernels that the pipeline does. pip downloads the package and checks its hash;
nothing else is fetched, the web pages of llama-server neither.
"""

import importlib.util
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from lathe.common import entry_point, operating_system, paths
from lathe.common.errors import InputError
from lathe.common.progress import Progress
from lathe.gguf import install_converter

logger = logging.getLogger(__name__)

SERVER, BATCHED_BENCH, QUANTIZE = "llama-server", "llama-batched-bench", "llama-quantize"
PROGRAMS = (SERVER, BATCHED_BENCH, QUANTIZE)
TOP = Path(__file__).with_name("llama_server.cmake")

# Below vendor/llama.cpp in the source package: what is compiled, and the headers of what is linked.
SOURCES = (
    "cmake",
    "common",
    "ggml/cmake",
    "ggml/include",
    "include",
    "scripts/ui-assets.cmake",
    "src/llama-ext.h",
    "tools/batched-bench",
    "tools/mtmd",
    "tools/quantize",
    "tools/server",
    "tools/ui/CMakeLists.txt",
    "tools/ui/ui.cpp.in",
    "tools/ui/ui.h.in",
    "vendor",
)


def main() -> None:
    """Build what is missing; an InputError is printed in one line, exit code 2."""
    entry_point.guard(lambda: build(paths.LLAMA_CPP, install_converter.REQUIREMENT))


def find_program(name: str, llama_cpp: Path | None = None) -> Path | None:
    """Return a program of `PROGRAMS` in a folder of llama.cpp, by default the checkout's; None if it is not built."""
    program = (llama_cpp or paths.LLAMA_CPP) / "bin" / name
    return program if program.is_file() else None


def build(llama_cpp: Path, requirement: Path) -> bool:
    """Build the programs into `llama_cpp`/bin, unless they are there; return whether anything was done.

    `requirement` is the file that pins the source package. A build that was killed goes on where it was. Raises
    InputError if the folder does not hold the pinned converter, if there is no compiler, or if the build fails.
    """
    if not install_converter.is_installed(llama_cpp, requirement):
        raise InputError(
            f"{llama_cpp} does not hold the llama.cpp that {requirement.name} pins; run `make setup` first",
            code="converter-outdated",
        )
    with operating_system.open_locked(llama_cpp / ".build-lock", wait=True) or sys.exit(1):
        if all(find_program(name, llama_cpp) for name in PROGRAMS):
            logger.info("%s: built already; remove the file to build it again", find_program(SERVER, llama_cpp))
            return False
        folder = llama_cpp / "server-build"
        source = folder / "source"
        if not source.is_dir():
            with paths.replace_folder(source) as partial:
                archive = install_converter.download_source(requirement, partial / ".download")
                install_converter.unpack(archive, partial, required=SOURCES)
                shutil.rmtree(partial / ".download")
                shutil.copyfile(TOP, partial / "CMakeLists.txt")
        _compile(source, folder / "build", requirement)
        for name in PROGRAMS:
            target = llama_cpp / "bin" / name
            target.parent.mkdir(exist_ok=True)
            partial = target.with_name(f"{name}.partial")
            shutil.copy(folder / "build/bin" / name, partial)
            partial.replace(target)
        shutil.rmtree(folder)
    logger.info("%s is built", find_program(SERVER, llama_cpp))
    return True


def find_libraries() -> Path:
    """Return the folder with the libraries of llama-cpp-python."""
    package = importlib.util.find_spec("llama_cpp")
    assert package
    assert package.origin
    return Path(package.origin).parent / "lib"


def _compile(source: Path, folder: Path, requirement: Path) -> None:
    version = requirement.read_text(encoding="utf-8").rpartition("==")[2].split()[0]
    cores = operating_system.count_usable_cores()
    logger.info("compiling %s: about %d min on %d cores", SERVER, max(1, round(9 / cores)), cores)
    configure = [_find_tool("cmake"), "-S", str(source), "-B", str(folder), "-G", "Ninja"]
    configure += [f"-DCMAKE_MAKE_PROGRAM={_find_tool('ninja')}", "-DCMAKE_BUILD_TYPE=Release"]
    configure += [f"-DLIBRARIES={find_libraries()}", f"-DVERSION={version}"]
    _run(configure, folder)
    compile_ = [_find_tool("cmake"), "--build", str(folder), "--parallel", str(cores), "--target", *PROGRAMS]
    _run(compile_, folder, show=True)


def _find_tool(name: str) -> str:
    # Beside Python first: `make setup` installs both there.
    tool = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if tool is None:
        raise InputError(f"{name}: no such program; run `make setup`, which installs it", code="missing-program")
    return tool


def _run(command: list[str], folder: Path, *, show: bool = False) -> None:
    """Run a step of the build, which ends with this process; show how many files are done."""
    folder.mkdir(exist_ok=True)
    log, lines, progress = folder / "build.log", list[str](), None
    environment = {**os.environ, "NINJA_STATUS": "[%f/%t] "}
    with (
        log.open("a", encoding="utf-8") as file,
        operating_system.start_command(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
        ) as process,
    ):
        assert process.stdout
        for line in process.stdout:
            text = line.decode("utf-8", "replace").rstrip()
            file.write(f"{text}\n")
            lines.append(text)
            if show and (step := re.match(r"\[(\d+)/(\d+)\]", text)):
                progress = progress or Progress(SERVER, int(step[2]), unit="file")
                progress.add(int(step[1]) - progress.done)
    if progress:
        progress.close()
    if process.returncode != 0:
        reason = next((line for line in lines if re.search(r"\berror\b", line, re.IGNORECASE)), lines[-1:] or ["?"])
        raise InputError(
            f"{SERVER}: {Path(command[0]).name} ends with exit code {process.returncode}: {str(reason)[:300]}; "
            f"its output is in {log}",
            code="build-failed",
        )


if __name__ == "__main__":
    main()
