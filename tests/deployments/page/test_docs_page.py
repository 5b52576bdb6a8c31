"""The page of the API in a real browser."""

import pytest

playwright = pytest.importorskip("playwright.async_api", reason="playwright is not installed")
expect = playwright.expect


async def test_the_api_is_described_without_any_other_server(browser, site, http):
    page = await browser.new_page()
    page.set_default_timeout(60_000)
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    await page.goto(f"{site}docs")
    described = (await http.get("/openapi.json")).json()["paths"]
    count = sum(len(methods) for methods in described.values())
    await expect(page.locator(".endpoint")).to_have_count(count)
    first = page.locator(".endpoint").filter(has_text="/v1/chat/completions").first
    await first.locator("summary").click()
    await expect(first.locator(".inside")).to_contain_text("Answer a conversation")
    assert all(url.startswith(site) for url in asked)
    await page.close()


async def test_a_key_opens_the_description(browser, guarded_site):
    page = await browser.new_page()
    page.set_default_timeout(60_000)
    await page.goto(f"{guarded_site}page/docs")
    await expect(page.get_by_role("alert")).to_contain_text("API key")
    await page.get_by_label("API key").fill("secret")
    await page.keyboard.press("Enter")
    await expect(page.locator(".endpoint").first).to_be_visible()
    await expect(page.locator("#problem")).to_be_hidden()
    await page.close()
