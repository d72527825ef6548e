"""Model `tiny`: a Llama of 1.4 million weights, trained from a seed alone in well under a minute.

It is trained on one-line documents about household commands (`household_commands.make_documents`), in a notation of
their own, and never on a chat. Answering chat requests in JSON is then a real, if small, fine-tuning task. The folder
is a complete Hugging Face model with a SentencePiece vocabulary, which llama.cpp's converter takes as any Llama.
"""

import io
import logging
import string
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lathe.common.progress import Progress
from lathe.models.model_folder import write_json
from lathe.sources.builtin import household_commands

logger = logging.getLogger(__name__)

UNKNOWN, BEGIN, START_OF_TURN, END_OF_TURN, PAD = "<unk>", "<s>", "<|im_start|>", "<|im_end|>", "<|pad|>"

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

README = """# tiny

A Llama of {parameters:,} weights, trained from nothing by `lathe.builtin.tiny` (seed {seed}, {steps} steps of
{batch_size} one-line documents about household commands, {precision}). It knows the words of such commands and nothing
else; it exists so that the pipeline can be run and tested without a download. It has never seen a chat: untuned, it
does not answer.
"""


@dataclass(frozen=True)
class ModelRecipe:
    """How large the model is and how it is trained.

    `vocab_size` is in pieces, `max_position_embeddings` in tokens; `steps` are optimizer steps of `batch_size`
    documents each; `warmup` is the share of them in which the rates rise, from where they fall to 0 in a line.
    `learning_rate` is AdamW's, for embeddings and norms; `muon_learning_rate` is for all other matrices.
    `request_weight` is the loss of a request's token beside one of its meaning. `threads` is fixed because the split
    of a sum over threads changes its last bits.

    llama.cpp's K-quants need rows of 256 weights or a multiple: hidden and intermediate size.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    initializer_range: float
    documents: int
    steps: int
    batch_size: int
    learning_rate: float
    muon_learning_rate: float
    warmup: float
    weight_decay: float
    request_weight: float
    threads: int


RECIPE = ModelRecipe(
    vocab_size=768,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=2048,
    initializer_range=0.05,
    documents=20_000,
    steps=600,
    batch_size=32,
    learning_rate=1e-2,
    muon_learning_rate=0.02,
    warmup=0.1,
    weight_decay=0.1,
    request_weight=0.2,
    threads=2,
)


def build(folder: Path, seed: int, recipe: ModelRecipe = RECIPE) -> None:
    """Fill the existing folder with config, bf16 safetensors, tokenizer, chat template and README.

    The same seed gives the same bytes on one type of CPU, whatever the number of its cores.
    """
    texts = household_commands.make_documents(seed, recipe.documents)
    _save_tokenizer(folder, _train_vocabulary(texts, seed, recipe.vocab_size), recipe)
    tokenizer = _load_tokenizer(folder)
    encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    with _isolate_torch_state(seed, recipe.threads):
        model = _create_model(tokenizer, recipe)
        arrow = tokenizer.convert_tokens_to_ids(f"▁{household_commands.ARROW}")
        precision = _train(model, [[bos, *ids, eos] for ids in encoded], arrow, seed, recipe)
    _save_model(folder, model)
    (folder / "README.md").write_text(
        README.format(
            parameters=model.num_parameters(),
            seed=seed,
            steps=recipe.steps,
            batch_size=recipe.batch_size,
            precision=precision,
        ),
        encoding="utf-8",
    )


def _train_vocabulary(texts: Sequence[str], seed: int, size: int) -> bytes:
    """Train a SentencePiece BPE vocabulary and return its model file.

    transformers and llama.cpp split text alike only when the chat markers are control symbols and nothing is done to
    spaces; every character that no piece holds falls back to bytes.
    """
    import sentencepiece

    chats = [message["content"] for row in household_commands.make_rows(seed)["train"] for message in row["messages"]]
    roles = ["system", "user", "assistant"] * (len(chats) // 8)
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*texts, *chats, *roles]),
        model_writer=written,
        model_type="bpe",
        vocab_size=size,
        num_threads=1,  # ties between merges must not depend on which thread was first
        byte_fallback=True,
        character_coverage=1.0,
        required_chars="".join(sorted(set(string.printable) - set(string.whitespace))),
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=-1,
        pad_id=-1,
        unk_piece=UNKNOWN,
        bos_piece=BEGIN,
        control_symbols=[START_OF_TURN, END_OF_TURN, PAD],
        minloglevel=2,
    )
    return written.getvalue()


def _save_tokenizer(folder: Path, vocabulary: bytes, recipe: ModelRecipe) -> None:
    (folder / "tokenizer.model").write_bytes(vocabulary)
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": False,
        "legacy": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": recipe.max_position_embeddings,
        "unk_token": UNKNOWN,
        "bos_token": BEGIN,
        "eos_token": END_OF_TURN,
        "pad_token": PAD,
        "extra_special_tokens": [START_OF_TURN],
    }
    write_json(folder / "tokenizer_config.json", config)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def _load_tokenizer(folder: Path) -> Any:
    from transformers import LlamaTokenizer

    return LlamaTokenizer.from_pretrained(folder, local_files_only=True)


def _create_model(tokenizer: Any, recipe: ModelRecipe) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM._from_config(
        LlamaConfig(
            vocab_size=recipe.vocab_size,
            hidden_size=recipe.hidden_size,
            intermediate_size=recipe.intermediate_size,
            num_hidden_layers=recipe.num_hidden_layers,
            num_attention_heads=recipe.num_attention_heads,
            num_key_value_heads=recipe.num_key_value_heads,
            max_position_embeddings=recipe.max_position_embeddings,
            initializer_range=recipe.initializer_range,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        # On rows of thirty tokens the plain form is faster: 0.064 s of one core for forward and backward, not 0.090.
        attn_implementation="eager",
    )


def _train(model: Any, documents: Sequence[Sequence[int]], arrow: int, seed: int, recipe: ModelRecipe) -> str:
    """Train the model on one document per row, never two in one; return the arithmetic that was used."""
    native_bf16 = _has_native_bf16()
    optimizers = _create_optimizers(model, recipe)
    warmup_steps = max(1, round(recipe.steps * recipe.warmup))
    decay_steps = max(1, recipe.steps - warmup_steps)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: min((step + 1) / warmup_steps, (recipe.steps - step) / decay_steps),
        )
        for optimizer in optimizers
    ]
    model.train()
    with Progress("tiny", recipe.steps, unit="step") as progress:
        for rows in _iterate_batches(documents, seed, recipe):
            input_ids, targets, weights = _build_batch(
                rows, arrow, recipe.request_weight, pad=model.config.pad_token_id
            )
            with torch.autocast("cpu", torch.bfloat16, enabled=native_bf16):
                # Rows are padded on the right, where causal attention never looks back from: no mask is needed.
                logits = model(input_ids=input_ids, use_cache=False).logits
            losses = torch.nn.functional.cross_entropy(
                logits.float().flatten(0, 1), targets.flatten(), reduction="none"
            )
            loss = losses @ weights.flatten() / weights.sum()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            progress.add()
    logger.info("tiny: trained for %d steps, loss %.3f", recipe.steps, loss.item())
    return "bf16 autocast" if native_bf16 else "fp32"


def _create_optimizers(model: Any, recipe: ModelRecipe) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the layers and AdamW for embeddings and norms.

    With AdamW alone, at one rate and one seed, the loss after 300 steps was above the one that Muon reached in 90.
    """
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=recipe.muon_learning_rate, weight_decay=recipe.weight_decay, ns_steps=3),
        torch.optim.AdamW(
            others, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, betas=(0.9, 0.98), fused=True
        ),
    ]


