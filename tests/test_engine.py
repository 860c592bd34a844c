"""Generation: the cache changes nothing but the speed, rows don't disturb each other, answers end as they should."""

import threading

import pytest
import torch

from nanozhchat import engine as engine_module
from nanozhchat.batching import Delta
from nanozhchat.conversation import SPECIAL_TOKENS
from nanozhchat.engine import Engine
from nanozhchat.gpt import GPT
from nanozhchat.kv_cache import CacheRows, KVCache
from nanozhchat.sampling import SamplingParams
from nanozhchat.torch_decoder import TorchDecoder
from tests.conftest import make_config, refused
from tests.fakes import real_chat

GREEDY = SamplingParams(temperature=0.0, max_tokens=40)
SHAPES = {
    "everything": {}, "full_attention": {"window_pattern": "L"}, "all_windows": {"window_pattern": "S", "n_layer": 3},
    "one_key_head": {"n_kv_head": 1}, "no_value_embeddings": {"value_embeddings": False, "n_kv_head": 4},
    "tiny_window": {"sequence_len": 64, "window_pattern": "SL", "n_layer": 2},
}  # fmt: skip


@pytest.fixture
def engine(bytes_tokenizer):
    return random_engine(bytes_tokenizer)


def random_engine(tokenizer, **changes):
    return real_chat(tokenizer, "torch", **{"sequence_len": 48, **changes}).engine


def prompt(length, seed=0):
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.inference_mode()
def from_scratch(engine, ids):
    """Greedy decoding that runs the whole sequence again, without a cache, for every token."""
    answer = []
    while len(answer) < GREEDY.max_tokens and len(ids) + len(answer) < engine.context:
        hidden = engine.model.hidden(torch.tensor([ids + answer]))
        token = int(engine.model.logits(hidden[:, -1])[0].argmax())
        if token in engine.end_ids:
            break
        answer.append(token)
    return answer


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_decoding_with_the_cache_alone_or_beside_others_equals_recomputing(bytes_tokenizer, changes, monkeypatch):
    monkeypatch.setattr(engine_module, "MAX_BATCH", 4)
    engine = random_engine(bytes_tokenizer, **changes)
    prompts = [prompt(n, n) for n in (5, 1, 20, 13, 2, 31, 9)]
    want = [from_scratch(engine, p) for p in prompts]
    assert len({len(answer) for answer in want}) > 1  # rows leave the batch at different times
    assert engine.batch(prompts, GREEDY) == want == [list(engine.tokens(p, GREEDY)) for p in prompts]
    assert engine.batch([], GREEDY) == []
    assert (torch.is_grad_enabled(), {p.grad for p in engine.model.parameters()}) == (True, {None})


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_hidden_states_do_not_depend_on_how_a_sequence_is_fed_to_the_cache(bytes_tokenizer, changes):
    engine = random_engine(bytes_tokenizer, **changes)
    ids = torch.tensor([prompt(30, 1), prompt(30, 2)])
    with torch.inference_mode():
        whole = engine.model.hidden(ids)
        for cuts in ([30], [1] * 30, [7, 1, 1, 21], [29, 1]):
            rows = TorchDecoder(engine.model, 2).rows([0, 1])
            parts = [engine.model.hidden(part, rows) for part in ids.split(cuts, 1)]
            torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=1e-4)


def test_a_rows_draws_depend_on_its_place_and_seed_not_on_its_neighbours(engine):
    def answers(prompts, seed=5):
        return engine.batch(prompts, SamplingParams(temperature=1.0, top_p=1.0, max_tokens=20, seed=seed))

    mine = prompt(6)
    with_short = answers([prompt(1, 8), mine, prompt(2, 9)])[1]
    assert with_short == answers([prompt(25, 10), mine, prompt(17, 11)])[1]
    assert len(with_short) > 3
    assert len({tuple(answer) for seed in range(4) for answer in answers([mine, mine], seed)}) == 8


class Scripted(GPT):
    """Says the same thing whatever it is asked."""

    script = ()
    said = 0

    def logits(self, hidden, context=None):
        out = torch.full((*hidden.shape[:-1], self.config.vocab_size), -10.0)
        out[..., self.script[self.said]] = 10.0
        self.said += 1
        return out


def scripted(tokenizer, ids, context=256):
    model = Scripted(make_config(vocab_size=tokenizer.vocab_size, sequence_len=context, n_layer=1))
    model.init_weights(torch.Generator().manual_seed(0))
    model.script = ids
    return Engine(model.eval(), tokenizer)


def stream(engine, *, ids=(1, 2, 3), **sampling):
    return list(engine.stream(ids, SamplingParams(temperature=0.0, **sampling)))


def check_protocol(deltas):
    """Only the last piece says why it ended; tokens are counted upwards. Returns the text."""
    assert [d.finish_reason is not None for d in deltas] == [False] * (len(deltas) - 1) + [True]
    counts = [d.n_tokens for d in deltas]
    assert counts == sorted(counts)
    assert all(d.text for d in deltas[:-1])
    return "".join(d.text for d in deltas)


