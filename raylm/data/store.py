"""Tokenised rows in Ray's object store: read, rendered and tokenised once, then gathered by index in any order.

Blocks are shared memory on each node and spill to disk when they outgrow it; a gathering task maps them without a
copy. The driver keeps only lengths and places: some 30 bytes a row. A second run reads the blocks from the cache.
"""

import gc
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from raylm.config.data import DataSection, SourceSection
from raylm.data.cache import Cache, Shard, address, cache_root
from raylm.data.files import HUB_SCHEME, fingerprint, num_bytes
from raylm.data.readers import RawRow, read_rows
from raylm.data.remote import scheme_of, shown
from raylm.data.report import DataReport, RejectedRow, SourceReport
from raylm.data.sources import SourceFile, list_files
from raylm.data.templates import ChatTemplate, chat_template
from raylm.data.templates.table import AUTO
from raylm.data.tokenize import FileOptions, RowTokenizer, TokenizeOptions
from raylm.data.tokenizer import load_tokenizer
from raylm.errors import DataError, ModelError

logger = logging.getLogger(__name__)

READ_ROWS = 1024
READ_BYTES = 8 * 2**20
TOKENIZE_ROWS = 1024
READ_CPUS, TOKENIZE_CPUS = 0.25, 0.5
"""Unequal, or Ray Data runs both stages in one actor; together below one, so that a cluster of one CPU runs both."""
BLOCK_BYTES = 4 * 2**20
"""Of the blocks between the stages: with Ray's 128 MiB, all of a file would go to one actor."""
SMALL_BYTES = 2**20
"""Up to this, tokenising takes less time than starting a worker for it."""
BYTES_PER_ACTOR = 4 * 2**20

RAW_SCHEMA = pa.schema(
    [
        ("file", pa.int32()),
        ("index", pa.int64()),
        ("line", pa.int64()),
        ("text", pa.large_string()),
        ("format", pa.string()),
        ("reason", pa.string()),
        ("problem", pa.large_string()),
    ]
)


@dataclass(frozen=True, slots=True)
class TokenizerSource:
    """Where a worker loads the tokenizer from; `name` is what messages call the model."""

    folder: str
    name: str
    revision: str | None = None
    trust_remote_code: bool = False

    def load(self) -> Any:
        """The tokenizer."""
        return load_tokenizer(self.folder, revision=self.revision, trust_remote_code=self.trust_remote_code)


@dataclass(frozen=True, slots=True)
class TokenStore:
    """Usable sequences of a dataset, as columns and as object references of the blocks that hold their tokens.

    lengths: (n,) int32 tokens of each; blocks, places: (n,) where its tokens are; files, indices: (n,) where it came
    from; weights: (n,) uses in an epoch, None where each is used once.
    """

    refs: list[Any]
    lengths: np.ndarray
    blocks: np.ndarray
    places: np.ndarray
    files: np.ndarray
    indices: np.ndarray
    file_names: tuple[str, ...]
    weights: np.ndarray | None = None

    def source(self, row: int) -> tuple[str, int]:
        """File and row that a usable sequence came from."""
        return self.file_names[int(self.files[row])], int(self.indices[row])


def row_tokenizer(
    files: Sequence[SourceFile], section: DataSection, source: TokenizerSource, tokenizer: Any = None
) -> RowTokenizer:
    """What turns the rows of these files into tokens; tokenizer: what `source` loads, where it is loaded already.

    Raises DataError and ModelError for templates that cannot be.
    """
    tokenizer = source.load() if tokenizer is None else tokenizer
    templates: dict[str, ChatTemplate | None] = {}
    for name in {file.template or section.template for file in files}:
        try:
            templates[name] = chat_template(name, tokenizer, source.name)
        except ModelError:
            if name != AUTO:
                raise
            templates[name] = None  # plain text needs none; a conversation is refused by its row
    options = [FileOptions(file.format, file.columns, templates[file.template or section.template]) for file in files]
    return RowTokenizer(tokenizer, tokenize_options(section), options)


