"""``serve run serve_config.yaml``, in processes of its own. Their end is checked where they are started."""

import subprocess
import sys

import pytest

from tests.serving import ROOT

pytestmark = pytest.mark.ray


def test_the_example_client_is_answered(served):
    client = [sys.executable, "examples/chat_client.py", "Describe this image."]
    said = subprocess.run(
        [*client, "--base-url", served.base_url], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert "red circle" in said and "blue square" in said
    assert len(served.process.children(recursive=True)) > 5