@pytest.mark.parametrize(("answer", "stop", "shown"), [
    ("你好，世界！", (), None), ("你好，世界！", ("世界",), "你好，"), ("你好，世界！", ("世纪", "界限"), None),
    ("你好，世界！", ("界", "世界"), "你好，"), ("你好，世界！", ("你",), ""), ("你好，世界！", ("！",), "你好，世界"),
    ("aaab", ("aab",), "a"), ("abababac", ("abac",), "abab"),
    ("用户：问\n\n用户", ("\n\n用户：", "\n\n用户"), "用户：问"), ("半个世", ("世界",), None),
])  # fmt: skip
def test_stop_strings_end_the_answer_wherever_tokens_are_cut(bytes_tokenizer, answer, stop, shown):
    ids, shown = [*bytes_tokenizer.encode(answer), bytes_tokenizer.end_id], answer if shown is None else shown
    deltas = stream(scripted(bytes_tokenizer, ids), stop=stop, max_tokens=200)
    assert (check_protocol(deltas), deltas[-1].finish_reason) == (shown, "stop")
    assert scripted(bytes_tokenizer, ids).complete([[1]], SamplingParams(temperature=0, stop=stop)) == [shown]


def test_text_that_cannot_begin_a_stop_string_is_not_held_back(bytes_tokenizer):
    ids = [*bytes_tokenizer.encode("一二三"), bytes_tokenizer.end_id]
    deltas = stream(scripted(bytes_tokenizer, ids), stop=("四五六",))
    assert [(d.text, d.n_tokens) for d in deltas] == [("一", 3), ("二", 6), ("三", 9), ("", 9)]


@pytest.mark.parametrize("name", SPECIAL_TOKENS)
def test_any_turn_token_ends_the_answer_and_no_control_token_is_ever_shown(bytes_tokenizer, name):
    ids, tool = [*b"ab", bytes_tokenizer.special(name), *b"c", bytes_tokenizer.end_id], "tool" in name
    deltas = stream(scripted(bytes_tokenizer, ids))
    shown = ("abc" if tool else "ab", "stop", 4 if tool else 2)
    assert (check_protocol(deltas), deltas[-1].finish_reason, deltas[-1].n_tokens) == shown


def test_the_pieces_of_a_stream_are_the_decoded_answer_even_if_it_is_not_utf8(engine):
    params = SamplingParams(temperature=2.0, top_p=1.0, max_tokens=40, seed=1)
    text = check_protocol(list(engine.stream(prompt(3), params)))
    assert text == engine.tokenizer.decode(engine.tokens(prompt(3), params))
    assert "\ufffd" in text


def test_an_answer_cut_by_its_limit_or_the_context_says_so_and_has_exactly_that_length(bytes_tokenizer):
    for said, context, length, limit, shown in (
        ("好" * 20, 256, 3, 7, "好好\ufffd"), ("x" * 20, 16, 15, 100, "x"), ("x" * 20, 16, 10, 100, "xxxxxx"),
    ):  # fmt: skip
        deltas = stream(scripted(bytes_tokenizer, [*said.encode()], context), ids=prompt(length), max_tokens=limit)
        n = min(limit, context - length)
        assert (check_protocol(deltas), deltas[-1].finish_reason, deltas[-1].n_tokens) == (shown, "length", n)


@pytest.mark.parametrize("length", [0, 16, 17, 1000])
def test_a_prompt_that_is_empty_or_leaves_no_room_is_an_error_that_says_what_to_do(bytes_tokenizer, length):
    engine = scripted(bytes_tokenizer, [], context=16)
    long = f"the prompt has {length} tokens, but the model's context is 16 .* shorten the prompt"
    for ask in (engine.tokens, engine.stream, lambda ids, params: engine.batch([[1], ids], params)):
        refused(long if length else "the prompt is empty", lambda ask=ask: list(ask(prompt(length), GREEDY)))


@pytest.mark.parametrize("after", [0, 3])
def test_cancelling_ends_the_answer_at_the_next_token_or_before_any_work(bytes_tokenizer, after):
    engine, cancel, deltas = scripted(bytes_tokenizer, [*b"x" * 200]), threading.Event(), []
    cancel.set() if not after else None
    for delta in engine.stream([1], SamplingParams(temperature=0, max_tokens=200), cancel=cancel):
        deltas.append(delta)
        if delta.n_tokens == after:
            cancel.set()
    assert (check_protocol(deltas), deltas[-1]) == ("x" * after, Delta("", after, "cancelled"))
    assert engine.model.said == after


def test_a_broken_model_raises_instead_of_talking(engine):
    with torch.no_grad():
        engine.model.lm_head.weight.fill_(torch.nan)
    refused(None, lambda: list(engine.stream(prompt(3), GREEDY)), error=FloatingPointError)
    refused(None, lambda: engine.batch([prompt(3)], GREEDY), error=FloatingPointError)


def test_a_cache_that_is_too_small_says_so():
    cache = KVCache(1, 1, 2, n_slots=1, max_len=4, device=torch.device("cpu"), dtype=torch.float32)
    rows, k = CacheRows(cache, [0]), torch.zeros(1, 1, 5, 2)
    refused("5 tokens do not fit the cache of 4", lambda: rows.write(0, rows.positions(5), k, k))
