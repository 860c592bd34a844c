"""The page in a real browser, against a live server with a fake model."""

import os
import re
import shutil

import httpx
import pytest
from playwright.sync_api import expect, sync_playwright

from tests.fakes import HOSTILE, STORY, FakeChat, FakeEngine, LiveServer, until

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no browser: `apt-get install chromium`, or CHROMIUM=/path/to/chrome"
)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


@pytest.fixture(scope="module")
def live():
    with LiveServer(FakeChat()) as server:
        yield server


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def page(live, browser):
    """A fresh page; the test fails if a script throws, a dialog opens or another server is asked for anything."""
    live.chat.engine = live.app.state.scheduler.engine = FakeEngine()
    live.chat.prompts.clear()
    context = browser.new_context(viewport={"width": 1000, "height": 700})
    context.set_default_timeout(5000)
    faults = []
    page = context.new_page()
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("dialog", lambda dialog: (faults.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: request.url.startswith(live.url) or faults.append(request.url))
    page.goto(live.url)
    expect(page.locator("#model")).to_have_text("d4 · 对话微调")
    yield page
    context.close()
    assert faults == []


def engine_of(live, **kwargs):
    live.chat.engine = live.app.state.scheduler.engine = FakeEngine(**kwargs)
    return live.chat.engine


def ask(page, text="讲个故事"):
    page.fill("#input", text)
    page.press("#input", "Enter")


def last_answer(page):
    return page.locator(".turn").last.locator(".answer")


def last_status(page):
    return page.locator(".turn").last.get_attribute("data-status") or ""


def test_question_gets_its_answer_with_the_servers_speed(page):
    ask(page)
    expect(last_answer(page)).to_have_text(STORY)
    expect(page.locator(".bubble")).to_have_text("讲个故事")
    expect(page.locator(".meta")).to_have_text(re.compile(r"[\d.]+ 词元/秒 · 首字 \d+ 毫秒 · 47 词元"))


def test_part_of_the_answer_shows_before_its_end(page, live):
    engine_of(live, delay_s=0.02)
    ask(page)
    expect(last_answer(page)).to_have_text(re.compile("^从前有一只"))
    assert last_status(page) == "streaming"
    assert len(last_answer(page).inner_text()) < len(STORY)
    expect(last_answer(page)).to_have_text(STORY)


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stopping_keeps_the_partial_answer_and_frees_the_slot(page, live, how):
    engine = engine_of(live, delay_s=0.02, repeat=20)
    ask(page)
    expect(last_answer(page)).to_have_text(re.compile("^从前有一只"))
    if how == "button":
        page.click("#stop")
    else:
        page.keyboard.press("Escape")
    expect(page.locator(".meta")).to_have_text("已停止")
    assert until(lambda: engine.active == 0, 1)
    kept = last_answer(page).inner_text()
    assert kept.startswith("从前有一只")
    engine_of(live)
    ask(page, "再讲")
    expect(last_answer(page)).to_have_text(STORY)
    assert [m.content for m in live.chat.prompts[-1]] == ["讲个故事", kept, "再讲"]


def test_history_is_sent_and_new_chat_clears_it(page, live):
    for text in ("一", "二"):
        ask(page, text)
        expect(page.locator(".turn[data-status=done]")).to_have_count(1 if text == "一" else 2)
    assert [m.content for m in live.chat.prompts[-1]] == ["一", STORY, "二"]
    page.click("#new-chat")
    expect(page.locator(".turn")).to_have_count(0)
    expect(page.locator("#welcome")).to_be_visible()
    ask(page, "三")
    expect(last_answer(page)).to_have_text(STORY)
    assert [m.content for m in live.chat.prompts[-1]] == ["三"]


def test_new_chat_during_an_answer_stops_it_and_nothing_of_it_appears_later(page, live):
    engine = engine_of(live, delay_s=0.02, repeat=20)
    ask(page)
    expect(last_answer(page)).to_have_text(re.compile("^从前"))
    page.click("#new-chat")
    assert until(lambda: engine.active == 0, 1)
    expect(page.locator(".turn")).to_have_count(0)
    expect(page.locator("#send")).to_be_visible()
    expect(page.locator("#banner")).to_be_hidden()


KEY_DOWN = """(keys) => {
  const event = new KeyboardEvent("keydown", { key: "Enter", bubbles: true, cancelable: true, ...keys });
  if (keys.keyCode) Object.defineProperty(event, "keyCode", { value: keys.keyCode });
  document.getElementById("input").dispatchEvent(event);
}"""


@pytest.mark.parametrize("keys", [{"isComposing": True}, {"keyCode": 229}, {"repeat": True}, {"altKey": True}], ids=str)
def test_enter_of_an_input_method_does_not_send(page, keys):
    page.fill("#input", "ni hao")
    page.evaluate(KEY_DOWN, keys)
    expect(page.locator(".turn")).to_have_count(0)
    expect(page.locator("#input")).to_have_value("ni hao")


def test_shift_enter_makes_a_new_line(page):
    page.fill("#input", "一")
    page.press("#input", "Shift+Enter")
    page.keyboard.type("二")
    expect(page.locator("#input")).to_have_value("一\n二")
    expect(page.locator(".turn")).to_have_count(0)


def test_blank_text_is_not_sent(page):
    ask(page, "  \n ")
    expect(page.locator(".turn")).to_have_count(0)
    expect(page.locator("#send")).to_be_disabled()


def test_text_typed_during_an_answer_is_neither_sent_nor_lost(page, live):
    engine_of(live, delay_s=0.02)
    ask(page)
    ask(page, "下一句")
    expect(page.locator(".turn")).to_have_count(1)
    expect(page.locator("#input")).to_have_value("下一句")


def test_hostile_text_shows_as_text(page, live):
    engine_of(live, answer=HOSTILE)
    ask(page, HOSTILE)
    expect(last_answer(page)).to_have_text(HOSTILE)
    expect(page.locator(".bubble")).to_have_text(HOSTILE)
    assert page.locator(".log img, .log script, .log a").count() == 0


def test_error_banner_retries_the_same_question(page, live):
    body = '{"error":{"message":"x","code":"internal_error"}}'
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=500, body=body))
    ask(page)
    expect(page.locator("#banner-text")).to_have_text("服务出错了（500）：x")
    page.unroute("**/v1/chat/completions")
    page.click("#banner-action")
    expect(last_answer(page)).to_have_text(STORY)
    expect(page.locator("#banner")).to_be_hidden()
    expect(page.locator(".turn")).to_have_count(1)


