"""Checks of the doctor: machine, packages, repository, device, remotes, keys, model, memory, disk."""

import importlib.metadata
import os
import re
import shlex
import shutil
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lathe.common import operating_system
from lathe.common.dvc_api import read_config
from lathe.common.errors import InputError
from lathe.common.git import read_line, try_git
from lathe.config.presets import GGUF_SUFFIX, list_datasets
from lathe.needs.disk_space import compute_needs, find_cache, find_existing, find_working_links
from lathe.provenance import remotes

if TYPE_CHECKING:
    from lathe.config.load import Config
    from lathe.config.training_params import Quantization, Training
    from lathe.needs.estimate import TrainingMemory

PYTHONS = ((3, 11), (3, 12), (3, 13))

# Memory of torch, transformers, TRL and the rest in a process before it loads a model.
LIBRARIES_BYTES = 650_000_000

NEARLY_FULL_DISK = 0.9  # above this share of what is free it may still become full


@dataclass(frozen=True)
class Finding:
    """What one check found: `remedy` is what to do about it, `details` are figures for `--json`."""

    check: str
    status: Literal["ok", "warning", "fail"]
    text: str
    remedy: str = ""
    details: Mapping[str, int | None] = field(default_factory=dict)


Findings = Iterator[Finding]


@dataclass(frozen=True)
class Circumstances:
    """What is checked: a checkout, the environment's variables, and the free disk and memory (bytes)."""

    root: Path
    environment: Mapping[str, str]
    free_disk: Callable[[Path], int] = lambda folder: shutil.disk_usage(folder).free
    free_memory: Callable[[], int] = lambda: free_memory_bytes()


def check_python(version: tuple[int, ...]) -> Findings:
    """Check the version of Python: the packages are pinned for some versions alone."""
    shown = ".".join(map(str, version))
    if version[:2] in PYTHONS:
        yield Finding("python", "ok", shown)
    else:
        wanted = [".".join(map(str, python)) for python in PYTHONS]
        text = f"{shown} runs this; the packages are pinned for {', '.join(wanted)}"
        yield Finding("python", "fail", text, f"`make clean`, then `make setup PYTHON=/path/to/python{wanted[-1]}`")


def check_packages(file: Path) -> Findings:
    """Compare every pin of pyproject.toml with what is installed: missing is a fail, another version a warning.

    What only an optional feature needs may be missing.
    """
    import tomllib

    project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
    extras = project.get("optional-dependencies", {})
    pin = re.compile(r"([\w.-]+)(?:\[.*\])?==([^\s;]+)")
    needed = dict(pin.findall("\n".join([*project["dependencies"], *extras.get("train", [])])))
    optional = dict(pin.findall("\n".join(requirement for extra in extras.values() for requirement in extra)))
    right = wrong = 0
    for name, pinned in {**optional, **needed}.items():
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if name in needed:
                wrong += 1
                yield Finding("packages", "fail", f"{name} is not installed; {file.name} pins {pinned}", "`make setup`")
            continue
        if installed.split("+")[0] == pinned:  # torch adds its build: 2.13.0+cpu
            right += 1
        else:
            wrong += 1
            text = f"{name} {installed} is installed; {file.name} pins {pinned}"
            yield Finding("packages", "warning", text, "`make setup`")
    if not wrong:
        yield Finding("packages", "ok", f"{right} of {file.name}, as pinned")


def check_repository(root: Path) -> Findings:
    """Check for the Git repository that DVC needs, with a commit for experiments to start from."""
    if shutil.which("git") is None:
        yield Finding("repository", "fail", "git is not installed", "install it; DVC works in a Git repository")
    elif try_git("rev-parse", "--show-toplevel", root=root) is None:
        yield Finding("repository", "fail", f"{root} is not in a Git repository", "clone it, or `git init` and commit")
    elif (commit := read_line("rev-parse", "--short", "HEAD", root=root)) is None:
        yield Finding(
            "repository", "fail", "no commit yet: experiments start from one", "`git add --all && git commit`"
        )
    else:
        changed = len((try_git("status", "--porcelain", root=root) or b"").splitlines())
        state = f"{changed} changed files are not committed, which is fine" if changed else "nothing uncommitted"
        yield Finding("repository", "ok", f"at commit {commit}, {state}")


