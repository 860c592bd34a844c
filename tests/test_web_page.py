"""The page in a real browser, against a live server with a fake model."""

import gzip
import json
import os
import re
import shutil
import threading

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect, sync_playwright

from nanozhchat.server.app import STATIC, Settings
from nanozhchat.server.library import Listed
from nanozhchat.server.scheduler import Limits
from tests.conftest import ROOT, pack, write_jsonl
from tests.fakes import STORY, FakeChat, FakeEngine, LiveServer, one_byte_pieces, until

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
WHY = "no browser: `apt-get install chromium`, or CHROMIUM=/path/to/chrome"
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=WHY)
expect.set_options(timeout=15_000)  # a busy machine is slow, not wrong
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
ANSWERS = "**/v1/chat/completions"
LISTED = [Listed(name=name, tag="d4", source=source, step=step, created=1_764_000_000)
          for name, source, step in (("d4", "sft", 1200), ("d4:base:900", "base", 900))]  # fmt: skip
RICH = (
    "# 题\n\n前 $x^2$ 元\n\n```python\nprint('你好')\n```\n\n|甲|乙|\n|-|-|\n|1|2|\n\n![图](https://evil.example/a.png)"
)
LAST = ".message.assistant >> nth=-1"
ANSWER, META, BANNER, CHATS = f"{LAST} >> .answer", f"{LAST} >> .meta", "#banner-text", "#chats .chat"
BEGUN = re.compile("^从前有一只")


@pytest.fixture(scope="module")
def live():
    base = FakeChat(FakeEngine("接着写的话。"), name="d4:base:900", source="base")
    with LiveServer(FakeChat(), listed=LISTED, load=lambda _item: base) as server:
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
    return Tab(context, live)


class Tab:
    """A tab on the page of a server; its methods give it back, so that they chain; the rest is Playwright's."""

    def __init__(self, context, live, script=""):
        self.page, self.live = context.new_page(), live
        self.page.add_init_script(script)
        self.visit()

    def __getattr__(self, name):
        return getattr(self.page, name)

    def visit(self):
        self.page.goto(self.live.url)
        return self.see({"#model option >> nth=0": "d4 · 对话微调 · 第 1200 步"})

    def click(self, *selectors):
        for selector in selectors:
            self.page.click(selector)
        return self

    def press(self, *keys):
        for key in keys:
            self.page.keyboard.press(key)
        return self

    def fill(self, selector, text, then=None):
        self.page.fill(selector, text)
        return self.press(then) if then else self

    def ask(self, text="讲个故事"):
        return self.fill("#input", text, "Enter")

    def answered(self, text="讲个故事", answer=STORY):
        """Ask, and wait for the whole answer."""
        return self.ask(text).see({ANSWER: answer}).status("done")

    def act(self, label, role="assistant"):
        self.page.locator(f".message.{role}").last.get_by_role("button", name=label, exact=True).click()
        return self

    def reload(self):
        self.page.reload()
        return self

    def see(self, shown):
        """Wait until each selector shows its text, or as many elements as the number says."""
        for selector, text in shown.items():
            found = expect(self.page.locator(selector))
            found.to_have_count(text) if isinstance(text, int) else found.to_have_text(text)
        return self

    def holds(self, selector, value):
        expect(self.page.locator(selector)).to_have_value(value)
        return self

    def status(self, status):
        expect(self.page.locator(LAST)).to_have_attribute("data-status", re.compile(status))
        return self

    def labelled(self, label):
        self.page.get_by_label(label).first.click()
        return self

    def downloaded(self, button):
        with self.page.expect_download() as download:
            self.page.click(button)
        return download.value.path().read_text()

    def request_of(self, *asked):
        """The body of the request that a question makes."""
        with self.page.expect_request(ANSWERS) as request:
            self.answered(*asked)
        return request.value.post_data_json


def engine_of(live, *args, **kwargs):
    live.chat.engine = FakeEngine(*args, **kwargs)
    return live.chat.engine


def sent(live):
    return [message.content for message in live.chat.prompts[-1]]


