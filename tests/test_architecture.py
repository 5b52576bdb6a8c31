"""Which part may know of which: the import direction of the source, read from the files themselves."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

#: From the top down: a package imports only what stands further down, or in its own line.
LAYERS = [
    ["llm", "async_engine"],
    ["loading"],
    ["core", "request_factory", "output_processor"],
    ["encoder"],
    ["runner"],
    ["scheduling", "structured"],
]

#: The engine's modules that deployments may import.
PUBLIC = {
    "engine",
    "engine.async_engine",
    "engine.config",
    "engine.encoder",
    "engine.errors",
    "engine.inputs.frontend",
    "engine.inputs.messages",
    "engine.inputs.prompt",
    "engine.media.decode",
    "engine.media.fetch",
    "engine.media.guard",
    "engine.outputs",
    "engine.pooling_params",
    "engine.sampling_params",
}


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imports(path: Path, *, deep: bool = True) -> Iterator[str]:
    """Modules that a file imports; with ``deep`` inside of functions and type checking blocks too."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if deep else iter(tree.body)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield node.module


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", sources("engine"), ids=relative)
def test_the_engine_knows_nothing_of_its_servers(path):
    for module in imports(path):
        assert not any(within(module, outer) for outer in ("ray", "deployments", "fastapi", "starlette"))


@pytest.mark.parametrize("path", sources("engine/scheduling"), ids=relative)
def test_scheduling_is_pure_python(path):
    for module in imports(path):
        assert not within(module, "torch") and not within(module, "transformers")


@pytest.mark.parametrize("path", sources("deployments"), ids=relative)
def test_deployments_use_the_engines_public_modules(path):
    for module in imports(path):
        assert not within(module, "torch") and not within(module, "transformers")
        if within(module, "engine"):
            assert module in PUBLIC


@pytest.mark.parametrize("part", ["kernels", "layers", "families", "weights", "media"])
def test_lower_parts_know_nothing_of_upper_ones(part):
    upper = [name for line in LAYERS for name in line]
    for path in sources(f"engine/{part}"):
        for module in imports(path):
            assert not any(within(module, f"engine.{name}") for name in upper), (relative(path), module)


def test_kernels_import_no_layers_and_layers_no_families():
    for lower, upper in (("kernels", "layers"), ("kernels", "families"), ("layers", "families")):
        for path in sources(f"engine/{lower}"):
            for module in imports(path):
                assert not within(module, f"engine.{upper}"), (relative(path), module)


def test_what_runs_without_a_model_imports_no_torch():
    """The ingress and the preprocessor: torch would cost each of them 200 MB and a second at start."""
    import subprocess
    import sys

    code = "import sys, deployments.ingress, deployments.preprocessor; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_no_module_is_a_drawer_of_odds_and_ends():
    for folder in ("engine", "deployments"):
        assert not [p for p in sources(folder) if p.stem in ("utils", "helpers", "misc", "common")]
