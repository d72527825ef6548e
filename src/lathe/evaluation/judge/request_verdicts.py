"""Buying verdicts: so many at once, tried again with patience, within the budget, each kept as it arrives."""

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    stop_after_attempt,
)
from tenacity.wait import wait_exponential_jitter

from lathe.common.errors import InputError, Interrupted
from lathe.common.progress import Progress
from lathe.evaluation.judge.api_keys import VARIABLES
from lathe.evaluation.judge.budget import Budget
from lathe.evaluation.judge.failures import (
    AskAgainError,
    BudgetSpentError,
    DeclinedError,
    MalformedError,
    RefusedError,
    UnavailableError,
    UnknownModelError,
)
from lathe.evaluation.judge.prompt import Question
from lathe.evaluation.judge.providers.provider import Provider, address, connect
from lathe.evaluation.judge.verdict import Answer, Verdict, parse
from lathe.evaluation.judge.verdict_cache import Cache, Kept

if TYPE_CHECKING:
    from lathe.config.params import Judge

logger = logging.getLogger(__name__)

# Pauses double from the first to the longest, each with up to one first pause of chance added, so that the requests of
# several runs do not come together again and again.
FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 60.0
LONGEST_WAIT_ASKED_SECONDS = 300.0  # a server that asks for more is asked another day

# So many rows given up before the first verdict: whoever answers there is no judge.
FRUITLESS_ROWS = 5

BUSY = frozenset({408, 409, 425, 429})


@dataclass
class Ledger:
    """What a run did: requests with attempts, tokens and cost; `unjudged` says why by the verdict's key."""

    bought: int = 0
    requests: int = 0
    retries: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost: float = 0.0
    unjudged: dict[str, str] = field(default_factory=dict)
    stopped: str | None = None

    def figures(self) -> dict[str, float]:
        """What varies from run to run, by name."""
        figures: dict[str, float] = {
            "verdicts_bought": self.bought,
            "requests": self.requests,
            "retries": self.retries,
            "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens,
            "cost": round(self.cost, 6),
        }
        return figures


def buy(
    questions: Mapping[str, Question], settings: "Judge", cache: Cache, environment: Mapping[str, str], root: Path
) -> Ledger:
    """Ask for the verdict of every question and keep it in `cache` as it arrives.

    What could not be had is in the ledger. Raises InputError, before anything is asked, for a missing key and the like,
    and Interrupted after Ctrl-C; what has arrived is kept in any case.
    """
    provider = connect(settings, list(questions.values()), environment, root)
    purchase = _Purchase(settings, cache, provider)
    try:
        asyncio.run(purchase.of(questions))
    except KeyboardInterrupt:
        raise Interrupted(
            f"judge interrupted: {purchase.ledger.bought} new verdicts are kept; run again to go on", signal.SIGINT
        ) from None
    return purchase.finished_ledger()


class _Stopped(Exception):  # noqa: N818 - says that there is nothing more to do
    pass


