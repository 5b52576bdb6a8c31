"""The list of models, and their health."""


async def test_models_and_health(http, client):
    assert [model.id async for model in client.models.list()] == ["pocket", "tests/vectors"]
    assert (await client.models.retrieve("pocket")).max_model_len == 1024
    assert (await client.models.retrieve("tests/vectors")).max_model_len == 512
    cards = (await http.get("/v1/models")).json()["data"]
    assert [(card["root"], card["parent"]) for card in cards] == [("pocket", None), ("tests/vectors", None)]
    health = await http.get("/health")
    assert health.json() == {"status": "ok", "models": {"pocket": "ok", "tests/vectors": "ok"}}
