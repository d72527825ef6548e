"""Answers from a server of OpenAI's protocol: vLLM, llama-server, TGI and others, by `POST completions`.

The prompt is sent as token ids where the server takes them, else as text, and never through its chat template. Every
answer says how many tokens its prompt had there, which must be as many as here: a server that adds a second BOS, or has
another vocabulary, is found out with the first row.
"""

import asyncio
import logging
import signal
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

from lathe.common.api_key import read_api_key
from lathe.common.errors import InputError, Interrupted
from lathe.common.http_session import HttpSession, HttpStatusError, MalformedError, UnavailableError
from lathe.common.patient_requests import PatientRequests, RunStoppedError, classify_status, describe_status
from lathe.common.progress import Progress
from lathe.config import engines
from lathe.inference.answer_engines import AnswerKeeper, AskedRow, iterate_asked, list_end_tokens, read_tokens
from lathe.inference.generate import Completion, Generator
from lathe.inference.same_weights import GivenAnswer, check_weights

if TYPE_CHECKING:
    from lathe.config.generation_params import Generate, ServedArtifact

logger = logging.getLogger(__name__)

KEY_VARIABLE = "LATHE_SERVER_API_KEY"
TRUST = "the file that the variable SSL_CERT_FILE names"

# Names that programs give as owner of their models; those of others are names of people.
PROGRAMS = {"vllm": "vllm", "llamacpp": "llama-server", "sglang": "sglang"}

CHECKED_ROWS = 8  # whose answers are held against the file before the others are asked

# Forms of a request, the most exact first: token ids, and the keys of vLLM and llama-server that OpenAI does not have.
FORMS = ((True, True), (True, False), (False, True), (False, False))
REFUSED_FORM = (400, 415, 422, 501)


