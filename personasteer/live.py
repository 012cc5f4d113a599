"""Requests that join and leave a running batch: sessions, and streams of text from them."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from personasteer.chat import Conversation
from personasteer.engine import Compiled, Request, Sampling, TextStream
from personasteer.errors import ArgumentError, ModelError, PersonasteerError, TemplateError, VectorError
from personasteer.grammar import grammar_of
from personasteer.prompts import Prompt
from personasteer.steering import Steer, SteeredModel, Steering, as_steering, check_fits

if TYPE_CHECKING:
    from personasteer.model import Model
    from personasteer.vectors import PersonaVector

Reading: TypeAlias = "PersonaVector | tuple[PersonaVector, Sequence[int]] | Mapping[int, NDArray[Any]]"


class Observer(Protocol):
    """Looks at a request of a session while it runs."""

    def at_prompt(self, readings: list[NDArray[np.float32]], n_prompt: int) -> Steering:
        """Asked once the prompt's n_prompt tokens are read, with their readings: edits of the response beside the
        request's own. Must not call the session.
        """

    def after_token(self, stream: Stream) -> None:
        """Told after each token, and when the request is done; may steer, cancel, or submit another."""


def make_request(
    model: Model,
    prompt: Prompt,
    steering: Steering,
    *,
    seed: int,
    max_tokens: int = 256,
    temperature: float = 0.7,
    top_k: int = 40,
    top_p: float = 0.95,
    min_p: float = 0.05,
    repeat_penalty: float = 1.0,
    frequency_penalty: float = 0.0,
    presence_penalty: float = 0.0,
    logit_bias: Mapping[int, float] | None = None,
    stop: Sequence[str] | str = (),
    grammar: str | None = None,
    json_schema: Mapping[str, Any] | str | None = None,
    logprobs: int | None = None,
    readings: Sequence[Reading] = (),
    read_prompt: bool = True,
    reuse_cache: bool = False,
) -> Request:
    """A request from the options of chat and generate. Raises ArgumentError for one outside its range."""
    if max_tokens < 1:
        raise ArgumentError(f"max_tokens must be at least 1, not {max_tokens}")
    if logprobs is not None and not 0 <= logprobs <= 100:
        raise ArgumentError(f"logprobs must be between 0 and 100, not {logprobs}")
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(isinstance(s, str) for s in stops):
        raise ArgumentError(f"stop must be a text or a list of texts, not {stop!r:.80}")
    return Request(
        prompt.tokens,
        prompt.n_prompt,
        steering,
        max_tokens,
        Sampling(
            temperature,
            top_k,
            top_p,
            min_p,
            repeat_penalty,
            seed,
            frequency_penalty,
            presence_penalty,
            _biases(logit_bias or {}, model),
        ),
        tuple(filter(None, stops)),
        reads=tuple(_reading(r, model) for r in readings),
        reads_from=0 if read_prompt else (prompt.n_prompt or len(prompt.tokens)) - 1,
        share_prefix=reuse_cache,
        roles=prompt.roles,
        think_marks=prompt.think_marks,
        thinking=prompt.thinking,
        grammar=grammar_of(grammar, json_schema),
        n_logprobs=-1 if logprobs is None else logprobs,
    )


def _biases(given: Mapping[int, float], model: Model) -> dict[int, float]:
    for token in given:
        if not isinstance(token, int) or not 0 <= token < model.n_vocab:
            raise ArgumentError(f"logit_bias names token {token!r}: the model has tokens 0 to {model.n_vocab - 1}")
    return dict(given)


def _reading(reading: Any, model: SteeredModel) -> dict[int, NDArray[np.float64]]:
    """{il: v-hat} of a vector at its recommended layers, or at given ones; or given directions as they are."""
    if isinstance(reading, Mapping):
        return {_block(il, model): _direction(u, model) for il, u in reading.items()}
    vector, layers = reading if isinstance(reading, tuple) and len(reading) == 2 else (reading, None)
    if not hasattr(vector, "directions_at"):
        raise ArgumentError(
            f"readings takes PersonaVectors, (vector, layers) or {{block: direction}}, not {type(vector).__name__}"
        )
    at = tuple(sorted({int(il) for il in (vector.layers if layers is None else layers)}))
    if not at:
        raise ArgumentError(f"vector {vector.name!r} names no layer to read: pass (vector, layers)")
    check_fits(vector, model)
    data, lengths = vector.directions_at(at)
    return dict(zip(at, data / lengths[:, None], strict=True))


def _block(il: Any, model: SteeredModel) -> int:
    if not isinstance(il, (int, np.integer)) or not 0 <= il < model.n_layer:
        raise VectorError(f"block {il!r} to read is out of range: the model has blocks 0 to {model.n_layer - 1}")
    return int(il)


def _direction(u: Any, model: SteeredModel) -> NDArray[np.float64]:
    try:
        direction = np.asarray(u, np.float64)
    except (TypeError, ValueError) as e:
        raise VectorError(f"a direction to read must be numbers, not {type(u).__name__}") from e
    if direction.shape != (model.n_embd,) or not np.isfinite(direction).all():
        raise VectorError(f"a direction to read must be {model.n_embd} finite numbers")
    return direction


@dataclass(frozen=True)
class Answer:
    """What came of a request.

    Args:
        text: the generated text, without stop string and end-of-turn token.
        finish: "stop", "length" or "cancelled".
        tokens: the generated tokens.
        rho: the largest dose that a token got, in units of the stream's norm.
        logprobs: log p of each generated token under the steered model, before temperature and filters; or None.
        top_logprobs: for each generated token [(token, log p)] of the most probable ones; or None.
        readings: for each requested vector (tokens of prompt and answer, layers): <h, v-hat> before the block's edits,
            NaN where there is none (a reused prefix, the last block within the prompt).
        n_prompt, n_reused: tokens of the prompt, and how many of them came from the prefix cache.
    """

    text: str
    finish: str
    tokens: list[int]
    rho: float
    logprobs: list[float] | None
    top_logprobs: list[list[tuple[int, float]]] | None
    readings: list[NDArray[np.float32]]
    n_prompt: int
    n_reused: int


class Stream:
    """One request of a session: iterate for its text, piece by piece, or ask for the whole `result`."""

    def __init__(self, session: Session, compiled: Compiled, request_id: int, observer: Observer | None = None) -> None:
        self._session, self._compiled, self._id, self._observer = session, compiled, request_id, observer
        self._text = TextStream(compiled.request.stop)
        self._pieces: deque[str] = deque()
        self._tokens: list[tuple[int, float, list[tuple[int, float]]]] = []
        self._answer: Answer | None = None
        self._error: BaseException | None = None

    def __iter__(self) -> Iterator[str]:
        while (piece := self._next()) is not None:
            yield piece

    def _next(self) -> str | None:
        while not self._pieces and not self.done:
            self._session._advance(self)
        if self._pieces:
            return self._pieces.popleft()
        if self._error:
            raise self._error
        return None

    async def __aiter__(self) -> AsyncIterator[str]:
        while True:
            while not self._pieces and not self.done:
                await self._session._advance_async(self)
            if not self._pieces and not self._error:
                return
            piece = self._next()
            assert piece is not None
            yield piece

    @property
    def done(self) -> bool:
        """Whether the answer is complete, cancelled or failed."""
        return self._answer is not None or self._error is not None

    def result(self) -> Answer:
        """Compute to the end. Raises ModelError where the request failed."""
        while not self.done:
            self._session._advance(self, to_end=True)
        if self._error:
            raise self._error
        assert self._answer is not None
        return self._answer

    def cancel(self) -> None:
        """Stop now; `result` then gives what there is. The other requests go on."""
        self._session._cancel(self)

    def steer(self, steer: Steer) -> None:
        """Other edits from the next token on; what is computed stays as it is. Without effect on a finished request.

        Raises ArgumentError for a condition on the prompt, which has been read.
        """
        self._session._steer(self, as_steering(steer))

    @property
    def n_prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self._compiled.request.tokens)

    def take(self) -> str:
        """The text that is there and was not taken, without computing anything."""
        text = "".join(self._pieces)
        self._pieces.clear()
        return text

    def tokens(self, first: int = 0) -> list[tuple[int, float, list[tuple[int, float]]]]:
        """(token, log p, [(token, log p)] of the most probable ones) of the tokens generated so far, from the token
        `first` on; NaN and [] where no log p was asked for.
        """
        return self._tokens[first:]

    @property
    def rho(self) -> float:
        """The largest dose that a token gets, or got before `steer`."""
        return self._compiled.rho

    def readings(self, first: int = 0) -> list[NDArray[np.float32]]:
        """The readings of the tokens computed so far, as in Answer; from the token `first` on."""
        return self._session._readings(self, first)


class Session:
    """Continuous batching over one model: requests join and leave between decodes, each with its own steering, sampling
    and end. Made by Model.session(). Whoever iterates over a stream computes for all; methods may be called from any
    thread.

    Texts computed before are taken over by later requests with the same beginning under the same steering, and under no
    other; `reuse_cache=False` computes every request from its first token.
    """

    def __init__(self, model: Model, native: Any, *, reuse_cache: bool) -> None:
        self._model, self._native, self._reuse = model, native, reuse_cache
        self._streams: dict[int, Stream] = {}
        self._lock = threading.RLock()
        self._turns: weakref.WeakKeyDictionary[Any, asyncio.Lock] = weakref.WeakKeyDictionary()
        self._turns_lock = threading.Lock()  # never held for long: the event loop waits for it

    def submit(
        self,
        conversation: Conversation | None = None,
        *,
        prompt: str | Sequence[int] | None = None,
        system: str | None = None,
        steer: Steer = None,
        observer: Observer | None = None,
        thinking: bool = True,
        variables: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Stream:
        """Queue a conversation (through the chat template), or a plain `prompt`, a text or tokens.

        Args:
            steer: as in Model.chat.
            observer: is asked for more edits once the prompt is read, and told of each token.
            thinking: False asks templates that know `enable_thinking` for an answer without thinking.
            variables: more names that the chat template may know, such as tools.
            options: max_tokens=256, temperature=0.7, top_k=40, top_p=0.95, min_p=0.05, repeat_penalty=1.0,
                frequency_penalty=0.0, presence_penalty=0.0, logit_bias={token: added to its logit}, seed, stop=();
                grammar (GBNF with the start symbol root) or json_schema; logprobs=n, for log p of each token and of the
                n most probable ones; readings=[vector or (vector, layers) or {block: direction}, ...], projected on for
                every token; read_prompt=False leaves out the prompt but its last token, so that a computed prefix can
                be taken over.

        Raises:
            ContextError: the prompt does not fit. ArgumentError: an option outside its range, a broken grammar.
        """
        if (conversation is None) == (prompt is None):
            raise ArgumentError("submit takes a conversation or a plain prompt, one of the two")
        if prompt is not None and system is not None:
            raise ArgumentError("a plain prompt takes no system message")
        steering = self._model.steering_of(steer)
        given = (
            self._model._plain_prompt(prompt)
            if prompt is not None
            else self._chat_prompt(
                conversation or "", system, steering.needs_roles, thinking=thinking, variables=variables
            )
        )
        options.setdefault("reuse_cache", self._reuse)
        seed = options.pop("seed", None)
        seed = self._model.seed if seed is None else seed
        request = make_request(self._model, given, steering, seed=seed, **options)
        if observer:
            request = replace(request, at_prompt=observer.at_prompt)
        return self._submit(request, observer)

    def _chat_prompt(self, conversation: Conversation, system: str | None, needs_roles: bool, **how: Any) -> Prompt:
        """With roles, which a later `steer` may need, where the template shows them."""
        try:
            return self._model._chat_prompt(conversation, system, roles=True, **how)
        except TemplateError:
            if needs_roles:
                raise
            return self._model._chat_prompt(conversation, system, **how)

    def _check_hook(self, steering: Steering, reads: Sequence[object] = ()) -> None:
        if self._model.unhooked and (steering or reads):
            raise ModelError(
                f"{self._model.name} runs without the hook ({self._model.unhooked}): a session can neither steer nor "
                "read it; chat and generate take additions with raw=True"
            )

    def _submit(self, request: Request, observer: Observer | None = None) -> Stream:
        native = self._open()
        self._check_hook(request.steering, request.reads)
        if request.steering:
            _ = self._model.norms  # measured before: it is a run of its own
        compiled = Compiled(request, self._model)
        with self._lock:  # no step may see the request before it is known here
            request_id = native.submit(**compiled.arguments(0))
            stream = self._streams[request_id] = Stream(self, compiled, request_id, observer)
        return stream

    def step(self) -> bool:
        """Compute one decode; whether requests are left. Raises what the decode did, and all requests fail with it.
        Edits that turn out unusable amid a request fail that request alone.
        """
        with self._model._lock, self._lock:
            native = self._open()
            if self._model._running:
                raise ModelError("a callback of a running computation cannot start another on the same model")
            self._model._running = True
            try:
                observed = [s for s in self._streams.values() if s._observer]
                for request_id, token, piece, logprob, top in native.step(self._decide) if native.busy else ():
                    stream = self._streams[request_id]
                    stream._tokens.append((token, logprob, top))
                    if text := stream._text.push(piece):
                        stream._pieces.append(text)
                self._collect(native)
                for stream in observed:
                    assert stream._observer is not None
                    try:
                        stream._observer.after_token(stream)
                    except PersonasteerError as e:
                        stream._error = e
                self._drop_failed(native)
                return bool(native.busy)
            except BaseException as e:  # Ctrl-C may come anywhere in between
                native.reset()
                self._fail(e)
                raise
            finally:
                self._model._running = False

    def run(self) -> None:
        """Compute until no request is left."""
        while self.step():
            pass

    def close(self) -> None:
        """Cancel what is running and free the memory."""
        with self._lock:
            self._native = None
            self._fail(ModelError("the session is closed"))

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def n_running(self) -> int:
        """Requests that are not done."""
        return len(self._streams)

    # -- for the streams --------------------------------------------------------------------------------------------

    def _open(self) -> Any:
        self._model._open()
        if self._native is None:
            raise ModelError("the session is closed")
        return self._native

    def _advance(self, stream: Stream, *, to_end: bool = False) -> None:
        """One decode, unless another thread has computed what the stream waits for."""
        with self._model._lock, self._lock:
            if not stream.done and (to_end or not stream._pieces):
                self.step()

    async def _advance_async(self, stream: Stream) -> None:
        loop = asyncio.get_running_loop()
        with self._turns_lock:
            turn = self._turns.setdefault(loop, asyncio.Lock())
        async with turn:
            if not stream._pieces and not stream.done:
                await asyncio.to_thread(self._advance, stream)

    def _decide(self, request_id: int, readings: NDArray[np.float32]) -> Any:
        stream = self._streams[request_id]
        try:
            return stream._compiled.decide(readings)
        except PersonasteerError as e:
            stream._error = e
            return None

    def _drop_failed(self, native: Any) -> None:
        """Requests whose own edits failed amid their computation; the others go on."""
        for request_id in [i for i, stream in self._streams.items() if stream._error]:
            native.cancel(request_id)
            del self._streams[request_id]

    def _collect(self, native: Any) -> None:
        for r in native.take_results():
            stream = self._streams.pop(r["id"], None)
            if stream is None or stream._error:
                continue
            if r["error"]:
                stream._error = ModelError(r["error"])
                continue
            if text := stream._text.finish(r["text"]):
                stream._pieces.append(text)
            wants = stream._compiled.request.n_logprobs >= 0
            stream._answer = Answer(
                text=r["text"].decode("utf-8", "replace"),
                finish=r["finish"],
                tokens=list(r["tokens"]),
                rho=stream.rho,
                logprobs=list(r["logprobs"]) if wants else None,
                top_logprobs=[list(t) for t in r["top_logprobs"]] if wants else None,
                readings=stream._compiled.own_readings(r["readings"]),
                n_prompt=r["n_prompt"],
                n_reused=r["n_reused"],
            )

    def _fail(self, error: BaseException) -> None:
        for stream in self._streams.values():
            known = isinstance(error, PersonasteerError)
            stream._error = error if known else ModelError("the computation was interrupted")
        self._streams.clear()

    def _cancel(self, stream: Stream) -> None:
        native = self._native
        if native is None or stream.done:
            return
        native.cancel(stream._id)
        with self._lock:
            self._collect(native)

    def _steer(self, stream: Stream, steering: Steering) -> None:
        native = self._open()
        self._check_hook(steering)
        if not stream.done:
            native.steer(id=stream._id, **stream._compiled.resteer(steering))

    def _readings(self, stream: Stream, first: int) -> list[NDArray[np.float32]]:
        if stream._answer is not None:
            return [r[first:] for r in stream._answer.readings]
        if self._native is None:
            return []
        return stream._compiled.own_readings(stream._compiled.shaped(self._native.readings_of(stream._id, first)))
