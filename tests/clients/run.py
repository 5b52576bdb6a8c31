"""Runs every client against the application, each in an environment of its own, and writes the table.

    python -m tests.clients.run [CLIENT ...] [--base-url http://127.0.0.1:8000] [--keep FOLDER]

A client's pins conflict with others': its environment is made for it, and is removed behind it unless
``--keep`` names a folder.
"""

from __future__ import annotations

import argparse
import ast
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from tests.clients.conftest import URL
from tests.clients.environment import NODE_FOLDER
from tests.clients.local import served
from tests.serving import ROOT

FOLDER = Path(__file__).parent
TABLE = ROOT / "docs" / "clients.md"
USES = ("chat", "image", "stream", "schema", "tools", "agent", "embeddings", "responses", "completions")
TOOLS = ("pytest", "pytest-asyncio", "pytest-timeout")
HEAD = """\
# Clients

Each client speaks to [`pocket-tools`](../models/pocket-tools/README.md): a chat, an image, a stream,
an answer that follows a JSON schema, a tool call about an image, a loop in which the tool's result is
answered, embeddings, the Responses API and text completions. `make test-clients` installs each client in an
environment of its own, runs its file in [`tests/clients/`](../tests/clients) and writes this table from the
results. A number says how many tests of a use passed; – means that there is none, *not run* that the client
could not be installed yet.

`make test`, and so CI, runs the files whose packages it finds installed, against a server in its own process:
those of openai-python 3, anthropic and `vllm bench serve`, which the development environment holds.

Coding agents send more than `pocket-tools` has room for. By hand, with its context made longer, turns of
these were answered:

- Claude Code 2.1: `ANTHROPIC_BASE_URL=http://127.0.0.1:8000` and `ANTHROPIC_MODEL`.
- Codex 0.171: a provider with `wire_api = "responses"`, and `web_search = "disabled"`, since tools that run
  on the server are not offered.

The `chat.completions.stream()` of openai-python 3.54 gives the pieces of a custom tool's call, but its
`get_final_completion()` then raises an AttributeError. `create()`, streamed or not, and the Responses API
give such calls whole.

Java's own `HttpClient` offers HTTP/2 with each request to an `http://` address, and uvicorn then drops the
request's body. Have it speak HTTP/1.1 alone (`version(HttpClient.Version.HTTP_1_1)` of its builder), or put
HAProxy in front (`RAY_SERVE_ENABLE_HA_PROXY=1`).

"""


@dataclass(frozen=True, slots=True)
class Client:
    """A client's file of tests.

    Attributes:
        name: of the file, between ``test_`` and ``.py``.
        title: the first line of its docstring.
        pins, node_pins: packages that the tests need, as pip and npm take them.
    """

    name: str
    title: str
    pins: tuple[str, ...]
    node_pins: tuple[str, ...]

    @property
    def path(self) -> Path:
        return FOLDER / f"test_{self.name}.py"


def clients() -> list[Client]:
    """All clients, as their files tell."""
    found = []
    for path in sorted(FOLDER.glob("test_*.py")):
        tree = ast.parse(path.read_text())
        pins: dict[str, tuple[str, ...]] = {}
        for node in ast.walk(tree):
            name = getattr(node.func, "id", "") if isinstance(node, ast.Call) else ""
            if isinstance(node, ast.Call) and name in ("needs", "needs_node"):
                pins[name] = tuple(ast.literal_eval(argument) for argument in node.args)
        if pins:
            title = (ast.get_docstring(tree) or "").split("\n")[0].rstrip(".")
            name = path.stem.removeprefix("test_")
            found.append(Client(name, title, pins.get("needs", ()), pins.get("needs_node", ())))
    return found


