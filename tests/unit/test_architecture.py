"""Proves the arrows of DESIGN.md by reading every import: the pure modules reach neither DeepSpeed, Ray nor
torch.distributed, not even through another module of sivae; DeepSpeed is in `engines` alone, Ray nowhere in sivae,
`launch` is never imported by it; and `sivae --help` waits for neither torch nor pydantic.

    python -m pytest tests/unit/test_architecture.py
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PURE = ("models", "augment", "objectives", "stacked_step", "theory", "schedule", "metrics", "data")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> set[str]:
    """Every name that a file imports, at its top or inside a function: for `from a import b` both `a` and `a.b`."""
    return imports_in(path.read_text(), package=module_name(path / "x" if path.name == "__init__.py" else path))


def imports_in(text: str, package: str = "") -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package.split(".")[: -node.level], *([base] if base else [])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and isinstance(node.func, (ast.Name, ast.Attribute)):
            name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            if name in ("import_module", "__import__") and node.args and isinstance(node.args[0], ast.Constant):
                found.add(str(node.args[0].value))
        elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith(("torch.distributed", "torch.ops")):
            found.add(ast.unparse(node))  # reachable through `import torch` alone
    return found


IMPORTS = {
    module_name(path): imports_of(path)
    for folder in ("sivae", "launch")
    if (ROOT / folder).is_dir()
    for path in sorted((ROOT / folder).rglob("*.py"))
}
SIVAE = sorted(name for name in IMPORTS if name.split(".")[0] == "sivae")


def imports(module: str, banned: str) -> set[str]:
    return {name for name in IMPORTS[module] if name == banned or name.startswith(f"{banned}.")}


def reached(module: str) -> set[str]:
    """The modules of sivae that a module pulls in, itself included."""
    todo, seen = [module], set()
    while todo:
        name = todo.pop()
        if name in IMPORTS and name not in seen:
            seen.add(name)
            todo += IMPORTS[name]
    return seen


def test_the_modules_are_found():
    assert {"sivae", "sivae.config", "sivae.engines", "sivae.models.conv", "sivae.data.reader"} <= set(SIVAE)
    assert "sivae.objectives" in reached("sivae.randomness")  # so that the checks below have something to walk


@pytest.mark.parametrize(
    "text, name",
    [
        ("import torch.distributed as dist", "torch.distributed"),
        ("from torch import distributed", "torch.distributed"),
        ("def f():\n    import ray", "ray"),
        ("import importlib\nimportlib.import_module('deepspeed')", "deepspeed"),
        ("import torch\ntorch.distributed.barrier()", "torch.distributed"),
        ("from . import engines", "sivae.engines"),
        ("from .engines import Engine", "sivae.engines"),
    ],
)
def test_an_import_is_seen_however_it_is_written(text, name):
    assert name in imports_in(text, package="sivae.module")


def test_settings_import_nothing_else_of_sivae():
    settings = [name for name in SIVAE if f"{name}.".startswith("sivae.config.")]
    assert len(settings) > 1
    for name in settings:
        assert imports(name, "sivae") == imports(name, "sivae.config"), name


@pytest.mark.parametrize("banned", ["deepspeed", "ray", "torch.distributed"])
@pytest.mark.parametrize("module", [name for name in SIVAE if name.count(".") and name.split(".")[1] in PURE])
def test_the_pure_modules_know_no_engine_and_no_cluster(module, banned):
    for name in reached(module):
        assert not imports(name, banned), f"{module} reaches {banned} through {name}"


def test_deepspeed_is_imported_in_engines_alone():
    assert [name for name in IMPORTS if imports(name, "deepspeed")] == ["sivae.engines"]


@pytest.mark.parametrize("banned", ["ray", "launch"])
def test_sivae_knows_neither_ray_nor_launch(banned):
    assert not [name for name in SIVAE if imports(name, banned)]


def test_help_imports_neither_torch_nor_pydantic():
    code = (
        "import sys, sivae.cli; sivae.cli.build_parser().format_help()\n"
        "print([name for name in ('torch', 'pydantic', 'deepspeed', 'numpy', 'fsspec') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
