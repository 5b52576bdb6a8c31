"""Vercel AI SDK."""

from tests.clients.environment import needs_node
from tests.clients.node_uses import check, use

FOLDER = needs_node("ai@6.0.325", "@ai-sdk/openai@3.0.141", "@ai-sdk/openai-compatible@2.0.92", "zod@4.1.12")


def test_chat(root):
    check("chat", use("ai_sdk", root, FOLDER, "chat"))


def test_image(root):
    check("image", use("ai_sdk", root, FOLDER, "image"))


def test_stream(root):
    check("stream", use("ai_sdk", root, FOLDER, "stream"))


def test_schema(root):
    check("schema", use("ai_sdk", root, FOLDER, "schema"))


def test_agent(root):
    check("agent", use("ai_sdk", root, FOLDER, "agent"))


def test_embeddings(root):
    check("embeddings", use("ai_sdk", root, FOLDER, "embeddings"))


def test_responses(root):
    check("responses", use("ai_sdk", root, FOLDER, "responses"))


def test_completions(root):
    check("completions", use("ai_sdk", root, FOLDER, "completions"))
