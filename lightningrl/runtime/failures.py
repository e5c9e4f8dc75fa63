"""Which exceptions say that the infrastructure failed, not the agent: those are worth another attempt."""

from __future__ import annotations

import traceback

# By name, so that no client has to be installed: openai and anthropic; httpx, httpx2; requests; aiohttp.
CONNECTION_ERRORS = frozenset(
    "APIConnectionError TransportError ConnectionError Timeout ChunkedEncodingError ClientConnectionError".split()
)


class AgentFailed(Exception):
    """Stands for what an agent raised in another process, described and judged there."""

    def __init__(self, text: str, *, infrastructure: bool) -> None:
        super().__init__(text)
        self.infrastructure = infrastructure


def is_infrastructure_failure(exception: BaseException) -> bool:
    """Whether a connection error, a timeout, HTTP 429 or 5xx is behind an exception.

    An explicit cause counts (`raise … from error`), since frameworks wrap their client's errors; of a group of exceptions, all
    must.
    """
    seen: set[int] = set()
    link: BaseException | None = exception
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        if isinstance(link, AgentFailed):
            return link.infrastructure
        if isinstance(link, BaseExceptionGroup):
            return all(is_infrastructure_failure(each) for each in link.exceptions)
        if _is_connection_error(link) or _is_server_error(link):
            return True
        link = link.__cause__
    return False


def _is_connection_error(exception: BaseException) -> bool:
    names = {base.__name__ for base in type(exception).__mro__}
    if "UnsupportedProtocol" in names:  # httpx counts it as a transport error, but it is a bad URL
        return False
    return isinstance(exception, TimeoutError) or bool(names & CONNECTION_ERRORS)


def _is_server_error(exception: BaseException) -> bool:
    # openai and anthropic put the status on the exception; httpx, requests on its response; aiohttp calls it `status`.
    response = getattr(exception, "response", None)
    holders = ((exception, "status_code"), (response, "status_code"), (exception, "status"))
    statuses = [getattr(holder, name, None) for holder, name in holders]
    return any(isinstance(status, int) and (status == 429 or 500 <= status < 600) for status in statuses)


def describe(exception: BaseException) -> str:
    """The traceback, as Python prints it; of a failure in another process that process' own."""
    if isinstance(exception, AgentFailed):
        return str(exception)
    return "".join(traceback.format_exception(exception))
