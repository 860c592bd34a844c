"""The page in a real browser, against a live server with a fake model."""

import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect, sync_playwright

from nanozhchat.server.library import Listed
from nanozhchat.server.pages import STATIC
from tests.conftest import ROOT
from tests.fakes import STORY, FakeChat, FakeEngine, LiveServer, one_byte_pieces, until

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no browser: `apt-get install chromium`, or CHROMIUM=/path/to/chrome"
)
expect.set_options(timeout=15_000)  # a busy machine is slow, not wrong
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
ANSWERS = "**/v1/chat/completions"
LISTED = [Listed(name=name, tag="d4", source=source, step=step, created=1_764_000_000)
          for name, source, step in (("d4", "sft", 1200), ("d4:base:900", "base", 900))]  # fmt: skip
RICH = (
    "# 题\n\n前 $x^2$ 元\n\n```python\nprint('你好')\n```\n\n|甲|乙|\n|-|-|\n|1|2|\n\n![图](https://evil.example/a.png)"
)


def base_chat(_item):
    return FakeChat(FakeEngine("接着写的话。"), name="d4:base:900", source="base")


@pytest.fixture(scope="module")
def live():
    with LiveServer(FakeChat(), listed=LISTED, load=base_chat) as server:
        yield server


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def context(browser, live):
    """A fresh profile; the test fails if a script throws, a dialog opens or another server is asked for anything."""
    live.chat.engine = FakeEngine()
    live.chat.prompts.clear()
    context = browser.new_context(viewport={"width": 1000, "height": 700})
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    context.set_default_timeout(15_000)
    faults = []

    def watch(page):
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("dialog", lambda dialog: (faults.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda r: r.url.startswith(("http://127.0.0.1:", "blob:")) or faults.append(r.url))

    context.on("page", watch)
    yield context
    context.close()
    assert faults == []


@pytest.fixture
def page(context, live):
    return visit(context.new_page(), live)


def visit(page, live, path="/"):
    page.goto(live.url + path)
    expect(page.locator("#model option").first).to_have_text("d4 · 对话微调 · 第 1200 步")
    return page


def engine_of(live, *args, **kwargs):
    live.chat.engine = FakeEngine(*args, **kwargs)
    return live.chat.engine


def ask(page, text="讲个故事"):
    page.fill("#input", text)
    page.press("#input", "Enter")


def last(page, role="assistant"):
    return page.locator(f".message.{role}").last


def answer_of(page):
    return last(page).locator(".answer")


def answered(page, text="讲个故事", answer=STORY):
    """Ask, and wait for the whole answer."""
    ask(page, text)
    expect(answer_of(page)).to_have_text(answer)
    expect(last(page)).to_have_attribute("data-status", "done")


def act(page, label, role="assistant"):
    last(page, role).get_by_role("button", name=label, exact=True).click()


def sent(live):
    return [message.content for message in live.chat.prompts[-1]]


def chats(page):
    return page.locator("#chats .chat")


# --- asking and answering


def test_question_gets_its_answer_with_the_servers_speed_and_counts(page):
    answered(page)
    expect(page.locator(".bubble")).to_have_text("讲个故事")
    expect(last(page).locator(".meta")).to_have_text(re.compile(r"[\d.]+ 词元/秒 · 首字 \d+ 毫秒 · 47 词元 · d4"))
    expect(page.locator("#context-text")).to_have_text("上下文 52/1024")


def test_the_first_token_shows_within_200_ms_while_the_answer_goes_on(page, live):
    page.evaluate("""new MutationObserver(() => {
        const answers = [...document.querySelectorAll("#log .answer")];
        if (answers.at(-1)?.textContent.trim()) window.seen ??= Date.now();
    }).observe(document.getElementById("log"), { subtree: true, childList: true, characterData: true })""")
    delays_ms = []
    for _ in range(3):  # the best of three: this machine may be doing other things
        engine = engine_of(live)
        engine.gate, engine.free = threading.Event(), 1
        page.click("#new-chat")
        page.evaluate("delete window.seen")
        ask(page)
        expect(answer_of(page)).to_have_text("从")
        assert last(page).get_attribute("data-status") == "streaming"
        expect(page.locator("#status")).to_have_text("正在回答")
        delays_ms.append(page.evaluate("window.seen") - 1000 * engine.first)
        engine.gate.set()
        expect(answer_of(page)).to_have_text(STORY)
    assert min(delays_ms) < 200


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stopping_keeps_the_partial_answer_and_frees_the_slot(page, live, how):
    engine = engine_of(live, delay_s=0.02, repeat=20)
    ask(page)
    expect(answer_of(page)).to_have_text(re.compile("^从前有一只"))
    page.click("#stop") if how == "button" else page.keyboard.press("Escape")
    expect(last(page).locator(".meta")).to_have_text("已停止")
    assert until(lambda: engine.active == 0, 1)
    kept = answer_of(page).inner_text().strip()
    engine_of(live)
    answered(page, "再讲")
    assert sent(live) == ["讲个故事", kept, "再讲"]


def test_regenerating_keeps_the_old_answer_as_a_variant(page, live):
    answered(page)
    engine_of(live, "另一个回答")
    act(page, "重新生成")
    expect(answer_of(page)).to_have_text("另一个回答")
    expect(page.locator(".variant:visible")).to_have_text("2/2")
    act(page, "上一个版本")
    expect(answer_of(page)).to_have_text(STORY)
    expect(page.locator(".variant:visible")).to_have_text("1/2")
    page.reload()
    expect(answer_of(page)).to_have_text(STORY)
    assert sent(live) == ["讲个故事"]


def test_editing_a_question_makes_a_branch_and_the_earlier_one_stays_reachable(page, live):
    answered(page, "一")
    answered(page, "二")
    page.locator(".message.user").first.get_by_label("编辑").click()
    page.fill(".editor textarea", "一改")
    page.press(".editor textarea", "Enter")
    expect(page.locator(".message")).to_have_count(2)
    expect(answer_of(page)).to_have_text(STORY)
    assert sent(live) == ["一改"]
    act(page, "上一个版本", "user")
    expect(page.locator(".bubble")).to_have_text(["一", "二"])


def test_an_answer_cut_by_the_length_limit_can_be_continued(page, live):
    page.click("#open-settings")
    page.fill("#set-max_tokens-value", "5")
    page.keyboard.press("Tab")
    page.keyboard.press("Escape")
    ask(page)
    expect(last(page).locator(".meta")).to_have_text(re.compile("^达到长度上限"))
    act(page, "继续写")
    expect(page.locator(".message.assistant[data-status=cut]")).to_have_count(2)
    assert sent(live) == ["讲个故事", STORY[:5], "继续。"]


def test_copying_gives_the_markdown_source_and_the_code_alone(page, live):
    engine_of(live, RICH)
    ask(page)
    page.locator(".code").wait_for()
    act(page, "复制")
    expect(page.locator("#status")).to_have_text("已复制")
    assert page.evaluate("navigator.clipboard.readText()") == RICH
    page.get_by_label("复制代码").click()
    assert until(lambda: page.evaluate("navigator.clipboard.readText()") == "print('你好')\n", 2)


def test_deleting_a_message_takes_what_follows_and_can_be_undone(page):
    answered(page, "一")
    answered(page, "二")
    page.locator(".message.user").last.get_by_label("删除").click()
    expect(page.locator(".bubble")).to_have_text(["一"])
    page.click("#banner-action")
    expect(page.locator(".bubble")).to_have_text(["一", "二"])


def test_a_system_prompt_is_sent_first_and_exported(page, live):
    page.click("#open-settings")
    page.fill("#system", "用诗回答")
    page.keyboard.press("Escape")
    answered(page)
    assert sent(live) == ["用诗回答", "讲个故事"]
    page.click("#open-settings")
    with page.expect_download() as download:
        page.click("#export-one")
    text = download.value.path().read_text()
    assert text.startswith("# 讲个故事\n\n## 系统提示\n\n用诗回答\n\n## 你\n\n讲个故事\n\n## 模型\n\n从前")


# --- history


def test_history_survives_a_reload_and_can_be_searched_renamed_and_deleted(page, live):
    answered(page, "小猫")
    page.click("#new-chat")
    answered(page, "小狗")
    page.reload()
    expect(page.locator(".bubble")).to_have_text("小狗")
    expect(chats(page)).to_have_count(2)
    page.fill("#search", "小猫😺")  # in both answers, not in the titles
    expect(chats(page)).to_have_count(2)
    page.fill("#search", "狗")
    expect(chats(page)).to_have_count(1)
    chats(page).get_by_label("重命名").click()
    page.keyboard.type("改名")
    page.keyboard.press("Enter")
    page.fill("#search", "")
    expect(chats(page).first.locator(".open")).to_have_text("改名")
    chats(page).first.get_by_label("删除对话").click()
    expect(chats(page)).to_have_count(1)
    expect(page.locator("#welcome")).to_be_visible()
    page.click("#banner-action")
    expect(chats(page)).to_have_count(2)
    expect(page.locator(".bubble")).to_have_text("小狗")
    page.click("#delete-all")
    page.click("#confirm button[value=no]")
    expect(chats(page)).to_have_count(2)
    page.click("#delete-all")
    page.click("#confirm-yes")
    expect(chats(page)).to_have_count(0)


def test_export_and_import_lose_nothing_and_refuse_what_is_not_ours(page, live, tmp_path):
    answered(page, "<b>一</b>")
    act(page, "重新生成")
    expect(page.locator(".variant:visible")).to_have_text("2/2")
    expect(last(page)).to_have_attribute("data-status", "done")
    with page.expect_download() as download:
        page.click("#export-all")
    data = json.loads(download.value.path().read_text())
    page.click("#delete-all")
    page.click("#confirm-yes")
    for change, message in (({"version": 2}, "不同版本"), ({"format": "x"}, "不是本页面"), ({"chats": [{"nodes": {"1": {
        "id": "1", "parent": None, "role": "system", "text": "x"}}}]}, "不是本页面"), ({}, "已导入 1 个")):  # fmt: skip
        path = tmp_path / "chats.json"
        path.write_text(json.dumps({**data, **change}))
        page.set_input_files("#import-file", path)
        expect(page.locator("#banner-text")).to_have_text(re.compile(message))
    chats(page).locator(".open").click()
    expect(page.locator(".bubble")).to_have_text("<b>一</b>")
    expect(page.locator(".variant:visible")).to_have_text("2/2")
    expect(answer_of(page)).to_have_text(STORY)


def test_draft_and_half_answer_survive_a_reload_in_mid_stream(page, live):
    engine = engine_of(live, delay_s=0.02, repeat=20)
    ask(page)
    page.fill("#input", "还没发的话")
    expect(answer_of(page)).to_have_text(re.compile("^从前有一只"))
    page.reload()
    assert until(lambda: engine.active == 0, 1)
    expect(last(page).locator(".meta")).to_have_text("中断了")
    expect(answer_of(page)).to_have_text(re.compile("^从前有一只"))
    expect(page.locator("#input")).to_have_value("还没发的话")


def test_chats_answer_at_the_same_time_without_mixing(page, live):
    engine_of(live, "甲" * 150, delay_s=0.01)
    ask(page, "一")
    expect(answer_of(page)).to_have_text(re.compile("^甲"))
    page.click("#new-chat")
    engine_of(live, "乙" * 20)
    answered(page, "二", "乙" * 20)
    chats(page).filter(has_text="一").locator(".open").click()
    expect(answer_of(page)).to_have_text("甲" * 150)
    assert "乙" not in page.locator("#log").inner_text()


def test_two_tabs_on_one_chat_tell_each_other(context, page, live):
    answered(page)
    other = visit(context.new_page(), live)
    expect(answer_of(other)).to_have_text(STORY)
    answered(other, "再来")
    expect(page.locator("#banner-text")).to_have_text("这个对话在另一个标签页里有更新。")
    page.click("#banner-action")
    expect(page.locator(".message")).to_have_count(4)


def test_blocked_storage_leaves_a_working_page_that_says_so(context, live):
    page = context.new_page()
    page.add_init_script("""for (const name of ["indexedDB", "localStorage", "sessionStorage"])
        Object.defineProperty(window, name, { get() { throw new Error("blocked"); } });""")
    visit(page, live)
    expect(page.locator("#banner-text")).to_have_text(re.compile("禁止了存储"))
    answered(page)
    expect(chats(page)).to_have_count(1)


def test_a_thousand_chats_open_and_can_be_searched(page, live):
    page.evaluate("""async () => {
      const { newChat, addNode } = await import("/static/chat.js");
      const { Store } = await import("/static/store.js");
      const store = new Store();
      await store.open(() => {});
      await Promise.all([...Array(1000).keys()].map((i) => {
        const chat = newChat();
        addNode(chat, addNode(chat, null, "user", `问题${i}`), "assistant", "答".repeat(500));
        return store.put(chat);
      }));
    }""")
    page.reload()
    expect(chats(page)).to_have_count(300)
    page.fill("#search", "问题777")
    expect(chats(page)).to_have_count(1)


# --- typing

KEY_DOWN = """(box, keys) => {
  const event = new KeyboardEvent("keydown", { key: "Enter", bubbles: true, cancelable: true, ...keys });
  if (keys.keyCode) Object.defineProperty(event, "keyCode", { value: keys.keyCode });
  box.dispatchEvent(event);
}"""
COMPOSE = "(box, kind) => box.dispatchEvent(new CompositionEvent(kind, { bubbles: true, data: '你好' }))"


@pytest.mark.parametrize("order", ["chrome", "safari"])
@pytest.mark.parametrize("box", ["#input", ".editor textarea", ".chat input", "#compare-input"])
def test_enter_of_an_input_method_never_sends(page, live, order, box):
    answered(page)
    if box == ".editor textarea":
        act(page, "编辑", "user")
    elif box == ".chat input":
        chats(page).get_by_label("重命名").click()
    elif box == "#compare-input":
        page.click("#open-compare")
    before = len(live.chat.prompts)
    area = page.locator(box)
    area.fill("ni hao")
    area.evaluate(COMPOSE, "compositionstart")
    if order == "chrome":
        area.evaluate(KEY_DOWN, {"isComposing": True, "keyCode": 229})
        area.evaluate(COMPOSE, "compositionend")
    else:
        area.evaluate(COMPOSE, "compositionend")
        area.evaluate(KEY_DOWN, {"keyCode": 229})
    expect(area).to_have_value("ni hao")
    assert len(live.chat.prompts) == before


def test_a_held_or_modified_enter_does_not_send_and_shift_enter_makes_a_line(page, live):
    page.fill("#input", "一")
    for keys in ({"repeat": True}, {"altKey": True}):
        page.locator("#input").evaluate(KEY_DOWN, keys)
    page.press("#input", "Shift+Enter")
    page.keyboard.type("二")
    expect(page.locator("#input")).to_have_value("一\n二")
    ask(page, "  \n ")
    expect(page.locator("#send")).to_be_disabled()
    assert live.chat.prompts == []


def test_ctrl_enter_can_be_chosen_to_send_and_the_choice_is_kept(page):
    page.click("#open-settings")
    page.get_by_role("button", name="Ctrl / ⌘ + Enter").click()
    page.keyboard.press("Escape")
    page.reload()
    page.fill("#input", "一")
    page.press("#input", "Enter")
    expect(page.locator(".message")).to_have_count(0)
    page.press("#input", "Control+Enter")
    expect(answer_of(page)).to_have_text(STORY)


def test_text_typed_during_an_answer_is_neither_sent_nor_lost(page, live):
    engine_of(live, delay_s=0.02)
    ask(page)
    ask(page, "下一句")
    expect(page.locator(".message.user")).to_have_count(1)
    expect(page.locator("#input")).to_have_value("下一句")


def test_slash_commands_work_by_keyboard_in_full_width_too_and_unknown_ones_are_not_sent(page, live):
    page.fill("#input", "/te")
    expect(page.locator(".command")).to_have_count(1)
    page.keyboard.press("Enter")
    page.keyboard.type("0")
    page.keyboard.press("Enter")
    expect(page.locator("#banner-text")).to_have_text("temperature = 0")
    ask(page, "／seed ４２")
    expect(page.locator("#banner-text")).to_have_text("seed = 42")
    ask(page, "/bogus")
    expect(page.locator("#banner-text")).to_have_text("没有 /bogus 这个命令，输入 /help 看全部命令。")
    expect(page.locator("#input")).to_have_value("/bogus")
    ask(page, "/model d4:base:900")
    with page.expect_request(ANSWERS) as request:
        answered(page, "从前", "接着写的话。")
    body = request.value.post_data_json
    assert (body["temperature"], body["seed"], body["model"]) == (0, 42, "d4:base:900")
    ask(page, "/clear")
    expect(page.locator("#welcome")).to_be_visible()
    expect(page.locator("#welcome-text")).to_have_text(re.compile("只做过预训练"))
    page.select_option("#model", "d4")


# --- trouble


def test_error_banner_retries_the_same_question(page):
    body = '{"error":{"message":"x","code":"internal_error"}}'
    page.route(ANSWERS, lambda route: route.fulfill(status=500, body=body))
    ask(page)
    expect(page.locator("#banner-text")).to_have_text("服务出错了（500）：x")
    expect(answer_of(page)).to_have_text("")  # an error is not an answer
    page.unroute(ANSWERS)
    page.click("#banner-action")
    expect(answer_of(page)).to_have_text(STORY)
    expect(page.locator("#banner")).to_be_hidden()
    expect(page.locator(".message")).to_have_count(2)


def test_busy_server_is_counted_down_before_retry(page):
    headers = {"retry-after": "2", "content-type": "application/json"}
    body = '{"error":{"message":"x","code":"rate_limit_exceeded"}}'
    page.route(ANSWERS, lambda route: route.fulfill(status=429, headers=headers, body=body))
    ask(page)
    expect(page.locator("#banner-action")).to_be_disabled()
    expect(page.locator("#banner-action")).to_have_text("1 秒后可重试")
    expect(page.locator("#banner-action")).to_be_enabled()
    page.unroute(ANSWERS)
    page.click("#banner-action")
    expect(answer_of(page)).to_have_text(STORY)


def test_failed_question_is_not_part_of_what_is_sent_later(page, live):
    page.route(ANSWERS, lambda route: route.abort())
    ask(page, "没送到")
    expect(page.locator("#banner-text")).to_have_text(re.compile("连接不到服务"))
    page.unroute(ANSWERS)
    answered(page, "送到了")
    assert sent(live) == ["送到了"]


def test_too_long_a_chat_offers_to_leave_out_the_oldest_turn(page, live):
    engine_of(live, context=110)
    visit(page, live)
    answered(page, "一")
    answered(page, "二")
    expect(page.locator("#context")).to_have_class(re.compile("full"))
    ask(page, "三" * 20)
    expect(page.locator("#banner-text")).to_have_text("对话太长，超出了模型的上下文。")
    page.click("#banner-action")
    expect(last(page)).to_have_attribute("data-status", re.compile("cut|done"))
    assert sent(live) == ["二", STORY, "三" * 20]


def test_waiting_in_line_shows_the_place(browser, live):
    from nanozhchat.server.app import Settings
    from nanozhchat.server.scheduler import Limits

    chat = FakeChat(FakeEngine(delay_s=0.02, repeat=9))
    with LiveServer(chat, Settings(limits=Limits(running=1)), LISTED) as slow:
        body = {"messages": [{"role": "user", "content": "a"}], "stream": True, "max_tokens": 400}
        with httpx.stream("POST", slow.url + "/v1/chat/completions", json=body):
            assert until(lambda: slow.scheduler.running == 1, 2)
            page = visit(browser.new_context().new_page(), slow)
            ask(page)
            expect(last(page).locator(".meta")).to_have_text("排队中，第 1 位")
            page.context.close()


SERVE = (
    "import sys; from tests.fakes import *; LiveServer(FakeChat(FakeEngine(delay_s=0.02)), port=int(sys.argv[1])).run()"
)


def test_a_server_killed_in_mid_stream_leaves_the_half_answer_and_is_found_again(context, live):
    def start():
        process = subprocess.Popen([sys.executable, "-c", SERVE, str(port)], cwd=ROOT)
        assert until(lambda: is_up(url), 30)
        return process

    with LiveServer(FakeChat()) as probe:
        port, url = probe.port, probe.url
    server = start()
    page = context.new_page()
    try:
        page.goto(url)
        ask(page)
        expect(answer_of(page)).to_have_text(re.compile("^从前有一只"))
        server.send_signal(signal.SIGKILL)
        expect(page.locator("#banner-text")).to_have_text("回答中断了，已保留收到的部分。")
        expect(last(page).locator(".meta")).to_have_text("未完成")
        server.wait()
        page.click("#banner-action")
        expect(page.locator("#banner-text")).to_have_text(re.compile("连接不到服务"))
        server = start()
        expect(page.locator("#banner-text")).to_have_text("已重新连上服务。", timeout=20000)
        page.click("#banner-action")
        expect(answer_of(page)).to_have_text(STORY)
        expect(page.locator(".message")).to_have_count(2)
    finally:
        server.kill()
        server.wait()


def is_up(url):
    try:
        return httpx.get(url + "/health").status_code == 200
    except httpx.HTTPError:
        return False


def test_a_stream_in_one_byte_pieces_gives_the_same_text(context, live):
    with LiveServer(FakeChat(), listed=LISTED, wrap=one_byte_pieces) as dripping:
        answered(visit(context.new_page(), dripping))


PARSE = """async (cuts) => {
  const { EventParser } = await import("/static/sse.js");
  const text = ": ping\\r\\n\\r\\ndata: 小😺\\r\\n\\r\\nevent: x\\ndata: a\\ndata: b\\n\\ndata:c\\n\\n";
  const bytes = new TextEncoder().encode(text);
  const parser = new EventParser();
  const found = [];
  for (let i = 0; i < bytes.length; i += cuts) found.push(...parser.push(bytes.slice(i, i + cuts)));
  return [...found, ...parser.push()];
}"""


def test_events_are_parsed_however_the_bytes_are_cut(page):
    for cuts in (1, 2, 3, 7, 1000):
        assert page.evaluate(PARSE, cuts) == ["小😺", "a\nb", "c"]


# --- rendered text

HOSTILE = (ROOT / "tests" / "hostile.txt").read_text().rstrip("\n").split("\n%%\n")
UNSAFE = """() => [...document.querySelectorAll("#log *")].flatMap((e) => [
  ...(/^(script|img|iframe|style|form|object|video|base|meta|link)$/i.test(e.tagName) ? [e.outerHTML] : []),
  ...[...e.attributes].filter((a) => /^on|^style$/i.test(a.name)).map((a) => a.name),
  ...(e.tagName === "A" && !/^https?:|^mailto:/.test(e.getAttribute("href") ?? "https:") ? [e.outerHTML] : []),
])"""


def test_forty_hostile_payloads_open_no_dialog_fetch_nothing_and_leave_no_unsafe_element(page, live):
    assert len(HOSTILE) == 40
    for payload in HOSTILE:  # the fixture counts dialogs and foreign requests
        engine_of(live, payload)
        page.click("#new-chat")
        ask(page, payload)
        expect(last(page)).to_have_attribute("data-status", "done")
        expect(last(page).locator(".blocks > *").first).to_be_attached()
        assert page.evaluate(UNSAFE) == [], payload
        expect(page.locator(".bubble")).to_have_text(payload)
    links = page.evaluate("[...document.querySelectorAll('#log a')].map((a) => a.rel)")
    assert set(links) <= {"noopener noreferrer nofollow"}


def test_markdown_code_and_maths_are_rendered_and_images_are_links(page, live):
    engine_of(live, RICH)
    ask(page)
    expect(answer_of(page).locator("h1")).to_have_text("题")
    expect(answer_of(page).locator("math msup")).to_be_attached()
    expect(answer_of(page).locator(".code .nb")).to_have_text("print")
    expect(answer_of(page).locator("figcaption")).to_have_text("python")
    expect(answer_of(page).locator("td")).to_have_text(["1", "2"])
    expect(answer_of(page).locator("a.image")).to_have_text("图 (evil.example)")


def test_finished_blocks_are_rendered_while_the_rest_streams_and_are_not_made_again(page, live):
    engine_of(live, "# 题\n\n一段话。\n\n" + "后面的话" * 60, delay_s=0.01)
    ask(page)
    heading = answer_of(page).locator("h1")
    expect(heading).to_have_text("题")
    assert last(page).get_attribute("data-status") == "streaming"
    heading.evaluate("e => { e.dataset.mine = 'yes'; }")
    expect(last(page)).to_have_attribute("data-status", "done")
    expect(answer_of(page).locator("p")).to_have_count(2)
    expect(heading).to_have_attribute("data-mine", "yes")


# --- controls


def test_settings_are_sent_clamped_to_the_servers_ranges_and_survive_a_reload(page, live):
    page.click("#open-settings")
    page.fill("#set-temperature-value", "99")
    page.keyboard.press("Tab")
    expect(page.locator("#set-temperature")).to_have_value("2")
    page.fill("#seed", "7")
    page.keyboard.press("Tab")
    page.keyboard.press("Escape")
    page.reload()
    with page.expect_request(ANSWERS) as request:
        answered(page)
    body = request.value.post_data_json
    assert (body["temperature"], body["seed"], "top_p" in body) == (2, 7, False)
    page.click("#open-settings")
    page.click("#reset")
    expect(page.locator("#set-temperature-value")).to_have_value("0.8")
    expect(page.locator("#seed")).to_have_value("")


def test_token_view_shows_every_token_with_its_likelihood_and_rivals(page):
    answered(page)
    act(page, "看词元")
    expect(page.locator(".token")).to_have_count(47)
    assert page.locator(".token[data-level='2'], .token[data-level='0']").count() == 47
    page.locator(".token").nth(2).click()
    expect(page.locator(".guess")).to_have_text(["有20.2%", "么8.2%"])
    page.keyboard.press("ArrowRight")
    expect(page.locator(".token-detail p").first).to_have_text("“一” 的字节：E4 B8 80")
    act(page, "看词元")
    expect(answer_of(page)).to_have_text(STORY)
    act(page, "看词元", "user")
    expect(page.locator(".token")).to_have_text(["讲", "个", "故", "事"])


def test_two_checkpoints_answer_side_by_side(page):
    page.click("#open-compare")
    expect(page.locator("#compare-right")).to_have_value("d4:base:900")
    page.fill("#compare-input", "从前")
    page.keyboard.press("Enter")
    expect(page.locator("#compare-left-answer")).to_have_text(STORY)
    expect(page.locator("#compare-right-answer")).to_have_text("接着写的话。")


def test_language_switch_changes_every_text_and_is_kept(page):
    answered(page)
    page.click("#language")
    expect(page.locator("html")).to_have_attribute("lang", "en")
    expect(last(page).locator(".meta")).to_have_text(re.compile("tokens/s"))
    page.reload()
    page.click("#new-chat")
    expect(page.locator("#welcome h2")).to_have_text("Say something")
    labels = page.evaluate("[...document.querySelectorAll('[aria-label]')].map(e => e.getAttribute('aria-label'))")
    assert [label for label in labels if re.search("[\u4e00-\u9fff]", label)] == ["切换到中文"]


def test_every_text_has_both_languages_and_every_used_key_exists():
    table = dict(re.findall(r"^  (\w+): \[(.+)\],$", (STATIC / "strings.js").read_text(), re.M))
    assert all(len(re.findall(r'"(?:[^"\\]|\\.)*"', texts)) == 2 for texts in table.values())
    sources = "".join(path.read_text() for path in STATIC.iterdir() if path.suffix in (".js", ".html"))
    used = re.findall(r'data-(?:text|label|tip|hint)="(\w+)"', sources) + re.findall(r'\bt\("(\w+)"', sources)
    assert set(used) <= set(table)


# --- devices and people


def test_a_chosen_theme_is_there_before_any_module_runs(context, live):
    page = context.new_page()
    page.emulate_media(color_scheme="light")
    visit(page, live)
    page.click("#open-settings")
    page.get_by_role("button", name="深色").click()
    page.route("**/static/main.js", lambda route: route.abort())
    page.reload()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(24, 22, 19)"


def test_scrolling_up_stops_following_and_the_button_resumes(page, live):
    engine_of(live, STORY + "\n", delay_s=0.003, repeat=12)
    page.set_viewport_size({"width": 360, "height": 420})
    ask(page)
    stage = page.locator("#stage")
    assert until(lambda: stage.evaluate("e => e.scrollTop") > 200, 5)
    stage.evaluate("e => { e.scrollTop = 0; }")
    expect(page.locator("#jump")).to_be_visible()
    expect(last(page)).to_have_attribute("data-status", re.compile("done|cut"))
    assert stage.evaluate("e => e.scrollTop") == 0
    page.click("#jump")
    assert stage.evaluate("e => e.scrollHeight - e.scrollTop - e.clientHeight") < 2


@pytest.mark.parametrize("width", [320, 360, 1920])
def test_nothing_is_wider_than_the_window(page, live, width):
    engine_of(live, RICH + "\n\n```\n" + "w" * 150 + "\n```\n\n" + "w" * 150)
    page.set_viewport_size({"width": width, "height": 700})
    ask(page, "长" * 300 + "w" * 300)
    expect(last(page)).to_have_attribute("data-status", "done")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("#stage").evaluate("e => e.scrollWidth <= e.clientWidth")


def test_on_a_phone_targets_are_big_enter_makes_a_line_and_the_list_opens_over_the_chat(browser, live):
    live.chat.engine = FakeEngine()
    context = browser.new_context(viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True)
    page = visit(context.new_page(), live)
    page.fill("#input", "一")
    page.press("#input", "Enter")
    expect(page.locator("#input")).to_have_value("一\n")
    assert page.locator("#input").evaluate("e => parseFloat(getComputedStyle(e).fontSize)") >= 16
    page.click("#send")
    expect(answer_of(page)).to_have_text(STORY)
    expect(page.locator("#sidebar")).to_be_hidden()
    page.click("#open-sidebar")
    for control in page.locator("button:visible, textarea:visible, select:visible, a.tool:visible").all():
        box = control.bounding_box()
        assert box is not None
        assert round(min(box["width"], box["height"]), 2) >= 44, control.evaluate("e => e.outerHTML")
        assert control.get_attribute("aria-label") or control.inner_text().strip()
    page.keyboard.press("Escape")
    expect(page.locator("#sidebar")).to_be_hidden()
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(page, live, scheme):
    page.emulate_media(color_scheme=scheme)
    engine_of(live, RICH)
    ask(page)
    page.locator(".code").wait_for()
    found = scan(page)
    act(page, "看词元")
    page.locator(".token").first.click()
    found += scan(page)
    for opener in ("#open-settings", "#open-compare"):
        page.click(opener)
        found += scan(page)
        page.keyboard.press("Escape")
    page.goto(live.url + "/runs")
    assert found + scan(page) == []


def scan(page):
    violations = Axe().run(page).response["violations"]
    serious = [v for v in violations if v["impact"] in ("serious", "critical")]
    return [(v["id"], node["html"][:90], node["any"][:1]) for v in serious for node in v["nodes"][:2]]


def test_the_whole_flow_works_by_keyboard_and_the_focus_returns(page):
    focused = "document.activeElement.id || document.activeElement.getAttribute('aria-label')"
    expect(page.locator("#input")).to_be_focused()
    page.keyboard.type("讲个故事")
    page.keyboard.press("Enter")
    expect(answer_of(page)).to_have_text(STORY)
    expect(page.locator("#status")).to_have_text("回答完毕")
    expect(page.get_by_role("log", name="对话")).to_have_attribute("aria-live", "off")
    reached = []
    for _ in range(5):  # back through the answer's buttons
        page.keyboard.press("Shift+Tab")
        reached.append(page.evaluate(focused))
    assert reached == ["删除这条及之后的消息", "看词元", "重新生成", "复制", "删除这条及之后的消息"]
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator(".variant:visible")).to_have_text("2/2")
    page.locator("#open-settings").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#settings")).to_be_visible()
    page.keyboard.press("Escape")
    assert page.evaluate(focused) == "open-settings"
    page.keyboard.press("?")
    expect(page.locator("#help")).to_be_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("Control+Shift+O")
    expect(page.locator("#input")).to_be_focused()
    expect(page.locator("#welcome")).to_be_visible()


