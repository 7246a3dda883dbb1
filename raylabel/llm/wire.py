"""One request to an OpenAI-compatible server: what it takes, what it answers, and which of its errors pass.

`Server.answer(question)` gives a plain dict (`text`, `refusal`, `finish`, `reasoning`, `prompt_tokens`,
`completion_tokens`, `logprobs`) or raises: Passing for what may go better later (429, 5xx, timeouts, cut connections, bodies
that are no answer), Final for what will not, BadInput for what the user can mend, RunFailed where the account has no credit.
What a server does not know of the protocol (JSON schemas, `max_tokens`, temperatures, logprobs) is found out from its
complaints and left out from then on. The key is in the client object alone and is cut out of every message.
"""

from __future__ import annotations

import asyncio
import os
import re
from typing import Any
from urllib.parse import urlsplit

import openai

from raylabel.errors import BadInput, RunFailed
from raylabel.sections import DescribeConfig

OPENAI = "https://api.openai.com/v1"
ALTERNATIVES = 20
LONGEST = 200
FORMATS = ("json_schema", "json_object", None)


class Passing(Exception):
    """May go better later.

    `wait`: seconds the server asks for; `busy`: it says that it has too much to do; `slow`: it did not answer in time; `lost`:
    there was no connection.
    """

    def __init__(
        self, reason: str, wait: float | None = None, busy: bool = False, slow: bool = False, lost: bool = False
    ) -> None:
        super().__init__(reason)
        self.wait, self.busy, self.slow, self.lost = wait, busy, slow, lost


class Final(Exception):
    """Will not go better."""