class ServerEngine:
    """What serves one artifact. Raises InputError if it cannot be reached, or does not know the model."""

    name = engines.SERVER

    def __init__(self, served: "ServedArtifact", settings: "Generate", environment: Mapping[str, str]) -> None:
        self.served, self.settings = served, settings
        self.url = served.url.rstrip("/")
        self.tokens, self.seconds = 0, 0.0
        self._key = read_api_key(KEY_VARIABLE, environment)
        self._form, self._begin, self._works = 0, 0, False
        self._end_tokens: list[int] = []
        entry = asyncio.run(self._find_model())
        program = PROGRAMS.get(str(entry.get("owned_by")))
        self.mark = f"{engines.SERVER} ({program})" if program else engines.SERVER

    def describe(self) -> dict[str, Any]:
        """Return what is known of the server."""
        return {"name": self.mark, "url": self.served.url, "model": self.served.model}

    def answer(
        self,
        generator: Generator,
        prompts: Callable[[], Iterable[tuple[int, str]]],
        *,
        max_new_tokens: int,
        finished: Container[int],
        keep: AnswerKeeper,
    ) -> None:
        """Answer the prompts, `generate.concurrency` at a time; see `AnswerEngine`."""
        began = time.perf_counter()
        numbers = [number for number, _ in prompts()]
        done = sum(number in finished for number in numbers)
        self._end_tokens = self._end_tokens or list_end_tokens(generator)
        rows = iterate_asked(generator, prompts(), max_new_tokens=max_new_tokens, finished=finished)

        def keep_counted(number: int, completion: Completion) -> None:
            self.tokens += completion.tokens
            keep(number, completion)

        with Progress(f"answers of {self.served.model}", len(numbers), done=done) as progress:
            try:
                asyncio.run(_SplitRequests(self, generator, progress, keep_counted).answer_all(rows))
            except KeyboardInterrupt:
                text = "generate interrupted: finished answers are kept; run again to go on"
                raise Interrupted(text, signal.SIGINT) from None
            finally:
                self.seconds += time.perf_counter() - began

    def open_session(self) -> HttpSession:
        """Open connections to the server."""
        session = HttpSession(
            self.url,
            key=f"the url of {self.served.artifact} in generate.servers",
            trust=TRUST,
            certificates=None,
            timeout_seconds=self.settings.timeout_seconds,
        )
        if self._key:
            session.secrets.add(self._key)
        return session

    @property
    def headers(self) -> dict[str, str]:
        """The headers of a request."""
        return {"Authorization": f"Bearer {self._key}"} if self._key else {}

    async def send(self, session: HttpSession, row: AskedRow, generator: Generator) -> tuple[Completion, list[int]]:
        """Send one row once; return its answer, and the token ids of it as far as they are known.

        Until a first answer has come, a form that the server refuses, or whose prompt it reads as other tokens, is
        followed by the next one.
        """
        while True:
            form, begin = self._form, self._begin
            try:
                async with asyncio.timeout(self.settings.timeout_seconds):
                    body = self._build_request(row, generator, form, begin)
                    response = await session.post("/completions", body, self.headers)
            except TimeoutError:
                raise UnavailableError(
                    f"{self.url}: no answer within generate.timeout_seconds, {self.settings.timeout_seconds:g}"
                ) from None
            except HttpStatusError as error:
                if not self._works and error.status in REFUSED_FORM and form + 1 < len(FORMS):
                    logger.debug("%s: form %d of a request is not accepted: %s", self.url, form, error)
                    self._form = max(self._form, form + 1)
                    continue
                raise self._classify(error, row) from None
            if self._is_read_alike(response, row, generator, begin):
                self._works = True
                return self._read_answer(response, row, generator)
            self._begin = begin + 1

    def _build_request(self, row: AskedRow, generator: Generator, form: int, begin: int) -> dict[str, Any]:
        as_tokens, extended = FORMS[form]
        content: dict[str, Any] = {
            "model": self.served.model,
            "prompt": _change_beginning(row, generator, begin, as_tokens=as_tokens),
            "max_tokens": row.max_tokens,
            "temperature": 0,
            "top_p": 1,
            "n": 1,
            "seed": 0,
            "presence_penalty": 0,
            "frequency_penalty": 0,
            "stream": False,
        }
        if extended:
            # vLLM would take penalties from the model's generation_config.json, and end at its end token alone.
            content |= {"repetition_penalty": 1.0, "repeat_penalty": 1.0, "stop_token_ids": self._end_tokens}
            content |= {"return_token_ids": True, "add_special_tokens": False}
        return content

    def _is_read_alike(self, response: Any, row: AskedRow, generator: Generator, begin: int) -> bool:
        """Tell whether the prompt had as many tokens as here; raises InputError if no other beginning may help."""
        read = _count(response, "prompt_tokens")
        if read is None:
            if not self._works:
                logger.warning(
                    "%s: does not say how many tokens a prompt has; whether it reads them so is not known", self.url
                )
            return True
        if read == len(row.tokens):
            return True
        if not self._works and begin + 1 < len(BEGINNINGS) and generator.model.bos is not None:
            return False
        raise InputError(
            f"{self.url}: reads the prompt of row {row.number} as {read} tokens, and {generator.model.path.name} as "
            f"{len(row.tokens)}: its vocabulary is another, or it adds or cuts something; serve the artifact "
            f"{self.served.artifact} itself, with a context of {generator.n_ctx} tokens",
            code="other-tokens",
        )

    def _read_answer(self, response: Any, row: AskedRow, generator: Generator) -> tuple[Completion, list[int]]:
        try:
            choice = response["choices"][0]
            text, reason, tokens = choice["text"], choice["finish_reason"], choice.get("token_ids")
        except (KeyError, IndexError, TypeError, AttributeError):
            raise MalformedError("the server's response has no choices[0] with text and finish_reason") from None
        if not isinstance(text, str):
            raise MalformedError("the server's answer has no text")
        if reason not in ("stop", "length"):
            shown = str(reason)[:40]
            raise MalformedError(f"the server's answer ended neither by itself nor by its length, but by {shown!r}")
        ended = reason == "stop"
        if _are_tokens(tokens, generator):
            completion = read_tokens(generator, tokens, ended=ended)
        else:
            # A character that UTF-16 cannot have is replaced, as bytes are that UTF-8 cannot.
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            tokens = generator.model.tokenize(text)
            counted = _count(response, "completion_tokens")
            completion = Completion(text, reason, len(tokens) + ended if counted is None else counted)
        self._check_length(completion, row, generator)
        return completion, tokens

    def _check_length(self, completion: Completion, row: AskedRow, generator: Generator) -> None:
        if completion.finish_reason == "length" and completion.tokens < row.max_tokens:
            raise InputError(
                f"{self.url}: cut the answer to row {row.number} after {completion.tokens} of {row.max_tokens} tokens: "
                f"its context is too small; start it with {generator.n_ctx} tokens for each request",
                code="answer-cut",
            )
        if completion.tokens > row.max_tokens + 1:
            raise InputError(
                f"{self.url}: the answer to row {row.number} has {completion.tokens} tokens, and {row.max_tokens} were "
                "asked for (max_tokens); use a server that keeps to them",
                code="answer-too-long",
            )

    def _classify(self, error: HttpStatusError, row: AskedRow) -> Exception:
        if error.status == 404:
            return InputError(
                f"{self.url}: has no completions for the model {self.served.model!r} ({describe_status(error)}); "
                "check url and model in generate.servers",
                code="unknown-model",
            )
        return classify_status(error, self.url, key=KEY_VARIABLE) or InputError(
            f"{self.url}: refuses row {row.number} of {len(row.tokens)} tokens ({describe_status(error)}); change what "
            "it names, or the server's options",
            code="request-refused",
        )

    async def _find_model(self) -> dict[str, Any]:
        """Return the server's entry of the model, empty if it does not list any."""
        patient, session = PatientRequests("generate", max_retries=self.settings.max_retries), self.open_session()

        async def list_models() -> Any:
            try:
                return await session.get("/models", self.headers)
            except HttpStatusError as error:
                if known := classify_status(error, self.url, key=KEY_VARIABLE):
                    raise known from None
                return None

        try:
            listed = await patient.send(list_models)
        except (UnavailableError, MalformedError) as error:
            raise InputError(
                f"{error}; by generate.servers it answers for {self.served.artifact}: start it, or change the url",
                code="unavailable",
            ) from None
        finally:
            await session.close()
        entries = listed.get("data") if isinstance(listed, dict) else None
        entries = [entry for entry in entries or [] if isinstance(entry, dict) and "id" in entry]
        if not entries:
            return {}
        for entry in entries:
            if self.served.model in (entry["id"], *(entry.get("aliases") or ())):
                return entry
        known = ", ".join(sorted(str(entry["id"]) for entry in entries))
        raise InputError(
            f"{self.url}: has no model {self.served.model!r}, which generate.servers names for {self.served.artifact}; "
            f"known there: {known}",
            code="unknown-model",
        )


