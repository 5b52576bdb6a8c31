"""The page at ``/`` in a real browser: everything a person does there, by mouse and by keyboard."""

import asyncio
import base64
import io
import json
import subprocess
import sys
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.deployments.pictures import circle, square

playwright = pytest.importorskip("playwright.async_api", reason="playwright is not installed")
expect = playwright.expect


def png(picture) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def file(name: str, picture) -> dict:
    return {"name": name, "mimeType": "image/png", "buffer": png(picture)}


@pytest_asyncio.fixture(loop_scope="session")
async def page(browser, site) -> AsyncIterator:
    """The page, freshly loaded. It must ask nobody else for anything, and write no error to its console."""
    context = await browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    page = await context.new_page()
    page.set_default_timeout(60_000)
    asked, errors = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.errors = errors
    await page.goto(site)
    await expect(page.get_by_label("Model", exact=True)).to_have_value("pocket")
    yield page
    await context.close()
    assert all(url.startswith((site, "data:")) for url in asked) and len(asked) > 5
    assert errors == []


async def send(page, text: str) -> None:
    """Write a message, send it by the keyboard, and wait for the answer's end."""
    await page.get_by_label("Message", exact=True).fill(text)
    await page.keyboard.press("Enter")
    await expect(page.locator(".turn.assistant").last).to_have_attribute("aria-busy", "false")
    await expect(page.get_by_role("button", name="Send")).to_be_visible()


async def test_a_conversation_about_images_with_its_times(page):
    await page.get_by_label("Most tokens").fill("40")
    await page.get_by_label("Temperature").fill("0")
    await page.get_by_label("Add images").set_input_files(
        [file("a.png", circle("red", (160, 160))), file("b.png", circle("blue", (160, 200)))]
    )
    await expect(page.get_by_role("img", name="Image 2: b.png")).to_be_visible()
    await send(page, "Do both pictures show the same color?")
    answer = page.locator(".turn.assistant")
    await expect(answer.locator(".text")).to_have_text("No, first red, then blue.")
    for word in ("prompt tokens", "to the first token", "per token", "Encode", "cached"):
        await expect(answer.locator(".facts")).to_contain_text(word, ignore_case=True)
    rows = answer.get_by_role("row")
    await expect(rows).to_have_count(3)
    await expect(rows.nth(2)).to_contain_text("Image 2")
    await expect(page.get_by_role("status")).to_have_text("Answer: No, first red, then blue.")
    # The second turn knows the first: the image is no longer attached, and its embedding is cached.
    await expect(page.locator("#attached li")).to_have_count(0)
    await send(page, "Do both pictures show the same color?")
    second = page.locator(".turn.assistant").nth(1)
    await expect(second.get_by_role("row").nth(1)).to_contain_text("cached")
    await page.get_by_role("button", name="New chat").click()
    await expect(page.locator(".turn")).to_have_count(0)


async def test_images_are_dropped_pasted_and_removed(page):
    data = base64.b64encode(png(square("blue"))).decode()
    deliver = """([kind, data]) => {
        const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
        const transfer = new DataTransfer();
        transfer.items.add(new File([bytes], kind + ".png", {type: "image/png"}));
        const event = kind === "paste"
            ? new ClipboardEvent("paste", {clipboardData: transfer, bubbles: true, cancelable: true})
            : new DragEvent(kind, {dataTransfer: transfer, bubbles: true, cancelable: true});
        document.getElementById("prompt").dispatchEvent(event);
    }"""
    await page.evaluate(deliver, ["dragenter", data])
    await expect(page.get_by_text("Drop images here")).to_be_visible()
    await page.evaluate(deliver, ["drop", data])
    await expect(page.get_by_text("Drop images here")).to_be_hidden()
    await page.evaluate(deliver, ["paste", data])
    await expect(page.locator("#attached img")).to_have_count(2)
    await page.get_by_role("button", name="Remove image 1").click()
    await expect(page.locator("#attached img")).to_have_count(1)
    await send(page, "What shape is this?")
    await expect(page.locator(".turn.assistant .text")).to_contain_text("square", ignore_case=True)


async def test_an_answer_is_stopped_and_stays_in_the_conversation(page):
    await page.get_by_label("Most tokens").fill("900")
    # Many digits take far longer than the test waits.
    schema = {"type": "string", "pattern": "^[0-9]{800}$"}
    await page.get_by_label("JSON schema of the answer").fill(json.dumps(schema))
    await page.get_by_label("Message", exact=True).fill("Count!")
    await page.get_by_role("button", name="Send").click()
    answer = page.locator(".turn.assistant .text")
    await expect(answer).not_to_be_empty()
    await page.keyboard.press("Escape")
    await expect(page.locator(".turn.assistant")).to_contain_text("Stopped.")
    length = len(await answer.text_content())
    assert 0 < length < 800
    await expect(page.get_by_role("button", name="Send")).to_be_visible()
    await page.get_by_label("JSON schema of the answer").fill("")
    await page.get_by_label("Most tokens").fill("8")
    await send(page, "Hello!")
    await expect(page.locator(".turn.assistant").nth(1).locator(".failed")).to_have_count(0)


