"""METEOR 1.5 by its authors' Java program, where a Java and the program are at hand.

There is no Java-free way to the same number: the score rests on a table of paraphrases, WordNet and a search for the
best alignment. The package pycocoevalcap ships the program; only its file is used, none of its Python.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from bench.paper.packages import named

Tokens = Sequence[str]

# a decimal comma or a file encoding of the user's would change what the program reads and prints;
# this collector needs half the memory
_JAVA = "java -Xmx2G -XX:+UseSerialGC -Duser.language=en -Duser.country=US -Dfile.encoding=UTF-8".split()


def _jar() -> Path | None:
    package = importlib.util.find_spec("pycocoevalcap")  # finds, does not import: its imports want pycocotools
    folders = (package.submodule_search_locations if package else None) or []
    return next((jar for folder in folders if (jar := Path(folder) / "meteor" / "meteor-1.5.jar").is_file()), None)


NO_JAVA = "there is no java on the PATH (any version from 8)"


def missing() -> str | None:
    """Why METEOR cannot be computed here, None if it can."""
    if _jar() is None:
        return "meteor-1.5.jar is not here (pip install --no-deps pycocoevalcap brings it)"
    return None if shutil.which("java") else NO_JAVA


def source() -> str:
    return f"METEOR 1.5 (Java) out of {named('pycocoevalcap')}"


def meteor(references: Sequence[Sequence[Tokens]], hypotheses: Sequence[Tokens]) -> float:
    """METEOR 1.5, English, normalised, in [0, 1]. RuntimeError, in words, if the program is missing or fails."""
    with running() as program:
        return converse(program, references, hypotheses)


@contextmanager
def running() -> Iterator[subprocess.Popen[str]]:
    """The program, which takes some ten seconds of processor time to start, and any number of `converse` after that."""
    if reason := missing():
        raise RuntimeError(reason)
    command = [*_JAVA, "-jar", str(_jar()), "-", "-", "-stdio", "-l", "en", "-norm"]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        try:
            with subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, encoding="utf-8"
            ) as program:
                yield program
        except (OSError, ValueError) as error:  # it ended early, or answered something else than numbers
            errors.seek(0)
            said = next((line.strip() for line in errors if line.strip()), str(error))
            raise RuntimeError(f"METEOR's Java program failed: {said}") from None


def converse(
    program: subprocess.Popen[str], references: Sequence[Sequence[Tokens]], hypotheses: Sequence[Tokens]
) -> float:
    return together(program, statistics(program, references, hypotheses))


def statistics(
    program: subprocess.Popen[str], references: Sequence[Sequence[Tokens]], hypotheses: Sequence[Tokens]
) -> list[str]:
    """Of each instance what `together` wants to be told; parts of a test set are aligned once for all their scores."""
    assert program.stdin and program.stdout
    answers = []
    for refs, hypothesis in zip(references, hypotheses, strict=True):
        texts = (" ".join(tokens) for tokens in (*refs, hypothesis))
        print("SCORE", *texts, sep=" ||| ", file=program.stdin, flush=True)
        answers.append(program.stdout.readline().strip())
    return answers


def together(program: subprocess.Popen[str], answers: Sequence[str]) -> float:
    """The score of the instances that have these statistics."""
    assert program.stdin and program.stdout
    print("EVAL", *answers, sep=" ||| ", file=program.stdin, flush=True)
    # one score for each instance, then the one for all
    return float([program.stdout.readline() for _ in range(len(answers) + 1)][-1])
