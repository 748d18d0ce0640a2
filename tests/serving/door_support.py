"""Keys of the shared server, and what tests of the guard look at: the engine's load, and the access log."""

import datetime
import ipaddress
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from tests.serving.servers import KEY, Running

LIMITED_KEY = "s3cret-" + "l" * 24
KEYS = f"""
- {{name: main, key: {KEY}}}
- {{name: limited, key: {LIMITED_KEY}, requests_per_minute: 2, tokens_per_minute: 60000}}
"""
SENTINEL = "sentinel of a prompt"


def requests_in(metrics: str) -> int:
    """Requests that the engine runs, as vLLM counts them."""
    [count] = re.findall(r"^vllm:num_requests_running\{.*\} (\S+)$", metrics, re.M)
    return int(float(count))


def becomes_idle(client: httpx.Client, model: str) -> bool:
    """Whether soon nothing runs in the engine. It counts when it takes a step, so a short request makes it do that."""

    def idle() -> bool:
        short = {"model": model, "prompt": "hello", "max_tokens": 1}
        assert client.post("/v1/completions", json=short).status_code == 200
        return requests_in(client.get("/metrics").text) == 0

    return eventually(idle)


def eventually(condition: Callable[[], bool], *, within_s: float = 10) -> bool:
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def logged(server: Running, request_id: str) -> dict[str, Any]:
    """The line that a request left in the access log, when it is over."""
    found: list[dict[str, Any]] = []

    def look() -> bool:
        for file in server.ray_dir.rglob("access_raylm_engine_*.log"):
            lines = (json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n"))
            found.extend(line for line in lines if line["request_id"] == request_id)
        return bool(found)

    assert eventually(look), f"{request_id} is not in the access log"
    return found[0]


def access_lines() -> list[dict[str, Any]]:
    """What all replicas on the Ray of this process have logged so far."""
    import ray

    folder = Path(ray._private.worker._global_node.get_session_dir_path())
    texts = (file.read_text() for file in folder.glob("logs/serve/access_*.log"))
    return [json.loads(line) for text in texts for line in text.splitlines(keepends=True) if line.endswith("\n")]


def self_signed(folder: Path) -> tuple[Path, Path]:
    """A certificate of 127.0.0.1 and its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "raylm test")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
    certificate = builder.add_extension(x509.SubjectAlternativeName([address]), critical=False).sign(
        key, hashes.SHA256()
    )
    (folder / "cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (folder / "key.pem").write_bytes(key.private_bytes(pem, pkcs8, plain))
    return folder / "cert.pem", folder / "key.pem"
