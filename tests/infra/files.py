"""What the tests of infra/ share: where the files lie, and what they must agree on."""

import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
DOCKERFILE = (INFRA / "Dockerfile").read_text()
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def load_yaml(path: str) -> Any:
    """The only document of a file of infra/."""
    documents = list(yaml.safe_load_all((INFRA / path).read_text()))
    assert len(documents) == 1
    return documents[0]


def docker_value(name: str) -> str:
    """What an ARG or ENV of the Dockerfile is set to."""
    found = re.search(rf"\b{name}=(\S+)", DOCKERFILE)
    assert found, f"the Dockerfile sets no {name}"
    return found.group(1)


def linter(name: str) -> str:
    """The path of a linter that pip installs as a binary; skips where this platform has no such package."""
    path = Path(sys.executable).parent / name
    if not path.exists():
        pytest.skip(f"{name} is not in this environment: pip install {name}-py")
    return str(path)
