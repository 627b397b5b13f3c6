"""What the documents point at is there, and the settings they name are accepted.

pytest tests/unit/test_docs.py
"""

import re
from pathlib import Path

import pytest

from sivae import config
from tests.processes import ROOT

DOCUMENTS = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "cluster").glob("*.md")),
    *sorted((ROOT / "benchmarks" / "results").glob("*.md")),
]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path):
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        assert target.startswith("http") or (path.parent / target).exists(), target
    assert not re.search(r"^[A-Z]{4,}$", path.read_text(), re.MULTILINE), "a placeholder was left"


def test_settings_that_the_readme_names_are_accepted():
    text = (ROOT / "README.md").read_text()
    values = {"N": "4", "DEST": "somewhere", "CONFIG": None}
    overrides = re.findall(r"`((?:run|data|model|objective|engine|schedule)\.[a-z_]+)=([^`\s]+)`", text)
    assert len(overrides) >= 8
    for key, value in overrides:
        value = values.get(value, value)
        try:
            config.load(str(ROOT / "configs" / "digits.yaml"), [f"{key}={value}", "schedule.batch_size=16"])
        except config.ConfigError as error:
            # Within reach of this file's model: only offloading and such need a second setting.
            pytest.fail(f"{key}={value}: {error}")


def test_one_oldest_python_is_told():
    told = re.search(r"Python (\d+)\.(\d+) or newer", (ROOT / "README.md").read_text()).groups()
    assert f"python_requires = >={'.'.join(told)}\n" in (ROOT / "setup.cfg").read_text()
    assert f"sys.version_info < ({', '.join(told)})" in (ROOT / "Makefile").read_text()