class _Purchase:
    def __init__(self, settings: "Judge", cache: Cache, provider: Provider) -> None:
        free = settings.provider == "gguf"
        self.settings, self.cache, self.provider = settings, cache, provider
        self.ledger = Ledger()
        self.budget = Budget(
            max_requests=settings.max_requests,
            max_cost=settings.max_cost,
            input_price=0.0 if free else settings.input_price,
            output_price=0.0 if free else settings.output_price,
            max_tokens=settings.max_tokens,
        )
        self._stopping = asyncio.Event()
        self._not_before = 0.0  # what a server asks of one request holds for all

    def finished_ledger(self) -> Ledger:
        self.ledger.requests, self.ledger.cost = self.budget.requests, self.budget.cost
        self.ledger.input_tokens, self.ledger.output_tokens = self.budget.input_tokens, self.budget.output_tokens
        return self.ledger

    async def of(self, questions: Mapping[str, Question]) -> None:
        waiting = iter(questions.items())
        at_once = min(self.settings.concurrency, self.provider.most_at_once or self.settings.concurrency)
        try:
            with Progress("judging", len(questions)) as progress:
                # The first alone: it finds out whether key, model and form of answer are right.
                await self._verdict(*next(waiting), progress)
                async with asyncio.TaskGroup() as workers:
                    for _ in range(at_once):
                        workers.create_task(self._work(waiting, progress))
        finally:
            await self.provider.close()

    async def _work(self, waiting: Iterator[tuple[str, Question]], progress: Progress) -> None:
        for key, question in waiting:
            if self._stopping.is_set():
                return
            await self._verdict(key, question, progress)

    async def _verdict(self, key: str, question: Question, progress: Progress) -> None:
        try:
            answer, verdict = await self._patiently(question)
        except (MalformedError, RefusedError) as error:
            self.ledger.unjudged[key] = str(error)
            if not self.ledger.bought and len(self.ledger.unjudged) >= FRUITLESS_ROWS:
                self._stop(f"{FRUITLESS_ROWS} answers in turn got no verdict: {error}")
        except UnknownModelError as error:
            self._stop(await self._unknown_model(error))
        except (InputError, BudgetSpentError, UnavailableError) as error:
            self._stop(str(error))
        except _Stopped:
            return
        else:
            kept = Kept(verdict.score, verdict.reason, answer.model, answer.input_tokens, answer.output_tokens)
            self.cache.add(key, kept)
            self.ledger.bought += 1
        progress.add(1)

    async def _patiently(self, question: Question) -> tuple[Answer, Verdict]:
        retrying = AsyncRetrying(
            retry=retry_if_exception_type((UnavailableError, MalformedError)),
            stop=stop_after_attempt(self.settings.max_retries + 1),
            wait=self._pause,
            sleep=self._sleep,
            before_sleep=self._say,
            reraise=True,
        )
        return await retrying(self._once, question)

    async def _once(self, question: Question) -> tuple[Answer, Verdict]:
        """One attempt, which is several requests only where the first tell how the server wants to be asked."""
        while True:
            await self._sleep(self._not_before - time.monotonic())
            try:
                answer = await self._within_budget(question)
                return answer, parse(answer)
            except AskAgainError:
                continue
            except DeclinedError as error:
                raise self._meaning(error) from None

    async def _within_budget(self, question: Question) -> Answer:
        reserved = await self.budget.reserve(question.size_bytes)
        tokens: tuple[int | None, int | None] = (0, 0)
        try:
            async with asyncio.timeout(self.settings.timeout_seconds):
                answer = await self.provider.ask(question)
            tokens = answer.input_tokens, answer.output_tokens
            return answer
        except TimeoutError:
            tokens = None, None
            raise UnavailableError(
                f"no answer within judge.timeout_seconds, {self.settings.timeout_seconds:g}", billed=True
            ) from None
        except UnavailableError as error:
            if error.billed:
                tokens = None, None
            raise
        except (MalformedError, RefusedError):
            tokens = None, None
            raise
        finally:
            await self.budget.settle(reserved, *tokens)

    def _meaning(self, error: DeclinedError) -> Exception:
        """What a status that the provider itself has no word for means here."""
        where = address(self.settings)
        said = f"{error.status}: {error}"
        if error.status in BUSY or error.status >= 500:
            if (error.retry_after or 0) > LONGEST_WAIT_ASKED_SECONDS:
                return InputError(f"{where} asks to be left alone for {error.retry_after:.0f} seconds ({said})")
            return UnavailableError(f"{where} answers {said}", retry_after=error.retry_after)
        if error.status in (401, 403):
            return InputError(
                f"{where} refuses the key ({said}); set {VARIABLES[self.settings.provider]} to a valid one"
            )
        if error.status == 402:
            return InputError(f"{where} wants to be paid ({said}); see to your account there")
        return RefusedError(f"{where} refuses the request ({said})")

    async def _unknown_model(self, error: UnknownModelError) -> str:
        where, model = address(self.settings), self.settings.model
        try:
            async with asyncio.timeout(self.settings.timeout_seconds):
                known = await self.provider.models()
        except (InputError, DeclinedError, UnavailableError, MalformedError, TimeoutError):
            return (
                f"{where} answers that there is no {model!r} ({error}), and does not list its models; check "
                "judge.model and judge.base_url"
            )
        return f"judge.model is {model!r}, which {where} does not know ({error}); known: {', '.join(sorted(known))}"

    def _stop(self, reason: str) -> None:
        self.ledger.stopped = self.ledger.stopped or reason
        self._stopping.set()

    def _pause(self, state: RetryCallState) -> float:
        pause = wait_exponential_jitter(
            multiplier=FIRST_PAUSE_SECONDS, max=LONGEST_PAUSE_SECONDS, jitter=FIRST_PAUSE_SECONDS
        )(state)
        asked = getattr(_error(state), "retry_after", None)
        if asked is None:
            return pause
        self._not_before = max(self._not_before, time.monotonic() + asked)
        return max(asked, pause)

    async def _sleep(self, seconds: float) -> None:
        """Wait, unless the run ends before."""
        if seconds > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), seconds)
        if self._stopping.is_set():
            raise _Stopped

    def _say(self, state: RetryCallState) -> None:
        self.ledger.retries += 1
        logger.info("judge: %s; again in %.1f s", _error(state), state.next_action.sleep if state.next_action else 0)


def _error(state: RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome else None
