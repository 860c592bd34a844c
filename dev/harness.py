"""Our models in EleutherAI's lm-evaluation-harness (`lm-eval`, in the dev group), for tasks that `tasks/` does not have
and to compare scores: `python -m dev.harness --model-tag=d4 --tasks cmmlu arc_easy`. The harness fetches from the hub.

`tests/test_harness.py` shows that both give the same scores on the same files.
"""

import argparse
import itertools
import json

from lm_eval.api.model import LM

from nanozhchat import chat
from nanozhchat.sampling import SamplingParams
from nanozhchat.task_eval import Likelihood


class HarnessLM(LM):
    """A loaded model as the harness wants it. Text and continuation are encoded apart, as in `run_text`."""

    def __init__(self, model):
        super().__init__()
        self.model, self.context = model, model.engine.context
        self.likelihood = Likelihood(model.engine)

    def _ids(self, text, room):
        ids = self.model.tokenizer.encode(text)
        return [self.model.tokenizer.bos_id, *ids[max(0, len(ids) - room + 1) :]]

    def loglikelihood(self, requests, disable_tqdm=False):
        done = []
        for text, group in itertools.groupby((r.args for r in requests), key=lambda args: args[0]):
            options = [self.model.tokenizer.encode(option)[: self.context - 1] for _, option in group]
            done += self.likelihood(self._ids(text, self.context - max(map(len, options))), options)
        return done

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """Score whole texts in windows that share one token."""
        done = []
        for ids in ([self.model.tokenizer.bos_id, *self.model.tokenizer.encode(r.args[0])] for r in requests):
            starts = range(0, len(ids) - 1, self.context - 1)
            done.append(sum(self.likelihood(ids[i : i + 1], [ids[i + 1 : i + self.context]])[0][0] for i in starts))
        return done

    def generate_until(self, requests, disable_tqdm=False):
        done = []
        for text, options in (r.args for r in requests):
            stop = options.get("until") or ()
            size = min(options.get("max_gen_toks", 256), self.context // 2)
            params = SamplingParams(temperature=options.get("temperature", 0.0), max_tokens=size,
                                    stop=(stop,) if isinstance(stop, str) else tuple(stop))  # fmt: skip
            done += self.model.engine.complete([self._ids(text, self.context - size)], params)
        return done


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-tag")
    parser.add_argument("--source")
    parser.add_argument("--tasks", nargs="+", required=True)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--num-fewshot", type=int)
    args = parser.parse_args()
    from lm_eval.evaluator import simple_evaluate

    model = HarnessLM(chat.load(args.model_tag, source=args.source))
    found = simple_evaluate(model, tasks=args.tasks, limit=args.limit, num_fewshot=args.num_fewshot)
    print(json.dumps(found["results"], indent=1, default=str))


if __name__ == "__main__":
    main()