def test_question_gets_its_answer_with_the_servers_speed_and_counts(page):
    meta = re.compile(r"[\d.]+ 词元/秒 · 首字 \d+ 毫秒 · 47 词元 · d4")
    page.answered().see({".bubble": "讲个故事", META: meta, "#context-text": "上下文 52/1024"})


WATCH = """new MutationObserver(() => {
  const answers = [...document.querySelectorAll("#log .answer")];
  if (answers.at(-1)?.textContent.trim()) window.seen ??= Date.now();
}).observe(document.getElementById("log"), { subtree: true, childList: true, characterData: true })"""


def test_the_first_token_shows_within_200_ms_while_the_answer_goes_on(page, live):
    page.evaluate(WATCH)
    delays_ms = []
    for _ in range(3):  # the best of three: this machine may be doing other things
        engine = engine_of(live)
        engine.gate, engine.free = threading.Event(), 1
        page.click("#new-chat").evaluate("delete window.seen")
        page.ask().see({ANSWER: "从", "#status": "正在回答"}).status("streaming")
        delays_ms.append(page.evaluate("window.seen") - 1000 * engine.first)
        engine.gate.set()
        page.see({ANSWER: STORY})
    assert min(delays_ms) < 200


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stopping_keeps_the_partial_answer_and_frees_the_slot(page, live, how):
    engine = engine_of(live, delay_s=0.02, repeat=20)
    page.ask().see({ANSWER: BEGUN})
    (page.click("#stop") if how == "button" else page.press("Escape")).see({META: "已停止"})
    assert until(lambda: engine.active == 0, 1)
    kept = page.locator(ANSWER).inner_text().strip()
    engine_of(live)
    page.answered("再讲")
    assert sent(live) == ["讲个故事", kept, "再讲"]


def test_regenerating_keeps_the_old_answer_as_a_variant(page, live):
    page.answered()
    engine_of(live, "另一个回答")
    page.act("重新生成").see({ANSWER: "另一个回答", ".variant:visible": "2/2"})
    page.act("上一个版本").see({ANSWER: STORY, ".variant:visible": "1/2"}).reload().see({ANSWER: STORY})
    assert sent(live) == ["讲个故事"]


def test_editing_a_question_makes_a_branch_and_the_earlier_one_stays_reachable(page, live):
    page.answered("一").answered("二").labelled("编辑").fill(".editor textarea", "一改", "Enter")
    page.see({".message": 2, ANSWER: STORY})
    assert sent(live) == ["一改"]
    page.act("上一个版本", "user").see({".bubble": ["一", "二"]})


def test_an_answer_cut_by_the_length_limit_can_be_continued(page, live):
    page.click("#open-settings").fill("#set-max_tokens-value", "5", "Tab").press("Escape")
    page.ask().see({META: re.compile("^达到长度上限")}).act("继续写").see({".message.assistant[data-status=cut]": 2})
    assert sent(live) == ["讲个故事", STORY[:5], "继续。"]


def test_copying_gives_the_markdown_source_and_the_code_alone(page, live):
    engine_of(live, RICH)
    page.ask().see({".code": 1}).act("复制").see({"#status": "已复制"})
    assert page.evaluate("navigator.clipboard.readText()") == RICH
    page.labelled("复制代码")
    assert until(lambda: page.evaluate("navigator.clipboard.readText()") == "print('你好')\n", 2)


def test_deleting_a_message_takes_what_follows_and_can_be_undone(page):
    page.answered("一").answered("二").act("删除这条及之后的消息", "user").see({".bubble": ["一"]})
    page.click("#banner-action").see({".bubble": ["一", "二"]})


def test_a_system_prompt_is_sent_first_and_exported(page, live):
    page.click("#open-settings").fill("#system", "用诗回答", "Escape").answered()
    assert sent(live) == ["用诗回答", "讲个故事"]
    text = page.click("#open-settings").downloaded("#export-one")
    assert text.startswith("# 讲个故事\n\n## 系统提示\n\n用诗回答\n\n## 你\n\n讲个故事\n\n## 模型\n\n从前")


