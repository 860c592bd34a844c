"""Data sets of the Hugging Face hub, or of a mirror (HF_ENDPOINT): whole files, checked, kept under `hub/`.

`huggingface_hub` downloads, resumes and retries; `datasets` says which files make up a configuration and split. The
commit found first is written down and stays: later runs read the same files, with HF_HUB_OFFLINE=1 too.
"""

import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanozhchat import files, paths, records
from nanozhchat.errors import DamagedError, DiskError

log = logging.getLogger(__name__)
PROBE_TIMEOUT_S = 10.0  # for the first answer of the hub; its own retries take minutes
DOWNLOADS = 3  # of a file whose hash is wrong
REMEDY = "check the name and the network, set HF_TOKEN if it is gated, HF_ENDPOINT for a mirror, or use builtin"


class DataSet:
    """One configuration and split of a data set. pattern: glob of the files wanted; spec: what the user wrote."""

    def __init__(
        self, name: str, config: str | None, split: str, pattern: str | None, revision: str, spec: str
    ) -> None:
        self.name, self.config, self.split, self.pattern, self.spec = name, config, split, pattern, spec
        self.revision = revision
        self.folder = paths.base_dir() / "hub" / paths.check_tag(name.replace("/", "--"), "data set")
        wanted = "|".join([config or "", split, pattern or "", revision])
        self._listing = self.folder / f"listing-{hashlib.sha256(wanted.encode()).hexdigest()[:12]}.json"

    def listing(self) -> dict[str, Any]:
        """Return {"revision": commit, "files": paths in order}, asking the hub the first time only.

        Raises DiskError when the hub cannot be read, ValueError when offline, without this split or without files.
        """
        from huggingface_hub import HfApi, constants

        if self._listing.exists():
            return files.read_json(self._listing)
        if constants.HF_HUB_OFFLINE:
            raise ValueError(f"{self.spec}: HF_HUB_OFFLINE is set and it was not fetched before: "
                             "unset it, or pass a local file or builtin")  # fmt: skip
        try:  # the first call fails fast, where the library that loads retries for long
            commit = HfApi().dataset_info(self.name, revision=self.revision, timeout=PROBE_TIMEOUT_S).sha
            found = self._resolve(str(commit))
        except Exception as error:  # the libraries let through errors of a dozen others: network, parsers, codecs
            where = f"cannot read {self.name} from {constants.ENDPOINT} ({_first_line(error)})"
            raise DiskError(f"{self.spec}: {where}; {REMEDY}") from error
        if self.split not in found:
            raise ValueError(f"{self.spec}: no split {self.split!r}; there are {', '.join(found)}")
        listing = {"hub": self.name, "revision": commit, "files": found[self.split]}
        files.write_json(self._listing, listing)
        return listing

    def _resolve(self, commit: str) -> dict[str, list[str]]:
        """Return the paths of each split's files."""
        import datasets

        builder = datasets.load_dataset_builder(self.name, self.config, revision=commit, data_files=self.pattern)
        data_files = builder.config.data_files or {}
        mark = f"@{commit}/"
        return {str(split): [url.partition(mark)[2] for url in urls] for split, urls in data_files.items()}

    def fetch(self, path: str) -> Path:
        """Return a file of the listing, downloading it unless it is there; interrupted downloads go on.

        Raises DiskError when the connection fails for good, DamagedError when the hash stays wrong.
        """
        from huggingface_hub import HfApi, constants, hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers

        target = self.folder / path
        if target.exists():
            return target
        if constants.HF_HUB_OFFLINE:
            raise ValueError(f"{self.spec}: HF_HUB_OFFLINE is set and {path} was not fetched before; unset it")
        revision = self.listing()["revision"]
        incoming = self.folder / f".{hashlib.sha256(path.encode()).hexdigest()}.part"
        try:
            found: list[Any] = HfApi().get_paths_info(self.name, [path], repo_type="dataset", revision=revision)
            info = found[0]
            url = hf_hub_url(self.name, path, repo_type="dataset", revision=revision, endpoint=constants.ENDPOINT)
            for _ in range(DOWNLOADS):
                with open(incoming, "ab") as handle:  # what an earlier process left is gone on from
                    http_get(url, handle, resume_size=handle.tell(), headers=build_hf_headers(),
                             expected_size=info.size)  # fmt: skip
                if not (problem := _mismatch(incoming, info)):
                    target.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(incoming, target)
                    return target
                log.warning("%s: %s; downloading it again", path, problem)
                incoming.unlink()
        except Exception as error:  # same reason as above
            raise DiskError(f"{self.spec}: {path} stopped arriving ({_first_line(error)}); "
                            "run the command again: it goes on from there") from error  # fmt: skip
        raise DamagedError(f"{self.spec}: {path} is damaged on its way: {problem}; try later, or another HF_ENDPOINT")

    def rows(self) -> Iterator[dict[str, Any]]:
        """Stream the rows of a data set whose files are of kinds that `records` does not read."""
        import datasets

        number = 0
        try:
            loaded: Any = datasets.load_dataset(self.name, self.config, split=self.split, data_files=self.pattern,
                                                revision=self.listing()["revision"], streaming=True)  # fmt: skip
            for row in loaded:
                number += 1
                yield dict(row)
        except Exception as error:
            raise DiskError(f"{self.spec}: reading stopped after {number:,} rows ({_first_line(error)}); "
                            "run the command again") from error  # fmt: skip

    def readable(self) -> bool:
        """Whether all its files are of kinds that `records` reads."""
        return all(records.kind_of(Path(path)) for path in self.listing()["files"])


def _mismatch(path: Path, info: Any) -> str:
    """Compare a file with what the hub says of it: SHA-256 of large files, git's SHA-1 of small ones; "" if equal."""
    size = path.stat().st_size
    if info.lfs:
        want, found = info.lfs.sha256, files.sha256(path)
    else:
        want, found = info.blob_id, hashlib.sha1(b"blob %d\0" % size + path.read_bytes()).hexdigest()
    return "" if found == want else f"{size:,} bytes with hash {found[:12]} instead of {info.size:,} with {want[:12]}"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
