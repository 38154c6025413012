"""The file of --keys."""

import hashlib
from pathlib import Path

import pytest

from llumnix.core.keys import KeyLimits
from llumnix.errors import UsageError
from llumnix.reload.key_file import KeyRing, read_key_file

CLASSES = ("high", "normal")


def sha(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.yaml"
    path.touch(mode=0o600)
    return path


def test_a_key_has_a_name_roles_a_class_and_limits(file: Path) -> None:
    file.write_text(
        "ada: {key: sesame-1, class: high, requests_per_min: 60, tokens_per_min: 1.5,\n"
        "  open_max: 8}\n"
        f"ops: {{sha256: {sha('sesame-2').hex().upper()}, roles: [admin, view]}}\n"
    )
    ada, ops = read_key_file(str(file), CLASSES)
    assert (ada.name, ada.digest, ada.roles, ada.cap) == (
        "ada", sha("sesame-1"), ("inference",), "high",
    )  # fmt: skip
    assert ada.limits == KeyLimits(requests_per_min=60, tokens_per_min=1.5, open_max=8)
    assert (ops.digest, ops.roles, ops.cap) == (sha("sesame-2"), ("view", "admin"), None)
    assert ops.limits == KeyLimits()
    assert "sesame" not in repr(ada)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "write `NAME: {key: KEY, roles: [inference]}` a line"),
        ("- sesame", "write `NAME: {key: KEY"),
        ("ada: sesame", "entry 1: write {key: KEY, roles: [inference]} after the name"),
        ("ada: {key: a}\nsesame: high", "entry 2: write {key: KEY, roles: [inference]}"),
        ("key:sesame: {}", "entry 1: a name has letters, digits"),
        ("ada: {key: sesame", "is not YAML (line 1)"),
        ("a b: {key: sesame}", "entry 1: a name has letters, digits"),
        ("ada: {}", "ada: give one of key and sha256"),
        ("ada: {key: sesame, sha256: sesame}", "ada: give one of key and sha256"),
        ("ada: {sha256: sesame}", "sha256 has 64 hexadecimal digits"),
        ("ada: {key: 17}", "ada: put the key in quotes"),
        ("ada: {key: 'sesame open'}", "a key may have letters"),
        ("ada: {key: sesame, role: [view]}", "ada: a field's name is none of key, sha256, roles"),
        ("ada: {key: sesame, role: [view]}", "did you mean roles?"),
        ("ada: {key:sesame-open, roles: [view]}", "is there a space after each colon?"),
        ("ada: {sesame, roles: [view]}", "is there a space after each colon?"),
        ("ada: {key: sesame, roles: view}", "roles is a list of some of: inference, view, admin"),
        ("ada: {key: sesame, roles: [root]}", "roles is a list of some of"),
        ("ada: {key: sesame, roles: []}", "roles is a list of some of"),
        ("ada: {key: high, class: sesame}", "ada: no such class; there are: high, normal"),
        ("ada: {key: sesame, open_max: 0}", "open_max must be a number above 0"),
        ("ada: {key: sesame, open_max: 0.5}", "open_max must be 1 or more"),
        ("ada: {key: sesame, tokens_per_min: many}", "tokens_per_min must be a number above 0"),
        ("ada: {key: sesame, tokens_per_min: .inf}", "tokens_per_min must be a number above 0"),
        ("ada: {key: sesame, tokens_per_min: .nan}", "tokens_per_min must be a number above 0"),
        ("ada: {key: sesame, open_max: .inf}", "open_max must be a number above 0"),
        (f"ada: {{key: sesame, open_max: 1{'0' * 400}}}", "open_max must be a number above 0"),
        ("ada: {key: sesame}\nbea: {key: sesame}", "bea and ada have the same key"),
        ("ada: {key: sesame}\n# More\nada: {key: b}", "lines 1 and 3 have the same name"),
        ("7: {key: sesame}\n'7': {key: b}", "lines 1 and 2 have the same name"),
        ("ada: {key: sesame, key: b}", "line 1 has the same name"),
        ("ada: {key: sesame}\nbea: 2026-13-13", "is not YAML"),
    ],
)
def test_a_bad_file_is_told_in_one_line_without_a_key(file: Path, text: str, said: str) -> None:
    file.write_text(text)
    with pytest.raises(UsageError) as refused:
        read_key_file(str(file), CLASSES)
    assert said in str(refused.value)
    assert str(file) in str(refused.value)
    assert "sesame" not in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_file_that_others_can_read_is_refused(file: Path) -> None:
    file.write_text("ada: {key: sesame}")
    file.chmod(0o640)
    assert len(read_key_file(str(file), CLASSES)) == 1
    file.chmod(0o644)
    with pytest.raises(UsageError, match="can be read by every user here: chmod 600 it"):
        read_key_file(str(file), CLASSES)
    with pytest.raises(UsageError, match=r"--keys /nowhere cannot be read \(No such file"):
        read_key_file("/nowhere", CLASSES)


def test_what_is_read_again_says_what_it_changes_and_a_bad_file_changes_nothing(file: Path) -> None:
    file.write_text("ada: {key: a}\nbea: {key: b}\n")
    ring = KeyRing(str(file), CLASSES)
    assert ring
    assert ring.replace(ring.read())["added"] == ["ada", "bea"]
    file.write_text("ada: {key: a, open_max: 2}\ncleo: {key: c}\n")
    assert ring.find(sha("b")) is not None
    assert ring.replace(ring.read()) == {
        "keys": 2, "added": ["cleo"], "removed": ["bea"], "changed": ["ada"],
    }  # fmt: skip
    assert ring.find(sha("b")) is None
    file.write_text("ada: {}")
    with pytest.raises(UsageError):
        ring.replace(ring.read())
    found = ring.find(sha("a"))
    assert found is not None
    assert found.limits.open_max == 2


def test_without_a_file_there_is_nothing_to_read_again() -> None:
    ring = KeyRing()
    assert not ring
    with pytest.raises(UsageError, match="the server has no --keys file"):
        ring.read()


def test_a_key_that_is_given_elsewhere_too_is_refused(file: Path) -> None:
    file.write_text("ada: {key: a}")
    ring = KeyRing(str(file), CLASSES)
    ring.others = frozenset({sha("a")})
    with pytest.raises(UsageError, match="ada is an --api-key or admin key, too"):
        ring.read()