def tokenize_options(section: DataSection) -> TokenizeOptions:
    """The options of the section that tokens depend on."""
    return TokenizeOptions(
        section.max_seq_len, section.loss_on, section.truncation, section.allow_special_tokens, dict(section.role_map)
    )


def tokenize_files(
    sources: Sequence[SourceSection], section: DataSection, tokenizer: TokenizerSource, *, seed: int = 0
) -> tuple[TokenStore, DataReport]:
    """Reads, renders and tokenises datasets with Ray Data, in file order, or takes them from the cache.

    Needs an initialised Ray. seed: chooses the rows of `data.sample`. Faults of rows are in the report, not raised.
    Raises DataError for missing files.
    """
    import ray

    files = list_files(sources)
    loaded = tokenizer.load()
    root = cache_root(section.cache, num_nodes=sum(node["Alive"] for node in ray.nodes()))
    key = cache_key(files, section, loaded, tokenizer.name, seed) if root else None
    cache = Cache(root, key) if root and key else None
    cached = _from_cache(cache) if cache else None
    refs = _tokenized(files, section, tokenizer, loaded, seed) if cached is None else cached
    store, report = _index(refs, files, sources, section.max_rows)
    if cache and cached is None and not any(row.index < 0 for row in report.rejected):
        _fill(cache, refs)  # not what a file could not be read for: that may be better tomorrow
    return store, report


def cache_key(files: Sequence[SourceFile], section: DataSection, tokenizer: Any, model: str, seed: int) -> str | None:
    """The name of the cache's entry for these files; None where a file may change without a sign."""
    versions = [_version(file) for file in files]
    return _address(files, versions, section, tokenizer, model, seed) if all(versions) else None


def _version(file: SourceFile) -> str:
    """What changes when a file does; empty for one that may be another tomorrow without a sign."""
    return file.options.revision or "" if scheme_of(file.path) == HUB_SCHEME else fingerprint(file.path)


def _address(
    files: Sequence[SourceFile],
    versions: Sequence[str],
    section: DataSection,
    tokenizer: Any,
    model: str,
    seed: int,
) -> str:
    names = sorted({file.template or section.template for file in files})
    templates = {}
    for name in names:
        try:
            templates[name] = chat_template(name, tokenizer, model).jinja()
        except ModelError:
            templates[name] = ""
    written = tokenizer.backend_tokenizer.to_str() + json.dumps(tokenizer.special_tokens_map, default=str)
    return address(
        {
            "files": [
                {**asdict(file), "weight": 0, "fingerprint": version}
                for file, version in zip(files, versions, strict=True)
            ],
            "tokenizer": hashlib.sha256(written.encode()).hexdigest(),
            "templates": templates,
            "options": asdict(tokenize_options(section)),
            "default_template": section.template,
            "sample": [section.sample, seed if section.sample < 1 else 0],
            "max_rows": section.max_rows,
        }
    )


def _tokenized(
    files: Sequence[SourceFile], section: DataSection, source: TokenizerSource, tokenizer: Any, seed: int
) -> list[Any]:
    """References of blocks of TOKENS_SCHEMA, in file order."""
    import ray

    keep = Keep(section.sample, seed, section.max_rows)
    sizes = [num_bytes(file.path) for file in files]
    total = None if None in sizes else sum(size or 0 for size in sizes)
    if total is not None and total <= SMALL_BYTES:  # done before a worker has imported its tokenizer
        rows = row_tokenizer(files, section, source, tokenizer)
        numbers = pa.table({"number": pa.array(range(len(files)), pa.int64())})
        return [ray.put(rows.table(table)) for table in _read_files(numbers, files, keep)]
    if source.trust_remote_code:
        tokenizer = None  # its class may not be known in the worker
    return _tokenized_by_ray_data(files, section, source, tokenizer, keep, total)


