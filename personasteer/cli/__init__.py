"""The command line: `personasteer VERB`. Results on stdout, the rest on stderr; exit 0, 1 failed, 2 usage."""

from __future__ import annotations

import codecs
import importlib
import io
import keyword
import logging
import os
import shutil
import signal
import sys
import threading
from importlib.metadata import version
from typing import Annotated

import typer

from personasteer import _native
from personasteer.cli._common import harmless, in_plain_letters, takes_unicode
from personasteer.errors import ArgumentError, PersonasteerError, TraitError

app = typer.Typer(
    name="personasteer",
    help="Derive, apply and ship persona vectors for quantized GGUF models.",
    no_args_is_help=True,
    rich_markup_mode="markdown" if shutil.get_terminal_size().columns >= 80 else None,  # whose tables would cut names
    pretty_exceptions_enable=False,
)

VERBS = (
    "demo", "traits", "derive", "inspect", "calibrate", "eval", "chat", "generate", "capture", "monitor", "track",
    "audit", "screen", "diff", "finetune", "realign", "import", "export", "verify", "bundle", "push", "bench", "serve",
)  # fmt: skip
_debug = False


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"personasteer {version('personasteer')}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show Python tracebacks.")] = False,
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    global _debug
    _debug = debug


for _verb in VERBS:
    _module = _verb + "_" if keyword.iskeyword(_verb) else _verb
    importlib.import_module(f"personasteer.cli.{_module}").register(app)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the console script; exits the process."""
    _native.is_command = True
    sys.exit(run(arguments))


def run(arguments: list[str] | None = None) -> int:
    """Run one command line; the exit code. Any failure is one line on stderr."""
    logging.basicConfig(stream=sys.stderr, format="personasteer: %(message)s", level=logging.WARNING)
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # its cache folder may be where nothing can be written
    codecs.register_error("personasteer", in_plain_letters)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and not takes_unicode(stream):
            stream.reconfigure(errors="personasteer")
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminated)  # temporary files go, as with Ctrl-C
    usage_error: type[Exception] = typer.BadParameter.__mro__[1]  # click's UsageError, wherever typer keeps it
    try:
        code = app(args=arguments, prog_name="personasteer", standalone_mode=False)
        sys.stdout.flush()
        return _fail("interrupted", 1) if code == 130 else int(code or 0)  # 130: typer's word for Ctrl-C
    except typer.Exit as e:
        return int(e.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", 1)
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except usage_error as e:
        if _debug:
            raise
        message = e.format_message() if hasattr(e, "format_message") else str(e)
        if type(e).__name__ == "NoArgsIsHelpError":
            typer.echo(message)
            return 2
        return _fail(f"{message} (see --help)", 2)
    except (ArgumentError, TraitError) as e:
        if _debug:
            raise
        return _fail(str(e), 2)
    except PersonasteerError as e:
        if _debug:
            raise
        return _fail(str(e), 1)
    except OSError as e:
        if _debug:
            raise
        return _fail(f"{e.filename + ': ' if isinstance(e.filename, str) else ''}{e.strerror or e}", 1)
    except MemoryError:
        return _fail("out of memory", 1)
    except Exception as e:
        if _debug:
            raise
        return _fail(f"{type(e).__name__}: {e} (not foreseen: --debug shows where)", 1)


def _terminated(*_: object) -> None:
    raise KeyboardInterrupt


def _fail(message: str, code: int) -> int:
    typer.echo("personasteer: " + harmless(" ".join(message.split())), err=True)
    return code
