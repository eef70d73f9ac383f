"""Response-to-passage conversion: an answer about an image becomes a document, to train retrieval on.

Visual instruction sets ask about an image and answer in a sentence. MIRe keeps what could be asked of a knowledge base,
finds passages by the answer, and puts the answer between them: a document as long and as noisy as those of a corpus.

Rules and numbers are those of the paper and of its released code, except that:

- its nouns come from a tagger; ours are the question's words that are not in `PLAIN_WORDS`, so that verbs are among them;
- its sentences end at every full stop; ours, at an end mark before white space and no lower-case letter, if no initial;
- its answers are put in lower case and lose a leading "yes," or "sure!"; ours do not.

References
----------
MIRe, arXiv:2411.08334, sec. 3.3 and appendix; ``runs/data_filtering.py`` and ``runs/convert_tasks.py`` of its release.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

MIN_QUESTION_CHARACTERS = 25
MIN_RESPONSE_CHARACTERS = 30

FEW_WORDS = 4
"""An answer of so many words or fewer is given the question's own."""

NUM_PASSAGES = 3
NUM_SENTENCES = 2
"""Kept of each passage."""

COUNTS_OR_COLOURS = re.compile(r"\b(how many|what colou?rs?|what (is|are) the colou?rs?)\b", re.IGNORECASE)
"""Questions that the image alone answers."""

NUMBER = re.compile(r"[\d.,\s]+")
UNANSWERED = re.compile(r"\bunanswerable\b|answering does not require reading", re.IGNORECASE)

SHOWN = "image|picture|photo|photograph|scene"
IN_THE_IMAGE = re.compile(rf",?\s*\bin (?:the|this) (?:{SHOWN})\b(?!['’]),?", re.IGNORECASE)
THE_IMAGE_SHOWS = re.compile(
    rf"^(?:the|this) (?:{SHOWN}) (?:shows|showcases|features|captures|depicts|presents|displays)\s+", re.IGNORECASE
)

WORD = re.compile(r"[^\W\d_][\w'’-]+")
PLAIN_WORDS = frozenset(  # as a list it would take a line a word
    """a about after all also am an and any are around as at be been before being between both but by can could describe did
    do does doing down each explain for from had has have having he her here hers him his how i if image images in into is
    it its just kind many may me might more most much my name no not of off on one ones only or other our out over photo
    photograph picture scene see seen she should show showing shown shows so some such tell than that the their them then
    there these they this those through to too type under up us very was we were what when where which while who whom whose
    why will with would you your""".split()  # noqa: SIM905
)
"""Words of a question that say nothing of what it is about."""

SENTENCE_END = re.compile(r"(?<!\b[A-Z])[.!?][\"'”’)\]]*\s+(?=[^\sa-z])")


@dataclass(frozen=True)
class Prepared:
    """A question and its answer, cleaned; ``reason`` says why they are left out, if they are."""

    question: str
    response: str
    reason: str | None


def prepare(image: str, question: str, response: str) -> Prepared:
    """Return a question and an answer fit for retrieval, or why they are not.

    Parameters
    ----------
    image
        Where the image is, which tells the data set that it comes from.
    question
        May hold the mark ``<image>``.
    response
        What was answered.
    """
    asked = " ".join(question.replace("<image>", " ").split())
    answered = without_image_phrases(response)
    if answered and len(answered.split()) <= FEW_WORDS:
        said = {word.casefold() for word in WORD.findall(answered)}
        words = [word for word in content_words(asked) if word.casefold() not in said]
        answered = f"{answered.rstrip('.')} ({', '.join(words)})" if words else answered
    return Prepared(asked, answered, _reason(image, asked, response.strip(), answered))


def _reason(image: str, question: str, response: str, cleaned: str) -> str | None:
    if "VG_100K" in image:
        return "with an image of Visual Genome (VG_100K)"
    if len(question) < MIN_QUESTION_CHARACTERS:
        return f"whose question has under {MIN_QUESTION_CHARACTERS} characters"
    if COUNTS_OR_COLOURS.search(question):
        return "whose question asks for a count or a colour"
    if NUMBER.fullmatch(response):
        return "whose answer is a number"
    if UNANSWERED.search(response):
        return "whose answer says that there is none"
    if len(cleaned) < MIN_RESPONSE_CHARACTERS:
        return f"whose answer has under {MIN_RESPONSE_CHARACTERS} characters"
    return None


def without_image_phrases(text: str) -> str:
    """Return a text that no longer speaks of "the image": what it says must hold without one."""
    text = IN_THE_IMAGE.sub("", THE_IMAGE_SHOWS.sub("", " ".join(text.split())))
    text = text.lstrip(" ,.").rstrip(" ,")
    return text[:1].upper() + text[1:]


def content_words(question: str) -> list[str]:
    """Return the words that say what a question is about, each once, in order."""
    words: dict[str, str] = {}
    for word in WORD.findall(question):
        words.setdefault(word.casefold(), word)
    return [word for key, word in words.items() if key not in PLAIN_WORDS and len(word) > 2]


def first_sentences(text: str, count: int = NUM_SENTENCES) -> str:
    """Return the first sentences of a text; all of it, if it has no more. "Dr." and the like end one."""
    text = " ".join(text.split())
    ends = [match.end() for match in islice(SENTENCE_END.finditer(text), count)]
    return text[: ends[-1]].rstrip() if len(ends) == count else text


def to_document(response: str, passages: Sequence[str]) -> str:
    """Return the answer between the first sentences of passages, best first: D1, R, D2, D3."""
    parts = [first_sentences(passage) for passage in passages]
    return " ".join([*parts[:1], response, *parts[1:]])
