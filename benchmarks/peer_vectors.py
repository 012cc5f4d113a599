"""Does it steer? Our vectors, repeng's and cvector-generator's, at the same blocks and equal KL; and a system prompt.

    python benchmarks/peer_vectors.py [MODEL.gguf] --cvector-generator PROGRAM [--work DIR] [--traits A,B] [--save NAME]
    python benchmarks/peer_vectors.py --table NAME

Two kinds of texts, the same for all tools that read them:

- plain pairs, as repeng's and cvector-generator's own examples are: the trait's system prompts and their opposites,
  its questions, and the same beginnings of answers under both. Ours: `contrast` (last token, difference of means).
- the model's own answers under these prompts, as our `derive` elicits and filters them. Ours: the mean over the answer.

repeng takes the PCA of the last token's states (transformers in float32 on the dequantized weights); cvector-generator
PCA (its default) or the mean, over all tokens. All steer the blocks that our sweep chooses for our own answers, each
direction as strongly as it takes for the same divergence from the unsteered model on everyday answers, in either sign;
its sign is left as the tool gives it. Measured as in methods.py. The system prompt stands beside them at the KL that it
has. Each trait's result is one JSON file in the work folder, so that the command can be stopped and started again.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import methods
import numpy as np
import other_tools
import results
from derive import ANSWERS
from methods import SIGNS, TARGET_KL, TOLERANCE, Made
from work_folder import Folder

import personasteer as ps
from personasteer import traits
from personasteer.derive import Elicited, Selection, from_elicited
from personasteer.engine import Request
from personasteer.evaluate import bootstrap_interval, cell_log_odds, make_cells
from personasteer.model import demo_model_path
from personasteer.statistics import divergence, log_softmax
from personasteer.traits import Trait, neutral_pairs

TRAITS = ("pessimistic", "pirate", "formal", "warm", "poetic")
WORDS = (4, 9)  # of the beginnings of answers, in the plain pairs
OURS = "personasteer, own answers"


def plain_pairs(model: ps.Model, trait: Trait, n_questions: int) -> list[tuple[str, str]]:
    """(text under the trait's prompt, under its opposite), which end in the same words."""
    pairs = []
    for i, question in enumerate(trait.derive_questions[:n_questions]):
        for k, both in enumerate(trait.system):
            beginning = " ".join(ANSWERS[(i + k) % len(ANSWERS)].split()[: WORDS[(i + k) % len(WORDS)]])
            positive, negative = (_prompt(model, question, system) + beginning for system in both)
            pairs.append((positive, negative))
    return pairs


def own_pairs(model: ps.Model, found: Elicited, selection: Selection) -> list[tuple[str, str]]:
    """The answers that our `derive` reads, each after its prompts."""
    rows = found.rollouts

    def text(i: int) -> str:
        return _prompt(model, rows[i].prompt, rows[i].system) + rows[i].text

    return [(text(a), text(b)) for a, b in selection.kept]


def _prompt(model: ps.Model, question: str, system: str | None) -> str:
    messages = [{"role": "system", "content": system}] if system else []
    return str(model.template.render([*messages, {"role": "user", "content": question}]))


def by_tool(
    program: str | None,
    n_questions: int,
    model: ps.Model,
    trait: Trait,
    found: Elicited,
    selection: Selection,
    layers: tuple[int, ...],
) -> Made:
    """A vector of each tool."""
    yield OURS, from_elicited(model, trait, found, selection, layers=layers)
    texts = {"own answers": own_pairs(model, found, selection), "plain pairs": plain_pairs(model, trait, n_questions)}
    positive, negative = zip(*texts["plain pairs"], strict=True)
    yield "personasteer, plain pairs", ps.contrast(model, positive, negative, layers=layers)

    def vector(directions: dict[int, np.ndarray]) -> ps.PersonaVector:
        rows = np.full((model.n_layer, model.n_embd), np.nan, np.float32)
        for il, direction in directions.items():
            rows[il] = direction
        return ps.PersonaVector(rows, layers, name=trait.name)

    for what, pairs in texts.items():
        yield f"repeng PCA, {what}", vector(other_tools.repeng(str(model.path), pairs, model.n_threads)["directions"])
    for method in ("pca", "mean") if program else ():
        *_, directions = other_tools.cvector_generator(
            program, str(model.path), texts["plain pairs"], method, model.n_threads
        )
        yield f"cvector-generator {method}, plain pairs", vector(directions)


def of_system_prompts(model: ps.Model, trait: Trait) -> dict[str, Any]:
    """The trait's first system prompt and its opposite: change of the log-odds, KL on everyday answers."""
    cells = make_cells(trait.evaluate_questions[: methods.N_QUESTIONS], trait.evaluation_pairs, methods.N_PAIRS)
    n = len(dict.fromkeys(c.question for c in cells))

    def odds(system: str | None) -> np.ndarray:
        return cell_log_odds(model, cells, [None], system=system).reshape(n, -1).mean(1)

    before = odds(None)
    out = {}
    for sign, system in zip(SIGNS, trait.system[0][::-1], strict=True):  # minus: the opposite
        change = odds(system) - before
        out[sign] = {
            "kl": kl_of_system(model, system),
            "delta": float(change.mean()),
            "interval": bootstrap_interval(change),
            "by_question": change.tolist(),
        }
    return out


def kl_of_system(model: ps.Model, system: str) -> float:
    """KL(without || with the system prompt) of the next token, over the answers that kl_on_neutral takes."""
    requests = []
    for question, answer in neutral_pairs()[: methods.NEUTRAL["n_pairs"]]:
        for prompt in (None, system):
            tokens, n_prompt = model.pair_tokens(question, answer, prompt)
            tokens = tokens[: n_prompt + methods.NEUTRAL["n_tokens"]]
            requests.append(Request(tokens, n_prompt, outputs=(n_prompt - 1, len(tokens) - 1), keep_logits=True))
    rows = [log_softmax(r["logits"]) for r in model.run_alone(requests)]
    each = [divergence(p, q) for p, q in zip(rows[::2], rows[1::2], strict=True)]
    return float(np.concatenate(each).mean())


def table(content: dict[str, Any]) -> str:
    """Markdown: each tool over the traits, and a line for each trait."""
    measured = [r for r in content["traits"] if "methods" in r]
    names = list(measured[0]["methods"])
    lines = [
        f"| at KL {content['target_kl']:g} | effect, mean | less ours | 95 % | largest effect | coherence, lower end | "
        "judged, + less - | cosine with ours |",
        "| --- " + "| ---: " * 2 + "| --- " + "| ---: " * 4 + "|",
    ]
    reference = [r["methods"][names[0]] for r in measured]
    for name in names:
        rows = [r["methods"][name] for r in measured]
        mean, low, high = methods.difference(rows, reference)
        wins = sum(max(r["methods"], key=lambda m: methods.effect(r["methods"][m]).mean()) == name for r in measured)
        compared = f"{mean:+.3f} | {low:+.3f} … {high:+.3f}" if name != names[0] else " |"
        lines.append(
            f"| {name} | {np.mean([methods.effect(row).mean() for row in rows]):.3f} | {compared} | "
            f"{wins} of {len(measured)} | {np.mean([min(row[s]['coherence'] for s in SIGNS) for row in rows]):.2f} | "
            f"{methods.apart(rows, 'judged'):+.0f} | {np.mean([row['cosine'] for row in rows]):.2f} |"
        )
    systems = [r["system"] for r in measured]
    kl = [s[sign]["kl"] for s in systems for sign in SIGNS]
    mean, low, high = methods.difference(systems, reference)
    lines.append(
        f"| system prompt, at KL {min(kl):.2f} to {max(kl):.2f} | "
        f"{np.mean([methods.effect(s).mean() for s in systems]):.3f} | {mean:+.3f} | {low:+.3f} … {high:+.3f} | | | | |"
    )
    lines += [
        "",
        "| trait | " + " | ".join(names) + " | system prompt |",
        "| --- " + "| ---: " * (len(names) + 1) + "|",
    ]
    for r in content["traits"]:
        if "rejected" in r:
            lines.append(f"| {r['trait']} | rejected: {r['rejected'].split('. Seen:')[0]} |" + " |" * len(names))
            continue
        cells = [f"{methods.effect(row).mean():.2f}" for row in (*r["methods"].values(), r["system"])]
        lines.append(f"| {r['trait']} | " + " | ".join(cells) + " |")
    off = [
        f"{r['trait']}, {name}"
        for r in measured
        for name, row in r["methods"].items()
        if any(abs(row[sign]["kl"] / r["target_kl"] - 1) > TOLERANCE for sign in SIGNS)
    ]
    lines += ["", f"KL not within {TOLERANCE:.0%} of the target: {'; '.join(off) or 'none'}."]
    return "\n".join(lines)


def describe(content: dict[str, Any]) -> str:
    """What the table is of."""
    kept = ", ".join(f"{r['elicitation']['kept']} of {r['elicitation']['n']} ({r['trait']})" for r in content["traits"])
    return (
        f"{content['model']}; {content['n_questions']} questions under each of five pairs of prompts, answers kept: "
        f"{kept}; {methods.N_QUESTIONS} held-out questions. {content['machine']}."
    )


def measure(args: argparse.Namespace) -> dict[str, Any]:
    path = args.model or str(demo_model_path())
    with ps.Model(path, n_ctx=512, n_threads=args.threads) as model:
        folder = Folder(args.work, methods.settings(model, args.questions) | {"words": WORDS})

        def compute(trait: Trait) -> dict[str, Any]:
            make = functools.partial(by_tool, args.cvector_generator, args.questions)
            found = methods.compare(model, trait, args.questions, make)
            return found if "rejected" in found else found | {"system": of_system_prompts(model, trait)}

        wanted = [traits.find(name) for name in args.traits.split(",")]
        for trait in wanted:
            folder.get(trait.name, functools.partial(compute, trait))
        found = folder.load()
        return {
            "model": f"{model.name} ({model.description})",
            "target_kl": TARGET_KL,
            "n_questions": args.questions,
            "traits": [{k: v for k, v in found[t.name].items() if k != "sweep"} for t in wanted],
        }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a GGUF file; the demo model without")
    parser.add_argument("--cvector-generator", metavar="PROGRAM")
    parser.add_argument("--work", type=Path, default=Path("peer-vectors-work"))
    parser.add_argument("--traits", default=",".join(TRAITS))
    parser.add_argument("--questions", type=int, default=methods.N_DERIVE, help="asked under each system prompt")
    parser.add_argument("--threads", type=int)
    results.options(parser)
    args = parser.parse_args(arguments)
    content = results.measured_or_saved(args, measure, peers=True)
    print(f"{describe(content)}\n\n{table(content)}")


if __name__ == "__main__":
    main()