def test_history_survives_a_reload_and_can_be_searched_renamed_and_deleted(page):
    page.answered("小猫").click("#new-chat").answered("小狗").reload().see({".bubble": "小狗", CHATS: 2})
    page.fill("#search", "小猫😺").see({CHATS: 2}).fill("#search", "狗").see({CHATS: 1})  # 😺: in both answers only
    page.labelled("重命名").keyboard.type("改名")
    page.press("Enter").fill("#search", "").see({f"{CHATS} >> nth=0 >> .open": "改名"})
    page.labelled("删除对话").see({CHATS: 1, "#welcome:visible": 1})
    page.click("#banner-action").see({CHATS: 2, ".bubble": "小狗"})
    page.click("#delete-all", "#confirm button[value=no]").see({CHATS: 2})
    page.click("#delete-all", "#confirm-yes").see({CHATS: 0})


def test_export_and_import_lose_nothing_and_refuse_what_is_not_ours(page, tmp_path):
    page.answered("<b>一</b>").act("重新生成").see({".variant:visible": "2/2"}).status("done")
    data = json.loads(page.downloaded("#export-all"))
    page.click("#delete-all", "#confirm-yes")
    odd = [{"nodes": {"1": {"id": "1", "parent": None, "role": "system", "text": "x"}}}]
    for change, message in (({"version": 2}, "不同版本"), ({"format": "x"}, "不是本页面"),
                            ({"chats": odd}, "不是本页面"), ({}, "已导入 1 个")):  # fmt: skip
        page.set_input_files("#import-file", pack(tmp_path / "chats.json", json.dumps({**data, **change})))
        page.see({BANNER: re.compile(message)})
    page.click(f"{CHATS} .open").see({".bubble": "<b>一</b>", ".variant:visible": "2/2", ANSWER: STORY})


def test_draft_and_half_answer_survive_a_reload_in_mid_stream(page, live):
    engine = engine_of(live, delay_s=0.02, repeat=20)
    page.ask().fill("#input", "还没发的话").see({ANSWER: BEGUN}).reload()
    assert until(lambda: engine.active == 0, 1)
    page.see({META: "中断了", ANSWER: BEGUN}).holds("#input", "还没发的话")


def test_chats_answer_at_the_same_time_without_mixing(page, live):
    engine_of(live, "甲" * 150, delay_s=0.01)
    page.ask("一").see({ANSWER: re.compile("^甲")}).click("#new-chat")
    engine_of(live, "乙" * 20)
    page.answered("二", "乙" * 20).click(f"{CHATS} .open:has-text('一')").see({ANSWER: "甲" * 150})
    assert "乙" not in page.locator("#log").inner_text()


def test_two_tabs_on_one_chat_tell_each_other(context, page, live):
    page.answered()
    Tab(context, live).see({ANSWER: STORY}).answered("再来")
    page.see({BANNER: "这个对话在另一个标签页里有更新。"}).click("#banner-action").see({".message": 4})


BLOCK = """for (const name of ["indexedDB", "localStorage", "sessionStorage"])
  Object.defineProperty(window, name, { get() { throw new Error("blocked"); } });"""


def test_blocked_storage_leaves_a_working_page_that_says_so(context, live):
    Tab(context, live, BLOCK).see({BANNER: re.compile("禁止了存储")}).answered().see({CHATS: 1})


FILL = """async () => {
  const { newChat, addNode } = await import("/static/chat.js");
  const { Store } = await import("/static/store.js");
  const store = new Store();
  await store.open(() => {});
  await Promise.all([...Array(1000).keys()].map((i) => {
    const chat = newChat();
    addNode(chat, addNode(chat, null, "user", `问题${i}`), "assistant", "答".repeat(500));
    return store.put(chat);
  }));
}"""


def test_a_thousand_chats_open_and_can_be_searched(page):
    page.evaluate(FILL)
    page.reload().see({CHATS: 300}).fill("#search", "问题777").see({CHATS: 1})


