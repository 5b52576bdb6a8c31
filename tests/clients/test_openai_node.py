"""openai-node."""

from tests.clients.environment import needs_node
from tests.clients.node_uses import check, use

FOLDER = needs_node("openai@6.30.1")


def test_chat(root):
    check("chat", use("openai", root, FOLDER, "chat"))


def test_image(root):
    check("image", use("openai", root, FOLDER, "image"))


def test_stream(root):
    check("stream", use("openai", root, FOLDER, "stream"))


def test_schema(root):
    check("schema", use("openai", root, FOLDER, "schema"))


def test_tools(root):
    check("tools", use("openai", root, FOLDER, "tools"))


def test_agent(root):
    check("agent", use("openai", root, FOLDER, "agent"))


def test_embeddings(root):
    check("embeddings", use("openai", root, FOLDER, "embeddings"))


def test_responses(root):
    check("responses", use("openai", root, FOLDER, "responses"))


def test_completions(root):
    check("completions", use("openai", root, FOLDER, "completions"))
