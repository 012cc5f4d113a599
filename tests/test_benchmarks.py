"""The benchmarks of quantizations and methods in small: on the tiny model, and their tables on made-up results."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import guard
import methods
import numpy as np
import pytest
import quantizations
import traits as traits_of_library
from planted import LETTERS
from requantize import requantize

import personasteer as ps
from personasteer import traits
from personasteer.derive import Response, Selection, replay
from personasteer.derive.selection import select_all
from personasteer.engine import Request
from personasteer.steering import as_steering
from personasteer.tiny_model import TEMPLATE, write_tiny_model
from personasteer.traits import neutral_pairs

QUESTIONS = LETTERS.derive_questions
RESPONSES = [
    Response(question, text, positive, LETTERS.system[0][0 if positive else 1])
    for question, texts in zip(QUESTIONS, LETTERS.continuations, strict=False)
    for text, positive in zip(texts, (True, False), strict=True)
]
SHAPES = 1e-4  # one text alone and many in a batch: float32 sums in another order, over some twenty tokens


# ---- doses of equal KL


def counted(kl: Any) -> tuple[Any, list[int]]:
    """A measurement that notes how many doses it was asked for."""
    sizes: list[int] = []

    def measure(at: Sequence[int], rho: np.ndarray) -> np.ndarray:
        sizes.append(len(at))
        return np.array([kl(k, r) for k, r in zip(at, rho, strict=True)])

    return measure, sizes


def test_a_kl_that_grows_with_the_square_of_the_dose_is_met_by_the_second_measurement() -> None:
    measure, sizes = counted(lambda k, rho: (k + 1) * rho**2)
    rho, kl = methods.equal_kl(measure, 4, target=0.1)
    np.testing.assert_allclose(rho, np.sqrt(0.1 / np.arange(1, 5)), rtol=1e-12)
    np.testing.assert_allclose(kl, 0.1, rtol=1e-12)
    assert sizes == [4, 4]


def test_a_kl_of_another_shape_is_met_by_the_secant_and_only_what_is_off_is_measured_again() -> None:
    exponents = (2.0, 1.3, 3.0, 3.5)
    measure, sizes = counted(lambda k, rho: 6.0 * rho ** exponents[k])
    rho, kl = methods.equal_kl(measure, 4, target=0.1)
    np.testing.assert_allclose(kl, [6.0 * r**p for r, p in zip(rho, exponents, strict=True)], rtol=1e-12)
    assert np.abs(kl / 0.1 - 1).max() <= methods.TOLERANCE
    assert sizes == [4, 4, 3]  # a power law has one exponent, which two measurements give


def test_a_direction_that_does_nothing_ends_at_the_largest_dose_with_the_kl_that_it_has() -> None:
    measure, sizes = counted(lambda k, rho: 0.002 * rho)
    rho, kl = methods.equal_kl(measure, 1, target=0.1)
    assert rho.tolist() == [methods.MOST_RHO]
    assert kl.tolist() == [0.002 * methods.MOST_RHO]
    assert len(sizes) == 1 + methods.MOST_CORRECTIONS


# ---- methods


@pytest.fixture(scope="module")
def tied_path(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with its embedding as output matrix: what makes letters of a text also makes them likelier."""
    path = tmp_path_factory.mktemp("tied") / "tied.gguf"
    shutil.copy(tiny_path, path)
    tensors = {t.name: t for t in gguf.GGUFReader(path, "r+").tensors}
    tensors["output.weight"].data[:] = tensors["token_embd.weight"].data
    return path


@pytest.fixture(scope="module")
def model(tied_path: Path) -> Iterator[ps.Model]:
    with ps.Model(tied_path, n_ctx=1024, n_threads=1) as m:
        yield m


def keep_all(found: Any, trait: Any) -> Selection:
    return select_all(found)