def check_llama() -> Findings:
    """The library that quantizes and answers; it is compiled at installation and may not load elsewhere."""
    from lathe.gguf.llama_library import load_library
    from lathe.gguf.tensor_types import list_file_types

    yield Finding(
        "llama.cpp", "ok", f"llama-cpp-python {load_library().__version__} loads, {len(list_file_types())} types"
    )


def check_converter(root: Path, llama_cpp_dir: str | None) -> Findings:
    """Check the converter of `make setup`, or the checkout that `convert.llama_cpp_dir` names."""
    from lathe.gguf.install_converter import REQUIREMENT, SCRIPT, find_converter

    folder, state = find_converter(root, llama_cpp_dir)
    shown = _show(folder, root)
    if state == "missing":
        remedy = "name a llama.cpp checkout in convert.llama_cpp_dir" if llama_cpp_dir else "`make setup`"
        yield Finding("converter", "fail", f"{shown} holds no {SCRIPT}", remedy)
    elif state == "outdated":
        yield Finding("converter", "warning", f"{shown} is not the one that {REQUIREMENT.name} pins", "`make setup`")
    else:
        whose = "named by convert.llama_cpp_dir" if llama_cpp_dir else "as pinned"
        yield Finding("converter", "ok", f"{shown}, {whose}")


def check_links(root: Path) -> Findings:
    """Check how DVC's cache gives files to the workspace: by a link, or by a copy that takes the space twice."""
    config = read_config(root)
    cache = find_cache(root, config)
    works, wanted = find_working_links(root, cache), config["cache"].get("type") or ["reflink", "copy"]
    usable = [kind for kind in wanted if kind in works]
    text = f"cache.type is {','.join(wanted)}; {', '.join(works)} work between {_show(cache, root)} and the checkout"
    if usable and usable[0] != "copy":
        yield Finding("links", "ok", text)
    else:
        yield Finding(
            "links",
            "warning",
            f"{text}: files are copied and take their space twice",
            "`dvc cache dir` on this file system, or `dvc config cache.type hardlink,symlink`",
        )


def check_remotes(root: Path, environment: Mapping[str, str]) -> Findings:
    """Check the remotes of `dvc push` and `dvc pull`; no secret is shown."""
    config = read_config(root)
    default = config["core"].get("remote")
    if not config["remote"]:
        yield Finding("remotes", "warning", "none is configured: outputs have no second copy", "`dvc remote add -d …`")
    for name, remote in config["remote"].items():
        url = urllib.parse.urlsplit(str(remote["url"]))
        shown = remotes.describe_remote(name, remote)
        if name == default:
            shown += ", the default"
        if url.scheme in ("", "file"):
            yield _check_local_remote(shown, Path(url.path))
        elif url.scheme == "s3":
            yield _check_s3_remote(shown, name, remote, environment, is_default=name == default)
        else:
            yield Finding("remotes", "ok", f"{shown}: not checked, only folders and S3 are")


def check_credentials(config: "Config", environment: Mapping[str, str]) -> Findings:
    """Check whether the token for gated repositories of a model hub is set; it is not read."""
    hub = [name for name, preset in (("model", config.model), ("dataset", config.dataset)) if _is_from_hub(preset)]
    if not hub:
        yield Finding("credentials", "ok", "none needed: model and dataset are not from a hub")
    elif environment.get("HF_TOKEN"):
        yield Finding("credentials", "ok", "HF_TOKEN is set")
    else:
        text = f"HF_TOKEN is not set; the {' and the '.join(hub)} {'comes' if len(hub) == 1 else 'come'} from a hub"
        yield Finding("credentials", "warning", text, "set it if the repository is gated; open ones need none")


def check_judge(config: "Config", here: Circumstances) -> Findings:
    """Check what an enabled judge needs: a key, which is not read, or its file."""
    from lathe.evaluation.judge import api_keys

    judge = config.params.judge
    variable = api_keys.VARIABLES.get(judge.provider)
    if not judge.enabled:
        yield Finding("judge", "ok", "none is asked: judge.enabled is false")
    elif variable is None:
        if (here.root / judge.model).is_file():
            yield Finding("judge", "ok", f"{judge.model} is there, and needs no key")
        else:
            yield Finding("judge", "fail", f"{judge.model} is not there", "name a GGUF file in judge.model")
    elif here.environment.get(variable):
        yield Finding("judge", "ok", f"{variable} is set")
    elif api_keys.get_required_variable(judge.provider, judge.base_url) is None:
        yield Finding("judge", "ok", f"{variable} is not set; a server of your own may need none")
    else:
        text = f"{variable} is not set; judge.provider {judge.provider} needs it for every verdict that is not kept yet"
        yield Finding("judge", "warning", text, "set it to your key, or judge.enabled to false")


