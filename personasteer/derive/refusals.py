"""Answers that decline instead of answering: a vector made of them would mean "refusing", whatever its name."""

from __future__ import annotations

import re

_CANNOT = (
    r"(?:can ?not|can['’]t|could ?n['’]t|could not|am not able to|['’]m not able to|am unable to|['’]m unable to|won['’]t|"
    r"will not)"
)
_DO = (
    r"(?:help(?! but)|assist|comply|provide|fulfil+|answer|do that|do this|engage|participate|generate|create|write|support|"
    r"give|offer|continue|respond|play|pretend|act|share|discuss|condone|encourage|recommend|be part|be using|go along|"
    r"take part|take on|adopt|talk about|say that|produce|accommodate|speak|role-?play|use that|"
    r"be rude|be mean|insult|mock|threaten|deceive|lie to|flatter|harm|hurt|wish)"
)
_ABLE = r"(?:able|unable|willing|comfortable|allowed|permitted|going|designed|programmed|supposed)"
_A_MACHINE = (
    r"(?:(?:\w+[ -]){0,2}(?:ai|artificial intelligence|language model|chatbot|computer program|machine)|"
    r"(?:\w+[ -]){0,2}(?:digital|virtual|text-based|ai) assistant)"
)
_LACKS = r"(?:don['’]t|do not|can['’]t|cannot|not able|unable|lack|no|am not|['’]m not)"
_VIEWS = r"(?:personal |own |real |any |human )*(?:opinions?|feelings?|emotions?|experiences?|beliefs?|views?|preferences?|consciousness)"
_PATTERNS = (
    rf"\bi (?:really |simply |just |must )?{_CANNOT} (?:really |simply |feel able to |in good conscience )?{_DO}\b",
    r"\bi (?:do not|don['’]t) (?:engage in|participate in|provide|role-?play|condone|feel able to)\b",
    rf"\bi(?:['’]m| am) (?:just |simply |really )?(?:not {_ABLE}|unable)(?: with| to)? (?:be )?(?:{_DO}|pretend\w*|do\w*)",
    rf"\b(?:as|being|i(?:['’]m| am)(?: \w+,)?(?: just| only| merely)?) (?:an? |only an? )?{_A_MACHINE}\b(?=.{{0,160}}\b{_LACKS}\b)",
    rf"\bi (?:do not|don['’]t) (?:have|hold|possess) (?:the ability|the capability|{_VIEWS})",
    r"\bi (?:must|have to|need to|will have to|['’]ll have to) (?:respectfully |politely )?(?:decline|refuse|say no)\b",
    r"\bi (?:respectfully |politely )?(?:decline|refuse) to\b",
    rf"\bi(?:['’]d| would) (?:rather|prefer) not (?:to )?(?:{_DO}|go|get|weigh|take)",
    r"\b(?:against|violat\w+) (?:my|our|the) (?:\w+ )?(?:guidelines|polic(?:y|ies)|programming|principles|rules)\b",
    r"\bmy (?:guidelines|polic(?:y|ies)|programming|principles|rules) (?:do not|don['’]t|forbid|prevent|prohibit)",
    r"\b(?:beyond|outside)(?: of)? (?:what i|my (?:abilities|capabilities|scope))",
    r"\b(?:not|isn['’]t) (?:something|a (?:request|topic|role)) (?:that )?i(?:['’]m| am| can|['’]ll| will)\b",
    r"\b(?:not|n['’]t) be appropriate (?:for me )?to\b",
    r"\bi (?:do not|don['’]t) (?:feel comfortable|think i (?:should|can|could)|think it (?:is|would be) appropriate)\b",
    r"\bi(?:['’]m| am| was) (?:designed|programmed|trained|made) to be (?:helpful|harmless|honest|safe|respectful)\b",
    r"\A\W*(?:i(?:['’]m| am) )?sorry,? (?:but )?no\b",
    r"\bi(?:['’]m| am) going to (?:have to )?(?:pass on|decline|refuse|sit this)|\bi['’]ll (?:sit this one out|pass on this)",
    r"\bi (?:do not|don['’]t) have (?:enough|sufficient) information to answer\b",
    r"\bi (?:do not|don['’]t) give advice on\b",
    r"\A\W*(?:no|nope)\b[.!,]?(?:\W*\Z| not going there| i (?:won['’]t|will not|refuse))",
)
_REFUSAL = re.compile("|".join(f"(?:{p})" for p in _PATTERNS), re.IGNORECASE | re.DOTALL)
_OPENING = 220  # characters: a refusal shows at the start


def refuses(text: str) -> bool:
    """Whether an answer opens by declining or deflecting, by the phrases that instruct models use for it."""
    return bool(_REFUSAL.search(" ".join(text[:_OPENING].split())))
