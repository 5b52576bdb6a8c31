"""The packages that the source imports are those that pyproject.toml declares."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterable
from functools import cache
from importlib.metadata import packages_distributions

import pytest

from tests.test_architecture import ROOT, Imports, loading_paths, read_imports, within

#: Modules that load an optional package when they are imported. Only functions, or helper processes, import
#: them.
OPTIONAL_LOADED_BY = {
    "av": {"engine.media.video.container", "engine.media.video.display", "engine.media.video.process"},
    "pypdfium2": {"engine.media.documents.pdf", "engine.media.documents.process"},
}


#: The distributions that bring each top-level module.
homes_of_modules = cache(packages_distributions)


def normalized(name: str) -> str:
    """Name of a distribution as PEP 503 compares names."""
    return re.sub(r"[-_.]+", "-", name).lower()


def names_of(requirements: Iterable[str]) -> set[str]:
    """Normalized names of requirements, without their versions, extras and markers."""
    return {normalized(re.match(r"[\w.-]+", text)[0]) for text in requirements}


def declared() -> tuple[set[str], set[str]]:
    """Names of the distributions that every installation has, and of those that some extra brings."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    return names_of(project["dependencies"]), set().union(*(names_of(extra) for extra in extras))


def third_party(imports: Imports) -> dict[str, set[str]]:
    """Each imported top-level module that is neither ours nor Python's, with the modules that import it."""
    found: dict[str, set[str]] = {}
    for module, names in imports.items():
        for top in {name.partition(".")[0] for name in names}:
            if top not in sys.stdlib_module_names and top not in ("engine", "deployments"):
                found.setdefault(top, set()).add(module)
    return found


def undeclared(imports: Imports) -> dict[str, set[str]]:
    """Third-party modules that no requirement in pyproject.toml brings, with the modules that import them."""
    required, optional = declared()
    homes = homes_of_modules()
    return {
        top: users
        for top, users in third_party(imports).items()
        if not {normalized(home) for home in homes.get(top, [top])} & (required | optional)
    }


def loaded_though_optional(imports: Imports) -> dict[str, list[str]]:
    """Modules of extras, with the modules of ours that can't be imported without them."""
    required, _ = declared()
    homes = homes_of_modules()
    found = {}
    for top in third_party(imports):
        if {normalized(home) for home in homes.get(top, [top])} & required:
            continue
        allowed = OPTIONAL_LOADED_BY.get(top, set())
        loading = loading_paths(imports, top, ["engine", "deployments"])
        if rest := [module for module in loading if not any(within(module, name) for name in allowed)]:
            found[top] = rest
    return found


def test_every_imported_package_is_declared():
    assert undeclared(read_imports("engine", "deployments")) == {}


def test_packages_of_extras_are_imported_where_they_are_used():
    assert loaded_though_optional(read_imports("engine", "deployments", at_load=True)) == {}


@pytest.mark.parametrize("name", ["httpcore", "anyio.to_thread"])
def test_a_planted_undeclared_import_is_found(name):
    imports = read_imports("engine", "deployments")
    imports["engine.media.http"] |= {name}
    assert undeclared(imports) == {name.partition(".")[0]: {"engine.media.http"}}


@pytest.mark.parametrize(
    ("module", "name", "optional"),
    [
        ("engine.media.video.decoder", "engine.media.video.container", "av"),
        ("deployments.tracing", "opentelemetry.sdk.trace", "opentelemetry"),
        ("deployments.preflight", "psutil", "psutil"),
    ],
)
def test_a_planted_import_of_an_optional_package_is_found(module, name, optional):
    imports = read_imports("engine", "deployments", at_load=True)
    assert module in imports
    imports[module] |= {name}
    assert module in loaded_though_optional(imports)[optional]
