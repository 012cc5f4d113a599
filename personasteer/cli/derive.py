from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from personasteer.cli._common import (
    CtxOption,
    GpuOption,
    JsonOption,
    ModelOption,
    RpcOption,
    SeedOption,
    ThreadsOption,
    open_model,
    print_json,
    say,
    stages,
    stderr,
    workers,
)
from personasteer.cli._completion import one_of, trait_names
from personasteer.errors import ArgumentError
from personasteer.files import atomic_write, check_output

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from personasteer.derive.judge import Judge
    from personasteer.endpoint import Endpoint
    from personasteer.model import Model
    from personasteer.traits import Trait
    from personasteer.vectors import PersonaVector

LOG_ODDS = "log-odds"
# options that say how answers are sampled, and what is done with them
OF_SAMPLING = {"questions": "--questions", "predict": "--predict", "temp": "--temp", "rollouts": "--rollouts"}
OF_ANSWERS = {
    "skip": "--skip-tokens",
    "position": "--position",
    "no_filter": "--no-filter",
    "no_calibrate": "--no-calibrate",
    "form": "--form",
}


def register(app: typer.Typer) -> None:
    app.command("derive")(derive)


def derive(
    context: typer.Context,
    trait: Annotated[
        str,
        typer.Argument(
            autocompletion=trait_names,
            help="A trait of the library, a .toml or .json file of one, a .jsonl file of contrasting chats; or, with "
            "--describe or --positive, a name.",
        ),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Control-vector GGUF to write.")],
    model: ModelOption = "demo",
    questions: Annotated[
        int | None, typer.Option("--questions", help="Questions per system prompt; all if not given.", min=1)
    ] = None,
    predict: Annotated[int, typer.Option("-n", "--predict", help="Tokens of an answer, at most.", min=1)] = 40,
    temp: Annotated[float, typer.Option("--temp", help="Temperature of the answers.", min=0.0)] = 0.1,
    rollouts: Annotated[int, typer.Option("--rollouts", help="Answers per question and prompt.", min=1)] = 1,
    skip: Annotated[int, typer.Option("--skip-tokens", help="First tokens left out of an answer's mean.", min=0)] = 0,
    responses: Annotated[
        Path | None, typer.Option("--responses", metavar="FILE", help="Read these answers (JSONL) instead of sampling.")
    ] = None,
    continuations: Annotated[
        bool,
        typer.Option(
            "--continuations",
            help="Read the trait's own continuation pairs instead of sampling: where the model refuses the trait, "
            "cannot act it or takes no system prompt.",
        ),
    ] = False,
    save_responses: Annotated[
        Path | None, typer.Option("--save-responses", metavar="FILE", help="Write the answers, for --responses.")
    ] = None,
    method: Annotated[
        str, typer.Option("--method", help="mean, pca or probe.", autocompletion=one_of("mean", "pca", "probe"))
    ] = "mean",
    position: Annotated[
        str,
        typer.Option(
            "--position",
            help="response: mean over the answer; last-prompt: the token before it.",
            autocompletion=one_of("response", "last-prompt"),
        ),
    ] = "response",
    exclude_massive: Annotated[
        bool, typer.Option("--exclude-massive", help="Leave out dimensions that are large whatever the text says.")
    ] = False,
    judge: Annotated[
        str | None,
        typer.Option(
            "--judge",
            metavar="MODEL|URL|log-odds",
            autocompletion=one_of(LOG_ODDS),
            help="Score the answers by another GGUF, an OpenAI-compatible URL, or the model's log-odds as 0 to 100.",
        ),
    ] = None,
    served: Annotated[
        str, typer.Option("--judge-model", help="The model's name at a --judge or --writer URL.")
    ] = "default",
    no_filter: Annotated[
        bool, typer.Option("--no-filter", help="Keep refusals, off-trait and broken answers.")
    ] = False,
    no_calibrate: Annotated[
        bool, typer.Option("--no-calibrate", help="No sweep over blocks and strengths: quick, not tested.")
    ] = False,
    form: Annotated[
        str,
        typer.Option(
            "--form",
            help="window, single or incremental: how many blocks.",
            autocompletion=one_of("window", "single", "incremental"),
        ),
    ] = "window",
    layers: Annotated[
        str | None,
        typer.Option("--layers", help="Blocks to steer at, as 12-17 or 3,5,9; found by the sweep if not given."),
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option("--work", metavar="DIR", help="Keep finished parts here: the same command goes on from them."),
    ] = None,
    positive: Annotated[
        Path | None,
        typer.Option(
            "--positive",
            metavar="FILE",
            help="Texts that show the trait, one a line, as llama.cpp's cvector-generator has.",
        ),
    ] = None,
    negative: Annotated[
        Path | None, typer.Option("--negative", metavar="FILE", help="Texts that show its opposite.")
    ] = None,
    describe: Annotated[
        str | None,
        typer.Option(
            "--describe", metavar="TEXT", help="One sentence on a new trait, for which a model writes the texts."
        ),
    ] = None,
    writer: Annotated[
        str | None,
        typer.Option("--writer", metavar="MODEL|URL", help="Who writes them; the model itself if not given."),
    ] = None,
    save_trait: Annotated[
        Path | None, typer.Option("--save-trait", metavar="FILE.toml", help="Keep the written trait here.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Use a written trait without asking.")] = False,
    seed: SeedOption = 0,
    ctx: CtxOption = 512,
    threads: ThreadsOption = None,
    gpu_layers: GpuOption = -1,
    rpc: RpcOption = None,
    json: JsonOption = False,
) -> None:
    """Derive a trait's vector on a model and write it as a control vector.

    Example: `personasteer derive pessimistic -m demo -o pessimistic.gguf`
    """
    from personasteer.derive import check_form, check_position, contrast
    from personasteer.derive import derive as derive_vector
    from personasteer.derive.contrast import check_method
    from personasteer.traits import find

    for file in (out, save_responses, save_trait):
        if file is not None:
            check_output(file)
    chosen = parse_layers(layers) if layers else None
    check_method(method)
    check_position(position)
    check_form(form, chosen=chosen is not None, calibrated=not no_calibrate)
    options = {
        "n_ctx": ctx,
        "n_parallel": 1,
        "n_threads": threads,
        "n_gpu_layers": gpu_layers,
        "rpc": workers(rpc),
        "seed": seed,
    }
    texts = _given_texts(trait, positive, negative)
    about_answers = {
        "--responses": responses, "--continuations": continuations, "--save-responses": save_responses,
        "--judge": judge, "--work": work, "--describe": describe,
    }  # fmt: skip
    about_writing = {"--writer": writer, "--save-trait": save_trait, "--yes": yes}
    if texts:
        _refuse(about_answers | _given(context, OF_SAMPLING | OF_ANSWERS), "goes with a trait, not with given texts")
    if responses:
        given = _given(context, OF_SAMPLING) | {"--continuations": continuations}
        _refuse(given, "goes with sampled answers, not with --responses")
    if continuations:
        sampling = {name: option for name, option in OF_SAMPLING.items() if name != "questions"}
        _refuse(_given(context, sampling), "goes with sampled answers, not with --continuations")
    if not describe:
        _refuse(about_writing, "goes with --describe")
    if no_filter:
        _refuse({"--judge": judge}, "scores answers for the filter: it does not go with --no-filter")
    if not any(_is_url(name) for name in (judge or "", writer or "")):
        _refuse(_given(context, {"served": "--judge-model"}), "goes with a URL as --judge or --writer")
    found = None if texts or describe else find(trait)
    with open_model(model, **options) as m:
        if describe:
            found = _written(trait, describe, _writer(writer, served, m, options), seed, save_trait, yes or json)
        if texts:
            with stages() as stage:
                vector = contrast(
                    m,
                    *texts,
                    name=re.sub(r"[^\w-]+", "-", Path(trait).stem).strip("-") or "contrast",
                    method=method,
                    exclude_massive=exclude_massive,
                    layers=chosen,
                    progress=stage("reading"),
                )
        else:
            assert found is not None
            with stages() as stage:
                vector = derive_vector(
                    m,
                    found,
                    n_questions=questions,
                    max_tokens=predict,
                    temperature=temp,
                    n_rollouts=rollouts,
                    skip_tokens=skip,
                    responses=responses,
                    continuations=continuations,
                    method=method,
                    position=position,
                    exclude_massive=exclude_massive,
                    judge=_judge(judge, served, m, options, stage) if judge else None,
                    filtered=not no_filter,
                    calibrated=not no_calibrate,
                    layers=chosen,
                    form=form,
                    work=work,
                    keep_responses=(lambda text: atomic_write(save_responses, text.encode()))
                    if save_responses
                    else None,
                    progress=stage(f"deriving {found.name}"),
                )
    vector.save(out)
    result = summary(vector) | {"vector": str(out)}
    if json:
        print_json(result)
    else:
        _print(result)


def summary(vector: PersonaVector) -> dict[str, Any]:
    """What `derive --json` prints."""
    at = list(vector.layers)
    elicitation = vector.provenance.get("elicitation")
    return {
        "trait": vector.name,
        "layers": at,
        "strength": vector.strength,
        "window": list(vector.window),
        "calibrated": "calibration" in vector.provenance,
        "separation": _mean(vector.separations, at),
        "auroc": _mean(vector.aurocs, at),
        "split_half_cosine": _mean(vector.reliability, at),
        "answers": vector.provenance.get("answers"),
        "elicitation": elicitation,
        "massive_dimensions": vector.provenance.get("massive_dimensions"),
        "n_positive": vector.provenance["n_positive"],
        "n_negative": vector.provenance["n_negative"],
    }


def _print(result: dict[str, Any]) -> None:
    from personasteer.vectors import block_ranges

    usable = f"usable from {result['window'][0]:g} to {result['window'][1]:g}"
    lines = [
        f"{result['vector']}: {result['trait']}, blocks {block_ranges(result['layers'])}, strength "
        f"{result['strength']:g}, " + (usable if result["calibrated"] else "not calibrated"),
        f"from {result['n_positive']} + {result['n_negative']} texts; separation d' {_text(result['separation'])}, "
        f"AUROC {_text(result['auroc'])}, split-half cosine {_text(result['split_half_cosine'])} (held out)",
    ]
    if result["elicitation"]:
        e = result["elicitation"]
        dropped = ", ".join(f"{n} {label}" for label, n in e["dropped"].items()) or "none"
        what = f"elicitation rate {e['rate']:.2f}" if result["answers"] is None else f"from {result['answers']}"
        lines.append(f"{what}: {e['kept']} of {e['n']} contrasts kept; dropped: {dropped}")
        if any(e["lexicon"].values()):
            shares = " and ".join(f"{share:.2f} of the {side}" for side, share in e["lexicon"].items())
            lines.append(f"hint: a word of the trait's lexicon stands in {shares} answers")
    for line in lines:
        say(line)


def _given_texts(trait: str, positive: Path | None, negative: Path | None) -> tuple[list[Any], list[Any]] | None:
    from personasteer.traits.formats import load_lines, load_pairs

    if positive is None and negative is None:
        return load_pairs(trait) if trait.endswith(".jsonl") else None
    if positive is None or negative is None:
        raise ArgumentError("--positive and --negative belong together")
    return list(load_lines(positive)), list(load_lines(negative))


def _refuse(options: dict[str, Any], why: str) -> None:
    """Raise ArgumentError for the first option that is given and would be ignored."""
    for name, value in options.items():
        if value:
            raise ArgumentError(f"{name} {why}")


def _given(context: typer.Context, options: Mapping[str, str]) -> dict[str, bool]:
    """Which of these (by parameter) stand on the command line."""
    source = context.get_parameter_source
    return {name: getattr(source(parameter), "name", "") == "COMMANDLINE" for parameter, name in options.items()}


def _is_url(text: str) -> bool:
    return text.startswith(("http://", "https://"))


def _judge(name: str, served: str, model: Model, options: dict[str, Any], stage: Any) -> Judge:
    """The judge of a --judge option, with its agreement with labelled answers on stderr."""
    from personasteer.derive.judge import EndpointJudge, LocalJudge, LogOddsJudge, agreement, labelled_examples
    from personasteer.endpoint import Endpoint

    judge: Judge
    if name == LOG_ODDS:
        judge = LogOddsJudge(model)
    else:
        judge = (
            EndpointJudge(Endpoint(name, served, timeout=300.0))
            if _is_url(name)
            else LocalJudge(_other(name, model, options))
        )
    agreed = agreement(judge, labelled_examples(), progress=stage("testing the judge"))
    stderr.print(
        f"the judge on {agreed.n} labelled answers: Spearman {agreed.spearman:.2f}, AUROC {agreed.auroc:.2f}, mean "
        f"error {agreed.mean_abs_error:.0f} of 100, {agreed.unscored} not scored",
        markup=False,
        soft_wrap=True,
    )
    return judge


def _writer(name: str | None, served: str, model: Model, options: dict[str, Any]) -> Model | Endpoint:
    from personasteer.endpoint import Endpoint

    if name is None:
        return model
    return Endpoint(name, served) if _is_url(name) else _other(name, model, options)


def _other(name: str, model: Model, options: dict[str, Any]) -> Model:
    from personasteer.model import demo_model_path

    path = str(demo_model_path()) if name == "demo" else name
    if os.path.exists(path) and os.path.samefile(path, model.path):
        return model
    return open_model(name, **{**options, "n_ctx": max(2048, int(options["n_ctx"])), "n_parallel": 8})


def _written(
    name: str,
    description: str,
    writer: Model | Endpoint,
    seed: int,
    file: Path | None,
    sure: bool,
) -> Trait:
    """The trait that a model wrote, shown before it is used."""
    from personasteer.derive.write import write_trait
    from personasteer.traits.formats import as_toml

    with stages() as stage:
        trait = write_trait(name, description, writer, seed=seed, progress=stage("writing the trait"))
    text = as_toml(trait)
    if file is not None:
        atomic_write(file, text.encode())
    stderr.print(text, markup=False, soft_wrap=True)
    if not sure and not typer.confirm("Derive from these?", err=True):
        stderr.print("not derived" + (f"; the trait is kept in {file}" if file else ""), markup=False, soft_wrap=True)
        raise typer.Exit(1)
    return trait


def _mean(values: NDArray[np.float32] | None, at: list[int]) -> float | None:
    import numpy as np

    known = values is not None and np.isfinite(values[at]).all()
    return round(float(values[at].mean()), 4) if values is not None and known else None


def _text(value: float | None) -> str:
    return "not measured (too few texts)" if value is None else f"{value:.2f}"


def parse_layers(text: str) -> list[int]:
    """[12, 13, 14] of "12-14" and [3, 5] of "3,5"."""
    out: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part, re.ASCII)
        layers = range(int(match[1]), int(match[2] or match[1]) + 1) if match else ()
        if not layers:
            raise typer.BadParameter(f"layers must look like 12-17 or 3,5,9, not {text!r}")
        out += layers
    return out