@pytest.fixture(scope="module")
def compared(model: ps.Model) -> dict[str, Any]:
    """Given answers instead of what a random model would say."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(methods, "elicit", lambda model, trait, **_: replay(model, RESPONSES))
        patch.setattr(methods, "select", keep_all)
        patch.setattr(methods, "N_QUESTIONS", 3)
        result = methods.compare(model, LETTERS)
    return json.loads(json.dumps(result)) | {"seconds": 6.0}  # as it comes out of its file


def test_every_method_steers_the_same_answers_directions_at_the_same_kl(
    model: ps.Model, compared: dict[str, Any]
) -> None:
    assert list(compared["methods"]) == ["difference of means", "PCA", "probe", "last prompt token"]
    found = replay(model, RESPONSES)
    positive, negative = (found.responses[side::2].astype(np.float64) for side in (0, 1))
    mean = ps.PersonaVector.from_array(positive.mean(0) - negative.mean(0), compared["layers"])
    for name, row in compared["methods"].items():
        for sign in (-1.0, 1.0):
            end = row["minus" if sign < 0 else "plus"]
            assert abs(end["kl"] / 0.1 - 1) <= methods.TOLERANCE, (name, sign)
            assert end["delta"] == pytest.approx(np.mean(end["by_question"]), abs=1e-12)
            assert end["interval"][0] <= end["delta"] <= end["interval"][1]
    for sign, end in ((-1.0, "minus"), (1.0, "plus")):
        row = compared["methods"]["difference of means"][end]
        assert row["kl"] == pytest.approx(kl_by_hand(model, mean, sign * row["rho"]), abs=SHAPES)
    assert compared["methods"]["difference of means"]["cosine"] == pytest.approx(1.0, abs=1e-6)
    assert all(abs(row["cosine"]) < 1 - 1e-6 for row in list(compared["methods"].values())[1:])


def kl_by_hand(model: ps.Model, vector: ps.PersonaVector, rho: float) -> float:
    """KL(unsteered || steered) over the first 12 tokens of 6 everyday answers, one text at a time."""
    total = count = 0.0
    for question, answer in neutral_pairs()[:6]:
        tokens, n_prompt = model.pair_tokens(question, answer)
        tokens = tokens[: n_prompt + 12]
        span = (n_prompt - 1, len(tokens) - 1)
        rows = []
        for steer in (None, ps.Add(vector, rho, scope="response")):
            request = Request(tokens, n_prompt, as_steering(steer), outputs=span, keep_logits=True)
            (r,) = model.run_requests([request])
            rows.append(log_softmax(r["logits"]))
        p, q = rows
        total += float((np.exp(p) * (p - q)).sum())
        count += len(p)
    return total / count


def log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    x = x - x.max(1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(1, keepdims=True)))


def test_a_trait_that_cannot_be_elicited_is_reported_and_not_compared(
    model: ps.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods, "elicit", lambda model, trait, **_: replay(model, RESPONSES))
    monkeypatch.setattr(methods, "select", lambda found, trait: Selection((), 4, {"positive refusal": 4}, {}, {}, {}))
    result = methods.compare(model, LETTERS)
    assert "could not be elicited" in result["rejected"]
    table = methods.tables([result | {"seconds": 1.0}])
    assert "| letters |" in table
    assert "rejected: trait 'letters' could not be elicited" in table


def arm(delta: float, spread: float, **more: Any) -> dict[str, Any]:
    return {
        "delta": delta,
        "interval": [delta - spread, delta + spread],
        "by_question": [delta - spread, delta + spread],
        **more,
    }


def method_result(trait: str, effects: Sequence[float], kl: float = 0.1) -> dict[str, Any]:
    rows = {}
    free = {"coherence": 0.7, "lexicon": 0.5}
    for k, (name, effect) in enumerate(zip(methods.METHODS, effects, strict=True)):
        rows[name] = {"cosine": 1 - 0.1 * k, "auroc": 0.9, "split_half": 0.8} | {
            sign: arm(factor * effect, 0.0, rho=0.2, kl=kl, judged=50 + 100 * factor * effect, **free)
            for sign, factor in (("minus", -1.0), ("plus", 1.0))
        }
    elicited = {"kept": 18, "n": 20}
    return {
        "trait": trait, "target_kl": 0.1, "elicitation": elicited, "layers": [3, 4], "methods": rows, "seconds": 60.0
    }  # fmt: skip


def test_the_table_of_methods_means_over_traits_and_compares_with_the_first_method() -> None:
    table = methods.tables([method_result("a", (0.5, 0.4, 0.6, 0.1)), method_result("b", (0.3, 0.1, 0.2, 0.0))])
    lines = table.splitlines()
    assert lines[2] == (
        "| a | difference of means | 3-4 | 1.000 | 0.900 | 0.800 | 0.20 / 0.20 | 0.100 / 0.100 | "
        "-0.50 (-0.50 … -0.50) | +0.50 (+0.50 … +0.50) | 0.50 | 0.70 / 0.70 | 0 / 100 | 0.50 / 0.50 |"
    )
    rest = "0.900 | 0.800 | 0.70 |"
    assert f"| difference of means | 0.400 | +0.000 | +0.000 … +0.000 | 1 of 2 | 1.000 | {rest} +80 | +0.00 |" in lines
    assert f"| PCA | 0.250 | -0.150 | -0.150 … -0.150 | 0 of 2 | 0.900 | {rest} +50 | +0.00 |" in lines
    assert f"| probe | 0.400 | +0.000 | +0.000 … +0.000 | 1 of 2 | 0.800 | {rest} +80 | +0.00 |" in lines
    assert "Contrasts read, of those asked for: 18 of 20 (a), 18 of 20 (b)." in table
    assert "within 10% of the target (marked *): none." in table
    assert table.endswith("2 minutes.")


def test_a_kl_that_was_not_reached_is_marked_and_named() -> None:
    table = methods.tables([method_result("a", (0.5, 0.4, 0.6, 0.1), kl=0.08)])
    assert "| 0.080* / 0.080* |" in table
    assert "a, difference of means; a, PCA; a, probe; a, last prompt token" in table


def test_the_trait_in_the_published_layout_has_its_keys_alone_and_no_text_twice() -> None:
    path = Path(methods.__file__).with_name("persona_vectors_layout.json")
    data = json.loads(path.read_text("utf-8"))
    assert list(data) == ["instruction", "questions", "eval_prompt"]
    assert all(set(pair) == {"pos", "neg"} for pair in data["instruction"])
    trait = traits.load(path)
    assert (len(trait.system), len(trait.derive_questions), len(trait.evaluate_questions)) == (5, 10, 10)
    assert trait.continuations == ()
    texts = [*data["questions"], *(text for pair in data["instruction"] for text in pair.values())]
    assert len(texts) == len({t.casefold() for t in texts}) == 30
    assert methods._beside("persona_vectors_layout.json") == str(path)
    assert methods._beside("formal") == "formal"


# ---- quantizations


@pytest.fixture(scope="module")
def ladder(tied_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    """Given answers, read on the tiny model and two quantizations of it."""
    work = tmp_path_factory.mktemp("ladder")
    lines = [
        json.dumps({"question": r.prompt, "answer": r.text, "positive": r.positive, "system": r.system})
        for r in RESPONSES
    ]
    (work / "letters.jsonl").write_text("\n".join(lines))
    return work, quantizations.run(tied_path, work, [LETTERS], ["Q8_0", "Q4_0"], n_threads=1, n_ctx=1024)


def test_a_ladder_reads_the_same_answers_on_every_file_and_says_what_the_files_hold(
    ladder: tuple[Path, dict[str, dict[str, Any]]], tied_path: Path
) -> None:
    work, results = ladder
    kinds = ("source", "Q8_0", "Q4_0")
    assert set(results) == {f"{kind}-{what}" for kind in kinds for what in ("file", "letters")}
    vectors = []
    for kind in kinds:
        path = tied_path if kind == "source" else work / f"{kind}.gguf"
        with ps.Model(path, n_ctx=1024, n_threads=1) as model:
            rows = replay(model, RESPONSES).responses.astype(np.float64)
        vectors.append(rows[0::2].mean(0) - rows[1::2].mean(0))
    for kind, v in zip(kinds, vectors, strict=True):
        cosine = (v * vectors[0]).sum(1) / np.linalg.norm(v, axis=1) / np.linalg.norm(vectors[0], axis=1)
        got = results[f"{kind}-letters"]["cosine"]
        expected = {"min": cosine[1:3].min(), "median": np.median(cosine[1:3])}  # windows of 4 blocks are 1 or 2
        for key, value in expected.items():
            assert got[key] == pytest.approx(value, abs=1e-6), (kind, key)
    assert results["source-file"]["types"] == {"F32": 30}
    assert results["Q8_0-file"]["types"] == {"Q8_0": 30}
    assert results["Q4_0-file"]["types"] == {"Q4_0": 29, "Q8_0": 1}
    kl = [results[f"{kind}-file"]["kl"] for kind in kinds]
    assert kl[0] == 0.0
    assert 0 < kl[1] < kl[2]
    assert 1 - 1e-6 > results["Q8_0-letters"]["cosine"]["min"] > results["Q4_0-letters"]["cosine"]["min"]


def test_a_finished_ladder_computes_nothing_again(
    ladder: tuple[Path, dict[str, dict[str, Any]]], tied_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, results = ladder
    monkeypatch.delattr(quantizations.ps, "Model")
    assert quantizations.run(tied_path, work, [LETTERS], ["Q8_0", "Q4_0"], n_threads=1) == results
    with pytest.raises(SystemExit, match="another model or other settings"):
        quantizations.run(tied_path, work, [LETTERS], ["Q8_0", "Q4_0"], n_threads=2)


def test_an_interrupted_ladder_goes_on_with_what_is_missing(
    ladder: tuple[Path, dict[str, dict[str, Any]]], tied_path: Path, tmp_path: Path
) -> None:
    work, results = ladder
    shutil.copytree(work, tmp_path / "copy")
    (tmp_path / "copy" / "Q4_0-letters.json").unlink()
    again = quantizations.run(tied_path, tmp_path / "copy", [LETTERS], ["Q8_0", "Q4_0"], n_threads=1, n_ctx=1024)
    anew = again.pop("Q4_0-letters")
    assert again == {name: r for name, r in results.items() if name != "Q4_0-letters"}  # their seconds, too
    assert anew == results["Q4_0-letters"] | {"seconds": anew["seconds"]}


def test_the_ladder_s_tables_name_every_file_and_the_effect_in_parts_of_the_source_s(
    ladder: tuple[Path, dict[str, dict[str, Any]]],
) -> None:
    table = quantizations.tables(ladder[1])
    assert table.index("| F32 (source) | 30 F32 | 32.00 |") < table.index("| Q8_0 | 30 Q8_0 |")
    assert "| Q4_0 | 29 Q4_0, 1 Q8_0 |" in table
    assert "| F32 (source) | 32.00 | 1.0000 | 1.000 | 1.000 … 1.000 | 1.000 | 1.000 … 1.000 |" in table
    assert "no row is the original float model" not in table
    of_quantized = {"types": {"Q4_1": 29, "Q8_0": 1}, "bits_per_weight": 5.125}
    results = ladder[1] | {"source-file": ladder[1]["source-file"] | of_quantized}
    said = "It is quantized itself, to 5.12 bits per weight: it is the reference here, and no row is the original float"
    assert said in quantizations.tables(results)


def test_a_file_is_named_by_what_it_holds_where_that_is_not_mostly_what_was_asked_for() -> None:
    files = {
        "source": {"types": {"Q4_1": 210, "Q8_0": 1}},
        "Q5_0": {"types": {"Q5_0": 210, "Q8_0": 1}},
        "Q6_K": {"types": {"Q8_0": 181, "Q6_K": 30}},
    }
    assert [quantizations.label(kind, files) for kind in files] == ["Q4_1 (source)", "Q5_0", "Q8_0 + Q6_K (“Q6_K”)"]


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_the_error_of_the_weights_is_relative_to_their_size(kind: str, tied_path: Path, tmp_path: Path) -> None:
    path = requantize(tied_path, tmp_path / "out.gguf", kind)
    a, b = ({t.name: t for t in gguf.GGUFReader(p).tensors} for p in (path, tied_path))
    names = [name for name in b if len(b[name].shape) > 1]
    got, true = (
        np.concatenate([gguf.quants.dequantize(of[n].data, of[n].tensor_type).ravel() for n in names]).astype(float)
        for of in (a, b)
    )
    expected = np.linalg.norm(got - true) / np.linalg.norm(true)
    assert quantizations.relative_error(path, tied_path) == pytest.approx(expected, rel=1e-5)  # float32 squares
    assert quantizations.relative_error(tied_path, tied_path) == 0.0


def test_the_mean_kl_of_two_known_distributions() -> None:
    p, q = np.log([[0.5, 0.5], [0.9, 0.1]]), np.log([[0.25, 0.75], [0.9, 0.1]])
    by_hand = (0.5 * np.log(2) + 0.5 * np.log(2 / 3)) / 2
    assert quantizations.mean_kl(p, q) == pytest.approx(by_hand, abs=1e-12)


def test_the_share_of_an_effect_is_taken_trait_by_trait_and_its_questions_are_drawn_together() -> None:
    def result(trait: str, plus: Sequence[float]) -> dict[str, Any]:
        ends = {"minus": {"by_question": [0.0] * len(plus)}, "plus": {"by_question": list(plus)}}
        return {"trait": trait, "effects": {"own": ends}}

    reference = {"a": result("a", (1.0, 3.0, 2.0)), "b": result("b", (0.2, 0.1, 0.6))}
    rows = [result("a", (0.5, 1.5, 1.0)), result("b", (0.22, 0.11, 0.66))]
    # half of a and 1.1 times b, on whichever questions: no spread
    assert quantizations.mean_share(rows, reference, "own") == pytest.approx((0.8, 0.8, 0.8), abs=1e-12)
    varied = [result("a", (3.0, 1.0, 2.0))]
    mean, low, high = quantizations.mean_share(varied, reference, "own")
    assert mean == pytest.approx(1.0)
    assert low < 0.7
    assert high > 1.4


# ---- traits of the library


def evaluated(name: str, size: float, *, unrelated: float = 0.0, t: float | None = 3.0) -> dict[str, Any]:
    ends = [{"strength": 0.3 * s, "log_odds": size * s - 1, "delta": size * s, "ci_low": size * s - 1.1,
             "ci_high": size * s - 0.9, "coherence": 0.9} for s in (-1, 1)]  # fmt: skip
    verdict = {"monotone": True, "outside_random": size > 0.1, "coherent": True}
    controls = {"random_p95": 0.1, "shuffled": 0.05, "unrelated": unrelated, "system_prompt": None}
    found = {"dose": ends, "controls": controls, "verdict": verdict, "passes": all(verdict.values()), "layers": [4, 5],
             "strength": 0.3, "spearman": 1.0, "kl_neutral": 0.1, "capability": {"base": 0.7, "steered": 0.7},
             "generations": None}  # fmt: skip
    elicited = {"rate": 0.5, "t": t}
    return {"trait": name, "elicitation": elicited, "window": [-0.5, 0.4], "evaluation": found, "seconds": 60.0}


def test_the_table_of_traits_counts_what_passes_and_names_controls_that_do_as_much() -> None:
    rejected = {"trait": "d", "rejected": "vector 'd' does not steer: at none of the blocks", "seconds": 60.0}
    rows = [evaluated("a", 0.5, unrelated=-0.6), evaluated("b", 0.05), evaluated("c", 0.2, t=None), rejected]
    lines = traits_of_library.table(rows).splitlines()
    assert lines[2].startswith(
        "| a | 0.50 | 4-5 | 0.30 | -0.50 … 0.40 | -0.50 | +0.50 | 0.40 … 0.60 | 0.10 | 0.05 | -0.60 |"
    )
    assert lines[3].endswith("| not outside_random |")
    assert lines[4].startswith("| c |  | 4-5")  # nothing was elicited
    assert lines[5].endswith("rejected: does not steer |")
    assert len({line.count("|") for line in lines[:6]}) == 1
    assert lines[-1] == (
        "4 traits: 2 pass, 1 do not (b), 1 are rejected when deriving (d). Passing beside a control that moves as far "
        "as +ρ: a (unrelated). 4 minutes."
    )


def test_a_rejected_trait_is_derived_from_its_continuations_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    no_system = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + TEMPLATE
    path = write_tiny_model(tmp_path / "m.gguf", chat_template=no_system)
    arguments = ["traits.py", str(path), "--work", str(tmp_path / "w"), "--traits", "warm", "--questions", "2"]
    monkeypatch.setattr("sys.argv", [*arguments, "--threads", "1"])
    traits_of_library.main()
    own, again = (json.loads((tmp_path / "w" / f"warm{way}.json").read_text()) for way in ("", "-continuations"))
    assert "takes no system message" in own["rejected"]
    assert "takes no system message" not in again.get("rejected", "")  # the rest depends on random weights
    first = capsys.readouterr().out
    assert first.count("| warm |") == 2
    monkeypatch.setattr(ps, "Model", None)
    traits_of_library.main()
    assert capsys.readouterr().out == first


# -- guard ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pessimistic", "sycophantic", "casual", "poetic"])
def test_a_trait_has_more_than_fifty_prompts_that_ask_for_a_character(name: str) -> None:
    trait = traits.get(name)
    prompts = guard.persona_prompts(trait)
    assert len({p for p, _ in prompts}) == len(prompts) == 52
    assert all(q in p and "{" not in p for p, q in prompts)
    assert {q for _, q in prompts} <= set(trait.evaluate_questions)
    library = " ".join(text for pair in trait.system for text in pair)
    assert not [p for p, _ in prompts if p in library]


def test_the_table_of_a_guard_has_a_line_for_each_rule() -> None:
    arm = {
        "shows": 0.5,
        "declines": 0.2,
        "score": 40.0,
        "coherence": 0.9,
        "touched": 0.1,
        "identical": 90,
        "untouched": 90,
    }
    row = {"model": "m", "trait": "t", "n": 52, "alarms_before": 0.75, "alarms": 1.0}
    text = guard.table([{**row, "arms": dict.fromkeys(guard.RULES, arm)}])
    assert text.count("| m | t |") == len(guard.RULES)
    assert "| m | t | cap | 50% of 52 | 20% | 40.0 | 0.90 | 10% | 90 of 90 |" in text
    assert "75% of the persona prompts" in text