def check_tracking(config: "Config", here: Circumstances) -> Findings:
    """Whether the trackers that runs are mirrored to answer; a run does not wait for them."""
    from lathe.experiments.tracking.run_files import Context, MirroredRun
    from lathe.experiments.tracking.targets import choose_targets
    from lathe.experiments.tracking.tracker import TrackerUnreachableError
    from lathe.experiments.tracking.trackers import create_mirror

    chosen, _ = choose_targets(config.params.tracking, here.environment)
    if not chosen:
        yield Finding("tracking", "ok", "runs are mirrored nowhere: neither MLflow nor W&B is enabled")
    for target in chosen:
        try:
            create_mirror(target, MirroredRun(here.root, Context())).check()
        except TrackerUnreachableError as error:
            remedy = "runs are kept until `lathe mirror` has sent them"
            yield Finding("tracking", "warning", f"{target}: {error}", remedy)
        else:
            yield Finding("tracking", "ok", f"{target}")


def check_model(config: "Config", here: Circumstances) -> Findings:
    """Estimate the memory of the training and the disk of every output, from the model's config.json."""
    import torch

    from lathe.needs.estimate import estimate_disk, estimate_training_memory
    from lathe.needs.fit_batch import choose_batch_sizes
    from lathe.training.batch_sizes import set_batch_sizes

    params = config.params
    try:
        model = find_model_config(config.model, here.root)
    except InputError as error:  # no network now; there may be one when it is fetched
        yield Finding("memory", "warning", f"cannot be estimated: {error}")
        yield Finding("disk", "warning", "cannot be estimated: as memory")
        return
    params = set_batch_sizes(params, choose_batch_sizes(model, params))
    disk = estimate_disk(model, params)
    try:
        memory = estimate_training_memory(model, params)
    except InputError as error:
        yield Finding("memory", "warning", f"cannot be estimated: {error}")
    else:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        yield check_memory(memory, params.training, params.quantization, here.free_memory(), device)
    if (here.root / "models/base/config.json").is_file():
        disk["models/base"] = 0
    yield from check_disk(here, disk)


def check_memory(
    memory: "TrainingMemory", training: "Training", quantization: "Quantization", available: int, device: str
) -> Finding:
    """Compare the estimate of a training with the memory that is free on the device that would train."""
    from lathe.common.text import readable_bytes
    from lathe.needs.estimate import explain
    from lathe.needs.fit_batch import USABLE

    parts = asdict(memory)
    shown = ", ".join(f"{name} {readable_bytes(size)}" for name, size in parts.items())
    text = (
        f"training takes up to {readable_bytes(memory.total)} of {readable_bytes(available)} free, with rows of "
        f"{training.max_length} tokens: {shown}"
    )
    details = {**parts, "total": memory.total, "available": available}
    if memory.total > available:
        return Finding("memory", "fail", text, explain(memory, training, quantization), details)
    if memory.total > USABLE[device] * available:
        remedy = f"it may not fit; {explain(memory, training, quantization)}"
        return Finding("memory", "warning", text, remedy, details)
    return Finding("memory", "ok", text, details=details)


def check_disk(here: Circumstances, outputs: Mapping[str, int | None]) -> Findings:
    """Compare the size of the outputs with what is free, where the checkout is and where DVC's cache is.

    Links to the cache take no space of their own; where only copies work, an output takes it in both places.
    """
    from lathe.common.text import readable_bytes

    sizes = {path: size for path, size in outputs.items() if size is not None}
    shown = ", ".join(f"{path.removeprefix('models/')} {readable_bytes(size)}" for path, size in sizes.items() if size)
    needed = compute_needs(here.root, sizes)
    for folder, size in needed.items():
        free = here.free_disk(folder)
        text = (
            f"outputs and checkpoints take about {readable_bytes(size)} of {readable_bytes(free)} free at {folder}, "
            f"data aside: {shown}"
        )
        details = {**outputs, "total": size, "free": free}
        remedy = "free some space, `dvc gc --workspace` for one, or name fewer quantize.types"
        if size > free:
            yield Finding("disk", "fail", text, remedy, details)
        elif size > NEARLY_FULL_DISK * free:
            yield Finding("disk", "warning", text, remedy, details)
        else:
            yield Finding("disk", "ok", text, details=details)