KEY_DOWN = """(box, keys) => {
  const event = new KeyboardEvent("keydown", { key: "Enter", bubbles: true, cancelable: true, ...keys });
  if (keys.keyCode) Object.defineProperty(event, "keyCode", { value: keys.keyCode });
  box.dispatchEvent(event);
}"""
COMPOSE = "(box, kind) => box.dispatchEvent(new CompositionEvent(kind, { bubbles: true, data: '你好' }))"
BOXES = {  # where text is typed, and how to get there
    "#input": lambda page: page, ".editor textarea": lambda page: page.act("编辑", "user"),
    ".chat input": lambda page: page.labelled("重命名"), "#compare-input": lambda page: page.click("#open-compare"),
}  # fmt: skip


@pytest.mark.parametrize("box", BOXES)
def test_enter_of_an_input_method_never_sends(page, live, box):
    BOXES[box](page.answered()).fill(box, "ni hao")
    before, area = len(live.chat.prompts), page.locator(box)
    ends, key = (COMPOSE, "compositionend"), {"keyCode": 229}
    for steps in (((KEY_DOWN, {**key, "isComposing": True}), ends), (ends, (KEY_DOWN, key))):  # of Chrome, of Safari
        area.evaluate(COMPOSE, "compositionstart")
        for step in steps:
            area.evaluate(*step)
        page.holds(box, "ni hao")
    assert len(live.chat.prompts) == before


def test_a_held_or_modified_enter_does_not_send_and_shift_enter_makes_a_line(page, live):
    page.fill("#input", "一")
    for keys in ({"repeat": True}, {"altKey": True}):
        page.locator("#input").evaluate(KEY_DOWN, keys)
    page.press("Shift+Enter").keyboard.type("二")
    page.holds("#input", "一\n二").ask("  \n ")
    expect(page.locator("#send")).to_be_disabled()
    assert live.chat.prompts == []


def test_ctrl_enter_can_be_chosen_to_send_and_the_choice_is_kept(page):
    page.click("#open-settings").get_by_role("button", name="Ctrl / ⌘ + Enter").click()
    page.press("Escape").reload().ask("一").see({".message": 0}).press("Control+Enter").see({ANSWER: STORY})


def test_text_typed_during_an_answer_is_neither_sent_nor_lost(page, live):
    engine_of(live, delay_s=0.02)
    page.ask().ask("下一句").see({".message.user": 1}).holds("#input", "下一句")


def test_slash_commands_work_by_keyboard_in_full_width_too_and_unknown_ones_are_not_sent(page):
    page.fill("#input", "/te").see({".command": 1}).press("Enter", "0", "Enter").see({BANNER: "temperature = 0"})
    page.ask("／seed ４２").see({BANNER: "seed = 42"})
    page.ask("/bogus").see({BANNER: "没有 /bogus 这个命令，输入 /help 看全部命令。"}).holds("#input", "/bogus")
    body = page.ask("/model d4:base:900").request_of("从前", "接着写的话。")
    assert (body["temperature"], body["seed"], body["model"]) == (0, 42, "d4:base:900")
    page.ask("/clear").see({"#welcome:visible": 1, "#welcome-text": re.compile("只做过预训练")})


@pytest.mark.parametrize(("status", "code", "shown"), [
    (500, "internal_error", {BANNER: "服务出错了（500）：x"}),
    (429, "rate_limit_exceeded", {"#banner-action:disabled": "1 秒后可重试"}),
])  # fmt: skip
def test_a_refused_question_is_asked_again_from_its_banner_after_the_servers_wait(page, status, code, shown):
    headers = {"retry-after": "2", "content-type": "application/json"}
    body = json.dumps({"error": {"message": "x", "code": code}})
    page.route(ANSWERS, lambda route: route.fulfill(status=status, headers=headers, body=body))
    page.ask().see({**shown, "#banner-action:enabled": 1, ANSWER: ""}).unroute(ANSWERS)  # an error is not an answer
    page.click("#banner-action").see({ANSWER: STORY, "#banner:visible": 0, ".message": 2})


