"""Public data sets by short name: facts only (hub id, columns, size, licence), for `--data=NAME` and `--list`.

None of them has been fetched by this project's tests, which run offline. Columns and sizes
were read on the data sets' own pages; a hub may rename files, then `hf:<dataset>` with `--text-field` still works.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """One public data set. kind: "text" for pretraining, "sft" for conversations; columns: what is read of a row."""

    name: str
    hub_id: str
    columns: tuple[str, ...]
    size: str
    licence: str
    kind: str = "text"
    config: str | None = None
    split: str = "train"
    files: str | None = None  # path or glob inside the data set's repository, when only some files are wanted
    note: str = ""


SEE_CARD = "see the data set's card"

_TEXT = (
    Preset("minimind-mini", "jingyaogong/minimind_dataset", ("text",), "1.2 GB", SEE_CARD,
           files="pretrain_t2t_mini.jsonl", note="for a laptop or one GPU; file names changed once already"),
    Preset("minimind", "jingyaogong/minimind_dataset", ("text",), "10 GB", SEE_CARD, files="pretrain_t2t.jsonl"),
    Preset("fineweb-edu-zh", "opencsg/chinese-fineweb-edu-v2", ("text",), "188M documents, parquet", "Apache-2.0",
           note="first choice for GPU runs"),
    Preset("fineweb-edu-zh-shuffled", "grimlee/fineweb-edu-Chinese-v2.1-shuffle", ("text",), "unknown", SEE_CARD,
           note="third-party copy of another set, already shuffled"),
    Preset("skypile", "Skywork/SkyPile-150B", ("text",), "150B tokens, jsonl", "Skywork licence (PDF on the card)"),
    Preset("cci3-hq", "BAAI/CCI3-HQ", ("text",), "500 GB", SEE_CARD),
    Preset("fineweb2-zh", "HuggingFaceFW/fineweb-2", ("text",), "very large, parquet", "ODC-By",
           config="cmn_Hani"),
    Preset("c4-zh", "allenai/c4", ("text",), "unknown, json.gz files", "ODC-By",
           files="multilingual/c4-zh.tfrecord-*.json.gz"),
    Preset("wikipedia-zh", "wikimedia/wikipedia", ("text",), "about 1.4M articles", "CC BY-SA",
           config="20231101.zh", note="mixed traditional and simplified characters"),
    Preset("chinesewebtext2", "CASIA-LM/ChineseWebText2.0", ("text",), "3.8 TB", SEE_CARD),
    Preset("tinystories-zh", "RobinChen2001/TinyStories-Zh-2M", ("text",), "1.5 GB, 1,994,314 stories", "MIT",
           note="translated short stories, for small models"),
    Preset("tinystories-zh-multilingual", "Gabrui/multilingual_TinyStories", ("story",), "1.2 GB, 2,879,487 stories",
           SEE_CARD, config="chinese"),
)  # fmt: skip

_MIXED = "mixed, partly non-commercial: see the card"
_BELLE = "research only, non-commercial"
_INSTRUCTION = ("instruction", "input", "output")

_SFT = (
    Preset("minimind-sft-mini", "jingyaogong/minimind_dataset", ("conversations",), "1.6 GB", _MIXED, "sft",
           files="sft_t2t_mini.jsonl"),
    Preset("minimind-sft", "jingyaogong/minimind_dataset", ("conversations",), "14 GB", _MIXED, "sft",
           files="sft_t2t.jsonl"),
    Preset("belle-0.5m", "BelleGroup/train_0.5M_CN", _INSTRUCTION, "0.5M rows", _BELLE, "sft"),
    Preset("belle-1m", "BelleGroup/train_1M_CN", _INSTRUCTION, "1M rows", _BELLE, "sft"),
    Preset("belle-2m", "BelleGroup/train_2M_CN", _INSTRUCTION, "2M rows", _BELLE, "sft"),
    Preset("belle-3.5m", "BelleGroup/train_3.5M_CN", ("conversations",), "3.5M rows", _BELLE, "sft"),
    Preset("belle-math", "BelleGroup/school_math_0.25M", _INSTRUCTION, "0.25M rows", _BELLE, "sft"),
    Preset("firefly", "YeungNLP/firefly-train-1.1M", ("input", "target"), "1.65M rows, 1.2 GB", SEE_CARD, "sft"),
    Preset("coig-cqia", "m-a-p/COIG-CQIA", _INSTRUCTION, "44,700 rows", SEE_CARD, "sft",
           note="several configurations; take one with hf:m-a-p/COIG-CQIA:<config>"),
    Preset("alpaca-gpt4-zh", "silk-road/alpaca-data-gpt4-chinese",
           ("instruction_zh", "input_zh", "output_zh"), "about 52,000 rows", SEE_CARD, "sft"),
    Preset("sharegpt-zh-en", "shareAI/ShareGPT-Chinese-English-90k", ("conversation",), "90,000 rows", SEE_CARD, "sft"),
)  # fmt: skip

PRESETS: dict[str, Preset] = {preset.name: preset for preset in (*_TEXT, *_SFT)}
