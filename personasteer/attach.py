"""Steering an existing llama_cpp.Llama in place: its generation, chat handlers and streaming stay as they are."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llama_cpp
import numpy as np

from personasteer._native import load_core
from personasteer.errors import ArgumentError, ModelError
from personasteer.mixes import Conditions, Plan, compile_plan, make_reads
from personasteer.model import Model
from personasteer.steering import Steer, Steering, as_steering

if TYPE_CHECKING:
    from llama_cpp import Llama

_ATTRIBUTE = "_personasteer"


def attach(llama: Llama, steering: Steer) -> Attachment:
    """Steer everything that `llama` computes from now on, until `detach`; attaching again replaces the steering.

    The prompt is what `llama.generate` is given (all of create_completion, create_chat_completion and the chat handlers
    go through it); text that is only evaluated counts as prompt. Texts computed under another steering are forgotten,
    and while attached a LlamaCache is set aside, because it does not know of steering.

    Args:
        llama: an open llama_cpp.Llama, not for embeddings.
        steering: as `steer` in Model.chat. Scopes of roles and thinking blocks need personasteer's own Model. A
            condition on the prompt acts from the prompt's last token on; with logits_all from the next one.

    Raises:
        ModelError: the context is for embeddings, or llama.cpp refuses the hook there.
        ArgumentError: a scope that is not known here.

    Example:
        >>> llama = llama_cpp.Llama(str(model.path), n_ctx=128, verbose=False)
        >>> attachment = ps.attach(llama, vector * 0.3)
        >>> text = llama("the cat sat", max_tokens=4)["choices"][0]["text"]
        >>> ps.detach(llama)
    """
    attached: Attachment | None = getattr(llama, _ATTRIBUTE, None)
    if attached is None:
        attached = Attachment(llama)
        setattr(llama, _ATTRIBUTE, attached)
    try:
        attached.steer(steering)
    except BaseException:
        if not attached.steering:
            detach(llama)
        raise
    return attached


def detach(llama: Llama) -> None:
    """Take steering out of `llama` again: from here on it computes as if it had never been attached."""
    attached: Attachment | None = getattr(llama, _ATTRIBUTE, None)
    if attached is not None:
        attached._take_out()
        delattr(llama, _ATTRIBUTE)


class Attachment:
    """The steering of a llama_cpp.Llama; made by `attach`."""

    def __init__(self, llama: Llama) -> None:
        if llama.context_params.embeddings:
            raise ModelError("a Llama for embeddings computes no text: there is nothing to steer")
        core = load_core()
        handle = llama._model.model
        self._model = Model._around(
            core.Model.borrow(_address(handle)), Path(llama.model_path), n_threads=llama.n_threads
        )
        if self._model.unhooked:
            raise ModelError(f"{llama.model_path}: {self._model.unhooked}")
        self.steering = Steering()
        self._hook: Any = core.Attachment(_address(llama._ctx.ctx))
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._hook))  # until it is taken out: see _take_out
        self._llama = weakref.ref(llama)
        self._keys: list[int] = []  # by position: under which mix the cache was computed, 0: none
        self._n_prompt: int | None = None
        self._kept = {"cache": llama.cache, "n_batch": llama.n_batch}
        self._decode = llama._ctx.decode
        llama.cache = None
        llama.n_batch = min(llama.n_batch, llama.context_params.n_ubatch)  # one ubatch a decode
        generate, load_state, close = type(llama).generate, type(llama).load_state, type(llama).close
        me = weakref.proxy(self)

        def steered_generate(tokens: Sequence[int], *args: Any, **options: Any) -> Iterator[int]:
            me._begin(list(tokens), options.get("reset", True))
            yield from generate(self_llama(), tokens, *args, **options)

        def steered_load_state(state: Any) -> None:
            load_state(self_llama(), state)
            me._keys = []  # computed under who knows what

        def closing() -> None:
            known = self_llama()
            if known is not None:  # None: collected in a cycle, where nothing is sure to be there
                detach(known)
                close(known)

        reference = self._llama

        def self_llama() -> Any:
            return reference()

        llama.generate = steered_generate
        llama.load_state = steered_load_state
        llama.close = closing
        llama._ctx.decode = lambda batch: me._steered_decode(batch)
        self._plan = Plan((), [], [])
        self._mixes: list[Any] = []
        self._forget()

    @property
    def rho(self) -> float:
        """The total dose of the additions."""
        return self.steering.rho(self._model)

    def steer(self, steering: Steer) -> None:
        """Another steering from here on; what was computed under the old one is forgotten."""
        chosen = as_steering(steering)
        if chosen.needs_roles:
            raise ArgumentError(
                "an attached Llama knows no messages: scope is all, prompt, response or token positions here"
            )
        conditions = Conditions(chosen, self._model)
        compile_plan(chosen, self._model, 2, 1, decided=[True] * len(chosen))  # whatever is wrong with it shows now
        self.steering, self._conditions = chosen, conditions
        reads = make_reads(conditions.directions, self._model.n_embd)
        self._layers = reads.layers if reads else ()
        self._reads = load_core().Readout(reads.layers, reads.directions) if reads else None
        self._n_prompt = None
        self._forget()

    def _forget(self) -> None:
        llama = self._llama()
        assert llama is not None
        llama.reset()
        llama._ctx.kv_cache_clear()
        self._keys = []

    def _take_out(self) -> None:
        llama = self._llama()
        assert llama is not None
        for name in ("generate", "load_state", "close"):
            delattr(llama, name)
        del llama._ctx.decode
        for name, value in self._kept.items():
            setattr(llama, name, value)
        # Only here may it go: collected in a cycle or at exit, it could go after the context that it is attached to.
        ctypes.pythonapi.Py_DecRef(ctypes.py_object(self._hook))
        self._hook = None
        self._forget()
        self._model.close()

    # -- generating -------------------------------------------------------------------------------------------------

    def _begin(self, tokens: list[int], reset: bool) -> None:
        """A prompt comes: what of the cache was computed under the mixes that it gets stays."""
        llama = self._llama()
        assert llama is not None
        n_prompt = len(tokens) if reset else llama.n_tokens + len(tokens)
        self._n_prompt = n_prompt
        self._verdicts: list[bool] = []
        self._compile(n_prompt)
        self._readings = np.full((n_prompt, len(self._layers), len(self._conditions.directions)), np.nan, np.float32)
        if not reset:
            return
        valid = 0
        n_cached = min(llama.n_tokens, len(self._keys), n_prompt)
        if not self._conditions:  # a condition reads the whole prompt
            while valid < n_cached and self._keys[valid] == self._key(valid):
                valid += 1
        if valid < llama.n_tokens:
            llama.n_tokens = valid
            llama._requires_eval = True

    def _compile(self, n_given: int) -> None:
        self._plan = compile_plan(self.steering, self._model, n_given, self._n_prompt, decided=self._verdicts)
        self._mixes = [m.native for m in self._plan.mixes]

    def _mix_at(self, t: int) -> int:
        if t < len(self._plan.of_token):
            return self._plan.of_token[t]
        return next((plain for begin, plain, _ in reversed(self._plan.generated) if begin <= self._j(t)), -1)

    def _j(self, t: int) -> int:
        return max(0, t - (self._n_prompt - 1)) if self._n_prompt is not None else 0

    def _key(self, t: int) -> int:
        mix = self._mix_at(t)
        return 0 if mix < 0 else int(self._mixes[mix].key_at(self._j(t)))

    def _steered_decode(self, batch: Any) -> None:
        b = batch.batch
        n = int(b.n_tokens)
        positions = [int(b.pos[i]) for i in range(n)]
        tokens = [int(b.token[i]) for i in range(n)] if b.token and not b.embd else []
        last = max(positions, default=-1)
        if self._n_prompt is None and last >= len(self._plan.of_token):
            self._verdicts = []
            self._compile(last + 1)
        self._compute(tokens, positions, [int(b.seq_id[i][0]) for i in range(n)], lambda: self._decode(batch))
        n_prompt = self._n_prompt
        if not self._conditions or n_prompt is None or self._verdicts or last < n_prompt - 1:
            return
        self._verdicts = self._conditions.decide(self._readings, self._layers, n_prompt)
        if any(self._verdicts):
            self._compile(n_prompt)
            self._once_more(tokens[-1] if tokens else None, n_prompt - 1)

    def _compute(self, tokens: list[int], positions: list[int], slots: list[int], decode: Any) -> None:
        self._hook.arm(
            tokens=tokens,
            positions=positions,
            slots=slots,
            mixes=self._mixes,
            mix_of_token=[self._mix_at(t) for t in positions],
            j=[self._j(t) for t in positions],
            reads=self._reads,
        )
        decode()
        flat = self._hook.finish()
        del self._keys[min(positions, default=0) :]
        for t in positions:
            self._keys += [-1] * (t - len(self._keys))
            self._keys.append(self._key(t))
        if self._reads is not None and self._n_prompt is not None:
            values = flat.reshape(len(positions), *self._readings.shape[1:])
            for t, row in zip(positions, values, strict=True):
                if t < self._n_prompt:
                    self._readings[t] = row

    def _once_more(self, token: int | None, position: int) -> None:
        """The prompt's last token, now with its steering; with logits_all the rows before it are still needed."""
        llama = self._llama()
        assert llama is not None
        if token is None or llama._logits_all or not llama._ctx.kv_cache_seq_rm(-1, position, -1):
            return
        one = (llama_cpp.llama_token * 1)(token)

        def decode() -> None:
            if llama_cpp.llama_decode(llama._ctx.ctx, llama_cpp.llama_batch_get_one(one, 1)) != 0:
                raise ModelError("llama.cpp cannot decode the prompt's last token again")

        self._compute([token], [position], [0], decode)


def _address(pointer: Any) -> int:
    return int(ctypes.cast(pointer, ctypes.c_void_p).value or 0)
