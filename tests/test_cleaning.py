"""Cleaning: what each step changes and drops, that it is counted, and that duplicates are found."""

import json
import random
import re
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanozhchat import cleaning, corpus, dedup
from nanozhchat.cleaning import Cleaner, Dropped
from scripts import data_fetch
from tests.conftest import refused, write_jsonl

WORDS = "春天来了河水慢慢融化孩子老师走进教室打开窗户山里公司发展经济研究结果表明因此我们认为问题需要解决城市农村火车"
WORDS = re.findall("..", WORDS + "经过大桥看见远处灯光朋友写信告诉消息今年收成很好大家非常高兴天气变化影响")


def article(seed, sentences=12):
    rng = random.Random(seed)
    parts = ["的".join(rng.sample(WORDS, 4)) + "，" + "".join(rng.sample(WORDS, 5)) for _ in range(sentences)]
    return "。".join(parts) + "。"


BODY = "来源于民间的故事，" + "说的是很久以前的事情。" * 8
NAVIGATION = f"首页 > 新闻\n{article(1)}\n责任编辑：张三\n{BODY}\n版权所有 © 2020\n京ICP备12345号\n分享到：微信 微博"


@pytest.mark.parametrize(("step", "text", "want"), [
    ("unicode", "\u3000\u3000你\u200b好\ufeff，\u202e世\u00ad界\r\n第二行\x00 \n", "你好，世界\n第二行"),
    ("unicode", "ＡＢＣ１２３，⼈⼯智能\u2028e\u0301", "ABC123，人工智能\né"),
    ("unicode", "  if x:\n\treturn　y", "  if x:\n\treturn y"),
    ("unicode", *("全角标点：（保留）“引号”…… 👨\u200d👩\u200d👧",) * 2),
    ("lines", NAVIGATION, f"{article(1)}\n{BODY}"),
    ("pii", "电话13812345678，信箱zhang.san@mail.example.cn。", "电话【电话】，信箱【邮箱】。"),
    ("pii", "+86 138-1234-5678或010-12345678", "【电话】或【电话】"),
    ("pii", "身份证11010519491231002X，编号110105194912310021", "身份证【身份证号】，编号110105194912310021"),
    ("pii", *("订单20231381234567890，版本1.2.3，@某人，13800138",) * 2),
])  # fmt: skip
def test_a_step_changes_what_it_names_and_leaves_what_looks_like_it(step, text, want):
    assert cleaning.PER_DOCUMENT[step](text) == want


LINES = [article(i, 1) for i in range(12)]


@pytest.mark.parametrize(("step", "text", "reason"), [
    ("chinese", "This is an English page about something, 中文很少。", "too little Chinese"),
    ("chinese", "これは日本語の文章です、漢字も有る。" * 5, "Japanese or Korean"), ("length", "太短了。", "too short"),
    ("length", "长" * 200_001, "too long"),
    ("repetition", "\n".join([*LINES[:5], *LINES[:5]]), "gopher: duplicate lines"),
    ("repetition", "".join("买手机" + w for w in WORDS * 3), "gopher: repeated n-grams"),
    ("repetition", "".join(f"{w}有限公司" for w in WORDS), "gopher: top n-gram"),
    ("quality", article(1) + "{}" * 5, "c4: filler or code"), ("quality", "…".join(article(1)[:60]), "gopher: symbols"),
    ("quality", "——|——|的是——|——|——人，。——", "gopher: few letters"),
    ("quality", "\n".join(f"• {x}" for x in LINES), "gopher: bullets"),
    ("quality", "\n".join(f"{x}..." for x in LINES), "gopher: ellipses"),
    ("quality", "手机电脑相机耳机键盘鼠标屏幕" * 5, "gopher: no common words"),
    ("quality", "\n".join(x.strip("。") for x in LINES), "fineweb: lines without end marks"),
    ("quality", "\n".join(["的是在了。"] * 9 + LINES[:2]), "fineweb: short lines"),
])  # fmt: skip
def test_a_step_drops_what_it_names_and_keeps_an_ordinary_text(step, text, reason):
    run = cleaning.PER_DOCUMENT[step]
    assert run(text) == Dropped(reason)
    for seed in range(20):
        assert run(ordinary := "\n".join(article(seed * 3 + i, 4) for i in range(3))) == ordinary


def test_steps_are_named_in_any_order_and_unknown_ones_refused():
    assert cleaning.parse_steps("near, unicode") == ("unicode", "near")
    assert set(cleaning.parse_steps("default,simplify")) == set(cleaning.STEPS)
    assert cleaning.parse_steps(None) == ()
    refused("unknown step 'dedupe'.*exact", cleaning.parse_steps, "dedupe")


def test_traditional_characters_become_simplified_by_words():
    pytest.importorskip("opencc")
    assert [*Cleaner(["simplify"]).run([("頭髮發財，乾淨的幹部在後臺", 1)])] == [("头发发财，干净的干部在后台", 1)]


def edited(text, rng, n):
    chars = list(text)
    for at in rng.sample(range(len(chars)), n):
        chars[at] = rng.choice("甲乙丙丁戊己庚辛")
    return "转载：" + "".join(chars) + rng.choice(["（完）", "", "\n\n本报讯"])