async def test_a_schema_shapes_the_answer_and_a_broken_one_is_shown(page):
    schema = page.get_by_label("JSON schema of the answer")
    await schema.fill('{"type": ')
    await expect(page.locator("#schema-error")).to_contain_text("not valid JSON")
    await page.get_by_label("Message", exact=True).fill("Hello!")
    await page.keyboard.press("Enter")
    await expect(page.locator(".turn")).to_have_count(0)
    await expect(schema).to_be_focused()
    await schema.fill('{"type": "object", "properties": {"red": {"type": "boolean"}}, "required": ["red"]}')
    await expect(page.locator("#schema-error")).to_be_hidden()
    await page.get_by_label("Show the answer as it is written").uncheck()
    await page.get_by_label("Message", exact=True).focus()
    await send(page, "Is it red?")
    assert set(json.loads(await page.locator(".turn.assistant .text").text_content())) == {"red"}


async def test_what_the_server_refuses_is_shown_and_can_be_sent_again(page):
    await page.get_by_label("Top p").fill("0.5")
    await page.locator("#top_p").evaluate("field => { field.value = 7 }")
    await send(page, "Hello!")
    failed = page.get_by_role("alert").filter(has_text="top_p")
    await expect(failed).to_be_visible()
    await expect(page.get_by_label("Message", exact=True)).to_have_value("Hello!")
    page.errors.clear()


async def test_a_request_as_curl_and_as_python_runs(page, site, tmp_path):
    await page.get_by_label("Most tokens").fill("6")
    await page.get_by_label("Temperature").fill("0")
    await page.get_by_label("Top k").fill("5")
    await page.get_by_label("System prompt").fill('It\'s "quoted" \\ and ünïcode')
    await page.get_by_label("Add images").set_input_files([file("a.png", circle("red"))])
    await send(page, "What color is the circle?")
    answer = (await page.locator(".turn.assistant .text").text_content()).strip()
    made = {}
    for name in ("curl", "Python"):
        await page.get_by_role("button", name=f"Copy as {name}").click()
        await expect(page.get_by_role("status")).to_have_text(f"Copy as {name}: copied")
        made[name] = await page.evaluate("navigator.clipboard.readText()")

    def run(*command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, timeout=200, check=True).stdout

    (tmp_path / "request.py").write_text(made["Python"])
    assert (
        answer
        and (await asyncio.to_thread(run, sys.executable, str(tmp_path / "request.py"))).strip() == answer
    )
    (tmp_path / "request.sh").write_text(made["curl"])
    events = (await asyncio.to_thread(run, "bash", str(tmp_path / "request.sh"))).split("\n\n")
    chunks = [json.loads(event[6:]) for event in events if event.startswith("data: {")]
    assert "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks).strip() == answer


async def test_a_key_is_asked_for_and_stays_out_of_copies(browser, guarded_site):
    context = await browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    page = await context.new_page()
    page.set_default_timeout(60_000)
    await page.goto(guarded_site)
    await expect(page.locator("#model-note")).to_contain_text("API key")
    await expect(page.get_by_label("API key")).to_be_focused()
    await page.keyboard.type("secret")
    await page.keyboard.press("Tab")
    await expect(page.get_by_label("Model", exact=True)).to_have_value("pocket")
    await page.get_by_label("Most tokens").fill("4")
    await send(page, "Hello!")
    for name in ("curl", "Python"):
        await page.get_by_role("button", name=f"Copy as {name}").click()
        await expect(page.get_by_role("status")).to_have_text(f"Copy as {name}: copied")
        copied = await page.evaluate("navigator.clipboard.readText()")
        assert "secret" not in copied and "API_KEY" in copied
    await page.reload()
    await expect(page.get_by_label("Model", exact=True)).to_have_value("pocket")
    await context.close()


async def test_every_field_has_a_name_and_the_keyboard_reaches_all(page):
    unnamed = await page.evaluate("""() => [
            ...document.querySelectorAll("input, textarea, select, button, a")]
        .filter((e) => !(e.labels?.length || e.textContent.trim() || e.getAttribute("aria-label")))
        .map((e) => e.id || e.outerHTML)""")
    assert unnamed == []
    reached = set()
    for _ in range(40):
        await page.keyboard.press("Tab")
        reached.add(await page.evaluate("document.activeElement.id"))
    wanted = {
        "model",
        "new-chat",
        "prompt",
        "files",
        "send",
        "key",
        "system",
        "temperature",
        "schema",
        "stream",
    }
    assert wanted <= reached, wanted - reached


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_text_stands_out_from_its_background(page, scheme):
    """WCAG's contrast of 4.5, in both colour schemes."""
    await page.emulate_media(color_scheme=scheme)
    await page.get_by_label("Most tokens").fill("4")
    await send(page, "Hello!")
    low = await page.evaluate("""() => {
        const parse = (text) => text.match(/[\\d.]+/g).map(Number);
        const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
            .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
            .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
        const background = (e) => {
            for (; e; e = e.parentElement) {
                const colour = parse(getComputedStyle(e).backgroundColor);
                if (colour.length < 4 || colour[3] > 0) return colour;
            }
            return [255, 255, 255];
        };
        const found = [];
        for (const e of document.querySelectorAll("body *")) {
            const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
            if (!own || !e.checkVisibility() || e.closest(".hidden, .drop")) continue;
            const pair = [light(parse(getComputedStyle(e).color)), light(background(e))];
            const contrast = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
            if (contrast < 4.5) found.push([e.className || e.tagName, contrast]);
        }
        return found;
    }""")
    assert low == []


async def test_the_page_fits_a_telephone(page):
    await page.set_viewport_size({"width": 360, "height": 700})
    await page.get_by_label("Message", exact=True).fill("Hello!")
    await page.keyboard.press("Enter")
    await expect(page.locator(".turn.assistant").last).to_have_attribute("aria-busy", "false")
    assert await page.evaluate("document.documentElement.scrollWidth") <= 360
