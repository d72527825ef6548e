"""Verdict requests: concurrent, retried with pauses, within the budget; each verdict is kept as it arrives."""

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
    BudgetSpentError,
    HttpStatusError,
    MalformedError,
    RetryAtOnceError,
    RowRefusedError,
    UnavailableError,
    UnknownModelError,
)
from lathe.evaluation.judge.prompt import JudgePrompt
from lathe.evaluation.judge.providers.provider import Provider, connect_provider, get_address
from lathe.evaluation.judge.verdict import JudgeAnswer, Verdict, parse_verdict
from lathe.evaluation.judge.verdict_cache import StoredVerdict, VerdictCache

if TYPE_CHECKING:
    from lathe.config.params import Judge

logger = logging.getLogger(__name__)

# Pauses between attempts double from the first to the longest. A random part of up to FIRST_PAUSE_SECONDS is added, so
# that requests of several runs do not keep coinciding.
FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 60.0
LONGEST_RETRY_AFTER_SECONDS = 300.0  # if a server asks for a longer delay, the run stops

# Rows without a verdict, at the beginning of a run, after which the server is taken for no judge and the run stops.
MAX_ROWS_WITHOUT_VERDICT = 5

BUSY_STATUSES = frozenset({408, 409, 425, 429})


@dataclass
class JudgeLedger:
    """What a run did: verdicts, requests (repeated attempts included), tokens, cost.

    `unjudged` gives by verdict key why there is none. `stopped` says why the run ended early, and `stop_code` is the
    kind of problem, as of an InputError.
    """

    bought: int = 0
    requests: int = 0
    retries: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost: float = 0.0
    unjudged: dict[str, str] = field(default_factory=dict)
    stopped: str | None = None
    stop_code: str | None = None

    def to_metrics(self) -> dict[str, float]:
        """Return the numbers by the names that they have in `metrics/timings/judge.json`."""
        return {
            "verdicts_bought": self.bought,
            "requests": self.requests,
            "retries": self.retries,
            "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens,
            "cost": round(self.cost, 6),
        }


def request_verdicts(
    prompts: Mapping[str, JudgePrompt],
    settings: "Judge",
    cache: VerdictCache,
    environment: Mapping[str, str],
    root: Path,
) -> JudgeLedger:
    """Request a verdict for every prompt, and add it to `cache` as it arrives.

    Verdicts that are missing in the end are in the ledger. Raises InputError before the first request, for a missing
    key and the like, and Interrupted after Ctrl-C; verdicts that have arrived are kept in any case.
    """
    provider = connect_provider(settings, list(prompts.values()), environment, root)
    requests = _VerdictRequests(settings, cache, provider)
    try:
        asyncio.run(requests.run(prompts))
    except KeyboardInterrupt:
        raise Interrupted(
            f"judge interrupted: {requests.ledger.bought} new verdicts are kept; run again to go on", signal.SIGINT
        ) from None
    return requests.complete_ledger()


class _RunStoppedError(Exception):
    """The run is stopping: no further request is made."""