class Server:
    """A model at a server."""

    def __init__(self, config: DescribeConfig) -> None:
        if not config.model:
            raise BadInput("describe.model is required: the name of the explainer's model at the server")
        self.model, self.url, self._env = config.model, config.base_url or OPENAI, config.api_key_env
        parts = urlsplit(self.url)
        if parts.username or parts.password:
            raise BadInput("describe.base_url: give the key in the variable named by describe.api_key_env, not in the URL")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise BadInput(f"describe.base_url: {self.url!r} is no http or https URL")
        key = os.environ.get(self._env, "")
        if not key and config.base_url is None:
            raise BadInput(f"describe.api_key_env: the environment variable {self._env} is not set")
        self._secret, self._timeout = key, config.timeout
        self._client = openai.AsyncOpenAI(
            api_key=key or "none", base_url=self.url, max_retries=0, timeout=config.timeout, organization="", project=""
        )
        self._format, self._limit, self._temperature, self._logprobs = 0, "max_tokens", True, True
        self.reached = False

    def __repr__(self) -> str:
        return f"Server({self.model!r} at {self.url!r})"

    __reduce__ = None  # type: ignore[assignment]  # it holds the key: it stays in its process

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.close()

    async def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        """The server's answer to `messages`, `schema` (JSON schema or None), `max_tokens`, `temperature`, `logprobs`."""
        while True:
            known = self._dialect
            try:
                response = await asyncio.wait_for(self._send(question), self._timeout)
                found = self._read(response)
                self.reached = True
                return found
            except (TimeoutError, openai.APITimeoutError):
                raise Passing(f"no answer within {self._timeout:g} s", slow=True) from None
            except openai.APIStatusError as error:
                # Another request may have found out in the meantime.
                if not (self._learn(error) or known != self._dialect):
                    raise self._sorted(error) from None
            except openai.APIConnectionError as error:
                cause = error.__cause__ or error
                raise Passing(f"no connection: {self.clean(cause) or type(cause).__name__}", lost=True) from None
            except (ValueError, TypeError, AttributeError, openai.APIError) as error:
                raise Passing(f"an answer that is not the protocol's: {self.clean(error)}") from None

    def clean(self, error: object) -> str:
        """An error in one short line without the key."""
        text = " ".join(str(error).split())
        if self._secret:
            text = text.replace(self._secret, "***")
        text = re.sub(r"\b(sk|gsk|hf|pk)[-_][A-Za-z0-9_*.-]{6,}", "***", text)
        return text[:LONGEST]

    @property
    def _dialect(self) -> tuple[Any, ...]:
        return self._format, self._limit, self._temperature, self._logprobs

    async def _send(self, question: dict[str, Any]) -> Any:
        given: dict[str, Any] = {self._limit: question["max_tokens"]}
        if self._temperature:
            given["temperature"] = question["temperature"]
        kind = FORMATS[self._format]
        if question["schema"] is not None and kind == "json_schema":
            wanted = {"name": "answer", "schema": question["schema"], "strict": True}
            given["response_format"] = {"type": kind, "json_schema": wanted}
        elif question["schema"] is not None and kind == "json_object":
            given["response_format"] = {"type": kind, "schema": question["schema"]}
        if question["logprobs"] and self._logprobs:
            given |= {"logprobs": True, "top_logprobs": ALTERNATIVES}
        return await self._client.chat.completions.create(model=self.model, messages=question["messages"], **given)

    def _learn(self, error: openai.APIStatusError) -> bool:
        """Whether a complaint is about something that can be said otherwise."""
        if error.status_code not in (400, 422, 500, 501):
            return False
        text = f"{error.message} {error.body}".lower()
        if self._limit == "max_tokens" and "max_completion_tokens" in text:
            self._limit = "max_completion_tokens"
        elif self._logprobs and "logprobs" in text:
            self._logprobs = False
        elif self._temperature and "temperature" in text and error.status_code in (400, 422):
            self._temperature = False
        elif FORMATS[self._format] and any(w in text for w in ("response_format", "json_schema", "json_object", "guided")):
            self._format += 1
        else:
            return False
        return True

    def _sorted(self, error: openai.APIStatusError) -> Exception:
        status, code = error.status_code, str(error.code or "")
        reason = f"{status}: {self.clean(error.message)}"
        if status == 401 or (status == 403 and not self.reached):
            return BadInput(f"describe.api_key_env: {self.url} refuses the key in {self._env} ({status})")
        if status == 404 and not self.reached:
            return BadInput(f"describe.model, describe.base_url: {self.url} has no model {self.model!r} (404)")
        if status == 402 or (status == 429 and ("quota" in code or "billing" in code)):
            return RunFailed(f"the account at {self.url} has no credit; everything paid for is kept ({status} {code})")
        if status in (408, 409, 425, 429) or status >= 500:
            return Passing(reason, _retry_after(error.response.headers), busy=status in (429, 503, 529))
        return Final(reason)

    def _read(self, response: Any) -> dict[str, Any]:
        wrong = getattr(response, "error", None) or (response.get("error") if isinstance(response, dict) else None)
        if wrong:
            raise Passing(f"200 with an error: {self.clean(wrong)}")
        if not isinstance(response, openai.types.chat.ChatCompletion):
            raise Passing(f"an answer that is not the protocol's: {self.clean(response)}")
        if not response.choices:
            raise Passing("an answer without choices")
        choice = response.choices[0]
        message = choice.message
        if message is None:
            raise Passing("a choice without a message")
        usage, listed = response.usage, choice.logprobs.content if choice.logprobs else None
        extra = getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None)
        return {
            "text": message.content or "", "refusal": bool(message.refusal), "finish": str(choice.finish_reason),
            "reasoning": bool(extra), "prompt_tokens": usage.prompt_tokens if usage else None,
            "completion_tokens": usage.completion_tokens if usage else None,
            "logprobs": [token.model_dump(mode="json") for token in listed] if listed else None,
        }  # fmt: skip


def _retry_after(headers: Any) -> float | None:
    """Seconds of `Retry-After` (or `retry-after-ms`), None where there is none."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            return max(0.0, float(headers[name]) * unit)
        except (KeyError, ValueError):
            continue
    return None