def test_failed_question_is_not_part_of_what_is_sent_later(page, live):
    page.route(ANSWERS, lambda route: route.abort())
    page.ask("没送到").see({BANNER: re.compile("连接不到服务")}).unroute(ANSWERS)
    page.answered("送到了")
    assert sent(live) == ["送到了"]


def test_too_long_a_chat_loses_its_oldest_turn_and_says_so_but_a_message_that_never_fits_is_to_be_shortened(page, live):
    engine_of(live, context=110)
    page.visit().answered("一").answered("二").see({"#context.full": 1})
    page.ask("三" * 20).status("cut|done").see({BANNER: "最早的 1 轮不再发给模型。"})
    assert sent(live) == ["二", STORY, "三" * 20]
    page.ask("长" * 200).see({BANNER: re.compile("这条消息太长"), "#banner-action:visible": 0})
    page.ask("四").status("cut|done")
    assert sent(live)[0] == "三" * 20


def test_what_fills_the_context_is_never_continued_without_itself(page, live):
    engine_of(live, context=110)
    page.ask("三" * 70).status("cut").act("继续写").see({BANNER: re.compile("^对话太长")})
    assert sent(live)[0] == "三" * 70


def test_waiting_in_line_shows_the_place(context):
    with LiveServer(FakeChat(FakeEngine(delay_s=0.02, repeat=20)), Settings(limits=Limits(running=1)), LISTED) as slow:
        first = Tab(context, slow).ask().see({ANSWER: BEGUN})
        second = Tab(context, slow).click("#new-chat").ask().see({META: "排队中，第 1 位"})
        second.close(), first.close()


def test_a_server_killed_in_mid_stream_leaves_the_half_answer_and_is_found_again(context):
    with LiveServer(FakeChat(FakeEngine(delay_s=0.02))) as server:
        page = Tab(context, server).ask().see({ANSWER: BEGUN})
        server.die()
        page.see({BANNER: "回答中断了，已保留收到的部分。", META: "未完成"})
    page.click("#banner-action").see({BANNER: re.compile("连接不到服务")})
    with LiveServer(FakeChat(), port=server.port):
        expect(page.locator(BANNER)).to_have_text("已重新连上服务。", timeout=20000)
        page.click("#banner-action").see({ANSWER: STORY, ".message": 2})


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
    assert [page.evaluate(PARSE, cuts) for cuts in (1, 2, 3, 7, 1000)] == [["小😺", "a\nb", "c"]] * 5


def test_a_stream_in_one_byte_pieces_gives_the_same_text(context):
    with LiveServer(FakeChat(), wrap=one_byte_pieces) as dripping:
        Tab(context, dripping).ask().see({ANSWER: STORY})


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
        page.click("#new-chat").ask(payload).status("done").see({".bubble": payload})
        expect(page.locator(f"{LAST} >> .blocks > *").first).to_be_attached()
        assert page.evaluate(UNSAFE) == [], payload
    links = page.evaluate("[...document.querySelectorAll('#log a')].map((a) => a.rel)")
    assert set(links) <= {"noopener noreferrer nofollow"}


def test_markdown_code_and_maths_are_rendered_and_images_are_links(page, live):
    engine_of(live, RICH)
    page.ask().see({f"{ANSWER} >> {place}": text for place, text in {
        "h1": "题", "math msup": 1, ".code .nb": "print", "figcaption": "python", "td": ["1", "2"],
        "a.image": "图 (evil.example)"}.items()})  # fmt: skip


def test_finished_blocks_are_rendered_while_the_rest_streams_and_are_not_made_again(page, live):
    engine_of(live, "# 题\n\n一段话。\n\n" + "后面的话" * 60, delay_s=0.01)
    page.ask().see({f"{ANSWER} >> h1": "题"}).status("streaming")
    page.locator(f"{ANSWER} >> h1").evaluate("e => { e.dataset.mine = 'yes'; }")
    page.status("done").see({f"{ANSWER} >> p": 2, f"{ANSWER} >> h1[data-mine=yes]": 1})


