"""Where keys come from, and that no message shows one (known faults Z01, Z06)."""

import hashlib
import pickle
from pathlib import Path

import pytest

from raylm.errors import ServingError
from raylm.serving.api_key import ApiKey, digest, find_key, read_api_key, read_api_keys


def test_the_key_is_the_first_line_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("s3cret \nmore\n")
    assert read_api_key(str(file)) == "s3cret"
    assert read_api_keys(str(file)) == (ApiKey("default", digest("s3cret")),)


def test_without_a_file_the_key_is_that_of_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    assert read_api_key(None) is None
    assert read_api_keys(None) == ()
    monkeypatch.setenv("VLLM_API_KEY", "s3cret")
    assert read_api_key(None) == "s3cret"
    assert read_api_keys(None) == (ApiKey("default", digest("s3cret")),)


@pytest.mark.parametrize("name", ["absent", "absent.yaml"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(ServingError, match=f"{name}: cannot be read: No such file or directory"):
        read_api_keys(str(tmp_path / name))


@pytest.mark.parametrize("text", ["", "\n", "   \nkey\n"])
def test_an_empty_first_line_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "key"
    file.write_text(text)
    with pytest.raises(ServingError, match="has no key in its first line"):
        read_api_key(str(file))


def read_yaml(folder: Path, text: str, name: str = "keys.yaml") -> tuple[ApiKey, ...]:
    file = folder / name
    file.write_text(text)
    return read_api_keys(str(file))


def test_a_list_of_keys(tmp_path: Path) -> None:
    hashed = hashlib.sha256(b"b0b").hexdigest()
    text = f"""
- {{name: alice, key: al1ce, requests_per_minute: 60}}
- {{name: bob, sha256: {hashed.upper()}, tokens_per_minute: 1000}}
"""
    alice, bob = read_yaml(tmp_path, text, "keys.yml")
    assert alice == ApiKey("alice", digest("al1ce"), requests_per_minute=60)
    assert bob == ApiKey("bob", digest("b0b"), tokens_per_minute=1000)
    assert find_key([alice, bob], b"Bearer al1ce") is alice
    assert find_key([alice, bob], b"bearer  b0b ") is bob
    for other in (b"Bearer carol", b"Basic al1ce", b"Bearer", b"al1ce", b"", b"Bearer al1c", b"Bearer al1ce2"):
        assert find_key([alice, bob], other) is None


SECRET = "sk-hidden"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"- {{name: a, key: {SECRET}}}\n- {{name: a, key: x}}", r"entry 2 \(a\) has the name of entry 1 \(a\)"),
        (f"- {{name: a, key: {SECRET}}}\n- {{name: b, key: {SECRET}}}", r"entry 2 \(b\) has the key of entry 1 \(a\)"),
        (
            f"- {{name: a, key: {SECRET}}}\n- {{name: b, sha256: {hashlib.sha256(SECRET.encode()).hexdigest()}}}",
            r"entry 2 \(b\) has the key of entry 1 \(a\)",
        ),
        (f"- {{name: a, keys: {SECRET}}}", r"entry 1 \(a\) has an unknown field. Did you mean key\?"),
        (f"- {{name: a, {SECRET}: key}}", r"entry 1 \(a\) has an unknown field. Choose one of name, key, sha256"),
        (f"- {{name: a, key: ''}}\n- {{name: b, key: {SECRET}}}", r"entry 1 \(a\) key: string should have at least 1"),
        (f"- {{name: a, key: '{SECRET} {SECRET}'}}", r"entry 1 \(a\) key is empty or has white space"),
        ("- {name: a}", r"entry 1 \(a\) needs `key` or `sha256`, and not both"),
        (f"- {{name: a, key: {SECRET}, sha256: {'a' * 64}}}", r"entry 1 \(a\) needs `key` or `sha256`, and not both"),
        (f"- {{name: a, sha256: {SECRET}}}", r"entry 1 \(a\) sha256: string should match pattern"),
        ("- {name: a, key: 12345}", r"entry 1 \(a\) key is not text: put it in quotes"),
        (f"- {{name: a, key: [{SECRET}]}}", r"entry 1 \(a\) key is not text"),
        (f"- {{key: {SECRET}}}", "entry 1 name is missing"),
        (f"- {{name: 'a b', key: {SECRET}}}", "name: string should match pattern"),
        (f"- {{name: a, key: {SECRET}, requests_per_minute: 0}}", "requests_per_minute: input should be greater"),
        (f"- {SECRET}", "entry 1 is not a mapping"),
        (SECRET, "is not a list of keys"),
        ("[]", "is not a list of keys"),
        ("", "is not a list of keys"),
        (f"- name: a\n  key: *{SECRET}", "is not valid YAML in line 2"),
        (f"- {{name: a, {SECRET}: 1, {SECRET}: 2}}", "is not valid YAML in line 1"),
        (f"- {{name: a, key: {SECRET}", "is not valid YAML in line"),
    ],
)
def test_a_fault_in_the_list_names_file_and_entry_and_shows_no_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ServingError, match=message) as caught:
        read_yaml(tmp_path, text)
    assert f"api_key_file {tmp_path / 'keys.yaml'}" in str(caught.value)
    assert SECRET not in str(caught.value)
    assert "12345" not in str(caught.value)


def test_a_client_cannot_send_a_list_of_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(f"- {{name: a, key: {SECRET}}}")
    with pytest.raises(ServingError, match=r"lists keys of a server\. A client's file holds one key"):
        read_api_key(str(file))


def test_what_travels_does_not_hold_the_key() -> None:
    key = ApiKey("a", digest("s3cret"))
    assert b"s3cret" not in pickle.dumps(key)
    assert pickle.loads(pickle.dumps(key)) == key  # noqa: S301
    assert key.digest.hex()[:8] not in repr(key)
    assert repr(key) == repr(ApiKey("a", digest("s3cret")))
    assert repr(key) != repr(ApiKey("a", digest("other")))  # a deployment with another key is another one