def test_failed_question_is_not_part_of_the_history(page, live):
    page.route("**/v1/chat/completions", lambda route: route.abort())
    ask(page, "没送到")
    expect(page.locator("#banner-text")).to_have_text(re.compile("连接不到服务"))
    page.unroute("**/v1/chat/completions")
    ask(page, "送到了")
    expect(last_answer(page)).to_have_text(STORY)
    assert [m.content for m in live.chat.prompts[-1]] == ["送到了"]


def test_busy_server_is_counted_down_before_retry(page):
    headers = {"retry-after": "2", "content-type": "application/json"}
    body = '{"error":{"message":"x","code":"rate_limit_exceeded"}}'
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=429, headers=headers, body=body))
    ask(page)
    expect(page.locator("#banner-action")).to_be_disabled()
    expect(page.locator("#banner-action")).to_have_text("1 秒后可重试")
    expect(page.locator("#banner-action")).to_be_enabled()


def test_settings_are_sent_and_survive_a_reload(page, live):
    page.click("#open-settings")
    page.fill("#set-max_tokens-value", "5")
    page.press("#set-max_tokens-value", "Tab")
    page.fill("#set-temperature-value", "99")
    page.press("#set-temperature-value", "Tab")
    expect(page.locator("#set-temperature")).to_have_value("2")
    page.keyboard.press("Escape")
    page.reload()
    with page.expect_request("**/v1/chat/completions") as request:
        ask(page)
    sent = request.value.post_data_json
    assert (sent["max_tokens"], sent["temperature"], "top_p" in sent) == (5, 2, False)
    expect(page.locator(".meta")).to_have_text(re.compile("^达到长度上限"))