def test_settings_are_sent_clamped_to_the_servers_ranges_and_survive_a_reload(page):
    page.click("#open-settings").fill("#set-temperature-value", "99", "Tab").holds("#set-temperature", "2")
    body = page.fill("#seed", "7", "Tab").press("Escape").reload().request_of()
    assert (body["temperature"], body["seed"], "top_p" in body) == (2, 7, False)
    page.click("#open-settings", "#reset").holds("#set-temperature-value", "0.5").holds("#seed", "")


def test_token_view_shows_every_token_with_its_likelihood_and_rivals(page):
    page.answered().act("看词元").see({".token": 47, ".token[data-level='2'], .token[data-level='0']": 47})
    page.click(".token >> nth=2").see({".guess": ["有20.2%", "么8.2%"]})
    page.press("ArrowRight").see({".token-detail p >> nth=0": "“一” 的字节：E4 B8 80"})
    page.act("看词元").see({ANSWER: STORY}).act("看词元", "user").see({".token": ["讲", "个", "故", "事"]})


def test_two_checkpoints_answer_side_by_side(page):
    page.click("#open-compare").holds("#compare-right", "d4:base:900").fill("#compare-input", "从前", "Enter")
    page.see({"#compare-left-answer": STORY, "#compare-right-answer": "接着写的话。"})


def test_language_switch_changes_every_text_and_is_kept(page):
    page.answered().click("#language").see({"html[lang=en]": 1, META: re.compile("tokens/s")})
    page.reload().click("#new-chat").see({"#welcome h2": "Say something"})
    labels = page.evaluate("[...document.querySelectorAll('[aria-label]')].map(e => e.getAttribute('aria-label'))")
    assert [label for label in labels if re.search("[\u4e00-\u9fff]", label)] == ["切换到中文"]


def test_every_text_has_both_languages_and_every_used_key_exists():
    table = dict(re.findall(r"^  (\w+): \[(.+)\],$", (STATIC / "strings.js").read_text(), re.M))
    assert all(len(re.findall(r'"(?:[^"\\]|\\.)*"', texts)) == 2 for texts in table.values())
    sources = "".join(path.read_text() for path in STATIC.iterdir() if path.suffix in (".js", ".html"))
    used = re.findall(r'data-(?:text|label|tip|hint)="(\w+)"', sources) + re.findall(r'\bt\("(\w+)"', sources)
    assert set(used) <= set(table)


def test_a_chosen_theme_is_there_before_any_module_runs(page):
    page.emulate_media(color_scheme="light")
    page.click("#open-settings").get_by_role("button", name="深色").click()
    page.route("**/static/main.js", lambda route: route.abort())
    assert page.reload().evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(24, 22, 19)"


def test_scrolling_up_stops_following_and_the_button_resumes(page, live):
    engine_of(live, STORY + "\n", delay_s=0.003, repeat=12)
    page.set_viewport_size({"width": 360, "height": 420})
    stage = page.ask().locator("#stage")
    assert until(lambda: stage.evaluate("e => e.scrollTop") > 200, 5)
    stage.evaluate("e => { e.scrollTop = 0; }")
    page.see({"#jump:visible": 1}).status("done|cut")
    assert stage.evaluate("e => e.scrollTop") == 0
    page.click("#jump")
    assert stage.evaluate("e => e.scrollHeight - e.scrollTop - e.clientHeight") < 2


def test_nothing_is_wider_than_the_window(page, live):
    engine_of(live, RICH + "\n\n```\n" + "w" * 150 + "\n```\n\n" + "w" * 150)
    page.ask("长" * 300 + "w" * 300).status("done")
    for width in (320, 360, 1920):
        page.set_viewport_size({"width": width, "height": 700})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator("#stage").evaluate("e => e.scrollWidth <= e.clientWidth")


