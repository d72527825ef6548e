"""Answer the held-out rows with a GGUF, greedily, through the template of training that the file carries.

reads   models/gguf/, data/processed/{validation,test}.jsonl, params.yaml: generate, and the file evaluate.general_text;
        base_few_shot in its place data/processed/train.jsonl, params.yaml: seed
writes  data/generated/<ARTIFACT>/{validation,test,general}.jsonl, metrics/generate/<ARTIFACT>.json
items   base, base_few_shot, merged and the types in quantize.types
"""

import os
from contextlib import ExitStack
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _path  # noqa: F401

from lathe import stage
from lathe.common import metric_files, paths
from lathe.config import artifacts
from lathe.config.artifacts import FEW_SHOT, MERGED, UNQUANTIZED
from lathe.config.load import Config
from lathe.stage import Speeds

if TYPE_CHECKING:
    from lathe.inference.held_out import Asking

SPLITS = {name: paths.DATA_PROCESSED / f"{name}.jsonl" for name in ("validation", "test")}
TRAIN = paths.DATA_PROCESSED / "train.jsonl"


def main(config: Config, item: str) -> Speeds:
    from lathe.inference import journal
    from lathe.inference.general_text import paragraphs
    from lathe.inference.generate import Generator
    from lathe.inference.held_out import Asking, fingerprint

    settings, seed = config.params.generate, config.params.seed
    file, threads = paths.GGUF / artifacts.get_file_name(item), os.cpu_count() or 1
    read = {"gguf": file, **SPLITS}
    if item == FEW_SHOT:
        decides = {**settings.model_dump(), "seed": seed, "threads": threads}
        read["train"] = TRAIN
    else:
        decides = {**settings.model_dump(exclude={"few_shot"}), "threads": threads}
        read["general"] = paths.ROOT / config.params.evaluate.general_text
        paragraphs(read["general"])  # refused before anything is loaded
    if item not in UNQUANTIZED:
        read["against"] = paths.GGUF / artifacts.get_file_name(MERGED)

    with journal.opened(paths.SCRATCH / "generate", fingerprint(read, decides)) as kept:
        with ExitStack() as stack:
            folder = stack.enter_context(paths.whole_folder(paths.DATA_GENERATED / item))
            generator, *against = [
                stack.enter_context(
                    Generator(read[name], n_parallel=settings.n_parallel, n_ctx=settings.n_ctx, threads=threads)
                )
                for name in ("gguf", "against")
                if name in read
            ]
            asking = Asking(generator, kept, *against)
            facts = _facts(asking, config, folder, gguf=file, general=read.get("general"))
        metric_files.write_json(paths.METRICS / f"generate/{item}.json", facts)
        kept.remove()
    return {"tokens_per_second": round(asking.tokens / asking.seconds, 1)} if asking.tokens else {}


def _facts(asking: "Asking", config: Config, folder: Path, *, gguf: Path, general: Path | None) -> dict[str, Any]:
    """Put everything to the model, and return what is to be said of its answers; without `general`, behind examples."""
    from lathe.inference import few_shot
    from lathe.inference.held_out import conversations_in

    settings = config.params.generate
    facts: dict[str, Any] = {}
    splits = {name: partial(conversations_in, file, max_rows=settings.max_rows) for name, file in SPLITS.items()}
    if general is None:
        drawn = few_shot.choose(conversations_in(TRAIN, max_rows=None), settings.few_shot, seed=config.params.seed)
        examples = few_shot.that_fit(
            asking.generator,
            drawn,
            lambda: chain.from_iterable(rows() for rows in splits.values()),
            max_new_tokens=settings.max_new_tokens,
        )
        splits = {name: partial(few_shot.before_each, examples, rows) for name, rows in splits.items()}
        facts["few_shot_examples"] = len(examples)
    # Lists, of which DVC makes no columns: all of these figures are columns of the scores already.
    facts["splits"] = []
    for name, rows in splits.items():
        out = folder / f"{name}.jsonl"
        found = asking.split(rows, out, name=name, max_new_tokens=settings.max_new_tokens)
        facts["splits"].append({"split": name, **found})
    perplexity = None if general is None else asking.general(general, folder / "general.jsonl")
    facts["file"] = [{"bytes": gguf.stat().st_size, "general_perplexity": perplexity}]
    return facts


if __name__ == "__main__":
    stage.run_items(main, lambda config: artifacts.list_artifacts(config.params.quantize.types))