def test_language_switch_changes_every_text_and_is_kept(page):
    ask(page)
    page.click("#language")
    expect(page.locator("html")).to_have_attribute("lang", "en")
    expect(page.locator(".meta")).to_have_text(re.compile("tokens/s"))
    page.reload()
    expect(page.locator("#welcome h2")).to_have_text("Say something")
    chinese = page.evaluate("[...document.querySelectorAll('[aria-label]')].map(e => e.getAttribute('aria-label'))")
    assert [label for label in chinese if re.search("[\u4e00-\u9fff]", label)] == ["切换到中文"]


def test_scrolling_up_stops_following_and_the_button_resumes(page, live):
    engine_of(live, answer=STORY + "\n", delay_s=0.003, repeat=12)
    page.set_viewport_size({"width": 360, "height": 420})
    ask(page)
    stage = page.locator("#stage")
    assert until(lambda: stage.evaluate("e => e.scrollTop") > 200, 5)
    stage.evaluate("e => { e.scrollTop = 0; }")
    expect(page.locator("#jump")).to_be_visible()
    expect(page.locator(".turn")).to_have_attribute("data-status", re.compile("done|cut"))
    assert stage.evaluate("e => e.scrollTop") == 0
    page.click("#jump")
    assert stage.evaluate("e => e.scrollHeight - e.scrollTop - e.clientHeight") < 2


@pytest.mark.parametrize("width", [320, 360, 1920])
def test_nothing_is_wider_than_the_window(page, width):
    page.set_viewport_size({"width": width, "height": 700})
    ask(page, "长" * 300 + "w" * 300)
    expect(last_answer(page)).to_have_text(STORY)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("#stage").evaluate("e => e.scrollWidth <= e.clientWidth")


def test_every_control_has_a_name_and_a_big_enough_target(page):
    page.set_viewport_size({"width": 360, "height": 700})
    for button in page.locator("button:visible, textarea:visible").all():
        box = button.bounding_box()
        assert box is not None
        assert min(box["width"], box["height"]) >= 44
        assert button.get_attribute("aria-label") or button.inner_text().strip()
    expect(page.get_by_role("log", name="对话")).to_be_attached()


PARSE = """async (cuts) => {
  const { EventParser } = await import("/static/sse.js");
  const text = ": ping\\r\\n\\r\\ndata: 小😺\\r\\n\\r\\nevent: x\\ndata: a\\ndata: b\\n\\ndata:c\\n\\n";
  const bytes = new TextEncoder().encode(text);
  const parser = new EventParser();
  const found = [];
  for (let i = 0; i < bytes.length; i += cuts) found.push(...parser.push(bytes.slice(i, i + cuts)));
  return [...found, ...parser.push()];
}"""


@pytest.mark.parametrize("cuts", [1, 2, 3, 7, 1000])
def test_events_are_parsed_however_the_bytes_are_cut(page, cuts):
    assert page.evaluate(PARSE, cuts) == ["小😺", "a\nb", "c"]


def test_both_languages_have_the_same_keys_and_used_keys_exist(live):
    source = httpx.get(live.url + "/static/strings.js").text
    chinese, english = (re.findall(r"^    (\w+):", part, re.M) for part in source.split("  en: {"))
    html = httpx.get(live.url + "/").text
    used = re.findall(r'data-(?:text|label|tip|hint)="(\w+)"', html)
    used += re.findall(r'\bt\("(\w+)"', httpx.get(live.url + "/static/main.js").text)
    assert chinese == english
    assert set(used) <= set(chinese)


def test_page_has_no_inline_script_or_style_and_no_foreign_address(live):
    html = httpx.get(live.url + "/").text
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", html)
    assert not re.search(r"(?:src|href)=[\"'](?!/static/)", html)
