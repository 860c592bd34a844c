"""Rollouts: who gets which advantage, tools, exact resume, ranks that agree, and that it learns."""

import os
import signal
import time

import pytest
import torch

from nanozhchat import files
from nanozhchat.compute import Compute
from nanozhchat.dataloader import RolloutBatch
from nanozhchat.errors import StoppedError
from nanozhchat.objectives import policy_gradient
from nanozhchat.rollout import Problems, RolloutSource, Settings, evaluation, reward_hook, roll_out
from nanozhchat.run import for_world, gpt_config
from nanozhchat.sampling import SamplingParams
from nanozhchat.trainer import fit
from tasks import registry
from tests.conftest import CPU, make_model, make_recipe, opened, pack, refused
from tests.fakes import ToyTask
from tests.test_engine import scripted


def make_source(tokenizer, model, compute=CPU, rows=4, **changes):
    settings = Settings(**{"prompts": 4, "group": 4, "max_tokens": 20, "seed": 1, **changes})
    brevity = ToyTask([(letter, "") for letter in "abcdef"], lambda *_: True)  # answers without end are never right
    problems = Problems([brevity], tokenizer, 16)
    return RolloutSource(model, tokenizer, problems, settings, compute, kind="native", batch_rows=rows)


def random_model(tokenizer):
    return make_model(gpt_config(rl_recipe(tokenizer)), seed=2, perturb=True)


def rl_recipe(tokenizer, **changes):
    recipe = make_recipe(vocab_size=tokenizer.vocab_size, sequence_len=32, total_batch_size=16 * 32, **changes)
    return for_world(recipe, 1, device_batch_size=4)


def train(tokenizer, *, tag, before=lambda step: None, steps):
    recipe = rl_recipe(tokenizer, num_steps=steps, warmup_frac=0.0)
    with opened("rl", tag, recipe, {"data_hash": "x"}, seed=2, perturb=True) as (run, recipe, model, optimizer):
        source = make_source(tokenizer, model, rows=recipe.device_batch_size)
        source.stop = run.stop
        if run.state.loader:
            source.seek(run.state.loader, recipe.device_batch_size)
        token_bytes = torch.from_numpy(tokenizer.token_bytes())
        plan = run.plan(model, optimizer, recipe, token_bytes, started=time.monotonic(), save_every=2)
        hooks = [evaluation(steps, source, source.problems, 2, CPU, run.metrics), reward_hook(source)]

        def objective(model, batch):
            before(source.step)
            return policy_gradient(model, batch)

        fit(model, optimizer, source, objective, plan, hooks, run.state, CPU, run.metrics)
        return model, files.read_jsonl(run.folder / "metrics.jsonl")


def test_advantages_compare_the_answers_of_a_group_and_groups_without_a_difference_teach_nothing(bytes_tokenizer):
    source = make_source(bytes_tokenizer, random_model(bytes_tokenizer).eval())
    teaching = source._rollouts()
    assert 0 < len(teaching) < 16
    assert len(teaching) % 4 == 0
    for start in range(0, len(teaching), 4):
        group = teaching[start : start + 4]
        assert len({tuple(r.ids[: r.chosen.index(True)]) for r in group}) == 1
        assert sum(r.advantage for r in group) == pytest.approx(0, abs=1e-4)
        assert all((r.advantage > 0) == (r.reward == 1.0) for r in group)
        assert all(not r.reward or r.finished for r in group)


def test_micro_batches_hold_every_teaching_answer_once_and_score_only_what_the_model_chose(bytes_tokenizer):
    source = make_source(bytes_tokenizer, random_model(bytes_tokenizer))
    batches = [next(source) for _ in range(4)]
    assert [b.state["step"] for b in batches] == [1] * 4
    chosen = sum(int((b.targets >= 0).sum()) for b in batches)
    assert chosen == sum(sum(r.chosen) for r in make_source(bytes_tokenizer, source.model)._rollouts())
    loss = policy_gradient(source.model, source._batch([]))
    loss.total.backward()
    assert (loss.total.item(), int(loss.count)) == (0.0, 0)


def test_the_gradient_is_that_of_advantage_times_log_probability(bytes_tokenizer):
    model = random_model(bytes_tokenizer)
    ids = torch.tensor([[1, 2, 3, 4]])
    targets, advantages = torch.tensor([[-1, 3, 4, -1]]), torch.tensor([[0.0, 2.0, -1.0, 0.0]])
    batch = RolloutBatch(ids, targets, 0, {}, advantages=advantages)
    policy_gradient(model, batch, temperature=0.5).total.backward()
    got = model.lm_head.weight.grad.clone()
    model.zero_grad()
    logprobs = (model.logits(model.hidden(ids)) / 0.5).log_softmax(-1)
    (-2.0 * logprobs[0, 1, 3] + logprobs[0, 2, 4]).backward()
    torch.testing.assert_close(got, model.lm_head.weight.grad)
    with torch.no_grad():
        far = RolloutBatch(ids, targets, 0, {}, advantages=0 * advantages, reference=torch.full((1, 4), -1.0))
        assert float(policy_gradient(model, far, kl=1.0).total) > 0


