"""Models that leave home: folders for transformers, GGUF files for llama.cpp, int8 folders for our own engine.

A plain model becomes an Arcee model, which both know: RMSNorm with weights of one, squared ReLU, rotary positions. The
scales per layer are folded into the projections that write to the stream, the norm of the embeddings into their table.
"""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanozhchat import gpt2
from nanozhchat.checkpoint import fill_model, read_tensors, save_tensors
from nanozhchat.conversation import CHAT_TEMPLATE
from nanozhchat.files import atomic_write, read_json, write_json, write_with
from nanozhchat.gpt import GPT, GPTConfig, rms_norm
from nanozhchat.quantize import dequantize, quantize
from nanozhchat.tokenizer import Tokenizer

EPSILON = torch.finfo(torch.float32).eps
# What a model is made of.
REMOTE_CODE = ("gpt_config.py", "attention.py", "cross_entropy.py", "kv_cache.py", "ngrams.py", "gpt.py")
WRAPPER = "hf_model.py.txt"  # its face towards transformers; not a module here, where nothing may need transformers


def export(kind: str, model: GPT, tokenizer: Tokenizer, out: Path) -> list[Path]:
    """Write `out`, a new folder or one file.gguf; returns the files. Raises ValueError if model or place forbid it."""
    if model.config.gpt2:
        raise ValueError("a model that started from GPT-2 weights cannot be exported yet")
    if kind == "gguf" and not model.config.plain:
        raise ValueError("GGUF needs an architecture that llama.cpp knows; train with --arch=plain, or use --to=hf")
    if kind == "int8" and model.config.ngrams:
        raise ValueError("int8 does not know n-gram counts, which only base models have; export the chat model")
    if out.is_file() or (out.exists() and any(out.iterdir())):
        raise ValueError(f"{out} is not empty; choose another --out")
    if kind == "gguf":
        path = out if out.suffix == ".gguf" else out / "model.gguf"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_gguf(model, tokenizer, path)
        return [path]
    out.mkdir(parents=True, exist_ok=True)
    tensors = {name: p.detach() for name, p in model.state_dict().items()}
    if kind == "int8":
        arrays = quantize({name: t.float().numpy() for name, t in tensors.items()})
        tensors = {name: torch.from_numpy(a) for name, a in arrays.items()}
        write_json(out / "config.json", {"model_type": "nanozhchat-int8", "gpt": model.config.to_dict()})
    elif model.config.plain:
        tensors = arcee_tensors(model)
        write_json(out / "config.json", transformers_config(model.config, tokenizer))
    else:
        tensors = {f"gpt.{name}": t for name, t in tensors.items()}
        write_json(out / "config.json", transformers_config(model.config, tokenizer))
        for name in (*REMOTE_CODE, WRAPPER):
            code = (Path(__file__).parent / name).read_text(encoding="utf-8")
            code = re.sub(r"from nanozhchat\.(\w+) import", r"from .\1 import", code)
            atomic_write(out / name.removesuffix(".txt"), code.encode())
    tensors = {name: t.contiguous() for name, t in tensors.items()}
    write_with(out / "model.safetensors", partial(save_tensors, tensors))
    tokenizer.save(out)
    names = {"bos_token": "<|bos|>", "eos_token": "<|end|>", "pad_token": "<|end|>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
    settings |= {"model_max_length": model.config.sequence_len, "chat_template": CHAT_TEMPLATE}
    write_json(out / "tokenizer_config.json", settings)
    return sorted(out.iterdir())


def config_of(folder: Path) -> GPTConfig:
    """Read the sizes of what `export` wrote with --to=hf or --to=int8; raises ValueError if it is something else."""
    about = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if "gpt" not in about:
        why = "its config.json has no entry 'gpt'" if folder.is_dir() else "there is no such folder"
        raise ValueError(f"{folder} is not a folder written by scripts.export; {why}")
    return GPTConfig(**about["gpt"])


def sizes_of(folder: str | None, tokenizer: str | None, depth: str | None = None) -> GPTConfig | None:
    """Read the sizes of weights to start from, GPT-2's or of `export`; None for none.

    Raises ValueError as both `config_of`, and if a model of ours has not the depth that is asked for.
    """
    if folder is None or gpt2.is_gpt2(folder):
        return gpt2.config_of(folder, tokenizer)
    sizes = config_of(Path(folder))
    if depth not in (None, str(sizes.n_layer)):
        raise ValueError(f"--depth={depth}, but --init-from={folder} has {sizes.n_layer} layers; leave out --depth")
    return sizes


def load_folder(folder: Path) -> tuple[GPT, Tokenizer]:
    """Read model and tokenizer; raises ValueError as `config_of`."""
    model, tensors = GPT(config_of(folder)), read_tensors(folder / "model.safetensors")
    if read_json(folder / "config.json")["model_type"] == "arcee":
        model.init_weights(torch.Generator().manual_seed(0))
        tensors = dict(model.named_parameters()) | from_arcee(tensors, model.config)
    arrays = dequantize({name: t.detach().numpy() for name, t in tensors.items()})
    fill_model(model, {name.removeprefix("gpt."): torch.from_numpy(a) for name, a in arrays.items()}, folder)
    return model.eval(), Tokenizer.load(folder)


def fill_from_folder(model: GPT, tokenizer: Tokenizer, folder: str) -> None:
    """Give a model the weights that `export` wrote; raises ValueError if sizes or tokenizer differ."""
    given, its_tokenizer = load_folder(Path(folder))
    ours, theirs = model.config.to_dict(), given.config.to_dict()
    if odd := [f"{name} {theirs[name]} there, {value} here" for name, value in ours.items() if theirs[name] != value]:
        raise ValueError(f"--init-from={folder} has another shape: {', '.join(odd)}; use the settings it was made with")
    if tokenizer.hash != its_tokenizer.hash:
        raise ValueError(f"--init-from={folder} has another tokenizer; leave out --tokenizer")
    fill_model(model, {name: p.detach() for name, p in given.named_parameters()}, Path(folder))


def transformers_config(config: GPTConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """config.json: of an Arcee model for a plain one, else of a model that brings its own code."""
    common = {"gpt": config.to_dict(), "vocab_size": config.vocab_size, "hidden_size": config.n_embd,
              "num_hidden_layers": config.n_layer, "num_attention_heads": config.n_head,
              "bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.end_id, "dtype": "float32",
              "tie_word_embeddings": False}  # fmt: skip
    if not config.plain:
        places = {"AutoConfig": "hf_model.NanozhchatConfig", "AutoModelForCausalLM": "hf_model.NanozhchatForCausalLM"}
        own = {"model_type": "nanozhchat", "architectures": ["NanozhchatForCausalLM"], "auto_map": places}
        return {**own, **common, "use_cache": False}
    sizes = {
        "num_key_value_heads": config.n_kv_head, "head_dim": config.head_dim, "intermediate_size": 4 * config.n_embd,
        "max_position_embeddings": config.sequence_len, "hidden_act": "relu2", "rms_norm_eps": EPSILON,
        "rope_theta": config.rope_base, "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
    }  # fmt: skip
    return {"model_type": "arcee", "architectures": ["ArceeForCausalLM"], **common, **sizes}


def _other_rotation(name: str, weight: Tensor, config: GPTConfig) -> Tensor:
    """Swap the halves of each head's rows in q and k: transformers turns the pairs of channels the other way round."""
    n_head = {"attn.c_q": config.n_head, "attn.c_k": config.n_kv_head}.get(name)
    return weight if n_head is None else weight.view(n_head, 2, -1, weight.size(1)).flip(1).reshape(weight.shape)


LAYER_NAMES = {  # ours -> Arcee's
    "attn.c_q": "self_attn.q_proj", "attn.c_k": "self_attn.k_proj", "attn.c_v": "self_attn.v_proj",
    "attn.c_proj": "self_attn.o_proj", "mlp.c_fc": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj",
}  # fmt: skip


def arcee_tensors(model: GPT) -> dict[str, Tensor]:
    """Tensors of a plain model under the names of transformers' Arcee."""
    c, own = model.config, {name: p.detach().float() for name, p in model.named_parameters()}
    scales = torch.cumprod(own["resid_lambdas"], 0)
    if bool((own["resid_lambdas"] <= 0).any()):
        raise ValueError("a layer of this model turns the stream round (resid_lambdas <= 0); it cannot be exported")
    out = {"model.embed_tokens.weight": rms_norm(own["wte.weight"][: c.vocab_size])}
    for i in range(c.n_layer):
        for name, theirs in LAYER_NAMES.items():
            weight = _other_rotation(name, own[f"h.{i}.{name}.weight"], c)
            if name.endswith("c_proj"):
                weight = weight / scales[i]
            out[f"model.layers.{i}.{theirs}.weight"] = weight
        for norm in ("input_layernorm", "post_attention_layernorm"):
            out[f"model.layers.{i}.{norm}.weight"] = torch.ones(c.n_embd)
    return out | {"model.norm.weight": torch.ones(c.n_embd), "lm_head.weight": own["lm_head.weight"][: c.vocab_size]}


def from_arcee(tensors: dict[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """Undo `arcee_tensors`: all parameters of a plain model but its scales, which become one."""
    padding = torch.zeros(config.padded_vocab_size - config.vocab_size, config.n_embd)
    out = {"wte.weight": torch.cat((tensors["model.embed_tokens.weight"], padding)),
           "lm_head.weight": torch.cat((tensors["lm_head.weight"], padding))}  # fmt: skip
    for i in range(config.n_layer):
        for name, theirs in LAYER_NAMES.items():
            out[f"h.{i}.{name}.weight"] = _other_rotation(name, tensors[f"model.layers.{i}.{theirs}.weight"], config)
    return out


def write_gguf(model: GPT, tokenizer: Tokenizer, path: Path) -> None:
    """Write a plain model for llama.cpp.

    llama.cpp knows pre-tokenizers by name only, not ours: "default" cuts some text into other tokens than training did.
    """
    try:
        import gguf
    except ImportError as error:
        raise ValueError("--to=gguf needs the extra `export`; run: uv sync --extra export") from error
    c = model.config
    writer: Any = gguf.GGUFWriter(path, "arcee")
    for key, value in {
        "context_length": c.sequence_len, "embedding_length": c.n_embd, "block_count": c.n_layer,
        "feed_forward_length": 4 * c.n_embd, "head_count": c.n_head, "head_count_kv": c.n_kv_head,
        "layer_norm_rms_eps": EPSILON, "rope_freq_base": c.rope_base, "rope_dimension_count": c.head_dim,
        "vocab_size": c.vocab_size, "file_type": gguf.LlamaFileType.ALL_F32,
    }.items():  # fmt: skip
        getattr(writer, f"add_{key}")(value)
    about = json.loads(tokenizer.json_file)
    special = {t["content"] for t in about["added_tokens"]}
    tokens = [*about["model"]["vocab"], *(t["content"] for t in about["added_tokens"])]
    kinds = [gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(about["model"]["merges"])
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.end_id)
    writer.add_chat_template(CHAT_TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.ARCEE, c.n_layer)
    for name, weight in arcee_tensors(model).items():
        kind = re.search(r"([qk])_proj", name)
        if kind:  # llama.cpp wants the two channels of a pair side by side
            n_head = c.n_head if kind[1] == "q" else c.n_kv_head
            weight = weight.view(n_head, 2, -1, c.n_embd).transpose(1, 2).reshape(weight.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