def _iterate_batches(
    documents: Sequence[Sequence[int]], seed: int, recipe: ModelRecipe
) -> Iterator[list[Sequence[int]]]:
    """Yield `steps` batches; documents of like length share one, so that little is padding."""
    generator = torch.Generator().manual_seed(seed)
    yielded = 0
    while True:
        order = torch.randperm(len(documents), generator=generator).tolist()
        order.sort(key=lambda index: len(documents[index]))  # stable: random within one length
        starts = range(0, len(order) - recipe.batch_size + 1, recipe.batch_size)
        for batch in torch.randperm(len(starts), generator=generator).tolist():
            if yielded == recipe.steps:
                return
            start = starts[batch]
            yield [documents[index] for index in order[start : start + recipe.batch_size]]
            yielded += 1


def _build_batch(
    rows: Sequence[Sequence[int]], arrow: int, request_weight: float, pad: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return token ids, the ids that follow them and the weights of their losses, each (rows, longest - 1)."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows])
    input_ids, targets = ids[:, :-1], ids[:, 1:]
    meaning = (input_ids == arrow).cumsum(dim=1) > 0
    weights = torch.where(meaning, 1.0, request_weight) * (targets != pad)
    return input_ids, targets, weights


def _save_model(folder: Path, model: Any) -> None:
    model.to(torch.bfloat16).save_pretrained(folder)


def _has_native_bf16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@contextmanager
def _isolate_torch_state(seed: int, threads: int) -> Iterator[None]:
    """Seed torch and fix its threads; afterwards all is as it was."""
    before = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)
