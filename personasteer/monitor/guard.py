"""Acting on alarms: rules that cap, subtract, switch on edits, stop or regenerate, per request, with a record of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from personasteer.chat import Conversation
from personasteer.errors import ArgumentError, VectorError
from personasteer.live import Answer, Session, Stream
from personasteer.mixes import Conditions
from personasteer.model import Model
from personasteer.monitor.thresholds import STATES, Threshold, thresholds_for
from personasteer.steering import Add, Cap, Steer, Steering, as_steering
from personasteer.vectors import PersonaVector

log = logging.getLogger("personasteer.guard")

ACTIONS = ("log", "cap", "subtract", "edit", "stop", "regenerate")
MOMENTS = ("before", "during", "both")


@dataclass(frozen=True)
class Rule:
    """What is done when a trait's reading comes to a state.

    Args:
        vector: the trait that is watched.
        action: "log", only record it; "cap", keep the readings on the vector's layers from rising above what 5 % of the
            tokens of clean answers exceed; "subtract", add -strength times the vector; "edit", switch on `edit`;
            "stop", end the answer there, with `message` instead of it; "regenerate", drop the answer and make it anew
            with -strength times the vector, `tries` times at most, each time with as much more; an answer made anew is
            dropped for its own running mean, not for its prompt again. Edits hold from the token after the alarm to the
            end of the answer, and from its first token where the alarm comes before it.
        on: "alarm", or "watch", which an alarm is, too.
        when: "before", the token before the answer; "during", the running mean over it; "both".
        strength: rho of "subtract" and "regenerate".
        edit: of "edit".
        message: of "stop".
        tries: of "regenerate".

    Raises:
        ArgumentError: an unknown action, state or moment, an action without what it needs, a strength that is not
            positive.
    """

    vector: PersonaVector
    action: str = "log"
    on: str = "alarm"
    when: str = "both"
    strength: float = 0.2
    edit: Steer = None
    message: str = ""
    tries: int = 2

    def __post_init__(self) -> None:
        choices = {"action": (self.action, ACTIONS), "on": (self.on, STATES[1:]), "when": (self.when, MOMENTS)}
        for what, (value, known) in choices.items():
            if value not in known:
                raise ArgumentError(f"{what} must be one of {', '.join(known)}, not {value!r}")
        if not (np.isfinite(self.strength) and self.strength > 0):
            raise ArgumentError(f"the strength of a rule must be a positive number, not {self.strength}")
        if self.tries < 1:
            raise ArgumentError(f"tries must be at least 1, not {self.tries}")
        object.__setattr__(self, "edit", as_steering(self.edit))
        if bool(self.edit) != (self.action == "edit"):
            raise ArgumentError(f'an edit goes with the action "edit", and only with it, not with {self.action!r}')

    def holds(self, state: str, moment: str) -> bool:
        """Whether it acts on a state, "before" or "during" the answer."""
        return self.when in (moment, "both") and STATES.index(state) >= STATES.index(self.on)


@dataclass(frozen=True)
class Event:
    """A change of state, or an action.

    Args:
        token: index in the text of the token that was read, the prompt's first being 0.
        moment: "before" or "during" the answer.
        name: of the vector.
        reading: of the token before the answer, or the running mean.
        state: ok, watch or alarm.
        probability: P(trait), before the answer only.
        action: what was done; "" for a change of state alone.
        attempt: 0, and more for an answer that was made anew.
    """

    token: int
    moment: str
    name: str
    reading: float
    state: str
    probability: float | None
    action: str
    attempt: int

    def as_dict(self) -> dict[str, Any]:
        """As plain data; reading and probability are None where the reading is no number."""
        return {**vars(self), **({} if np.isfinite(self.reading) else {"reading": None, "probability": None})}


@dataclass(frozen=True)
class GuardedAnswer:
    """What came of a guarded request.

    Args:
        answer: as in Answer; its first readings, two for each vector, are the guard's own. Where a rule stopped it, its
            text is the rule's message and its finish "stopped".
        events: what happened, in order.
        before: for each vector the reading at the token before the answer, of the first attempt; `states_before` what
            it amounts to.
        running: for each vector (n,) running means over the answer, the first one over its first `window` tokens.
        attempts: answers made.
    """

    answer: Answer
    events: tuple[Event, ...]
    before: dict[str, float]
    states_before: dict[str, str]
    running: dict[str, NDArray[np.float64]]
    attempts: int

    @property
    def text(self) -> str:
        """What was said in the end; of a stopped answer the rule's message."""
        return self.answer.text

    @property
    def states(self) -> dict[str, str]:
        """For each vector of which there is an event the worst state that any names."""
        worst: dict[str, str] = {}
        for e in self.events:
            worst[e.name] = max(worst.get(e.name, "ok"), e.state, key=STATES.index)
        return worst


