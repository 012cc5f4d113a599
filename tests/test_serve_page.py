"""The page, without a browser where that is enough, and in a Chromium where PERSONASTEER_CHROMIUM names one."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import samples
from serving import KEY, Running, serving

CHROMIUM = os.environ.get("PERSONASTEER_CHROMIUM", "")
QUESTION = "What should I do on a rainy day?"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("server")
    options = []
    for seed, name in enumerate(("warm", "grim")):
        v = samples.vector(n_layer=30, n_embd=576, layers=(10, 12, 14), seed=seed, name=name, window=(-0.3, 0.25))
        v.save(folder / f"{name}.gguf")
        options += ["-v", f"{name}={folder / name}.gguf"]
    with serving(folder / "log", ["-m", "demo", "-t", "1", "-c", "512", "-n", "12", *options]) as s:
        yield s


def test_the_page_loads_nothing_from_elsewhere(server: Running) -> None:
    page = httpx.get(server.url + "/")
    assert page.status_code == 200
    addresses = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert addresses
    assert not [a for a in addresses if a.startswith(("http:", "https:", "//"))]
    assert KEY not in page.text
    assert httpx.get(server.url + addresses[0]).status_code == 200


def test_the_api_is_the_same_beside_the_page(server: Running) -> None:
    assert server.get("/v1/models").status_code == 200
    assert httpx.get(server.url + "/v1/models").status_code == 401


@pytest.fixture
def browser() -> Iterator[Any]:
    if not CHROMIUM:
        pytest.skip("PERSONASTEER_CHROMIUM names no browser")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as p:
        flags = ["--no-sandbox", "--disable-gpu", "--single-process", "--no-zygote"]
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any, server: Running) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1200, "height": 850})
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.set_default_timeout(30_000)
    page.went_to, page.errors = [], []
    page.on("request", lambda r: page.went_to.append(r.url))
    page.on("pageerror", lambda e: page.errors.append(str(e)))
    page.goto(server.url)
    page.get_by_label("API key").fill("wrong")
    page.get_by_label("API key").press("Enter")
    page.get_by_text("That is not it.").wait_for()
    page.get_by_label("API key").fill(KEY)
    page.get_by_label("API key").press("Enter")
    page.get_by_label("Your message").wait_for()
    yield page
    assert page.errors == []
    assert not [a for a in page.went_to if not a.startswith(server.url) and not a.startswith(("data:", "blob:"))]
    context.close()


def ask(page: Any, text: str, n: int) -> list[str]:
    """Send a message, and the texts of all answers so far once there are n, and the last is whole."""
    page.get_by_label("Your message").fill(text)
    page.get_by_label("Your message").press("Enter")
    page.wait_for_function("n => document.querySelectorAll('.ps-text:has(.ps-tok)').length === n", arg=n)
    page.get_by_role("button", name="Send").wait_for()
    return [str(x.inner_text()) for x in page.query_selector_all(".ps-text:has(.ps-tok)")]


def colours(page: Any) -> list[str]:
    return [str(x.get_attribute("style")) for x in page.query_selector_all(".ps-tok")]


def shots(page: Any, name: str) -> None:
    if folder := os.environ.get("PERSONASTEER_SHOTS"):
        page.screenshot(path=str(Path(folder) / f"{name}.png"))


@pytest.mark.browser
def test_an_answer_is_coloured_and_a_slider_changes_it(page: Any) -> None:
    page.get_by_text("Options").click()
    page.get_by_label("Temperature").fill("0")
    page.get_by_text("Options").click()
    (plain,) = ask(page, QUESTION, 1)
    assert len(colours(page)) == 12
    assert len(set(colours(page))) > 3
    before = colours(page)
    page.get_by_label("trait whose readings colour the tokens").click()
    page.get_by_role("option", name="grim").click()
    page.wait_for_function("s => document.querySelector('.ps-tok').getAttribute('style') !== s", arg=before[0])
    page.get_by_role("button", name="New chat").click()
    slider = page.locator("[role=slider][aria-label=warm] [tabindex]")
    slider.focus()
    for _ in range(45):
        slider.press("ArrowRight")
    page.wait_for_function("document.querySelector('[aria-label=\"strength of warm\"]').value === '0.45'")
    (steered,) = ask(page, QUESTION, 1)
    assert steered != plain
    page.get_by_text("Beside it, without steering").click()
    both = ask(page, "And on a sunny day?", 3)
    assert both[1] != both[2]
    shots(page, "beside")


@pytest.mark.browser
def test_what_others_write_is_text(page: Any) -> None:
    attack = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
    ask(page, attack, 1)
    assert page.title() == "personasteer"
    assert page.query_selector("img[src=x]") is None
    assert page.get_by_text(attack).count() == 1


@pytest.mark.browser
def test_the_mix_can_be_taken_along(page: Any, server: Running) -> None:
    page.get_by_label("strength of warm").fill("0.3")
    page.get_by_label("strength of warm").press("Tab")
    page.get_by_text("Take it with you").click()
    page.get_by_role("button", name="JSON").click()
    page.get_by_text('"strength": 0.3').wait_for()
    page.get_by_role("button", name="curl").click()
    page.get_by_text("/v1/chat/completions").wait_for()
    page.get_by_role("button", name="Python").click()
    page.get_by_text("extra_body").wait_for()
    page.get_by_role("button", name="Bundle").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Save").click()
    assert Path(download.value.path()).read_bytes()[257:262] == b"ustar"
    assert page.query_selector("input[type=file]") is None  # uploads are off


@pytest.mark.browser
def test_it_is_readable_on_a_phone_and_in_the_dark(page: Any) -> None:
    page.set_viewport_size({"width": 390, "height": 800})
    ask(page, QUESTION, 1)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    shots(page, "phone")
    page.get_by_label("Dark or light").click()
    page.wait_for_function("document.body.classList.contains('body--dark')")
    page.set_viewport_size({"width": 1200, "height": 850})
    shots(page, "dark")


@pytest.mark.browser
def test_a_vector_can_be_uploaded_where_that_is_allowed(browser: Any, tmp_path: Path) -> None:
    samples.vector(n_layer=30, n_embd=576, layers=(12,), name="calm").save(tmp_path / "calm.gguf")
    (tmp_path / "junk.gguf").write_bytes(b"no vector")
    with serving(tmp_path / "log", ["-m", "demo", "-t", "1", "-c", "512", "-n", "4", "--allow-upload"]) as s:
        page = browser.new_context().new_page()
        page.set_default_timeout(30_000)
        page.goto(s.url)
        page.get_by_label("API key").fill(KEY)
        page.get_by_label("API key").press("Enter")
        page.get_by_label("Your message").wait_for()
        page.set_input_files("input[type=file]", tmp_path / "junk.gguf")
        page.get_by_text("junk.gguf: not a GGUF file").wait_for()
        page.set_input_files("input[type=file]", tmp_path / "calm.gguf")
        page.get_by_text("calm can be used").wait_for()
        assert page.locator("[role=slider][aria-label=calm]").count() == 1
        assert [v["id"] for v in s.get("/v1/vectors").json()["data"]] == ["calm"]
        mix = [{"vector": "calm", "strength": 0.3}]
        ask_for = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, "steering": mix}
        assert s.post("/v1/chat/completions", json=ask_for).status_code == 200
