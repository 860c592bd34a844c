"""nanozhchat: train a Chinese chat model from nothing and talk to it.

Layers (each imports only lower ones; `tests/test_layers.py` enforces it):
0 leaves (paths, files, log, cli, schedule, hardware, conversation, zh_text, builtin) - 1 recipe, report -
2 compute, attention, kv_cache, tokenizer, sources, corpus, token_store - 3 gpt, optim, dataloader -
4 checkpoint, sampling, engine, objectives - 5 loss_eval, task_eval, chat - 6 trainer, server.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["load"]

if TYPE_CHECKING:
    from nanozhchat.chat import load


def __getattr__(name: str) -> Any:
    """Resolve `nanozhchat.load` on first use, so that importing the package stays free of torch."""
    if name == "load":
        from nanozhchat.chat import load

        return load
    raise AttributeError(f"module 'nanozhchat' has no attribute {name!r}")
