"""Answer engines other than llama.cpp in this process: servers of OpenAI's protocol, and vLLM in its own environment.

They are given the prompts that are rendered here, as token ids of the file's vocabulary, and answer greedily. The
likelihood of references, and with it perplexity and KL divergence, is computed by llama.cpp in this process all the
same.
"""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lathe.config import engines
from lathe.inference.generate import Completion, Generator
from lathe.inference.shared_prefix import TokenSequence

if TYPE_CHECKING:
    from lathe.config.params import Generate

# Keeps the answer to the row of a number, whatever happens to this process next.
AnswerKeeper = Callable[[int, Completion], None]


@dataclass(frozen=True)
class AskedRow:
    """A row to answer: its number, its prompt as text and as token ids, and the most tokens of its answer."""

    number: int
    prompt: str
    tokens: list[int]
    max_tokens: int


class AnswerEngine(Protocol):
    """What answers for one artifact: `mark` is what its answers are marked with, `name` begins its figures of speed.

    `tokens` and `seconds` are those of the answers that this process has asked for.
    """

    name: str
    mark: str
    tokens: int
    seconds: float

    def answer(
        self,
        generator: Generator,
        prompts: Callable[[], Iterable[tuple[int, str]]],
        *,
        max_new_tokens: int,
        finished: Container[int],
        keep: AnswerKeeper,
    ) -> None:
        """Answer the numbered prompts whose number is not in `finished`, and keep each answer as it comes.

        `generator` is the artifact's file: its vocabulary and context are those of the answers. `prompts` is called
        twice and read lazily. Raises InputError, after which the answers so far are kept.
        """

    def describe(self) -> dict[str, Any]:
        """Return what is known of the engine, for the stage's metrics."""


def connect_engine(
    settings: "Generate", artifact: str, *, weights: Path, scratch: Path, environment: Mapping[str, str]
) -> AnswerEngine | None:
    """Return the engine that answers for an artifact, None for llama.cpp in this process.

    `weights` is the folder of its 16-bit weights, and `scratch` one for files in between. Raises InputError if the
    server cannot be reached, does not know the model, or refuses the key, and if vLLM or the weights are not there.
    """
    match engines.choose_engine(settings, artifact):
        case engines.SERVER:
            from lathe.inference.server_answers import ServerEngine

            served = engines.find_server(settings, artifact)
            assert served is not None
            return ServerEngine(served, settings, environment)
        case engines.VLLM:
            from lathe.inference.vllm_answers import VllmEngine

            return VllmEngine(artifact, weights, settings, scratch, environment)
    return None


def iterate_asked(
    generator: Generator, prompts: Iterable[tuple[int, str]], *, max_new_tokens: int, finished: Container[int]
) -> Iterator[AskedRow]:
    """Yield the rows that are not finished, as many tokens for each as llama.cpp would generate.

    Raises InputError that names the row if its prompt fills the context.
    """
    for number, prompt in prompts:
        if number not in finished:
            tokens = list(TokenSequence.of(number, generator.tokenize(prompt), n_ctx=generator.n_ctx).tokens)
            yield AskedRow(number, prompt, tokens, min(max_new_tokens, generator.n_ctx - len(tokens)))


def list_end_tokens(generator: Generator) -> list[int]:
    """Return every token of the vocabulary that ends an answer."""
    return [token for token in range(generator.model.n_vocab) if generator.model.is_end(token)]


def read_tokens(generator: Generator, tokens: list[int], *, ended: bool) -> Completion:
    """Return the answer of these generated tokens, as llama.cpp in this process would have given it.

    An engine may leave out the ending token, which is counted.
    """
    text = b"".join(map(generator.get_token_bytes, tokens)).decode("utf-8", "replace")
    has_end = bool(tokens) and generator.model.is_end(tokens[-1])
    return Completion(text, "stop" if ended else "length", len(tokens) + (ended and not has_end))
