"""Judge budget: the limits on requests and cost of one run; a request in flight counts at its highest cost."""

import asyncio
from dataclasses import dataclass

from lathe.evaluation.judge.failures import BudgetSpentError

# Fewest bytes per token of a whole request, a lower bound: English text has 4, Russian and Chinese 3 to 5, JSON 3.
BYTES_PER_TOKEN = 2


@dataclass(frozen=True)
class TokenReservation:
    """The most tokens that a request in flight can use."""

    input_tokens: int
    output_tokens: int


class Budget:
    """Counts requests, repeated attempts included, and their cost.

    Prices are per million tokens. If the server does not report its tokens, a request counts at its highest cost.
    """

    def __init__(
        self, *, max_requests: int, max_cost: float | None, input_price: float, output_price: float, max_tokens: int
    ) -> None:
        self.max_requests, self.max_cost, self.max_tokens = max_requests, max_cost, max_tokens
        self.input_price, self.output_price = input_price, output_price
        self.requests = self.input_tokens = self.output_tokens = 0
        self.cost = 0.0
        self._in_flight: list[TokenReservation] = []
        self._changed = asyncio.Condition()

    async def reserve(self, size_bytes: int) -> TokenReservation:
        """Reserve the highest cost of one request; wait while requests in flight may still use up the budget.

        Raises BudgetSpentError if the request does not fit and none is in flight.
        """
        reservation = TokenReservation(-(-size_bytes // BYTES_PER_TOKEN), self.max_tokens)
        async with self._changed:
            while True:
                if self.requests >= self.max_requests:
                    raise BudgetSpentError(
                        f"{self.requests} requests were made, as many as judge.max_requests allows; raise it"
                    )
                if self.max_cost is None or self._compute_highest_cost(*self._in_flight, reservation) <= self.max_cost:
                    break
                if not self._in_flight:
                    raise BudgetSpentError(
                        f"{self.cost:.6g} is spent, and another request may cost "
                        f"{self._compute_cost(reservation):.6g}: more than judge.max_cost, {self.max_cost:g}, allows; "
                        "raise it"
                    )
                await self._changed.wait()
            self.requests += 1
            self._in_flight.append(reservation)
        return reservation

    async def settle(self, reserved: TokenReservation, input_tokens: int | None, output_tokens: int | None) -> None:
        """Replace a reservation by the tokens that were used: 0 if the request was not processed, None if unknown."""
        input_tokens = reserved.input_tokens if input_tokens is None else input_tokens
        output_tokens = reserved.output_tokens if output_tokens is None else output_tokens
        async with self._changed:
            self._in_flight.remove(reserved)
            self.input_tokens += input_tokens
            self.output_tokens += output_tokens
            self.cost += self._compute_cost(TokenReservation(input_tokens, output_tokens))
            self._changed.notify_all()

    def _compute_highest_cost(self, *requests: TokenReservation) -> float:
        return self.cost + sum(map(self._compute_cost, requests))

    def _compute_cost(self, request: TokenReservation) -> float:
        return (request.input_tokens * self.input_price + request.output_tokens * self.output_price) / 1e6
