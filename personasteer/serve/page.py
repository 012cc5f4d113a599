"""The page at /: a chat, a slider for each vector, and readings as colours."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import html
import json
import math
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from nicegui import core, events, run, ui
from pydantic import ValidationError

from personasteer.errors import PersonasteerError
from personasteer.serve.answers import Choice
from personasteer.serve.edits import steering_of
from personasteer.serve.protocol import ApiError, ChatRequest, Edit
from personasteer.serve.server import Server
from personasteer.ship.bundle import write_bundle
from personasteer.steering import SCOPES
from personasteer.vectors import PersonaVector

OPS = ("add", "cap", "floor", "ablate")
REDRAW = 0.1  # seconds between two looks of a growing answer
MAX_UPLOAD = 256 * 2**20
GREY = "#888"  # readable on light and dark
STYLE = """
.ps-tok { border-radius: 2px; white-space: pre-wrap }
.ps-text { line-height: 1.75; overflow-wrap: anywhere }
.ps-track { height: 4px; border-radius: 2px; margin: 0 0 2px 0; width: 100% }
.ps-key span { padding: 0 .6em; border-radius: 2px }
.ps-user { opacity: .85 }
"""


@dataclass
class _Slider:
    """What the page knows of one vector."""

    name: str
    info: dict[str, Any]
    strength: float = 0.0
    op: str = "add"
    scope: str = "all"

    def edit(self) -> Edit | None:
        """The edit that it stands for; None where it does nothing."""
        if self.op == "add":
            return Edit(vector=self.name, strength=round(self.strength, 4), scope=self.scope) if self.strength else None
        if self.op == "ablate":
            share = min(1.0, abs(self.strength))
            return Edit(vector=self.name, op="ablate", strength=share, scope=self.scope) if share else None
        return Edit.model_validate({"vector": self.name, "op": self.op, "scope": self.scope})


class _SteadySlider(ui.slider):
    """One that is not told its own value again: late echoes would take back what keys did meanwhile."""

    LOOPBACK = False


@dataclass
class _Turn:
    """An answer on the page: its tokens with their readings."""

    pieces: list[str] = field(default_factory=list)
    readings: dict[str, list[float | None]] = field(default_factory=dict)
    text: str = ""

    def mean(self, name: str) -> float | None:
        known = [x for x in self.readings.get(name, []) if x is not None]
        return sum(known) / len(known) if known else None


def add_page(app: FastAPI, server: Server, *, upload: bool) -> None:
    """Put the page at / of an application."""

    @ui.page("/", title="personasteer")
    async def page() -> None:
        ui.add_css(STYLE)
        dark = ui.dark_mode(None)
        with ui.header().classes("items-center py-1 px-3 gap-2"):
            ui.label("personasteer").classes("text-lg font-medium")
            title = ui.label().classes("text-sm opacity-80 ellipsis").style("max-width: 40vw")
            ui.space()
            ui.button(icon="contrast", on_click=lambda: dark.set_value(not dark.value)).props(
                'flat dense color=white aria-label="Dark or light"'
            ).tooltip("Dark or light")
        place = ui.column().classes("w-full")
        with place:
            ui.label("The model is being loaded.").classes("p-4")
        await ui.context.client.connected()
        try:
            await server.backend.ready()
        except ApiError as e:
            with place:
                ui.label(e.message).classes("p-4 text-negative")
            return
        place.clear()
        title.text = server.name
        shown = _Page(server, upload=upload)
        with place:
            if server.options.api_key is None:
                shown.build()
            else:
                _ask_for_key(server.options.api_key, shown)

    ui.run_with(app, title="personasteer", dark=None, reconnect_timeout=10, show_welcome_message=False)
    core.sio.eio.cors_allowed_origins = None  # its own pages only


def _ask_for_key(key: str, shown: _Page) -> None:
    """The page, once the key is right."""
    place = ui.context.slot.parent
    with ui.card().classes("absolute-center") as card:
        ui.label("This server asks for its API key.")
        given = ui.input("API key", password=True).props("autofocus outlined").classes("w-full")
        wrong = ui.label("That is not it.").classes("text-negative")
        wrong.visible = False

        def check() -> None:
            if not hmac.compare_digest((given.value or "").encode(), key.encode()):
                wrong.visible = True
                return
            card.delete()
            with place:
                shown.build()

        given.on("keydown.enter", check)
        ui.button("Enter", on_click=check)


class _Page:
    """One visitor's chat."""

    def __init__(self, server: Server, *, upload: bool) -> None:
        self.server, self.upload = server, upload
        self.sliders = {name: _Slider(name, info) for name, info in server.vectors.items()}
        for edit in server.default:
            if edit.op == "add" and edit.vector in self.sliders:
                self.sliders[edit.vector].strength = edit.strength or 0.0
        self.messages: list[dict[str, str]] = []
        self.turns: list[_Turn] = []
        self.shown: list[tuple[_Turn, ui.html]] = []
        self.colour = next(iter(self.sliders), None)
        self.running: asyncio.Task[None] | None = None
        self.temperature, self.max_tokens, self.system = 0.7, 256, ""
        self.beside = False

    # -- looks ------------------------------------------------------------------------------------------------------

    def build(self) -> None:
        self.client = ui.context.client
        self.client.on_delete(self._stop)
        with ui.row(wrap=True).classes("w-full items-start no-wrap-md gap-4").style("flex-wrap: wrap"):
            with ui.column().classes("gap-2").style("flex: 2 1 22rem; min-width: min(100%, 22rem)"):
                self.log = ui.column().classes("w-full gap-3").props('role="log" aria-live="polite"')
                self._empty()
                with ui.row(wrap=False).classes("w-full items-end gap-2"):
                    self.entry = (
                        ui.textarea(placeholder="Ask something")
                        .props('autogrow outlined dense autofocus aria-label="Your message"')
                        .classes("grow")
                    )
                    self.entry.on("keydown.enter.exact.prevent", self.send)
                    self.send_button = ui.button(icon="send", on_click=self.send).props('aria-label="Send"')
                with ui.row().classes("w-full items-center gap-2"):
                    ui.switch("Beside it, without steering").bind_value(self, "beside")
                    ui.space()
                    ui.button("New chat", icon="restart_alt", on_click=self.reset).props("flat dense")
            with ui.column().classes("gap-3").style("flex: 1 1 19rem; min-width: min(100%, 19rem)"):
                self._sliders()
                self._colours()
                self._drift()
                self._more()

    def _empty(self) -> None:
        with self.log:
            self.hint = ui.label(
                "Answers appear here; each token in the colour of the chosen trait's reading."
            ).classes("opacity-70")

    def _sliders(self) -> None:
        with ui.card().classes("w-full gap-1"):
            ui.label("Mix").classes("font-medium")
            if not self.sliders:
                ui.label("This server has no vectors: start it with -v NAME=FILE.").classes("opacity-70")
            self.slider_box = ui.column().classes("w-full gap-1")
            for slider in self.sliders.values():
                self._slider(slider)
            if self.upload:
                ui.upload(label="Add a vector file", auto_upload=True, max_file_size=MAX_UPLOAD,
                          on_upload=self._uploaded).props("flat dense accept=.gguf").classes("w-full")  # fmt: skip

    def _slider(self, s: _Slider) -> None:
        low, high = (float(x) for x in s.info.get("window", (-0.5, 0.5)))
        edge = round(max(0.6, 1.25 * max(abs(low), abs(high)), abs(s.strength)), 2)
        with self.slider_box, ui.column().classes("w-full gap-0"):
            with ui.row(wrap=False).classes("w-full items-center gap-1"):
                ui.label(s.name).classes("grow ellipsis")
                number = (
                    ui.number(format="%.2f", step=0.05, min=-edge, max=edge)
                    .props(f'dense borderless input-class="text-right" aria-label="strength of {html.escape(s.name)}"')
                    .classes("w-16")
                )
                number.bind_value(s, "strength", forward=lambda x: float(x or 0.0))
                ops = [o for o in OPS if s.info.get("cap") or o in ("add", "ablate")]
                ui.select(ops).props(f'dense borderless aria-label="operator of {html.escape(s.name)}"').bind_value(
                    s, "op"
                )
                ui.select(list(SCOPES)).props(
                    f'dense borderless aria-label="scope of {html.escape(s.name)}"'
                ).bind_value(s, "scope")
            _SteadySlider(min=-edge, max=edge, step=0.01).props(f'label aria-label="{html.escape(s.name)}"').bind_value(
                s, "strength", forward=lambda x: float(x or 0.0)
            )
            begin, end = (100 * (x + edge) / (2 * edge) for x in (max(low, -edge), min(high, edge)))
            said = "calibrated window" if s.info.get("calibrated") else "usual window, not calibrated"
            ui.element("div").classes("ps-track").style(
                f"background: linear-gradient(to right, rgba(128,128,128,.2) {begin:.1f}%, #2e9d6a {begin:.1f}%, "
                f"#2e9d6a {end:.1f}%, rgba(128,128,128,.2) {end:.1f}%)"
            ).tooltip(f"{said}: {low:g} to {high:g}")

    def _colours(self) -> None:
        if not self.sliders:
            return
        with ui.card().classes("w-full gap-1"):
            with ui.row(wrap=False).classes("w-full items-center"):
                ui.label("Colour").classes("font-medium grow")
                ui.select(list(self.sliders), on_change=self.recolour).props(
                    'dense aria-label="trait whose readings colour the tokens"'
                ).bind_value(self, "colour")
            self.key = ui.html("", sanitize=False).classes("ps-key text-sm")

    def _drift(self) -> None:
        if not self.sliders:
            return
        with ui.card().classes("w-full"):
            ui.label("Mean reading of each answer").classes("font-medium")
            self.chart = ui.echart({
                "grid": {"left": 44, "right": 8, "top": 28, "bottom": 24},
                "legend": {"type": "scroll", "top": 0, "textStyle": {"color": GREY}},
                "tooltip": {"trigger": "axis"},
                "xAxis": {"type": "category", "data": [], "axisLabel": {"color": GREY}},
                "yAxis": {
                    "type": "value", "scale": True, "axisLabel": {"color": GREY},
                    "splitLine": {"lineStyle": {"color": "rgba(128,128,128,.25)"}},
                },
                "series": [],
            }).classes("w-full").style("height: 12rem")  # fmt: skip

    def _more(self) -> None:
        with ui.expansion("Options", icon="tune").classes("w-full"):
            ui.textarea("System message").bind_value(self, "system").props("autogrow outlined dense").classes("w-full")
            ui.number("Temperature", min=0, max=5, step=0.1).bind_value(self, "temperature")
            ui.number("Tokens, at most", min=1, max=100_000, precision=0).bind_value(self, "max_tokens")
        with ui.expansion("Take it with you", icon="ios_share").classes("w-full"):
            with ui.row().classes("gap-1"):
                for what in ("JSON", "curl", "Python"):
                    ui.button(what, on_click=lambda _, w=what: self._copy(w)).props("flat dense no-caps")
                ui.button("Bundle", icon="download", on_click=self._bundle).props("flat dense no-caps")
            self.code = ui.code("", language="bash").classes("w-full")
            self.code.visible = False

    # -- the mix ----------------------------------------------------------------------------------------------------

    def mix(self) -> list[Edit]:
        return [edit for s in self.sliders.values() if (edit := s.edit()) is not None]

    def _as_json(self) -> list[dict[str, Any]]:
        return [e.model_dump(exclude_defaults=True) | {"vector": e.vector} for e in self.mix()]

    async def _copy(self, what: str) -> None:
        url = str(ui.context.client.request.base_url).rstrip("/")
        asked = next((m["content"] for m in reversed(self.messages) if m["role"] == "user"), "Hello!")
        body = {
            "model": self.server.name,
            "messages": [{"role": "user", "content": asked}],
            "steering": self._as_json(),
        }
        key = ' -H "Authorization: Bearer $PERSONASTEER_API_KEY"' if self.server.options.api_key else ""
        texts = {
            "JSON": json.dumps({"steering": self._as_json()}, indent=2),
            "curl": f"curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} \\\n"
            f"  -d {shlex.quote(json.dumps(body, ensure_ascii=False))}",
            "Python": "import os\n\nfrom openai import OpenAI\n\n"
            f'client = OpenAI(base_url={url + "/v1"!r}, api_key=os.environ.get("PERSONASTEER_API_KEY", "none"))\n'
            f"answer = client.chat.completions.create(\n    model={self.server.name!r},\n"
            f"    messages={body['messages']!r},\n"
            f"    extra_body={ {'steering': body['steering']}!r},\n)\nprint(answer.choices[0].message.content)",
        }
        self.code.content = texts[what]
        self.code.visible = True
        ui.clipboard.write(texts[what])
        ui.notify("copied")

    async def _bundle(self) -> None:
        mix, worker = self.mix(), self.server.backend.options
        if not mix:
            ui.notify("the mix is empty: move a slider", type="warning")
            return
        with ui.dialog() as dialog, ui.card():
            ui.label("Save the mix as a bundle")
            name = ui.input("Name of the persona", value="my persona").props("autofocus")
            ui.button("Save", on_click=lambda: dialog.submit(name.value))
        chosen = await dialog
        if not chosen:
            return
        waiting = ui.notification("writing the bundle", spinner=True, timeout=None)

        def write() -> bytes:
            vectors = {e.vector: PersonaVector.load(worker.vectors[e.vector], offset=worker.offset) for e in mix}
            with tempfile.TemporaryDirectory() as folder:
                out: Path = write_bundle(
                    Path(folder) / "bundle.tar", model=self.server.backend.info["path"], name=chosen,
                    steering=steering_of(mix, vectors), adapters=self.server.backend.info["adapters"],
                )  # fmt: skip
                return out.read_bytes()

        try:
            ui.download.content(await run.io_bound(write) or b"", "bundle.tar")
        except (PersonasteerError, KeyError) as e:
            ui.notify(f"{e}", type="negative")
        finally:
            waiting.dismiss()

    async def _uploaded(self, e: events.UploadEventArguments) -> None:
        folder = Path(tempfile.mkdtemp(prefix="personasteer-upload-"))
        path = folder / "vector.gguf"
        await e.file.save(path)
        name = "".join(c for c in Path(e.file.name).stem if c.isalnum() or c in "-_ ")[:60] or "vector"
        try:
            await self.server.backend.load(name, str(path))
        except ApiError as error:
            ui.notify(error.message.replace(str(path), e.file.name), type="negative")
            return
        self.sliders[name] = _Slider(name, self.server.vectors[name])
        self._slider(self.sliders[name])
        ui.notify(f"{name} can be used")

    # -- the chat ---------------------------------------------------------------------------------------------------

    def _stop(self) -> None:
        if self.running is not None:
            self.running.cancel()

    def reset(self) -> None:
        self._stop()
        self.messages, self.turns, self.shown = [], [], []
        self.log.clear()
        self._empty()
        self._redraw_chart()

    async def send(self) -> None:
        text = (self.entry.value or "").strip()
        if self.running is not None and not self.running.done():
            self.running.cancel()  # the button is a stop button meanwhile
            return
        if not text:
            return
        self.entry.value = ""
        self.hint.visible = False
        self.messages.append({"role": "user", "content": text})
        with self.log:
            ui.label(text).classes("ps-user ps-text font-medium").style("white-space: pre-wrap")
            with ui.row(wrap=True).classes("w-full gap-4 items-start"):
                columns = [("", self.mix())] if not self.beside else [("steered", self.mix()), ("without", [])]
                places = []
                for title, mix in columns:
                    with ui.column().classes("gap-0").style("flex: 1 1 15rem"):
                        if title:
                            ui.label(title).classes("text-sm opacity-70")
                        places.append((ui.html("", sanitize=False).classes("ps-text w-full"), mix))
        self.send_button.props("icon=stop aria-label=Stop")
        self.running = asyncio.create_task(self._answer(places))
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.shield(self.running)
        self.send_button.props("icon=send aria-label=Send")
        self.entry.run_method("focus")

    async def _answer(self, places: Sequence[tuple[ui.html, list[Edit]]]) -> None:
        """The answers to the last message, one for each place, computed together."""
        turns, messages, before = [_Turn() for _ in places], self.messages, self.turns  # of this chat
        self.shown += [(turn, place) for turn, (place, _) in zip(turns, places, strict=True)]
        try:
            await asyncio.gather(*(self._stream(t, p, m) for t, (p, m) in zip(turns, places, strict=True)))
        finally:
            messages.append({"role": "assistant", "content": turns[0].text})
            before.append(turns[0])
            self.recolour()
            self._redraw_chart()

    async def _stream(self, turn: _Turn, place: ui.html, mix: list[Edit]) -> None:
        system = [{"role": "system", "content": self.system}] if self.system.strip() else []
        drawn, loop = 0.0, asyncio.get_running_loop()
        try:
            body = ChatRequest.model_validate({
                "messages": [*system, *self.messages], "steering": [e.model_dump() for e in mix],
                "readings": bool(self.sliders), "temperature": self.temperature or 0, "logprobs": True,
                "max_tokens": int(self.max_tokens or 256),
            })  # fmt: skip
            _, jobs, choices = self.server.begin_chat(body, self.client.ip or "page")
            async with contextlib.aclosing(self.server.heard(jobs, choices)) as heard:
                async for choice, _ in heard:
                    _update(turn, choice)
                    if loop.time() - drawn > REDRAW:
                        drawn = loop.time()
                        self._draw(turn, place)
        except ApiError as e:
            turn.text = turn.text or ""
            with place.parent_slot.parent:  # type: ignore[union-attr]
                ui.label(e.message).classes("text-negative")
        except ValidationError as e:
            with self.log:
                ui.notify(str(e.errors()[0]["msg"]), type="negative")
        self._draw(turn, place)

    # -- colours ----------------------------------------------------------------------------------------------------

    def recolour(self) -> None:
        for turn, place in self.shown:
            self._draw(turn, place)
        if hasattr(self, "key"):
            low, high = self._range()
            said = "".join(
                f'<span style="{_shade((i - 2) / 2)}">{low + (high - low) * i / 4:.2f}</span>' for i in range(5)
            )
            self.key.content = f"{said} of the stream's norm" if self.turns else ""

    def _range(self) -> tuple[float, float]:
        """What the palest and the strongest colour stand for: the readings that were seen."""
        seen = [x for turn, _ in self.shown for x in turn.readings.get(self.colour or "", []) if x is not None]
        if not seen:
            return -1.0, 1.0
        middle = sum(seen) / len(seen)
        reach = max((abs(x - middle) for x in seen), default=0.0) or 1.0
        return middle - reach, middle + reach

    def _draw(self, turn: _Turn, place: ui.html) -> None:
        readings = turn.readings.get(self.colour or "", [])
        low, high = self._range()
        parts = []
        for i, piece in enumerate(turn.pieces):
            x = readings[i] if i < len(readings) else None
            if x is None:
                parts.append(html.escape(piece))
                continue
            place_of = 2 * (x - low) / ((high - low) or 1.0) - 1
            parts.append(
                f'<span class="ps-tok" style="{_shade(place_of)}" title="{x:+.3f}">{html.escape(piece)}</span>'
            )
        place.content = "".join(parts) or '<span class="opacity-60">…</span>'

    def _redraw_chart(self) -> None:
        if not hasattr(self, "chart"):
            return
        names = list(self.sliders)
        self.chart.options["xAxis"]["data"] = [str(i + 1) for i in range(len(self.turns))]
        self.chart.options["series"] = [
            {"name": n, "type": "line", "data": [_rounded(t.mean(n)) for t in self.turns]} for n in names
        ]
        self.chart.update()


def _update(turn: _Turn, choice: Choice) -> None:
    """The tokens as whole characters: one that ends within a character has no text of its own."""
    turn.text = choice.text
    turn.readings = choice.readings
    if choice.done is not None and choice.done["finish"] == "stopped":  # a guard's words have no tokens
        turn.pieces, turn.readings = [choice.text], {}
        return
    turn.pieces, held = [], b""
    for data, *_ in choice.tokens:
        held += bytes(data)
        try:
            turn.pieces.append(held.decode())
            held = b""
        except UnicodeDecodeError:
            turn.pieces.append("")


def _shade(x: float) -> str:
    """A background between blue (-1), none (0) and orange (1)."""
    x = max(-1.0, min(1.0, x if math.isfinite(x) else 0.0))
    rgb = "230,120,30" if x > 0 else "50,120,230"
    return f"background: rgba({rgb},{abs(x) * 0.6:.2f})"


def _rounded(x: float | None) -> float | None:
    return None if x is None else round(x, 4)
