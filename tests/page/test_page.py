"""The server's page in headless Chromium: a chat by keyboard, its cache, samples with their vote, the dial, a key."""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from commands import save_model, write_adapter
from http_serving import CHAT, Running, serving, wait_for
from serving import assert_empty
from sparsekv import LLM
from sparsekv.modeling.load import load_model
from sparsekv.server.operate.dial import Dial

pytestmark = pytest.mark.page


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(shutil.which("chromedriver"))))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The tiny model with an adapter, so that there is a dial."""
    folder = tmp_path_factory.mktemp("page")
    sizes = {"max_position_embeddings": 1024}
    save_model(folder / "model", chat=True, **sizes)
    write_adapter(folder / "adapter", **sizes)
    model, tokenizer = load_model(str(folder / "model"))
    tokenizer.chat_template = CHAT
    llm = LLM(model, tokenizer=tokenizer, adapter=str(folder / "adapter"), cr=4, kv_memory="8MiB", max_num_seqs=8)
    with serving(llm, dial=Dial(llm=llm, cr=4, high=8)) as running:
        yield running
        assert_empty(llm)


@pytest.fixture
def page(browser: webdriver.Chrome, server: Running) -> Iterator[webdriver.Chrome]:
    browser.get(server.url)
    wait_for(lambda: "dms" in text(browser, "model"))
    yield browser
    errors = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not [e for e in errors if "401" not in e["message"]]


def text(browser: webdriver.Chrome, name: str) -> str:
    return browser.find_element(By.ID, name).text


def fill(browser: webdriver.Chrome, name: str, value: Any) -> None:
    field = browser.find_element(By.ID, name)
    field.clear()
    field.send_keys(str(value))


def ask(browser: webdriver.Chrome, words: str) -> None:
    """By keyboard alone."""
    browser.find_element(By.ID, "text").send_keys(words, Keys.ENTER)
    wait_for(lambda: not browser.find_element(By.ID, "send").is_enabled() or answers(browser))
    wait_for(lambda: browser.find_element(By.ID, "send").is_enabled())


def answers(browser: webdriver.Chrome) -> list[str]:
    return [e.text for e in browser.find_elements(By.CSS_SELECTOR, ".assistant p:not(.vote)")]


def test_a_chat_and_its_cache(page: webdriver.Chrome, server: Running) -> None:
    fill(page, "temperature", 0)
    fill(page, "tokens", 40)
    ask(page, "The old lighthouse")
    messages: Any = [{"role": "user", "content": "The old lighthouse"}]
    client = server.client()
    reply = client.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=40)
    (shown,) = page.find_elements(By.CSS_SELECTOR, ".assistant p")
    assert shown.get_property("textContent") == reply.choices[0].message.content
    spans = page.find_elements(By.CSS_SELECTOR, "#cache-text span")
    assert len(spans) == reply.usage.prompt_tokens + 39  # type: ignore[union-attr]
    counts = [int(span.get_attribute("title").split()[0]) for span in spans]  # type: ignore[union-attr]
    heads = int(spans[0].get_attribute("title").split()[2])  # type: ignore[union-attr]
    assert sum(counts) / heads == pytest.approx(reply.usage.kv["tokens_held"])  # type: ignore[union-attr]
    assert min(counts) == 0
    assert counts[-1] == heads
    config = server.llm.model.config
    assert len(page.find_elements(By.CSS_SELECTOR, "#map tr")) == config.num_hidden_layers
    assert len(page.find_elements(By.CSS_SELECTOR, "#map td")) == heads
    assert "where dense holds" in text(page, "bar-text")
    ask(page, "and then")  # the conversation goes on
    assert len(answers(page)) == 2
    assert len(page.find_elements(By.CSS_SELECTOR, "#cache-text span")) > len(spans) + 39


def test_samples_side_by_side_with_their_vote(page: webdriver.Chrome) -> None:
    fill(page, "samples", 4)
    fill(page, "tokens", 20)
    page.find_element(By.CSS_SELECTOR, "#vote option:last-child").click()
    ask(page, "The keeper")
    boxes = page.find_elements(By.CSS_SELECTOR, ".sample")
    assert len(boxes) == 4
    assert all(box.location["y"] == boxes[0].location["y"] for box in boxes[:2])
    assert "Vote:" in page.find_element(By.CSS_SELECTOR, ".vote").text


def test_escape_stops(page: webdriver.Chrome, server: Running) -> None:
    fill(page, "tokens", 900)
    page.find_element(By.ID, "text").send_keys("The code", Keys.ENTER)
    wait_for(lambda: server.service.samples == 1)
    page.switch_to.active_element.send_keys(Keys.ESCAPE)
    wait_for(lambda: server.service.samples == 0 and not server.llm.engine.requests)
    wait_for(lambda: page.find_element(By.ID, "send").is_enabled())


def test_the_dial_turns_by_keyboard(page: webdriver.Chrome, server: Running) -> None:
    assert server.service.dial is not None
    before = server.llm.offset
    page.find_element(By.ID, "dial").send_keys(Keys.ARROW_RIGHT)
    wait_for(lambda: server.service.dial.cr == 4.5)  # type: ignore[union-attr]
    assert server.llm.offset > before
    wait_for(lambda: text(page, "dial-value") == "4.5")
    server.service.dial.turn(4)


def test_on_a_phone_nothing_is_cut_off(page: webdriver.Chrome) -> None:
    size = page.get_window_size()
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 700, "deviceScaleFactor": 1, "mobile": True}
    )
    try:
        assert page.execute_script("return document.documentElement.scrollWidth") <= 360
        talk, memory = (page.find_element(By.ID, name).rect for name in ("talk", "memory"))
        assert memory["y"] >= talk["y"] + talk["height"]
        for name in ("send", "stop", "clear"):
            assert page.find_element(By.ID, name).size["height"] >= 40
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.set_window_size(size["width"], size["height"])


def test_dark_and_light_are_readable(page: webdriver.Chrome) -> None:
    for scheme in ("light", "dark"):
        page.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        )
        ink, paper, soft = (
            page.execute_script(
                "const c = document.createElement('canvas').getContext('2d');"
                "c.fillStyle = getComputedStyle(document.documentElement).getPropertyValue(arguments[0]).trim();"
                "return c.fillStyle",
                name,
            )
            for name in ("--ink", "--page", "--soft")
        )
        assert contrast(ink, paper) >= 7
        assert contrast(soft, paper) >= 4.5
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def contrast(a: str, b: str) -> float:
    """WCAG's, of two colours #rrggbb."""

    def light(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((light(a), light(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_a_key_is_asked_for(browser: webdriver.Chrome, server: Running) -> None:
    with serving(server.llm, api_keys=("right",)) as closed:
        browser.get(closed.url)
        wait_for(lambda: browser.find_element(By.ID, "key-form").is_displayed())
        browser.find_element(By.ID, "key").send_keys("right", Keys.ENTER)
        wait_for(lambda: "tiny" in text(browser, "model"))
        assert not browser.find_element(By.ID, "key-form").is_displayed()
        browser.get("about:blank")  # else it would ask a server that is gone
    browser.get_log("browser")


def test_all_parts_come_from_the_server(page: webdriver.Chrome, server: Running) -> None:
    names = page.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert len(names) >= 3
    assert all(name.startswith(server.url) for name in names)