def test_the_page_is_small_and_asks_no_other_server():
    files = {path.name: path.read_bytes() for path in STATIC.iterdir()}
    assert sum(len(gzip.compress(content)) for content in files.values()) < 150_000
    for name in ("index.html", "runs.html"):
        html = files[name].decode()
        assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", html)
        assert not re.search(r"(?:src|href)=[\"'](?!/)", html)


# --- watching a training


def test_runs_page_shows_curves_and_samples_and_follows_the_training(context, live, base_dir):
    folder = base_dir / "base" / "d4"
    folder.mkdir(parents=True)
    rows = [{"step": i, "train/loss": 9 / i, "tok_per_sec": 900, "eta_s": 65} for i in range(1, 41)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 41, "tr')
    samples = [{"step": i, "prompt": "从前", "text": f"第{i}步<b>的话"} for i in (20, 40)]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    page = context.new_page()
    page.goto(live.url + "/runs")
    expect(page.locator("#title")).to_have_text("d4 · 预训练")
    expect(page.locator("#state")).to_have_text("进行中 · 还要 01:05")
    expect(page.locator(".chart polyline")).to_have_count(2)
    expect(page.locator("#samples")).to_have_text("从前第40步<b>的话")
    page.locator("#when").press("ArrowLeft")
    expect(page.locator("#samples")).to_have_text("从前第20步<b>的话")
    with open(folder / "metrics.jsonl", "a") as handle:
        handle.write("\n" + json.dumps({**rows[-1], "step": 50}) + "\n")
    expect(page.locator("#figures dd").first).to_have_text("50")
