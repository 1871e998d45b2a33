"""Where the CUDA kernels can be wrong by one barrier, wait, commit, fence, fragment or turn of a loop: from their text.

All mutants of a copy are compiled at once: each stands behind a switch, and the environment's MUTANT says which is on.
A barrier that MUTANT=7 takes out is `::mutant::is(7) ? (void)0 : hw::sync_block();`.
"""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

FOLDER = "csrc/cuda/attention"
PROGRAMS = "fwd", "bwd"  # of csrc/cuda/tests
REMOVED = {
    "sync_block": "barrier",
    "sync_named": "barrier",
    "sync_warp": "barrier",
    "copy_wait": "wait",
    "copy_commit": "commit",
    "fence_device": "fence",
}

# Included before all else. A line of output leaves at once, so that a mutant can be stopped at its first failure.
HEADER = """\
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
namespace mutant {
inline const int now = std::getenv("MUTANT") ? std::atoi(std::getenv("MUTANT")) : 0;
inline unsigned char reached[4096];
inline void tell() {
    for (int n = 1; n < 4096 && now == 0; ++n)
        if (reached[n]) std::printf("reached %d\\n", n);
}
inline const bool ready = !std::setvbuf(stdout, nullptr, _IOLBF, 4096) && !std::atexit(tell);
inline bool is(int n) { return (reached[n] = 1, n == now); }
// In a function of this template argument alone.
inline bool is(int n, const char *function, const char *argument) { return std::strstr(function, argument) && is(n); }
// A loop that is cut ends after its first turn.
inline bool first(int n, int &turns) { return !is(n) || turns++ == 0; }
// Before a thread begins: where its variables will lie, what it does not set is nan.
__attribute__((noinline)) inline void spoil() {
    unsigned char below[16384];
    std::memset(below, 0xff, sizeof below);
    asm volatile("" : : "r"(below) : "memory");
}
inline void exchange(int n, uint32_t &a, uint32_t &b) {
    const uint32_t kept = a;
    if (is(n)) a = b, b = kept;
}
template <int size>
struct Words {
    uint32_t x[size];
};
template <int size>
Words<size> exchanged(int n, const uint32_t (&x)[size], int i) {
    Words<size> made;
    for (int j = 0; j < size; ++j) made.x[j] = x[j];
    exchange(n, made.x[i], made.x[i + 1]);
    return made;
}
template <class Two>
Two exchanged(int n, const Two &x) {
    if (is(n)) return {{x.second[0], x.second[1]}, {x.first[0], x.first[1]}};
    return x;
}
}  // namespace mutant
"""


class Site(NamedTuple):
    file: str
    function: str
    kind: str  # of REMOVED's, or "fragments", or "loop"
    text: str
    nth: int  # of those that are the same up to here
    change: str
    edits: tuple[tuple[int, int, str], ...]  # from, to, what is put there; {n} is the switch

    def identity(self) -> dict[str, str | int]:
        return {key: getattr(self, key) for key in ("file", "function", "kind", "text", "nth", "change")}


def sites(folder: Path) -> list[Site]:
    """Of all kernels below `folder`, the root of a repository."""
    return [site for path in sorted((folder / FOLDER).glob("*.h")) for site in sites_of(path)]


def sites_of(path: Path) -> list[Site]:
    source = path.read_text(encoding="utf-8")
    text = re.sub(r"//.*", lambda comment: " " * len(comment[0]), source)  # places stay
    found: list[Site] = []
    for begin, end, kind, change, edits in sorted([*_removed(text), *_fragments(text), *_loops(text)]):
        function, is_kernel = _function(text, begin)
        if not is_kernel:
            continue
        site = Site(path.name, function, kind, " ".join(text[begin:end].split()), 0, change, edits)
        nth = sum(other[:4] == site[:4] and other.change == change for other in found)
        found.append(site._replace(nth=nth))
    return found