def test_on_a_phone_targets_are_big_enter_makes_a_line_and_the_list_opens_over_the_chat(browser, live):
    engine_of(live)
    context = browser.new_context(viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True)
    page = Tab(context, live).ask("一").holds("#input", "一\n")
    assert page.locator("#input").evaluate("e => parseFloat(getComputedStyle(e).fontSize)") >= 16
    page.click("#send").see({ANSWER: STORY, "#sidebar:visible": 0}).click("#open-sidebar")
    for control in page.locator("button:visible, textarea:visible, select:visible, a.tool:visible").all():
        box = control.bounding_box()
        assert round(min(box["width"], box["height"]), 2) >= 44, control.evaluate("e => e.outerHTML")
        assert control.get_attribute("aria-label") or control.inner_text().strip()
    page.press("Escape").see({"#sidebar:visible": 0})
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(page, live, scheme):
    page.emulate_media(color_scheme=scheme)
    engine_of(live, RICH)
    page.ask().see({".code": 1})
    found = scan(page)
    found += scan(page.act("看词元").click(".token >> nth=0"))
    for opener in ("#open-settings", "#open-compare"):
        found += scan(page.click(opener))
        page.press("Escape")
    page.goto(live.url + "/runs")
    assert found + scan(page) == []


def scan(tab):
    serious = [v for v in Axe().run(tab.page).response["violations"] if v["impact"] in ("serious", "critical")]
    return [(v["id"], node["html"][:90], node["any"][:1]) for v in serious for node in v["nodes"][:2]]


def test_the_whole_flow_works_by_keyboard_and_the_focus_returns(page):
    focused = "document.activeElement.id || document.activeElement.getAttribute('aria-label')"
    page.see({"#input:focus": 1}).keyboard.type("讲个故事")
    page.press("Enter").see({ANSWER: STORY, "#status": "回答完毕"})
    expect(page.get_by_role("log", name="对话")).to_have_attribute("aria-live", "off")
    reached = [page.press("Shift+Tab").evaluate(focused) for _ in range(5)]  # back through the answer's buttons
    assert reached == ["删除这条及之后的消息", "看词元", "重新生成", "复制", "删除这条及之后的消息"]
    page.press("Tab", "Tab", "Enter").see({".variant:visible": "2/2"}).locator("#open-settings").focus()
    page.press("Enter").see({"#settings:visible": 1}).press("Escape")
    assert page.evaluate(focused) == "open-settings"
    page.press("?").see({"#help:visible": 1}).press("Escape", "Control+Shift+O")
    page.see({"#input:focus": 1, "#welcome:visible": 1})


def test_the_page_is_small_and_asks_no_other_server():
    files = {path.name: path.read_bytes() for path in STATIC.iterdir()}
    assert sum(len(gzip.compress(content)) for content in files.values()) < 150_000
    for name in ("index.html", "runs.html"):
        html = files[name].decode()
        assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", html)
        assert not re.search(r"(?:src|href)=[\"'](?!/)", html)


def test_runs_page_shows_curves_and_samples_and_follows_the_training(page, live, base_dir):
    folder = base_dir / "base" / "d4"
    rows = [{"step": i, "train/loss": 9 / i, "tok_per_sec": 900, "eta_s": 65} for i in range(1, 41)]
    write_jsonl(folder / "samples.jsonl", [{"step": i, "prompt": "从前", "text": f"第{i}步<b>的话"} for i in (20, 40)])
    metrics = write_jsonl(folder / "metrics.jsonl", rows)
    metrics.write_text(metrics.read_text() + '{"step": 41, "tr')
    page.goto(live.url + "/runs")
    page.see({"#title": "d4 · 预训练", "#state": "进行中 · 还要 01:05", ".chart polyline": 2})
    page.see({"#samples": "从前第40步<b>的话"}).locator("#when").press("ArrowLeft")
    page.see({"#samples": "从前第20步<b>的话"})
    with metrics.open("a") as handle:
        handle.write("\n" + json.dumps({**rows[-1], "step": 50}) + "\n")
    page.see({"#figures dd >> nth=0": "50"})
