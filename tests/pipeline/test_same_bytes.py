"""Two fresh clones end with the same hash for every output, whatever they are called and wherever they are run."""

import subprocess
from pathlib import Path

import pytest
import torch
from conftest import Checkout, add_small_inputs, make_checkout, output_hashes
from toy import toy_text

from lathe.common import paths
from lathe.models.precision import has_native_bf16

ELSEWHERE = {"LC_ALL": "C", "TZ": "Asia/Kathmandu", "PYTHONHASHSEED": "7", "USER": "somebody", "LANGUAGE": "de"}


def test_another_folder_and_user_change_no_byte(reproduced: Checkout, small_model: Path, tmp_path: Path) -> None:
    other = make_checkout(tmp_path / "another clone, übersetzt")
    add_small_inputs(other, small_model)
    other.environment.update(USER="somebody")
    other.run("dvc", "repro")
    assert output_hashes(other) == output_hashes(reproduced)


@pytest.mark.slow
def test_another_locale_time_zone_and_hash_seed_change_no_byte(
    reproduced: Checkout, small_model: Path, tmp_path: Path
) -> None:
    # In processes of their own, as a user has them: those of `reproduced` were forked from one (tests/preloaded.py).
    other = make_checkout(tmp_path / "another clone, übersetzt").without_preloading()
    add_small_inputs(other, small_model)
    other.environment.update(ELSEWHERE)
    other.run("dvc", "repro")
    assert output_hashes(other) == output_hashes(reproduced)


def clone(root: Path) -> Checkout:
    subprocess.run(["git", "clone", "--quiet", str(paths.ROOT), str(root)], check=True)
    (root / ".llama.cpp").symlink_to(paths.LLAMA_CPP)
    return Checkout(root).without_preloading()


@pytest.mark.slow
def test_two_clones_of_the_toy_end_alike(tmp_path: Path) -> None:
    locks = []
    for name, environment in (("one", {}), ("the other", ELSEWHERE)):
        made = clone(tmp_path / name)
        (made.root / "params.yaml").write_text(toy_text(), encoding="utf-8")
        made.environment.update(environment)
        made.run("dvc", "repro")
        locks.append(output_hashes(made))
    assert locks[0] == locks[1]


@pytest.mark.slow
def test_a_clone_of_the_committed_pipeline_ends_as_committed(tmp_path: Path) -> None:
    if not (has_native_bf16() and torch.backends.cpu.get_cpu_capability() == "AVX512"):
        pytest.skip("the committed dvc.lock was made on a CPU with AVX-512 bf16; this one is another type")
    if not torch.cpu._is_amx_tile_supported() or torch.get_num_threads() != 2:
        pytest.skip("the committed dvc.lock was made with AMX and on two cores")
    made = clone(tmp_path / "clone")
    committed = output_hashes(made)
    made.run("dvc", "repro")
    assert output_hashes(made) == committed