def write_switched(folder: Path) -> list[Site]:
    """Puts the switches into the kernels below `folder`, a copy; mutant n is the list's n - 1."""
    found = sites(folder)
    machine = folder / "csrc" / "cuda" / "hw" / "host.h"
    text, count = re.subn(r"(?=\bK::run\()", "::mutant::spoil(), ", machine.read_text(encoding="utf-8"))
    if count != 1:
        raise RuntimeError("no place before a thread begins is known")
    machine.write_text(text, encoding="utf-8")
    (folder / "csrc" / "mutant.h").write_text(HEADER, encoding="utf-8")
    for path in sorted((folder / FOLDER).glob("*.h")):
        edits = [
            (begin, end, number, put.replace("{n}", str(number)))
            for number, site in enumerate(found, 1)
            if site.file == path.name
            for begin, end, put in site.edits
        ]
        text = path.read_text(encoding="utf-8")
        # from the end on; of several at one place, the last first, so that they stand in their order
        for begin, end, _, put in sorted(edits, reverse=True):
            text = text[:begin] + put + text[end:]
        path.write_text(text, encoding="utf-8")
    return found


def programs_of(file: str, folder: Path) -> list[str]:
    """The programs that include a kernel's file."""
    return [name for name in PROGRAMS if file in _included(folder / "csrc" / "cuda" / "tests" / f"{name}.cpp", folder)]


def digests(folder: Path) -> dict[str, str]:
    """Of the kernels, of the programs that run them and of the machine. Comments and layout do not count."""
    cuda = folder / "csrc" / "cuda"
    paths = [*cuda.glob("attention/*.h"), *cuda.glob("host/*.h"), cuda / "hw" / "host.h", cuda / "tests" / "truth.h"]
    paths += [cuda / "tests" / f"{name}.cpp" for name in PROGRAMS]
    made = {}
    for path in sorted(paths):
        words = re.sub(r"//.*", "", path.read_text(encoding="utf-8")).split()
        made[path.relative_to(cuda).as_posix()] = hashlib.sha256(" ".join(words).encode()).hexdigest()[:16]
    return made


Found = tuple[int, int, str, str, tuple[tuple[int, int, str], ...]]


def _removed(text: str) -> Iterator[Found]:
    for call in re.finditer(rf"\bhw::({'|'.join(REMOVED)})\b[^;]*;", text):
        for argument in _arguments_of_template(text, call.start()) or [""]:
            switch = f'{{n}}, __PRETTY_FUNCTION__, "{argument}"' if argument else "{n}"
            put = f"::mutant::is({switch}) ? (void)0 : "  # of several at one call each is before the next
            change = f"removed where {argument}" if argument else "removed"
            yield *call.span(), REMOVED[call[1]], change, ((call.start(), call.start(), put),)


def _fragments(text: str) -> Iterator[Found]:
    def site(begin: int, end: int, change: str, *edits: tuple[int, int, str]) -> Found:
        return begin, end, "fragments", change, edits

    for call in re.finditer(r"\b(hw::mma|multiply|as_a)<E>\(", text):
        end, places = _arguments(text, call.end())
        words = [text[slice(*place)] for place in places]
        if call[1] == "hw::mma":
            for index, first in ((1, 1), (2, 0)):
                put = f"::mutant::exchanged({{n}}, {words[index]}, {first}).x"
                change = f"registers {first} and {first + 1} of {words[index].strip()} exchanged"
                yield site(call.start(), end, change, (*places[index], put))
        elif call[1] == "multiply":
            put = f"::mutant::exchanged({{n}}, {words[3]})"
            yield site(call.start(), end, "first and second exchanged", (*places[3], put))
        else:
            left, right = (f"::mutant::is({{n}}) ? {a} : {b}" for a, b in (words[:0:-1], words[1:]))
            yield site(call.start(), end, "left and right exchanged", (*places[1], left), (*places[2], right))
    for pair in re.finditer(r"\{\{(\w+)\[0\], \1\[1\]\}, \{\1\[2\], \1\[3\]\}\}", text):
        one, two = (f"{pair[1]}[::mutant::is({{n}}) ? {a} : {b}]" for a, b in ((2, 1), (1, 2)))
        put = f"{{{{{pair[1]}[0], {one}}}, {{{two}, {pair[1]}[3]}}}}"
        yield site(*pair.span(), "registers 1 and 2 exchanged", (*pair.span(), put))
    # what fills an operand's registers one by one, or by ldmatrix
    after = " ::mutant::exchange({{n}}, {0}[1], {0}[2]);"
    for pair in re.finditer(r"(\w+(?:\[[^\]\n]*\])?)\[1\] = [^;]*;\s*\1\[2\] = [^;]*;", text):
        yield site(*pair.span(), "exchanged", (pair.end(), pair.end(), after.format(pair[1])))
    for call in re.finditer(r"\bhw::ldmatrix(?:_trans)?\((a), [^;]*;", text):
        put = after.format(call[1])
        yield site(*call.span(), "registers 1 and 2 exchanged", (call.end(), call.end(), put))


