"""Verdict requests: concurrent, retried with pauses, within the budget; each verdict is kept as it arrives."""

import asyncio
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lathe.common.errors import InputError, Interrupted
from lathe.common.http_session import HttpStatusError, MalformedError, UnavailableError
from lathe.common.patient_requests import PatientRequests, RunStoppedError, classify_status, describe_status
from lathe.common.progress import Progress
from lathe.evaluation.judge.api_keys import VARIABLES
from lathe.evaluation.judge.budget import Budget
from lathe.evaluation.judge.failures import BudgetSpentError, RetryAtOnceError, RowRefusedError, UnknownModelError
from lathe.evaluation.judge.prompt import JudgePrompt
from lathe.evaluation.judge.providers.provider import Provider, connect_provider, get_address
from lathe.evaluation.judge.verdict import JudgeAnswer, Verdict, parse_verdict
from lathe.evaluation.judge.verdict_cache import StoredVerdict, VerdictCache

if TYPE_CHECKING:
    from lathe.config.params import Judge

# Rows without a verdict, at the beginning of a run, after which the server is taken for no judge and the run stops.
MAX_ROWS_WITHOUT_VERDICT = 5


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
        self.patient = PatientRequests("judge", max_retries=settings.max_retries)

    def complete_ledger(self) -> JudgeLedger:
        self.ledger.retries = self.patient.retries
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
            if self.patient.is_stopping:
                return
            await self._request_verdict(key, prompt, progress)

    async def _request_verdict(self, key: str, prompt: JudgePrompt, progress: Progress) -> None:
        try:
            answer, verdict = await self.patient.send(lambda: self._request_once(prompt))
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
        except RunStoppedError:
            return
        else:
            stored = StoredVerdict(
                verdict.score, verdict.reason, answer.model, answer.input_tokens, answer.output_tokens
            )
            self.cache.add(key, stored)
            self.ledger.bought += 1
        progress.add(1)

    async def _request_once(self, prompt: JudgePrompt) -> tuple[JudgeAnswer, Verdict]:
        """Make one attempt: several requests only if the provider changes their form after a refusal."""
        while True:
            await self.patient.wait_for_server()
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
        known = classify_status(error, where, key=VARIABLES[self.settings.provider])
        return known or RowRefusedError(f"{where} refuses the request ({describe_status(error)})")

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
        self.patient.stop()