def _tokenized_by_ray_data(
    files: Sequence[SourceFile],
    section: DataSection,
    source: TokenizerSource,
    tokenizer: Any,
    keep: "Keep",
    total: int | None,
) -> list[Any]:
    """A task for each file feeds actors that tokenise; total: bytes of all files, where they are known.

    The actors are sent the tokenizer itself: loading it there would import PyTorch, which takes three times as long.
    """
    import ray.data

    items = [{"number": number} for number in range(len(files))]
    cpus = int(ray.cluster_resources().get("CPU", 1))
    actors = max(1, cpus if total is None else min(cpus, -(-total // BYTES_PER_ACTOR)))
    dataset = (
        ray.data.from_items(items, override_num_blocks=len(items))
        .map_batches(
            _read_files,
            fn_kwargs={"files": list(files), "keep": keep},
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=READ_CPUS,
        )
        .map_batches(
            _TokenizeStage,
            fn_constructor_kwargs={
                "files": list(files),
                "section": section,
                "source": source,
                "tokenizer": ray.put(tokenizer),
                "num_threads": max(1, cpus // actors),
            },
            batch_size=TOKENIZE_ROWS,
            batch_format="pyarrow",
            num_cpus=TOKENIZE_CPUS,
            # All at once where their number is sure: Ray Data adds actors one by one, and not before the first is busy.
            compute=ray.data.ActorPoolStrategy(min_size=1 if total is None else actors, max_size=actors),
        )
    )
    dataset.context.execution_options.preserve_order = True
    dataset.context.target_max_block_size = BLOCK_BYTES
    dataset.context.enable_progress_bars = False
    return list(dataset.materialize().to_arrow_refs())


def _fill(cache: Cache, refs: list[Any]) -> None:
    """Stores the blocks. A disk that is full costs the cache, not the run."""
    import ray

    write = ray.remote(num_cpus=TOKENIZE_CPUS)(_write_shard)  # as many at once as there are CPUs
    try:
        cache.commit(ray.get([write.remote(cache, ref) for ref in refs]))
    except (OSError, ray.exceptions.RayTaskError) as error:
        logger.warning("%s: cannot be written, so the next run tokenises again: %s", cache.where, _reason(error))


def _reason(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _write_shard(cache: Cache, table: pa.Table) -> Shard:
    return cache.write_shard(table)


def _from_cache(cache: Cache) -> list[Any] | None:
    """References of the blocks of a complete entry, or None."""
    import ray

    shards = cache.shards()
    if shards is None:
        return None
    read = ray.remote(num_cpus=TOKENIZE_CPUS, num_returns=2)(_read_shard)
    pairs = [read.remote(cache, shard) for shard in shards]
    damaged = [shard.name for shard, good in zip(shards, ray.get([pair[1] for pair in pairs]), strict=True) if not good]
    if damaged:
        logger.warning("%s: shard %s is damaged: tokenising again", cache.where, damaged[0])
        return None
    logger.info("tokenised rows come from the cache %s", cache.where)
    return [pair[0] for pair in pairs]


def _read_shard(cache: Cache, shard: Shard) -> tuple[pa.Table | None, bool]:
    table = cache.read_shard(shard)
    return table, table is not None


def gather(store: TokenStore, rows: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """input_ids (int32) and loss masks (bool) of usable rows, in the given order. Runs in a Ray task or actor."""
    ids: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    for row in rows:
        offsets, block_ids, block_masks = _block(store.refs[int(store.blocks[row])])
        place = int(store.places[row])
        ids.append(block_ids[offsets[place] : offsets[place + 1]])
        masks.append(block_masks[offsets[place] : offsets[place + 1]])
    return ids, masks


@lru_cache(maxsize=64)
def _block(ref: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    import ray

    table = ray.get(ref)
    column = table["input_ids"].combine_chunks()
    mask = table["loss_mask"].combine_chunks()
    return (
        np.asarray(column.offsets),
        np.asarray(column.values),
        np.asarray(mask.values.to_numpy(zero_copy_only=False), dtype=bool),
    )


@dataclass(frozen=True, slots=True)
class Keep:
    """Which rows of a file are looked at."""

    share: float
    seed: int
    max_rows: int | None

    def sampled(self, file: int, index: int) -> bool:
        """A draw that depends on the seed and the row's place alone."""
        if self.share >= 1:
            return True
        digest = hashlib.blake2b(f"{self.seed}:{file}:{index}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") < self.share * 2**64


def raw_rows(file: SourceFile, number: int, keep: "Keep") -> Iterator[tuple[RawRow, str]]:
    """Rows of a file with the reason for which they are not looked at further, if any; last their number, as `end`."""
    taken = count = 0
    for row in read_rows(file.path, file.options):
        count += 1
        if row.text is None:
            yield row, "malformed"
        elif not keep.sampled(number, row.index):
            yield row, "not_sampled"
        else:
            taken += 1
            yield row, ""
        if keep.max_rows is not None and taken >= keep.max_rows:
            break
    yield RawRow(count, 0, None), "end"


def _read_files(batch: pa.Table, files: Sequence[SourceFile], keep: Keep) -> Iterator[pa.Table]:
    for number in batch["number"].to_pylist():
        rows: list[tuple[RawRow, str]] = []
        size = 0
        for row, reason in raw_rows(files[number], number, keep):
            rows.append((row, reason))
            size += len(row.text or "")
            if len(rows) == READ_ROWS or size > READ_BYTES:
                yield raw_table(number, rows)
                rows, size = [], 0
        yield raw_table(number, rows)


def raw_table(file: int, rows: Sequence[tuple[RawRow, str]]) -> pa.Table:
    """Raw rows of one file as RAW_SCHEMA."""
    columns: Mapping[str, list[Any]] = {
        "file": [file] * len(rows),
        "index": [row.index for row, _ in rows],
        "line": [row.line for row, _ in rows],
        "text": [None if reason else row.text for row, reason in rows],
        "format": [row.format for row, _ in rows],
        "reason": [reason for _, reason in rows],
        "problem": [row.problem for row, _ in rows],
    }
    return pa.table([pa.array(columns[field.name], field.type) for field in RAW_SCHEMA], schema=RAW_SCHEMA)


class _TokenizeStage:
    """Prepares the tokenizer in the worker, then calls the plain function that the unit tests call."""

    def __init__(
        self,
        files: Sequence[SourceFile],
        section: DataSection,
        source: TokenizerSource,
        tokenizer: Any,
        num_threads: int,
    ) -> None:
        """tokenizer: a reference of it, of None where it must be loaded here.

        num_threads: of the tokenizer; its default is one for each core of the node, in every actor.
        """
        import ray

        os.environ["RAYON_NUM_THREADS"] = str(num_threads)
        self._rows = row_tokenizer(files, section, source, ray.get(tokenizer))
        gc.freeze()

    def __call__(self, batch: pa.Table) -> pa.Table:
        # Collecting while the objects of a batch come to life finds nothing, and takes a fifth of the time.
        gc.disable()
        try:
            return self._rows.table(batch)
        finally:
            gc.enable()


def _index(
    refs: list[Any], files: Sequence[SourceFile], sources: Sequence[SourceSection], max_rows: int | None
) -> tuple[TokenStore, DataReport]:
    """Keeps lengths and places of usable sequences, and the rejected rows, from blocks of TOKENS_SCHEMA."""
    import ray

    columns = ["file", "index", "line", "length", "loss_tokens", "straddling", "reason", "problem"]
    select = ray.remote(lambda table: table.select(columns) if table.num_rows else None).options(num_cpus=0)
    parts: list[dict[str, np.ndarray]] = []
    rejected: list[RejectedRow] = []
    ledger = _Ledger(files)
    left_out = 0
    for block, head in enumerate(ray.get([select.remote(ref) for ref in refs])):
        if head is None:
            continue
        reasons = np.asarray(head["reason"].to_pylist(), dtype=object)
        used = np.flatnonzero(reasons == "")
        arrays = {
            name: np.asarray(head[name]) for name in ("file", "index", "line", "length", "loss_tokens", "straddling")
        }
        ledger.add(arrays["file"], arrays["index"], reasons)
        parts.append(
            {
                "lengths": arrays["length"][used],
                "blocks": np.full(len(used), block, np.int32),
                "places": used.astype(np.int64),
                "files": arrays["file"][used],
                "indices": arrays["index"][used],
                "loss": arrays["loss_tokens"][used],
                "straddling": arrays["straddling"][used],
            }
        )
        left_out += int((reasons == "not_sampled").sum())
        for place in np.flatnonzero(~np.isin(reasons, ["", "not_sampled", "end"])):
            rejected.append(
                RejectedRow(
                    files[arrays["file"][place]].path,
                    int(arrays["index"][place]),
                    reasons[place],
                    head["problem"][int(place)].as_py(),
                    int(arrays["line"][place]),
                )
            )
    ledger.check()
    kinds = {"lengths": np.int32, "blocks": np.int32, "places": np.int64, "files": np.int32, "indices": np.int64}
    kinds |= {"loss": np.int32, "straddling": np.int32}
    found = {
        name: np.concatenate([part[name] for part in parts]) if parts else np.zeros(0, kind)
        for name, kind in kinds.items()
    }
    number = _row_numbers(found["files"], found["indices"])
    if max_rows is not None:
        kept = number < max_rows
        left_out += len(np.unique(number[~kept]))
        found, number = {name: column[kept] for name, column in found.items()}, number[kept]
    return _store_and_report(found, number, refs, files, sources, rejected, left_out)


class _Ledger:
    """Holds what came out of the tokenising stage against what the reading stage says it put in."""

    def __init__(self, files: Sequence[SourceFile]) -> None:
        self._files = files
        self._seen = np.zeros(len(files), np.int64)
        self._read = np.full(len(files), -1, np.int64)
        self._last = (-1, -2)

    def add(self, files: np.ndarray, indices: np.ndarray, reasons: np.ndarray) -> None:
        """A block of rows, in order."""
        ends = reasons == "end"
        self._read[files[ends]] = indices[ends]
        files, indices = files[~ends], indices[~ends]
        if not len(files):
            return
        before = np.concatenate([[self._last], np.stack([files, indices], axis=1)[:-1]])
        new = (before[:, 0] != files) | (before[:, 1] != indices)  # a row that is split comes several times
        self._seen += np.bincount(files[new], minlength=len(self._seen))
        self._last = (int(files[-1]), int(indices[-1]))

    def check(self) -> None:
        """Raises DataError when rows are missing or doubled."""
        for file, seen, read in zip(self._files, self._seen, self._read, strict=True):
            if seen != read:
                raise DataError(file.path, f"{read} rows were read, but {seen} came out of the tokenising stage.")


def _row_numbers(files: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """0, 1, … by source row; the pieces of a split row share a number."""
    if not len(files):
        return np.zeros(0, np.int64)
    new = (files[1:] != files[:-1]) | (indices[1:] != indices[:-1])
    return np.concatenate([[0], np.cumsum(new)])


def _store_and_report(
    found: dict[str, np.ndarray],
    number: np.ndarray,
    refs: list[Any],
    files: Sequence[SourceFile],
    sources: Sequence[SourceSection],
    rejected: list[RejectedRow],
    left_out: int,
) -> tuple[TokenStore, DataReport]:
    loss, straddling = found.pop("loss"), found.pop("straddling")
    by_file = np.array([file.weight for file in files], np.float64)
    weights = by_file[found["files"]] if np.any(by_file != 1) else None
    store = TokenStore(refs=refs, file_names=tuple(shown(file.path) for file in files), weights=weights, **found)
    used = int(number[-1]) + 1 if len(number) else 0
    origin = np.array([file.source for file in files], np.int32)[found["files"]] if len(number) else np.zeros(0, int)
    bad = [next(file.source for file in files if file.path == row.file) for row in rejected]
    reports = []
    for place, source in enumerate(sources):
        own = origin == place
        rows = len(np.unique(number[own]))
        tokens = round(float(store.lengths[own].sum()) * source.weight)
        reports.append(SourceReport(source.path, rows + bad.count(place), rows, tokens))
    report = DataReport(
        rows=used + len(rejected) + left_out,
        used=used,
        rejected=tuple(rejected),
        tokens=int(store.lengths.sum()),
        loss_tokens=int(loss.sum()),
        sequences=len(store.lengths),
        left_out=left_out,
        straddling=int(straddling.sum()),
        sources=tuple(reports),
    )
    return store, report
