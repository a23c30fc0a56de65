"""The ASGI middleware between vLLM's authentication and its routes."""

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from mikv_vllm.config import RATIO_FIELD, RatioError
from mikv_vllm.server.reports import HttpRequest, current_request
from mikv_vllm.server.request_body import (
    RATIO_HEADER,
    RatioRequest,
    put_into_xargs,
    refuse_ratio,
    take_ratio,
)
from mikv_vllm.server.response_body import EventStream, header_value, rewrite_json

MESSAGES_ROUTE = "/v1/messages"
RESPONSES_ROUTE = "/v1/responses"
COHERE_ROUTE = "/cohere/v2/chat"
"""Exists only with ``VLLM_ENABLE_COHERE_API=1`` and the package ``cohere``."""
GENERATE_ROUTES = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/chat/completions/batch",
    RESPONSES_ROUTE,
    MESSAGES_ROUTE,
    COHERE_ROUTE,
    "/inference/v1/generate",
    "/invocations",
)
"""Routes that accept a ratio and return a report."""
RENDER_ROUTES = tuple(
    f"{route}/render"
    for route in ("/v1/completions", "/v1/chat/completions", RESPONSES_ROUTE, MESSAGES_ROUTE)
)
"""Routes that return a request for ``/inference/v1/generate``. The ratio is part of it."""
AUDIO_ROUTES = ("/v1/audio/transcriptions", "/v1/audio/translations")
"""Routes that receive a form. They accept a ratio in the header and return a report."""
WEBSOCKET_ROUTES = ("/v1/realtime",)
"""Routes that generate in messages, which have no field for a ratio. They refuse the header."""

REPORT_HEADER = "x-kv-compression"
"""Header with the report of an answer that is not a stream, as JSON."""


class RatioMiddleware:
    """Reads the ratio of requests and adds the report to responses.

    A ratio in a request to any other route is refused. All events of a stream except the last one
    are unchanged. The largest ratio is ``app.state.mikv_largest_ratio``.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if scope["type"] == "websocket":
            await self._websocket(path, scope, receive, send)
        elif scope["method"] == "POST":
            await self._post(path, scope, receive, send)
        elif scope["method"] == "GET" and path.startswith(f"{RESPONSES_ROUTE}/"):
            await self.app(scope, receive, ReportSender(send, HttpRequest(None, True, False)))
        else:
            await self.app(scope, receive, send)

    async def _websocket(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a ratio in the header."""
        if RATIO_HEADER in Headers(scope=scope):
            sentence = f"{RATIO_HEADER} is not supported by the websocket {path}."
            refusal = _bad_request(sentence, path)
            await WebSocket(scope, receive, send).send_denial_response(refusal)
        else:
            await self.app(scope, receive, send)

    async def _post(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        header = Headers(scope=scope).get(RATIO_HEADER)
        try:
            body = await Request(scope, receive).body()
            taken = _take_ratio(path, body, header, scope["app"].state.mikv_largest_ratio)
        except ClientDisconnect:
            return
        except RatioError as error:
            await _bad_request(str(error), path)(scope, receive, send)
            return
        if taken is None:
            await self.app(scope, _replay(body, receive), send)
            return
        if taken.body is not body:
            scope = _with_length(scope, len(taken.body))
        request = HttpRequest(taken.ratio, taken.is_set, is_stored=path == RESPONSES_ROUTE)
        token = current_request.set(request)
        try:
            await self.app(scope, _replay(taken.body, receive), ReportSender(send, request))
        finally:
            current_request.reset(token)


def _take_ratio(path: str, body: bytes, header: str | None, largest: float) -> RatioRequest | None:
    """Return the ratio of a request to any route, or None if the route does not generate text.

    Raises:
        RatioError: the ratio is wrong, or the route cannot apply it.
    """
    if path in GENERATE_ROUTES:
        return take_ratio(body, header, largest)
    if path in AUDIO_ROUTES:
        if RATIO_FIELD.encode() in body:
            raise RatioError(f"{RATIO_FIELD} is not a field of a form; set {RATIO_HEADER}.")
        return take_ratio(b"", header, largest)._replace(body=body)
    if path in RENDER_ROUTES:
        rendered = take_ratio(body, header, largest)
        if rendered.ratio is None:
            return rendered
        return rendered._replace(body=put_into_xargs(rendered.body, rendered.ratio))
    refuse_ratio(body, header, path)
    return None


class ReportSender:
    """An ASGI ``send`` that adds the report of a request to its response."""

    def __init__(self, send: Send, request: HttpRequest) -> None:
        self._send = send
        self._request = request
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
            self._stream = EventStream(self._request.total)
        await self._send(message)

    async def _body_of_json(self, message: Message) -> None:
        self._json += message.get("body", b"")
        if message.get("more_body", False):
            return
        assert self._start is not None, "the start of a response comes before its body"
        body, report = rewrite_json(bytes(self._json), self._request.total())
        headers = MutableHeaders(raw=self._start["headers"])
        headers["content-length"] = str(len(body))
        if report is not None:
            headers[REPORT_HEADER] = header_value(report)
        await self._send(self._start)
        await self._send({"type": "http.response.body", "body": body})

    async def _body_of_stream(self, message: Message, stream: EventStream) -> None:
        body = stream.feed(message.get("body", b""))
        more = message.get("more_body", False)
        if not more:
            body += stream.end()
        if body or not more:
            await self._send({"type": "http.response.body", "body": body, "more_body": more})


def _bad_request(sentence: str, path: str) -> Response:
    """Return a response with status 400 and the error body of the route."""
    from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

    error = create_error_response(sentence, param=RATIO_FIELD)
    if path == MESSAGES_ROUTE:
        from vllm.entrypoints.anthropic.api_router import translate_error_response

        return translate_error_response(error)
    if path == COHERE_ROUTE:
        return JSONResponse({"message": sentence}, status_code=error.error.code)
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