def test_ranks_share_the_problems_and_draw_the_same_answers_as_one(bytes_tokenizer):
    model = random_model(bytes_tokenizer)
    alone = sorted((tuple(r.ids), r.advantage) for r in make_source(bytes_tokenizer, model)._rollouts())
    ranks = [make_source(bytes_tokenizer, model, Compute(torch.device("cpu"), rank=r, world_size=2), 2) for r in (0, 1)]
    assert sorted((tuple(r.ids), r.advantage) for source in ranks for r in source._rollouts()) == alone
    third = Compute(torch.device("cpu"), rank=0, world_size=3)
    refused("pass --prompts=6", make_source, bytes_tokenizer, model, third, 2)


def test_an_epoch_asks_every_problem_once(bytes_tokenizer):
    source = make_source(bytes_tokenizer, None, prompts=2)
    asked = []
    for source.step in range(3):
        asked += source.numbers()
    assert sorted(asked) == list(range(6))


def test_a_stopped_and_resumed_run_has_the_same_losses_and_learns(bytes_tokenizer):
    model, whole = train(bytes_tokenizer, tag="whole", steps=30)
    options = {"tag": "cut", "before": lambda n: n == 4 and os.kill(os.getpid(), signal.SIGTERM), "steps": 30}
    refused(None, train, bytes_tokenizer, **options, error=StoppedError)
    again, rows = train(bytes_tokenizer, tag="cut", steps=30)
    keys = ("step", "train/loss", "grad_norm", "train/reward", "tokens")
    assert [[r.get(k) for k in keys] for r in rows] == [[r.get(k) for k in keys] for r in whole]
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    first, last = whole[0], whole[-1]
    assert last["val/pass@2"] >= last["val/pass@1"] > first["val/pass@1"] + 0.3
    assert {"val/greedy", "train/reward", "train/unfinished_frac"} <= last.keys()


@pytest.mark.parametrize(("call", "result"), [("37+48", "85"), ("1/0", "错误："), ("<|end|>", "错误：")])
def test_a_call_is_answered_as_plain_text_that_is_not_learnt(bytes_tokenizer, call, result):
    call_id, end, encode = bytes_tokenizer.special("<|tool_call|>"), bytes_tokenizer.end_id, bytes_tokenizer.encode
    engine = scripted(bytes_tokenizer, [*encode("算"), call_id, *encode(call), end, *encode("是85"), end])
    batch = engine.new_batch(1, drafts=False)
    engine.new_batch = lambda *_rows, **_drafts: batch
    (rollout,) = roll_out(engine, [([1, 2, 3], 0, 0)], SamplingParams(max_tokens=200))
    assert (rollout.text, rollout.finished, rollout.calls) == ("是85", True, 1)
    opens, *said, ends, turn = (i for i, own in zip(rollout.ids[3:], rollout.chosen[3:], strict=True) if not own)
    controls = [bytes_tokenizer.special(name) for name in ("<|tool_result|>", "<|end|>", "<|assistant|>", "<|user|>")]
    assert [opens, ends, turn] == controls[:3]
    assert (bytes_tokenizer.decode(said).startswith(result), {*said} & {*controls}) == (True, set())
    assert batch.decoder.held == [rollout.ids[:-1]]  # what the model read is what it learns from


def test_calls_without_end_are_cut_off(bytes_tokenizer):
    called = [bytes_tokenizer.special("<|tool_call|>"), *bytes_tokenizer.encode("1"), bytes_tokenizer.end_id]
    (rollout,) = roll_out(scripted(bytes_tokenizer, called * 20), [([1], 0, 0)], SamplingParams(max_tokens=200))
    assert (rollout.calls, rollout.finished) == (8, False)


@pytest.mark.parametrize("name", ["mgsm_zh", "builtin:arithmetic"])
def test_what_is_learnt_from_is_not_what_is_held_out(name, tmp_path):
    pack(tmp_path / "mgsm/mgsm_zh.tsv", "".join(f"{i}加1？\t{i + 1}\n" for i in range(40)))
    halves = [registry.resolve(name, 30, folder=str(tmp_path), split=s)[0] for s in ("train", "held_out")]
    train, held = ({task.prompt(i)[-1].content for i in range(len(task))} for task in halves)
    assert min(len(train), len(held)) >= 5
    assert not train & held
