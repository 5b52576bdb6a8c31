"""Running the scripts of Node.js clients, and what they must print."""

import json
import os
import shutil
import subprocess
from pathlib import Path

from tests.clients import cases
from tests.clients.environment import needs_node

SCRIPTS = Path(__file__).parent / "node"


def use(script: str, root: str, folder: Path, name: str) -> dict:
    """Output of a script for one of its uses."""
    # A script finds packages in the folders above its own.
    place = shutil.copytree(SCRIPTS, folder / "scripts", dirs_exist_ok=True)
    environment = {**os.environ, "SIGHTLINE_URL": root, "PICTURE": cases.DATA_URL, "OPENAI_API_KEY": "EMPTY"}
    command = ["node", place / f"{script}.mjs", name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(name: str, found: dict) -> None:
    """Hold what a script printed to what the use must give."""
    if name in ("chat",):
        assert cases.is_greeting(found["text"])
    if name in ("image", "stream", "agent"):
        assert cases.is_caption(found["text"])
    if name == "stream":
        assert found["pieces"] > 1
    if name in ("schema", "tools", "agent"):
        assert cases.is_right(found["facts"])
    if name == "embeddings":
        assert found["lengths"] == [256, 256]
    if name == "completions":
        assert found["length"] > 0
    if name == "responses":
        assert cases.is_caption(found["text"]) or cases.is_greeting(found["text"])
        assert "facts" not in found or cases.is_right(found["facts"])


__all__ = ["check", "needs_node", "use"]
