"""What a run may still ask and spend. What is under way is reckoned at the most that it can cost."""

import asyncio
from dataclasses import dataclass

from lathe.evaluation.judge.failures import BudgetSpentError

# Fewest bytes of text in a token, on the average of a request: English has 4, Russian and Chinese 3 to 5, JSON 3.
BYTES_PER_TOKEN = 2


@dataclass(frozen=True)
class Reserved:
    """The most tokens that a request under way can take."""

    input_tokens: int
    output_tokens: int


class Budget:
    """Counts requests, attempts included, and their cost.

    Prices are those of a million tokens. Where the server does not tell its tokens, a request costs the most it can.
    """

    def __init__(
        self, *, max_requests: int, max_cost: float | None, input_price: float, output_price: float, max_tokens: int
    ) -> None:
        self.max_requests, self.max_cost, self.max_tokens = max_requests, max_cost, max_tokens
        self.input_price, self.output_price = input_price, output_price
        self.requests = self.input_tokens = self.output_tokens = 0
        self.cost = 0.0
        self._under_way: list[Reserved] = []
        self._changed = asyncio.Condition()

    async def reserve(self, size_bytes: int) -> Reserved:
        """Take room for one request; wait while what is under way might use it up.

        Raises BudgetSpentError where there is no room even if nothing is.
        """
        wanted = Reserved(-(-size_bytes // BYTES_PER_TOKEN), self.max_tokens)
        async with self._changed:
            while True:
                if self.requests >= self.max_requests:
                    raise BudgetSpentError(f"{self.requests} requests are made, as many as judge.max_requests allows")
                if self.max_cost is None or self._most(*self._under_way, wanted) <= self.max_cost:
                    break
                if not self._under_way:
                    raise BudgetSpentError(
                        f"{self.cost:.6g} is spent, and another request may cost {self._price(wanted):.6g}: more than "
                        f"judge.max_cost, {self.max_cost:g}, allows"
                    )
                await self._changed.wait()
            self.requests += 1
            self._under_way.append(wanted)
        return wanted

    async def settle(self, reserved: Reserved, input_tokens: int | None, output_tokens: int | None) -> None:
        """Book what a request took: 0 where it was not worked on, None where nobody knows."""
        input_tokens = reserved.input_tokens if input_tokens is None else input_tokens
        output_tokens = reserved.output_tokens if output_tokens is None else output_tokens
        async with self._changed:
            self._under_way.remove(reserved)
            self.input_tokens += input_tokens
            self.output_tokens += output_tokens
            self.cost += self._price(Reserved(input_tokens, output_tokens))
            self._changed.notify_all()

    def _most(self, *requests: Reserved) -> float:
        return self.cost + sum(map(self._price, requests))

    def _price(self, request: Reserved) -> float:
        return (request.input_tokens * self.input_price + request.output_tokens * self.output_price) / 1e6
