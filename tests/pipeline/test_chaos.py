"""A few of the faults of `make chaos`, and that its plan leaves no stage out."""

from pathlib import Path

import pytest
import yaml
from chaos.pipeline_faults import FAULTS
from chaos.plan import ITEMS, OF_COMMANDS, Injection, make_plan
from chaos.sites import Sites
from chaos.state import describe_differences, describe_leftovers, read_state
from conftest import Checkout

FEW = (
    ("SIGKILL of the whole group", "merge"),
    ("damaged cache object", "quantize@Q8_0"),
    ("two at once", "evaluate"),
)


def test_the_plan_injects_more_than_a_hundred_faults_and_kills_every_stage(reproduced: Checkout) -> None:
    plan = make_plan(1)
    assert len(plan) > 100
    assert plan == make_plan(1) != make_plan(2)
    killed = {each.subject for each in plan if each.kind.startswith("SIGKILL of")}
    listed = reproduced.run("dvc", "stage", "list", "--name-only").stdout.split()
    assert killed == set(ITEMS) == set(listed)
    assert {each.subject for each in plan if not each.of_item} == set(OF_COMMANDS)
    assert {each.kind for each in plan if each.of_item} == set(FAULTS)


@pytest.mark.parametrize(("kind", "item"), FEW)
def test_a_fault_is_survived(reproduced: Checkout, tmp_path: Path, kind: str, item: str) -> None:
    injection = Injection(1, kind, item, f"{kind} {item}")
    with Sites(tmp_path).copy(reproduced.root, "1", injection.random) as site:
        print(FAULTS[kind](site, item))


def test_what_is_not_survived_is_seen(reproduced: Checkout, tmp_path: Path) -> None:
    """Each kind of harm that the checks look for, done on purpose."""
    with Sites(tmp_path).copy(reproduced.root, "1", Injection(1, "", "", "").random) as site:
        expected = read_state(site.root)
        site.check_at_the_end()
        card = site.root / "models/gguf/README.md"
        card.unlink()
        card.write_text("half")
        lock = yaml.safe_load((site.root / "dvc.lock").read_text())
        del lock["stages"]["merge"]
        (site.root / "dvc.lock").write_text(yaml.safe_dump(lock))
        (site.root / "models/.merged.partial").mkdir()
        cached = next((site.root / ".dvc/cache/files/md5").glob("??/*[0-9a-f]"))
        content = cached.read_bytes()
        cached.unlink()
        cached.write_bytes(content[:-1])
        (cached.parent / "partial").touch()
        (site.temporary / "forgotten").touch()
        state = read_state(site.root)
        assert "dvc.lock: merge is missing" in list(describe_differences(state, expected))
        assert [line for line in describe_differences(state, expected) if line.startswith("models/gguf/README.md: ")]
        left = "\n".join(describe_leftovers(site.root, state, expected))
        assert "models/.merged.partial: left lying about" in left
        assert "partial: left lying about" in left
        assert f"{cached.name}: an object of the cache that is not what its name says" in left
        assert site.describe_temporary_files() == ["forgotten: left in the temporary folder"]
        site.start("sh", "-c", "sleep 100 & exit 0").wait()
        with pytest.raises(AssertionError, match="still running: sleep 100"):
            site.check_after_fault(0.5)