def run(client: Client, root: str, kept: Path | None, extra: list[str]) -> dict[str, list[bool]]:
    """Install a client and run its tests; returns whether each test of each use passed.

    Args:
        kept: holds environments from one call to the next; without it, they are removed.
    """
    with tempfile.TemporaryDirectory(prefix=f"client-{client.name}-") as name:
        folder = Path(name)
        home = folder if kept is None else kept / client.name
        python = home / "venv" / "bin" / "python"
        if not (home / "complete").exists():
            install(client, home, python)
        results = folder / "results.xml"
        command = [
            python,
            "-m",
            "pytest",
            client.path,
            "--confcutdir",
            FOLDER,
            f"--junitxml={results}",
            *extra,
        ]
        environment = {**os.environ, URL: root, NODE_FOLDER: str(home), "PYTHONDONTWRITEBYTECODE": "1"}
        subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, check=False)
        return read_results(results) if results.exists() else {}


def install(client: Client, home: Path, python: Path) -> None:
    """Make an environment for Python and Node.js in the folder ``home``.

    Raises:
        subprocess.CalledProcessError: a package can't be installed.
    """
    home.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", "--clear", home / "venv"], check=True)
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-compile"]
    subprocess.run([*pip, *TOOLS, *client.pins], check=True)
    if client.node_pins:
        npm = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", home]
        subprocess.run([*npm, *client.node_pins], check=True)
    (home / "complete").touch()


def read_results(path: Path) -> dict[str, list[bool]]:
    """Outcomes by use, from pytest's report; skipped tests do not count."""
    found: dict[str, list[bool]] = {}
    for case in ElementTree.parse(path).iter("testcase"):
        if case.find("skipped") is None:
            passed = case.find("failure") is None and case.find("error") is None
            found.setdefault(use_of(case.get("name", "")), []).append(passed)
    return found


def use_of(test: str) -> str:
    """The use that a test is about: the first word of its name."""
    return test.removeprefix("test_").partition("_")[0].partition("[")[0]


def row(client: Client, results: dict[str, list[bool]] | None) -> str:
    """One line of the table, from :func:`read_results`; None if the client was not run."""
    cells = ["*not run*"] if results is None else []
    for use in USES if results is not None else USES[1:]:
        outcomes = (results or {}).get(use, [])
        failed = outcomes.count(False)
        cells.append("–" if not outcomes else f"{len(outcomes)}" if not failed else f"**{failed} failed**")
    pins = "<br>".join(f"`{pin}`" for pin in client.node_pins or client.pins)
    return f"| [{client.title}](../tests/clients/{client.path.name}) | {pins} | {' | '.join(cells)} |"


def write_table(rows: dict[str, str]) -> None:
    """Write the table, from rows by the name of their client; those of clients not run stay as they are."""
    old = dict(read_rows())
    lines = [f"| client | pinned | {' | '.join(USES)} |", f"|---|---|{'---|' * len(USES)}"]
    lines += [rows.get(client.name) or old.get(client.name) or row(client, None) for client in clients()]
    TABLE.write_text(HEAD + "\n".join(lines) + "\n")


def read_rows() -> Iterator[tuple[str, str]]:
    """Rows of the present table by the name of their client."""
    for line in TABLE.read_text().splitlines() if TABLE.exists() else ():
        _, found, rest = line.partition("](../tests/clients/test_")
        if found:
            yield rest.partition(".py)")[0], line


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", help="clients, by the names of their files; all by default")
    parser.add_argument("--base-url", help="a server that runs already, with pocket-tools and pocket-embed")
    parser.add_argument("--keep", type=Path, help="a folder for the environments, to be used again")
    options, extra = parser.parse_known_args()
    chosen = [client for client in clients() if not options.names or client.name in options.names]
    rows: dict[str, str] = {}
    failed = []
    with nullcontext(options.base_url) if options.base_url else served() as root:
        for client in chosen:
            print(f"{client.name}: {' '.join(client.pins + client.node_pins)}", flush=True)
            try:
                results = run(client, root, options.keep, extra)
            except (subprocess.CalledProcessError, FileNotFoundError) as error:
                print(f"{client.name} can't be installed: {error}", flush=True)
                results = {}
            if not results or not all(outcome for outcomes in results.values() for outcome in outcomes):
                failed.append(client.name)
            if results:
                rows[client.name] = row(client, results)
                write_table(rows)
    print(f"{len(chosen) - len(failed)} clients passed" + (f", not {', '.join(failed)}" if failed else ""))
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
