"""Judge failures: why a request brought no verdict, as exceptions by what is done next.

A problem that ends the whole run at once is a `lathe.common.errors.InputError`; those of the connection are in
`lathe.common.http_session`.
"""


class RowRefusedError(Exception):
    """The server refuses this row: it gets no verdict, and the run goes on with the other rows."""


class UnknownModelError(Exception):
    """The server does not know the model."""


class RetryAtOnceError(Exception):
    """The provider has changed the form of its requests after a refusal: the request is sent again at once."""


class BudgetSpentError(Exception):
    """Another request could exceed judge.max_requests or judge.max_cost."""