def _loops(text: str) -> Iterator[Found]:
    for loop in re.finditer(r"\b(for|while) \(", text):
        end, _ = _arguments(text, loop.end())
        inside = text[loop.end() : end - 1]
        parts = inside.split(";") if loop[1] == "for" else ["", inside, ""]
        if len(parts) != 3:
            continue  # over a list
        begin = loop.end() + (len(parts[0]) + 1 if loop[1] == "for" else 0)
        condition = begin, begin + len(parts[1])
        if put := _shorter(*(part.strip() for part in parts[1:])):
            yield loop.start(), end, "loop", "one turn less", ((*condition, " " + put),)
            continue
        counted = f" ({parts[1].strip()}) && ::mutant::first({{n}}, turns_{{n}})"
        counter = loop.start(), loop.start(), "if (int turns_{n} = 0; true) "
        yield loop.start(), end, "loop", "no second turn", (counter, (*condition, counted))


def _shorter(condition: str, step: str) -> str:
    """The condition of a loop without its last turn, or "" where that is no matter of a bound."""
    compared = re.fullmatch(r"(\w+) ([<>]) ([^&|]*)", condition)
    if compared is None:
        return ""
    name, sign, bound = compared.groups()
    sizes = [found[1] for found in re.finditer(rf"\b{name} \+= ([^,]*)", step)]
    if f"++{name}" in step or (sign == ">" and f"--{name}" in step):
        sizes = ["1"]
    if sizes:
        return f"{name} {sign} ({bound}) {'-' if sign == '<' else '+'} (::mutant::is({{n}}) ? ({sizes[0]}) : 0)"
    if f"{name} *= 2" in step:
        return f"{name} < ({bound}) / (::mutant::is({{n}}) ? 2 : 1)"
    return ""


def _arguments(text: str, begin: int) -> tuple[int, list[tuple[int, int]]]:
    """Behind the bracket that closes what `begin` lies in, and the places of what commas part in it."""
    places: list[tuple[int, int]] = []
    depth, start, at = 0, begin, begin
    while True:
        letter = text[at]
        if letter in ")]}" and depth == 0:
            return at + 1, [*places, (start, at)]
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            places.append((start, at))
            start = at + 1 + (text[at + 1] == " ")
        at += 1


def _begun(text: str, at: int) -> re.Match[str] | None:
    """Where the function begins whose body `at` lies in: its first line, up to the bracket."""
    opens = r"^(?:\w| +(?:PA_|static |inline ))[^=(\n]*?(\w+)\("
    begun = [found for found in re.finditer(opens, text[:at], flags=re.MULTILINE) if "static_assert" not in found[0]]
    return begun[-1] if begun else None


def _function(text: str, at: int) -> tuple[str, bool]:
    """Whose body `at` lies in, and whether a kernel runs it."""
    begun = _begun(text, at)
    return (begun[1], "PA_" in begun[0]) if begun else ("", False)


def _arguments_of_template(text: str, at: int) -> list[str]:
    """With which numbers the function around `at` is called, as compilers write them, if there are several."""
    begun = _begun(text, at)
    if begun is None or not (template := re.search(r"template <(?:int|bool) (\w+)>\s*\Z", text[: begun.start()])):
        return []
    values = sorted(set(re.findall(rf"\b{begun[1]}<(\w+)>\(", text)))
    return [f"{template[1]} = {value}" for value in values] if len(values) > 1 else []


def _included(path: Path, folder: Path) -> set[str]:
    found, left = set(), [path]
    while left:
        for name in re.findall(r'#include "(cuda/attention/[^"]*)"', left.pop().read_text(encoding="utf-8")):
            if name not in found:
                found.add(name)
                left.append(folder / "csrc" / name)
    return {Path(name).name for name in found}
