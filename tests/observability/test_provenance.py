import json
import os
import subprocess
from pathlib import Path

from megatron_ads.observability.provenance import code_digest, git_revision, provenance


def _git(folder: Path, *arguments: str) -> str:
    identity = {
        "GIT_AUTHOR_NAME": "a",
        "GIT_AUTHOR_EMAIL": "a@b.c",
        "GIT_COMMITTER_NAME": "a",
        "GIT_COMMITTER_EMAIL": "a@b.c",
    }
    run = subprocess.run(
        ["git", "-C", str(folder), *arguments], env=os.environ | identity, capture_output=True, text=True, check=True
    )
    return run.stdout.strip()


def test_a_result_says_where_it_was_made() -> None:
    values = json.loads(json.dumps(provenance()))
    assert values["host"]["cpu"]
    assert 1 <= values["host"]["cores"] <= (os.cpu_count() or 1)
    assert values["host"]["memory_bytes"] > 2**28
    assert values["versions"]["torch"].startswith("2.")


def test_the_revision_tells_a_changed_checkout_from_a_clean_one(tmp_path: Path) -> None:
    _git(tmp_path, "init", "-q")
    (tmp_path / "file").write_text("1")
    _git(tmp_path, "add", "file")
    _git(tmp_path, "commit", "-q", "-m", "one")
    commit = _git(tmp_path, "rev-parse", "HEAD")
    git_revision.cache_clear()
    assert git_revision(tmp_path) == commit
    (tmp_path / "file").write_text("2")
    git_revision.cache_clear()
    assert git_revision(tmp_path) == f"{commit}-dirty"


def test_the_code_digest_changes_with_the_code_and_with_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "code.py").write_text("1")
    before = code_digest(tmp_path)
    (tmp_path / "README.md").write_text("words")
    assert code_digest(tmp_path) == before
    (tmp_path / "a" / "code.py").write_text("2")
    changed = code_digest(tmp_path)
    (tmp_path / "a" / "code.py").rename(tmp_path / "code.py")
    assert len({before, changed, code_digest(tmp_path)}) == 3


def test_outside_a_checkout_there_is_no_revision(tmp_path: Path) -> None:
    assert git_revision(tmp_path) is None