def free_memory_bytes() -> int:
    """Return what a training may still take: of the GPU if torch sees one, else of the memory and of the cgroup."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.mem_get_info(0)[0]
    return max(0, operating_system.get_available_memory_bytes() - LIBRARIES_BYTES)


def _is_from_hub(preset: Any) -> bool:
    return any(part.source == "hub" for part in list_datasets(preset).values())


def find_model_config(preset: Any, root: Path) -> Path | Mapping[str, Any]:
    """Return the folder, or the content, of config.json of a model that may not have been fetched yet."""
    if preset.source == "builtin":
        from lathe.sources.builtin.tiny_model import RECIPE

        return {"model_type": "llama", "tie_word_embeddings": True, "dtype": "bfloat16", **asdict(RECIPE)}
    if preset.source in ("local", "package"):
        found = root / preset.path
        if preset.source == "package":
            from lathe.sources import python_package

            found = python_package.find_files(preset.package, preset.version, preset.path)
        return _read_gguf_config(found) if found.suffix == GGUF_SUFFIX else found
    if preset.file:
        raise InputError(f"config.json of {preset.id} is in its GGUF file, which `fetch` downloads", code="not-fetched")
    from huggingface_hub import constants, try_to_load_from_cache

    from lathe.sources.hub import Repository

    try:
        cached = try_to_load_from_cache(preset.id, "config.json", revision=preset.revision)
        if not isinstance(cached, str):
            if not constants.HF_HUB_OFFLINE:
                remotes.connect(constants.ENDPOINT)  # the hub's client would try for 20 seconds
            cached = str(Repository("model", preset.id, preset.revision).files(["config.json"])["config.json"])
    except (OSError, ValueError, InputError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        message = f"config.json of {preset.id} is neither in the hub's cache nor to be had: {reason}"
        raise InputError(message, code="unreachable-hub") from None
    return Path(cached).parent


def _read_gguf_config(file: Path) -> dict[str, Any]:
    from lathe.sources import gguf_model

    return gguf_model.read_config(file)


def _show(path: Path, root: Path) -> str:
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)


def _check_local_remote(shown: str, folder: Path) -> Finding:
    home = find_existing(folder)
    if not home.is_dir():
        return Finding("remotes", "fail", f"{shown}: {home} is a file", "change the remote's url")
    if not os.access(home, os.W_OK):
        text = f"{shown}: {home} cannot be written to"
        return Finding("remotes", "fail", text, "make it writable for this user, or change the remote's url")
    if home == folder and any(folder.iterdir()):
        return Finding("remotes", "ok", f"{shown}: there and writable")
    if home in (folder, folder.parent):
        text = f"{shown}: empty until a `dvc push` in this checkout; `dvc pull` brings nothing"
        return Finding(
            "remotes", "ok", text, "`make repro` makes the outputs; or set the remote's url to a folder that has them"
        )
    text = f"{shown}: neither it nor {folder.parent} is there"
    return Finding("remotes", "warning", text, "mount or make it, or change the remote's url")


def _check_s3_remote(
    shown: str, name: str, remote: Mapping[str, Any], environment: Mapping[str, str], *, is_default: bool
) -> Finding:
    if not remotes.has_credentials(remote, environment):
        remedy = f"set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY before `dvc push -r {shlex.quote(name)}`"
        return Finding("remotes", "warning" if is_default else "ok", f"{shown}: no credentials", remedy)
    try:
        remotes.connect(remotes.get_endpoint(remote))
    except OSError as error:
        return Finding("remotes", "warning", f"{shown}: {error}", "check the network and the remote's endpointurl")
    return Finding("remotes", "ok", f"{shown}: credentials are there, and its endpoint answers")
