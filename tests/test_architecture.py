"""The floors of the house: which package may import which, read from the source files themselves."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

#: Floors of the engine from the ground up. A package imports itself and packages of lower floors, no others.
FLOORS = [
    ["collector", "errors", "text_formats"],
    [
        *("graphs", "logprobs", "outputs", "param_checks", "parsers", "prompt", "kernels", "watchdog"),
        *("startup", "helpers", "lru", "goal_queue", "transfers", "turns", "settings"),
    ],
    ["distributed", "repetition"],
    [
        *("config", "generation_config", "sampling_params", "pooling_params"),
        *("checkpoint", "text", "mailbox", "media", "metrics", "layers", "progress"),
    ],
    ["constraints", "request", "structured", "token_rows", "vision", "weights"],
    ["families", "request_group", "scheduling"],
    ["fit", "placement", "inputs", "preparation", "runner", "core"],
    ["model_parts", "encoder", "executor", "output_processor", "prepared_items"],
    ["frontend", "request_factory"],
    ["loading"],
    ["async_engine", "offline"],
    ["llm"],
    ["__init__"],
]

#: Floors of the deployments from the ground up.
SERVER_FLOORS = [
    ["leaving", "logs", "unknown_fields"],
    ["report"],
    ["errors"],
    ["autoscaling", "in_place", "thought_tokens", "tracing", "turns"],
    ["admission"],
    [
        "access",
        "answers",
        "caller_fields",
        "metrics",
        "references",
        "response_store",
        "tasks",
        "threads",
    ],
    ["direct", "resumption", "routing", "stage_config", "stages", "text_tokens", "tools"],
    ["answer_format", "config", "request_log"],
    ["protocol"],
    ["charges"],
    ["body", "openapi", "sse", "replay", "preprocessor", "encoder", "language_model"],
    ["media"],
    ["pipeline"],
    ["conversations", "messages", "readiness", "responses"],
    ["decisions", "vectors"],
    ["routers"],
    ["api"],
    ["in_process", "preflight", "ray_serve"],
    ["app", "batch"],
]

#: The engine's modules that deployments may import.
PUBLIC = {
    "engine",
    "engine.async_engine",
    "engine.config",
    "engine.encoder",
    "engine.errors",
    "engine.executor.hosts",
    "engine.executor.launch",
    "engine.families.given_rows",
    "engine.inputs.builder",
    "engine.inputs.media_options",
    "engine.inputs.messages",
    "engine.inputs.pages",
    "engine.inputs.retrieval",
    "engine.inputs.video",
    "engine.lru",
    "engine.mailbox",
    "engine.media.decode",
    "engine.media.documents.limits",
    "engine.media.fetch",
    "engine.media.guard",
    "engine.media.keys",
    "engine.media.ledger",
    "engine.media.safetensors",
    "engine.media.source",
    "engine.media.video.limits",
    "engine.metrics",
    "engine.model_parts",
    "engine.outputs",
    "engine.parsers.answer",
    "engine.parsers.call_forms",
    "engine.parsers.events",
    "engine.parsers.formats",
    "engine.parsers.free_text",
    "engine.parsers.grammar",
    "engine.parsers.reasoning",
    "engine.placement",
    "engine.pooling_params",
    "engine.preparation",
    "engine.prepared_items",
    "engine.progress",
    "engine.prompt",
    "engine.sampling_params",
    "engine.scheduling.prefix_cache",
    "engine.settings",
    "engine.startup",
    "engine.structured.checks",
    "engine.structured.json_schema",
    "engine.structured.prepare",
    "engine.turns",
}

#: Heavy or foreign packages, and the packages that must not load them, directly or through other modules.
NEVER_LOADED = {
    "torch": [
        "engine.scheduling",
        "engine.inputs",
        "engine.media",
        "engine.text",
        "engine.frontend",
        "engine.model_parts",
        "deployments",
    ],
    "transformers": ["engine", "deployments"],
    "ray": ["engine", "deployments"],
    "fastapi": ["engine"],
    "starlette": ["engine"],
    "deployments": ["engine"],
}

#: Modules of the deployments that may load a package that the others must not: those that run a model, and
#: those that know Ray.
MAY_LOAD = {
    "torch": {
        "deployments.app",
        "deployments.batch",
        "deployments.encoder",
        "deployments.in_process",
        "deployments.language_model",
        "deployments.ray_serve.hosts",
        "deployments.ray_serve.replicas",
    },
    "ray": {"deployments.app", "deployments.batch", "deployments.preflight", "deployments.ray_serve"},
}

Imports = Mapping[str, frozenset[str]]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imported(tree: ast.AST, *, at_load: bool) -> Iterator[str]:
    """Modules that a file imports. With ``at_load`` those alone that its own import loads: neither what
    functions import nor what type checkers read."""
    nodes = _at_load(tree) if at_load else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, "relative imports are not used here"
            # ``from package import module`` names a module as well as ``import package.module``.
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _at_load(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _at_load(child)


def read_imports(*folders: str, at_load: bool = False) -> dict[str, frozenset[str]]:
    """Every module below ``folders`` with the modules that it imports."""
    return {module_name(path): _imports_of(path, at_load) for folder in folders for path in sources(folder)}


@cache
def _imports_of(path: Path, at_load: bool) -> frozenset[str]:
    return frozenset(imported(ast.parse(path.read_text()), at_load=at_load))


def package_of(module: str, root: str) -> str | None:
    """``engine.layers.norm`` belongs to ``layers`` of the root ``engine``; None for modules outside."""
    parts = module.split(".")
    if parts[0] != root:
        return None
    return parts[1] if len(parts) > 1 else "__init__"


def upward(imports: Imports, floors: list[list[str]], root: str) -> list[tuple[str, str]]:
    """Pairs of a module and an import of it that leads to the same floor or a higher one."""
    height = {name: level for level, names in enumerate(floors) for name in names}
    found = []
    for module, names in imports.items():
        own = package_of(module, root)
        if own is None:
            continue
        for name in names:
            other = package_of(name, root)
            # The root itself, or a name that it exports, as in ``from engine import LLM``.
            if name == root or other == own or other not in height:
                continue
            if height[other] >= height[own]:
                found.append((module, name))
    return sorted(found)


def loads(imports: Imports, start: str) -> set[str]:
    """All modules that importing ``start`` loads: ours, their parent packages, and names of others."""
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        parts = module.split(".")
        waiting += [".".join(parts[:count]) for count in range(1, len(parts))]
        for name in imports.get(module, ()):
            # Names within a module come with the module.
            known = name in imports or name.partition(".")[0] not in ("engine", "deployments")
            waiting += [name] if known else []
    return seen


def circle(imports: Imports) -> list[str]:
    """Modules that import each other in a circle, from one of them back to it; empty if none do."""
    known = {module: [name for name in names if name in imports] for module, names in imports.items()}
    try:
        TopologicalSorter(known).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def loading_paths(imports: Imports, banned: str, packages: Iterable[str]) -> list[str]:
    """Modules below ``packages`` that load ``banned``."""
    return sorted(
        module
        for module in imports
        if any(within(module, package) for package in packages) and banned in loads(imports, module)
    )


def test_every_package_stands_on_a_floor():
    for folder, floors in (("engine", FLOORS), ("deployments", SERVER_FLOORS)):
        found = {package_of(module, folder) for module in read_imports(folder)}
        named = [name for floor in floors for name in floor]
        assert len(named) == len(set(named))
        assert found - {"__init__"} == set(named) - {"__init__"}


def test_imports_lead_down():
    assert upward(read_imports("engine"), FLOORS, "engine") == []
    assert upward(read_imports("deployments"), SERVER_FLOORS, "deployments") == []


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("engine.kernels.gemv", "engine.layers.norm"),
        ("engine.layers.decoder", "engine.vision.pixels"),
        ("engine.media.fetch", "engine.inputs.messages"),
        ("engine.weights.loader", "engine.families.registry"),
        ("engine.scheduling.batch", "engine.runner.sampler"),
        ("engine.families.llava.family", "engine.inputs.builder"),
        ("engine.inputs.builder", "engine.frontend"),
        ("engine.core", "engine.runner.model_runner"),
        ("engine.errors", "engine.prompt"),
    ],
)
def test_a_planted_upward_import_is_found(module, name):
    imports = read_imports("engine")
    assert module in imports
    imports[module] |= {name}
    assert (module, name) in upward(imports, FLOORS, "engine")


def test_no_modules_import_each_other_in_a_circle():
    """Not even in a function, or for type checkers alone."""
    imports = read_imports("engine", "deployments")
    assert circle(imports) == []
    imports["engine.layers.build"] |= {"engine.layers.linear"}
    assert {"engine.layers.build", "engine.layers.linear"} <= {*circle(imports)}


def test_heavy_packages_stay_where_they_belong():
    imports = read_imports("engine", "deployments", at_load=True)
    for banned, packages in NEVER_LOADED.items():
        found = loading_paths(imports, banned, packages)
        allowed = MAY_LOAD.get(banned, set())
        assert [module for module in found if not any(within(module, name) for name in allowed)] == [], banned


@pytest.mark.parametrize(
    ("module", "name", "banned"),
    [
        # Directly, and through a module in between.
        ("engine.scheduling.scheduler", "torch", "torch"),
        ("engine.scheduling.kv_manager", "engine.logprobs", "torch"),
        ("engine.media.decode", "engine.vision.pixels", "torch"),
        ("engine.prompt", "ray", "ray"),
        ("deployments.pipeline", "ray.serve", "ray"),
        ("deployments.routers.chat", "deployments.ray_serve.failures", "ray"),
    ],
)
def test_a_planted_heavy_import_is_found(module, name, banned):
    imports = read_imports("engine", "deployments", at_load=True)
    assert module in imports
    imports[module] |= {name}
    assert module in loading_paths(imports, banned, NEVER_LOADED[banned])


def test_the_process_of_an_engine_loads_no_ray():
    imports = read_imports("engine", "deployments", at_load=True)
    modules = ["deployments.ray_serve.engine_server", "deployments.language_model", "deployments.encoder"]
    assert loading_paths(imports, "ray", modules) == []
    imports["deployments.ray_serve.line"] |= {"deployments.ray_serve.handoff"}
    assert "deployments.ray_serve.engine_server" in loading_paths(imports, "ray", modules)


def test_functions_of_the_engine_import_no_server_either():
    for module, names in read_imports("engine").items():
        assert not any(within(name, "ray") or within(name, "deployments") for name in names), module


def test_deployments_use_the_engines_public_modules():
    for module, names in read_imports("deployments").items():
        for name in names:
            assert not within(name, "torch") and not within(name, "transformers"), module
            if within(name, "engine"):
                assert name in PUBLIC or name.rpartition(".")[0] in PUBLIC, (module, name)


def test_what_runs_without_a_model_imports_no_torch():
    """What builds an application, the ingress and the preprocessor: torch costs each 200 MB and 2 seconds.

    The preprocessor's class is in one module with the replicas that have models.
    """
    code = "import sys, deployments.app, deployments.preprocessor; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_no_module_is_a_drawer_of_odds_and_ends():
    for folder in ("engine", "deployments"):
        assert not [p for p in sources(folder) if p.stem in ("utils", "helpers", "misc", "common")]
