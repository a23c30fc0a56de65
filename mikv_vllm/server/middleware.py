"""The ASGI middleware between vLLM's authentication and its routes."""

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mikv_vllm.config import RATIO_FIELD, RatioError
from mikv_vllm.server.reports import ReportGroup, current_group
from mikv_vllm.server.request_body import move_ratio
from mikv_vllm.server.response_body import EventStream, rewrite_json

GENERATE_ROUTES = ("/v1/completions", "/v1/chat/completions", "/v1/responses")
"""Routes that accept a ratio and return a report."""

STORED_RESPONSES = "/v1/responses/"
"""Routes with this prefix return the report of an earlier response."""


class RatioMiddleware:
    """Reads ``kv_compression_ratio`` from requests and adds ``kv_compression`` to responses.

    Other routes and all events of a stream except the last one are unchanged. The largest ratio is
    ``app.state.mikv_largest_ratio``.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if scope["method"] == "POST" and path in GENERATE_ROUTES:
            await self._generate(scope, receive, send)
        elif scope["method"] == "GET" and path.startswith(STORED_RESPONSES):
            await self.app(scope, receive, ReportSender(send, ReportGroup()))
        else:
            await self.app(scope, receive, send)

    async def _generate(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await Request(scope, receive).body()
            moved = move_ratio(body, scope["app"].state.mikv_largest_ratio)
        except ClientDisconnect:
            return
        except RatioError as error:
            await _bad_request(str(error))(scope, receive, send)
            return
        if moved is not body:
            scope = _with_length(scope, len(moved))
        group = ReportGroup()
        token = current_group.set(group)
        try:
            await self.app(scope, _replay(moved, receive), ReportSender(send, group))
        finally:
            current_group.reset(token)


class ReportSender:
    """An ASGI ``send`` that adds the report of a group to the response."""

    def __init__(self, send: Send, group: ReportGroup) -> None:
        self._send = send
        self._group = group
        self._start: Message | None = None
        self._json = bytearray()
        self._stream: EventStream | None = None

    async def __call__(self, message: Message) -> None:
        """Send one message of the response."""
        if message["type"] == "http.response.start":
            await self._begin(message)
        elif message["type"] == "http.response.body" and self._start is not None:
            await self._body_of_json(message)
        elif message["type"] == "http.response.body" and self._stream is not None:
            await self._body_of_stream(message, self._stream)
        else:
            await self._send(message)

    async def _begin(self, message: Message) -> None:
        content_type = Headers(raw=message["headers"]).get("content-type", "")
        if message["status"] == 200 and content_type.startswith("application/json"):
            self._start = message  # sent with the body, because the body changes the content-length
            return
        if message["status"] == 200 and content_type.startswith("text/event-stream"):
            self._stream = EventStream(self._group.total)
        await self._send(message)

    async def _body_of_json(self, message: Message) -> None:
        self._json += message.get("body", b"")
        if message.get("more_body", False):
            return
        assert self._start is not None, "the start of a response comes before its body"
        body = rewrite_json(bytes(self._json), self._group.total())
        MutableHeaders(raw=self._start["headers"])["content-length"] = str(len(body))
        await self._send(self._start)
        await self._send({"type": "http.response.body", "body": body})

    async def _body_of_stream(self, message: Message, stream: EventStream) -> None:
        body = stream.feed(message.get("body", b""))
        more = message.get("more_body", False)
        if not more:
            body += stream.end()
        if body or not more:
            await self._send({"type": "http.response.body", "body": body, "more_body": more})


def _bad_request(sentence: str) -> Response:
    """Return a response with status 400 and vLLM's error body."""
    from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

    error = create_error_response(sentence, param=RATIO_FIELD)
    return JSONResponse(error.model_dump(), status_code=error.error.code)


def _with_length(scope: Scope, length: int) -> Scope:
    """Return the scope of the same request with a body of another length, in one message."""
    headers = [
        (name, value)
        for name, value in scope["headers"]
        if name not in (b"content-length", b"transfer-encoding")
    ]
    return {**scope, "headers": [*headers, (b"content-length", str(length).encode())]}


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return an ASGI ``receive`` that returns ``body`` first, then further messages."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return messages.pop() if messages else await receive()

    return receive_again