class Guard:
    """Watches requests of a model, and acts by rules. Thresholds are the model's own: see `calibrate`.

    Args:
        rules: what to do; vectors that are only watched have a rule with the action "log".
        thresholds: for the rules' vectors, by name, with those of running means; calibrated, and kept, when None.
        on_event: called with each event as it happens; must not call the model.

    Raises:
        ArgumentError: no rule, two vectors of one name.
        VectorError: a threshold that is missing or for a model of another shape. ModelError: for another template.

    Example:
        >>> guard = monitor.Guard(model, [monitor.Rule(vector, "cap"), monitor.Rule(other, "stop", message="No.")])
        >>> found = guard.chat("Write me a poem.", max_tokens=8)
        >>> sorted(found.before) == sorted([vector.name, other.name])
        True
    """

    def __init__(
        self,
        model: Model,
        rules: Sequence[Rule],
        *,
        thresholds: Sequence[Threshold] | None = None,
        on_event: Callable[[Event], None] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        vectors: dict[str, PersonaVector] = {}
        for rule in rules:
            if vectors.setdefault(rule.vector.name, rule.vector) != rule.vector:
                raise ArgumentError(f"two vectors of a guard have the name {rule.vector.name!r}")
        if not vectors:
            raise ArgumentError("a guard needs at least one rule")
        if thresholds is None:
            thresholds = thresholds_for(model, list(vectors.values()), running=True, progress=progress)
        known = {t.name: t for t in thresholds}
        missing = [name for name in vectors if name not in known]
        if missing:
            raise VectorError(f"there is no threshold of {missing[0]!r}: calibrate one")
        self.model, self.rules, self.on_event = model, tuple(rules), on_event
        self.thresholds = tuple(known[name] for name in vectors)
        for t in self.thresholds:
            t.check(model)
            if t.running is None and any(r.vector.name == t.name and r.when != "before" for r in rules):
                raise VectorError(
                    f"the threshold of {t.name!r} has no running mean: calibrate with running=True (monitor --running)"
                )
        _ = model.norms  # measured before a request is: it is a run of its own
        self._edits = {id(rule): self._edit(rule, known[rule.vector.name]) for rule in self.rules}
        for steering in self._edits.values():  # what is wrong with an edit shows now, not amid other requests
            if Conditions(steering, model):
                raise ArgumentError(
                    'a rule acts after the prompt, which its edit must not ask for: use When(..., on="token")'
                )
            if steering.needs_roles:
                raise ArgumentError("a rule acts on the answer: its edit cannot have a role as its scope")
            for edit in steering:
                edit.terms(model)

    def _edit(self, rule: Rule, threshold: Threshold) -> Steering:
        vector = rule.vector
        if rule.action == "cap":
            if threshold.running is None:
                raise VectorError(f"the threshold of {vector.name!r} has no caps: calibrate with running=True")
            caps = threshold.running.caps
            layers = tuple(il for il in vector.layers if np.isfinite(caps[il]))  # not the last one, which is not read
            if not layers:
                raise VectorError(f"vector {vector.name!r} names no block below the last one to cap at")
            return as_steering(Cap(vector, caps, layers=layers, scope="response"))
        if rule.action in ("subtract", "regenerate"):
            return as_steering(Add(vector, -rule.strength, scope="response"))
        return as_steering(rule.edit)

    def submit(
        self,
        session: Session,
        conversation: Conversation | None = None,
        *,
        steer: Steer = None,
        earlier: Mapping[str, str] | None = None,
        **options: Any,
    ) -> GuardedStream:
        """Queue a request as `Session.submit` does, guarded: it runs in the session's batch beside any others. Models
        that think are asked for an answer without (thinking=False), as thresholds are calibrated.

        earlier: `states_before` of the conversation's last answer: an alarm lasts until a reading is below `watch`.
        """
        return GuardedStream(self, session, conversation, steer, dict(earlier or {}), {"thinking": False, **options})

    def chat(self, conversation: Conversation, **options: Any) -> GuardedAnswer:
        """One guarded answer; options as in `Session.submit`."""
        return self.chat_batch([conversation], **options)[0]

    def chat_batch(self, conversations: Sequence[Conversation], **options: Any) -> list[GuardedAnswer]:
        """Guarded answers to many conversations, computed together."""
        with self.model.session() as session:
            streams = [self.submit(session, c, **options) for c in conversations]
            return [s.result() for s in streams]


@dataclass
class _Watched:
    """What is known of one vector in one attempt."""

    threshold: Threshold
    state: str = "ok"
    sums: list[float] = field(default_factory=lambda: [0.0])  # of the answer's readings
    means: list[float] = field(default_factory=list)

    def push(self, reading: float) -> float | None:
        """The running mean once there are enough tokens."""
        running = self.threshold.running
        if running is None:
            return None
        self.sums.append(self.sums[-1] + reading)
        if len(self.sums) <= running.window:
            return None
        self.means.append((self.sums[-1] - self.sums[-1 - running.window]) / running.window)
        return self.means[-1]


class GuardedStream:
    """One guarded request: iterate for its text, or ask for the whole `result`.

    Where a rule may take back the text (stop with a message, regenerate), it comes when the answer is whole.

    Attributes:
        events: what happened so far.
        holds_back: whether a rule may take back the text.
        attempt: 0, and more for an answer that is made anew.
    """

    def __init__(
        self,
        guard: Guard,
        session: Session,
        conversation: Conversation | None,
        steer: Steer,
        earlier: dict[str, str],
        options: dict[str, Any],
    ) -> None:
        self._guard, self._session = guard, session
        self._conversation, self._earlier, self._options = conversation, earlier, options
        more_reads = list(options.pop("readings", ()))
        options.pop("read_prompt", None)  # of the prompt only its last token is read
        self._base = guard.model.steering_of(steer)
        edits = any(r.when != "before" and r.action in ("cap", "subtract", "edit") for r in guard.rules)
        if edits and Conditions(self._base, guard.model):
            raise ArgumentError(
                'a guard that edits during the answer takes no conditions on the prompt: use When(..., on="token")'
            )
        self.holds_back = any(r.action == "regenerate" or (r.action == "stop" and r.message) for r in guard.rules)
        self._extra = Steering()  # of earlier attempts
        self._before: dict[str, float] = {}
        self._states_before: dict[str, str] = {}
        self.attempt = 0
        self.events: list[Event] = []
        self._reads = [
            {side.layer: side.direction} for t in guard.thresholds for side in (t, t.running or t)
        ]  # before the answer, and during it
        self._n_own = len(self._reads)
        self._reads += more_reads
        self._begin()

    def _begin(self) -> None:
        self._watched = [_Watched(t) for t in self._guard.thresholds]
        self._acted: set[int] = set()  # rules
        self._added = Steering()
        self._stopped: Rule | None = None
        self._again: Rule | None = None
        self._n_read: int | None = None  # tokens of the text that were looked at
        self._stream = self._session.submit(
            self._conversation,
            steer=self._base + self._extra,
            observer=self,
            readings=self._reads,
            read_prompt=False,
            **self._options,
        )

    # -- for the session --------------------------------------------------------------------------------------------

    def at_prompt(self, readings: list[NDArray[np.float32]], n_prompt: int) -> Steering:
        """The edits of the rules that act before the answer."""
        self._n_read = n_prompt
        for k, w in enumerate(self._watched):
            reading = float(readings[2 * k][n_prompt - 1, 0])
            w.state = w.threshold.state(reading, self._earlier.get(w.threshold.name, "ok"))
            if self.attempt == 0:
                self._before[w.threshold.name] = reading
                self._states_before[w.threshold.name] = w.state
            probability = w.threshold.probability(reading)
            self._record(n_prompt - 1, "before", w, reading, probability, "")
            self._act(n_prompt - 1, "before", w, reading, probability)
            w.state = "ok"  # the running mean has a scale of its own
        return self._added

    def after_token(self, stream: Stream) -> None:
        """Look at what was read since."""
        if self._n_read is None:
            return
        if self._stopped or self._again:  # before the answer, where nothing could be cancelled
            stream.cancel()
            return
        fresh = [r[:, 0] for r in stream.readings(self._n_read)]
        n_before = len(self._added)
        for i in range(len(fresh[0]) if fresh else 0):
            for k, w in enumerate(self._watched):
                mean = w.push(float(fresh[2 * k + 1][i]))
                if mean is None or w.threshold.running is None:
                    continue
                before, w.state = w.state, w.threshold.running.state(mean, w.state)
                if w.state != before:
                    self._record(self._n_read + i, "during", w, mean, None, "")
                self._act(self._n_read + i, "during", w, mean, None, over=stream.done)
        self._n_read += len(fresh[0]) if fresh else 0
        if self._stopped or self._again:
            stream.cancel()
        elif len(self._added) > n_before:
            stream.steer(self._base + self._extra + self._added)

    def _act(
        self, token: int, moment: str, w: _Watched, reading: float, probability: float | None, *, over: bool = False
    ) -> None:
        """over: there is no token left for an edit to act on."""
        for i, rule in enumerate(self._guard.rules):
            if rule.vector.name != w.threshold.name or i in self._acted or not rule.holds(w.state, moment):
                continue
            if rule.action == "regenerate" and moment == "before" and self.attempt:
                continue  # the prompt is what it was: now the answer tells
            if over and rule.action in ("cap", "subtract", "edit"):
                continue
            self._acted.add(i)
            if rule.action == "regenerate":
                if self.attempt >= rule.tries or self._again:
                    continue
                self._again = rule
            elif rule.action == "stop":
                self._stopped = self._stopped or rule
            else:
                self._added = self._added + self._guard._edits[id(rule)]
            self._record(token, moment, w, reading, probability, rule.action)

    def _record(
        self, token: int, moment: str, w: _Watched, reading: float, probability: float | None, action: str
    ) -> None:
        event = Event(token, moment, w.threshold.name, reading, w.state, probability, action, self.attempt)
        self.events.append(event)
        log.info("%s", event)
        if self._guard.on_event:
            self._guard.on_event(event)

    # -- for the caller ---------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[str]:
        if self.holds_back:
            yield self.result().text
            return
        for piece in self._stream:
            if self._silenced:
                return
            yield piece

    async def __aiter__(self) -> AsyncIterator[str]:
        if self.holds_back:
            yield (await asyncio.to_thread(self.result)).text
            return
        async for piece in self._stream:
            if self._silenced:
                return
            yield piece

    @property
    def _silenced(self) -> bool:
        """Whether a rule has stopped it before its first token."""
        return self._stopped is not None and not any(len(w.sums) > 1 for w in self._watched)

    def take(self) -> str:
        """The text that is there and was not taken, without computing: others step the session. Where a rule asks for
        another answer, it is queued here.
        """
        if self._stream.done and self._again and not self._failed:
            self._begin_again()
        if self.holds_back or self._silenced:
            return ""
        return self._stream.take()

    @property
    def done(self) -> bool:
        """Whether the answer is complete, cancelled or failed."""
        return self._stream.done and (self._again is None or self._failed)

    @property
    def _failed(self) -> bool:
        return self._stream._error is not None

    @property
    def n_prompt(self) -> int:
        """Tokens of the prompt."""
        return self._stream.n_prompt

    def readings(self, first: int = 0) -> list[NDArray[np.float32]]:
        """Those of the caller's own `readings`, as in Stream."""
        return self._stream.readings(first)[self._n_own :]

    def tokens(self, first: int = 0) -> list[tuple[int, float, list[tuple[int, float]]]]:
        """As in Stream; of the attempt under way."""
        return self._stream.tokens(first)

    def _begin_again(self) -> None:
        assert self._again is not None
        self.attempt += 1
        self._extra = self._extra + self._guard._edits[id(self._again)]
        self._begin()

    def result(self) -> GuardedAnswer:
        """Compute to the end. Raises ModelError where the request failed."""
        answer = self._stream.result()
        while self._again:
            self._begin_again()
            answer = self._stream.result()
        if self._stopped:
            text = self._stopped.message or ("" if self._silenced else answer.text)
            answer = replace(answer, text=text, finish="stopped")
        running = {w.threshold.name: np.array(w.means) for w in self._watched}
        before = dict(self._before), dict(self._states_before)
        return GuardedAnswer(answer, tuple(self.events), *before, running, self.attempt + 1)

    def cancel(self) -> None:
        """Stop now; `result` then gives what there is."""
        self._stream.cancel()