class _SplitRequests:
    """The requests for the answers of one split."""

    def __init__(self, engine: ServerEngine, generator: Generator, progress: Progress, keep: AnswerKeeper) -> None:
        self.engine, self.generator, self.progress, self.keep = engine, generator, progress, keep
        self.patient = PatientRequests("generate", max_retries=engine.settings.max_retries)
        self.session = engine.open_session()
        self.failure: InputError | None = None
        self._given: list[GivenAnswer] = []

    async def answer_all(self, rows: Iterator[AskedRow]) -> None:
        """Ask for all answers; the first rows are kept when they have been found to be the file's.

        Raises InputError for the first problem that another attempt cannot solve; answers on their way are kept.
        """
        first: list[tuple[int, Completion]] = []
        try:
            # The first one alone: it finds out whether key, model and form of the request are right.
            await self._answer_rows(islice(rows, 1), 1, lambda *answer: first.append(answer))
            await self._answer_rows(
                islice(rows, CHECKED_ROWS - 1), self.engine.settings.concurrency, lambda *answer: first.append(answer)
            )
            check_weights(self.generator, self._given, where=self.engine.url)
            for answer in first:
                self.keep(*answer)
            await self._answer_rows(rows, self.engine.settings.concurrency, self.keep)
        finally:
            await self.session.close()

    async def _answer_rows(self, rows: Iterator[AskedRow], concurrency: int, keep: AnswerKeeper) -> None:
        async def work() -> None:
            for row in rows:
                if self.patient.is_stopping:
                    return
                await self._answer_row(row, keep)

        try:
            async with asyncio.TaskGroup() as workers:
                for _ in range(concurrency):
                    workers.create_task(work())
        except ExceptionGroup as group:  # a prompt that fills the context, a full disk
            raise group.exceptions[0] from None
        if self.failure:
            raise self.failure

    async def _answer_row(self, row: AskedRow, keep: AnswerKeeper) -> None:
        async def attempt() -> tuple[Completion, list[int]]:
            await self.patient.wait_for_server()
            return await self.engine.send(self.session, row, self.generator)

        try:
            completion, tokens = await self.patient.send(attempt)
        except InputError as error:
            self._fail(error)
        except (UnavailableError, MalformedError) as error:
            attempts = self.engine.settings.max_retries + 1
            text = (
                f"row {row.number} has no answer after {attempts} attempts: {error}; run again: finished ones are kept"
            )
            code = "unavailable" if isinstance(error, UnavailableError) else "malformed-answer"
            self._fail(InputError(text, code=code))
        except RunStoppedError:
            return
        else:
            if len(self._given) < CHECKED_ROWS and tokens:
                self._given.append(GivenAnswer(row.tokens, tokens))
            keep(row.number, completion)
            self.progress.add()

    def _fail(self, error: InputError) -> None:
        self.failure = self.failure or error
        self.patient.stop()


# What the prompt that is sent begins with: as it is, without its BOS, which the server adds, or with one.
BEGINNINGS = ("as it is", "without", "with")


def _change_beginning(row: AskedRow, generator: Generator, begin: int, *, as_tokens: bool) -> str | list[int]:
    bos = generator.model.bos
    text = generator.model.get_token_text(bos)
    tokens, prompt = row.tokens, row.prompt
    if bos is not None and BEGINNINGS[begin] == "without":
        tokens, prompt = tokens[tokens[:1] == [bos] :], prompt.removeprefix(text)
    elif bos is not None and BEGINNINGS[begin] == "with":
        tokens, prompt = [bos, *tokens], text + prompt
    return tokens if as_tokens else prompt


def _are_tokens(tokens: Any, generator: Generator) -> bool:
    return isinstance(tokens, list) and all(
        isinstance(token, int) and not isinstance(token, bool) and 0 <= token < generator.model.n_vocab
        for token in tokens
    )


def _count(response: Any, key: str) -> int | None:
    """Return a count of tokens that the response reports; None without one."""
    usage = response.get("usage") if isinstance(response, dict) else None
    count = usage.get(key) if isinstance(usage, dict) else None
    return count if isinstance(count, int) and not isinstance(count, bool) and count >= 0 else None
