"""LangChain.js."""

from tests.clients.environment import needs_node
from tests.clients.node_uses import check, use

FOLDER = needs_node("langchain@1.2.39", "@langchain/core@1.1.49", "@langchain/openai@1.2.9", "zod@4.1.12")


def test_chat(root):
    check("chat", use("langchain", root, FOLDER, "chat"))


def test_image(root):
    check("image", use("langchain", root, FOLDER, "image"))


def test_stream(root):
    check("stream", use("langchain", root, FOLDER, "stream"))


def test_schema(root):
    check("schema", use("langchain", root, FOLDER, "schema"))


def test_tools(root):
    check("tools", use("langchain", root, FOLDER, "tools"))


def test_agent(root):
    check("agent", use("langchain", root, FOLDER, "agent"))


def test_embeddings(root):
    check("embeddings", use("langchain", root, FOLDER, "embeddings"))


def test_responses(root):
    check("responses", use("langchain", root, FOLDER, "responses"))
