"""The application in one process."""

import subprocess
import sys

from tests.serving import ROOT

SCRIPT = """
import asyncio, sys
import httpx
from deployments.config import AppConfig
from deployments.in_process import LocalApplication
from tests.serving import app_args

async def main():
    app = LocalApplication(AppConfig.model_validate(app_args()))
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as http:
        body = {"model": "pocket", "messages": [{"role": "user", "content": "Hello!"}], "temperature": 0}
        response = await http.post("/v1/chat/completions", json=body)
    print(response.json()["choices"][0]["message"]["content"])
    await app.close()

asyncio.run(main())
print("ray" in sys.modules)
"""


def test_it_answers_without_ray_and_ends():
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    said, knows_ray = run.stdout.splitlines()
    assert said.startswith("Hello! Show me a picture") and knows_ray == "False"