class _VerdictRequests:
    def __init__(self, settings: "Judge", cache: VerdictCache, provider: Provider) -> None:
        free = settings.provider == "gguf"
        self.settings, self.cache, self.provider = settings, cache, provider
        self.ledger = JudgeLedger()
        self.budget = Budget(
            max_requests=settings.max_requests,
            max_cost=settings.max_cost,
            input_price=0.0 if free else settings.input_price,
            output_price=0.0 if free else settings.output_price,
            max_tokens=settings.max_tokens,
        )
        self._stopping = asyncio.Event()
        self._not_before = 0.0  # a delay that the server asks for holds for all requests

    def complete_ledger(self) -> JudgeLedger:
        self.ledger.requests, self.ledger.cost = self.budget.requests, self.budget.cost
        self.ledger.input_tokens, self.ledger.output_tokens = self.budget.input_tokens, self.budget.output_tokens
        return self.ledger

    async def run(self, prompts: Mapping[str, JudgePrompt]) -> None:
        waiting = iter(prompts.items())
        workers_count = min(self.settings.concurrency, self.provider.max_concurrency or self.settings.concurrency)
        try:
            with Progress("judging", len(prompts)) as progress:
                # The first one alone: it finds out whether key, model and response format are right.
                await self._request_verdict(*next(waiting), progress)
                async with asyncio.TaskGroup() as workers:
                    for _ in range(workers_count):
                        workers.create_task(self._run_worker(waiting, progress))
        finally:
            await self.provider.close()

    async def _run_worker(self, waiting: Iterator[tuple[str, JudgePrompt]], progress: Progress) -> None:
        for key, prompt in waiting:
            if self._stopping.is_set():
                return
            await self._request_verdict(key, prompt, progress)

    async def _request_verdict(self, key: str, prompt: JudgePrompt, progress: Progress) -> None:
        try:
            answer, verdict = await self._request_with_retries(prompt)
        except (MalformedError, RowRefusedError) as error:
            self.ledger.unjudged[key] = str(error)
            if not self.ledger.bought and len(self.ledger.unjudged) >= MAX_ROWS_WITHOUT_VERDICT:
                self._stop("no-verdicts", f"{MAX_ROWS_WITHOUT_VERDICT} answers in a row were no verdict: {error}")
        except UnknownModelError as error:
            self._stop("unknown-model", await self._describe_unknown_model(error))
        except InputError as error:
            self._stop(error.code, str(error))
        except BudgetSpentError as error:
            self._stop("budget-spent", str(error))
        except UnavailableError as error:
            self._stop("unavailable", str(error))
        except _RunStoppedError:
            return
        else:
            stored = StoredVerdict(
                verdict.score, verdict.reason, answer.model, answer.input_tokens, answer.output_tokens
            )
            self.cache.add(key, stored)
            self.ledger.bought += 1
        progress.add(1)

    async def _request_with_retries(self, prompt: JudgePrompt) -> tuple[JudgeAnswer, Verdict]:
        retrying = AsyncRetrying(
            retry=retry_if_exception_type((UnavailableError, MalformedError)),
            stop=stop_after_attempt(self.settings.max_retries + 1),
            wait=self._compute_pause,
            sleep=self._sleep,
            before_sleep=self._log_retry,
            reraise=True,
        )
        return await retrying(self._request_once, prompt)

    async def _request_once(self, prompt: JudgePrompt) -> tuple[JudgeAnswer, Verdict]:
        """Make one attempt: several requests only if the provider changes their form after a refusal."""
        while True:
            await self._sleep(self._not_before - time.monotonic())
            try:
                answer = await self._send_within_budget(prompt)
                return answer, parse_verdict(answer)
            except RetryAtOnceError:
                continue
            except HttpStatusError as error:
                raise self._classify_status(error) from None

    async def _send_within_budget(self, prompt: JudgePrompt) -> JudgeAnswer:
        reserved = await self.budget.reserve(prompt.size_bytes)
        tokens: tuple[int | None, int | None] = (0, 0)
        try:
            async with asyncio.timeout(self.settings.timeout_seconds):
                answer = await self.provider.request_answer(prompt)
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
        except (MalformedError, RowRefusedError):
            tokens = None, None
            raise
        finally:
            await self.budget.settle(reserved, *tokens)

    def _classify_status(self, error: HttpStatusError) -> Exception:
        """Return the exception for a status that the provider has not handled itself."""
        where = get_address(self.settings)
        status = f"{error.status}: {error}"
        if error.status in BUSY_STATUSES or error.status >= 500:
            if (error.retry_after or 0) > LONGEST_RETRY_AFTER_SECONDS:
                return InputError(
                    f"{where} asks for a delay of {error.retry_after:.0f} seconds ({status}); run again after that",
                    code="server-busy",
                )
            return UnavailableError(f"{where} answers {status}", retry_after=error.retry_after)
        if error.status in (401, 403):
            return InputError(
                f"{where} refuses the key ({status}); set {VARIABLES[self.settings.provider]} to a valid one",
                code="invalid-key",
            )
        if error.status == 402:
            return InputError(
                f"{where} requires a payment ({status}); check your account there", code="payment-required"
            )
        return RowRefusedError(f"{where} refuses the request ({status})")

    async def _describe_unknown_model(self, error: UnknownModelError) -> str:
        where, model = get_address(self.settings), self.settings.model
        try:
            async with asyncio.timeout(self.settings.timeout_seconds):
                known = await self.provider.list_models()
        except (InputError, HttpStatusError, UnavailableError, MalformedError, TimeoutError):
            return (
                f"{where} answers that there is no {model!r} ({error}), and does not list its models; check "
                "judge.model and judge.base_url"
            )
        return f"judge.model is {model!r}, which {where} does not know ({error}); known: {', '.join(sorted(known))}"

    def _stop(self, code: str, reason: str) -> None:
        if self.ledger.stopped is None:
            self.ledger.stop_code, self.ledger.stopped = code, reason
        self._stopping.set()

    def _compute_pause(self, state: RetryCallState) -> float:
        pause = wait_exponential_jitter(
            multiplier=FIRST_PAUSE_SECONDS, max=LONGEST_PAUSE_SECONDS, jitter=FIRST_PAUSE_SECONDS
        )(state)
        retry_after = getattr(_get_error(state), "retry_after", None)
        if retry_after is None:
            return pause
        self._not_before = max(self._not_before, time.monotonic() + retry_after)
        return max(retry_after, pause)

    async def _sleep(self, seconds: float) -> None:
        """Wait; raises _RunStoppedError if the run stops meanwhile."""
        if seconds > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), seconds)
        if self._stopping.is_set():
            raise _RunStoppedError

    def _log_retry(self, state: RetryCallState) -> None:
        self.ledger.retries += 1
        logger.info(
            "judge: %s; retrying in %.1f s", _get_error(state), state.next_action.sleep if state.next_action else 0
        )


def _get_error(state: RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome else None
