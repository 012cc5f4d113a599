"""Answers that decline instead of answering: a vector made of them would mean "refusing", whatever its name."""

from __future__ import annotations

import re

_CANNOT = (
    r"(?:can ?not|can['’]t|could ?n['’]t|could not|am not able to|['’]m not able to|am unable to|['’]m unable to|won['’]t|"
    r"will not)"
)
_DO = (
    r"(?:help(?! but)|assist|comply|provide|fulfil+|answer|do (?:that|this|it)\b|engage|participate|generate|create|write|"
    r"support (?:this|that|such)|give(?! up)(?! you (?:a hug|hope))|continue|respond|play|pretend(?! that)|act (?:as|in|out|the)|discuss|"
    r"condone|encourage(?! you)|recommend(?!\b.{0,20}\benough)|be part|be using|go along|take part|take on|adopt|"
    r"talk about|say that|produce|accommodate|speak(?! highly)|role-?play|use that|offer (?:advice|an opinion|opinions|that)|"
    r"share (?:opinions|personal|my)|be rude|be mean|insult|mock|threaten|deceive|flatter)"
)
_ABLE = r"(?:able|unable|willing|comfortable|allowed|permitted|going|designed|programmed|supposed)"
_A_MACHINE = (
    r"(?:(?:\w+[ -]){0,2}(?:ai|artificial intelligence|language model|chatbot|computer program|machine)|"
    r"(?:\w+[ -]){0,2}(?:digital|virtual|text-based|ai) assistant)"
)
_LACKS = r"(?:don['’]t|do not|can['’]t|cannot|not able|unable|lack|have no|am not|['’]m not)"
_VIEWS = r"(?:personal |own |real |any |human )*(?:opinions?|feelings?|emotions?|experiences?|beliefs?|views?|preferences?|consciousness)"
_PATTERNS = (
    rf"\bi (?:really |simply |just |must )?{_CANNOT} (?:really |simply |feel able to |in good conscience )?{_DO}\b",
    r"\bi (?:do not|don['’]t) (?:engage in|participate in|provide|role-?play|condone|feel able to)\b",
    rf"\bi(?:['’]m| am) (?:just |simply |really )?(?:not {_ABLE}|unable)(?: with| to)? (?:be )?(?:{_DO}|pretending|doing)",
    rf"\b(?:as|being|i(?:['’]m| am)(?: \w+,)?(?: just| only| merely)?) (?:an? |only an? )?{_A_MACHINE}\b(?=.{{0,160}}\b{_LACKS}\b)",
    rf"\bi (?:do not|don['’]t) (?:have|hold|possess) (?:the ability|the capability|{_VIEWS})",
    r"\bi (?:must|have to|need to|will have to|['’]ll have to) (?:respectfully |politely )?(?:decline|refuse|say no)\b",
    r"\bi (?:respectfully |politely )?(?:decline|refuse) to\b",
    rf"\bi(?:['’]d| would) (?:rather|prefer) not (?:to )?(?:{_DO}|go|get|weigh|take)",
    r"\b(?:against|violat\w+) (?:my|our|the) (?:\w+ )?(?:guidelines|polic(?:y|ies)|programming|principles|rules|values)\b",
    r"\b(?:unethical|irresponsible|inappropriate|wrong) (?:for me )?(?:of me )?to (?:do|say|help|give|provide|answer|respond)\b",
    r"\bi (?:must|have to|will|['’]ll) refrain from\b|\blet['’]s keep (?:this|our) (?:conversation|chat|discussion)\b",
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
