"""The machines and the software of a run: each host writes down its own, once, when a worker starts there."""

import json
import os
import platform
import re
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

FOLDER = "hosts"
PACKAGES = (
    "raylm",
    "torch",
    "transformers",
    "ray",
    "peft",
    "deepspeed",
    "tokenizers",
    "safetensors",
    "pyarrow",
    "numpy",
)


@dataclass(frozen=True, slots=True)
class Host:
    """A machine that workers ran on. cpus: logical ones; memory_gib: of the machine; gpus: those workers see."""

    name: str
    cpu: str
    cpus: int
    memory_gib: float
    gpus: tuple[str, ...]
    platform: str
    versions: dict[str, str]


def write_host(run_dir: Path) -> None:
    """Writes `run_dir`/hosts/NAME.json about this machine."""
    host = this_host()
    target = run_dir / FOLDER / f"{re.sub(r'[^A-Za-z0-9.-]', '_', host.name)}.json"
    target.parent.mkdir(exist_ok=True)
    partial = target.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(asdict(host), indent=1))
    partial.rename(target)


def read_hosts(run_dir: Path) -> list[Host]:
    """The machines of a run by name; none for a run that no worker started in."""
    trees = [json.loads(path.read_text()) for path in sorted((run_dir / FOLDER).glob("*.json"))]
    return [Host(**{**tree, "gpus": tuple(tree["gpus"])}) for tree in trees]


def this_host() -> Host:
    """This machine."""
    import psutil
    import torch

    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return Host(
        name=platform.node(),
        cpu=_cpu_name(),
        cpus=os.cpu_count() or 1,
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        gpus=tuple(f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB" for gpu in gpus),
        platform=platform.platform(),
        versions=_versions(torch.version.cuda),
    )


def _cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _versions(cuda: Any) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return {**found, **({"cuda": str(cuda)} if cuda else {})}