def test_planted_near_duplicates_are_found_and_others_are_kept_even_if_much_is_forgotten():
    rng = random.Random(0)
    originals = [article(seed, rng.randint(6, 40)) for seed in range(1000)]
    planted = [edited(rng.choice(originals), rng, rng.randint(0, 3)) for _ in range(500)]
    near = dedup.NearDuplicates()
    found = [*map(near.seen, near.keys(originals + planted))]
    assert sum(found[len(originals) :]) / len(planted) >= 0.95
    assert sum(found[len(originals) :]) / sum(found) >= 0.99
    small = dedup.NearDuplicates(table_bytes=1)
    keys = small.keys([*map(article, range(2000))])
    assert not any(map(small.seen, keys))
    assert small.seen(keys[-1])


@pytest.mark.parametrize("kind", [dedup.ExactDuplicates, dedup.NearDuplicates])
def test_a_memory_restored_at_any_point_answers_as_the_one_that_went_on(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(dedup, "MERGE_KEYS", 10)
    keys = kind.keys([article(seed % 60) for seed in range(90)])
    want = [*map(kind().seen, keys)]
    first = kind(tmp_path)
    assert [*map(first.seen, keys[:50])] == want[:50]
    n = first.save()
    [*map(first.seen, keys[50:80])]  # what a killed build did after its last state
    assert [*map(kind(tmp_path, n).seen, keys[50:])] == want[50:]
    assert sum(want) == 30


def test_a_corpus_is_cleaned_and_says_what_was_dropped_with_samples(tmp_path):
    texts = [*map(article, range(40)), "太短了", article(3), "转载：" + article(5), "\u3000" + article(50)]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    said = []
    built = corpus.build([str(path)], "c", clean=cleaning.DEFAULT, progress=said.append)
    report = built.manifest["cleaning"]
    assert (report["documents"], report["kept"]) == (44, 41)
    dropped = {name: step["dropped"] for name, step in report["steps"].items() if step["dropped"]}
    assert dropped == {"length": {"too short": 1}, "exact": {"exact duplicate": 1}, "near": {"near duplicate": 1}}
    assert report["steps"]["unicode"]["changed"] == 1
    assert report["steps"]["length"]["samples"] == {"too short": ["太短了"]}
    assert report["kept_bytes"] == sum(built.n_bytes(split) for split in ("train", "val"))
    assert "41 of 44 documents kept" in said[-1]
    assert corpus.build([str(path)], "c", clean=(), progress=said.append).hash != built.hash


def test_any_number_of_processes_gives_the_same_texts_and_counts(monkeypatch):
    monkeypatch.setattr(cleaning, "BATCH_CHARS", 3000)
    texts = [None if i % 50 == 9 else article(i % 170) * (i % 40 != 7) + "\u3000" * (i % 3) + "短" for i in range(200)]
    found = []
    for workers in (1, 2):
        cleaner = Cleaner(cleaning.DEFAULT)
        cleaner.workers = workers
        found.append(([*cleaner.run(zip(texts, range(200), strict=True))], cleaner.report()))
    assert found[0] == found[1]
    assert [number for _, number in found[0][0]] == [*range(200)]


PIECES = ["首页|", "京ICP备", "Cookie", "来源：", article(1), *"。的 \t\n\u3000\xa0\u200bａ１7abİΣ가あ😀\ufb01\u0301Ⅸ"]


@given(st.lists(st.sampled_from(PIECES), max_size=40).map("".join))
@settings(deadline=None)
def test_what_is_done_by_tables_is_what_the_plain_rules_say(text):
    shown = unicodedata.normalize("NFC", re.sub(r"[ \t\u3000\xa0]+$|^[\u3000\xa0]+", "", text, flags=re.MULTILINE))
    assert cleaning.unicode_display(text) == "".join(cleaning.DISPLAY.get(c, c) for c in shown).strip("\n")
    bad = [cleaning.BOILERPLATE, cleaning.TECHNICAL]
    lines = [x for x in text.split("\n") if len(x) > 60 or not any(p.match(x.strip()) for p in bad)]
    assert cleaning.boilerplate_lines(text) == "\n".join(lines).strip()
    found = [sum(map(len, re.findall(pattern, text))) for pattern in cleaning.KINDS.values()]
    assert [*cleaning._counts(text).values()] == found
    words = re.sub(r"[\W_]+", "", text.lower().replace("ς", "σ"))
    own = dedup.signature(text)
    assert (own is None and len(words) < 5) or (own == dedup.signature(words)).all()


def test_benchmark_items_are_found_in_a_corpus_whatever_their_marks_and_width(tmp_path, capsys):
    questions = [article(1000 + i, 2) for i in range(6)]
    rows = [{"question": q, "options": {"A": "甲", "B": "乙"}} for q in questions] + [{"question": "太短"}]
    bench = write_jsonl(tmp_path / "bench.jsonl", rows)
    texts = [*map(article, range(30)), article(31) + questions[0].replace("，", ", ") + article(32), questions[1][:20]]
    corpus.build([str(write_jsonl(tmp_path / "a.jsonl", texts))], "c", progress=lambda _: None)
    data_fetch.main(["--name=c", "--contamination", str(bench)])
    found = json.loads(capsys.readouterr().out)
    counts = {name: found[name] for name in ("items", "too_short", "touched", "contained", "documents")}
    assert counts == {"items": 7, "too_short": 1, "touched": 2, "contained": 1, "documents": 2}
    assert found["examples"][0]["item"].startswith(questions[0])
