"""Mistakes in the CUDA kernels: where they can be made, what the record says of each, and one that is made here."""

import json
from pathlib import Path
from typing import Any

import pytest

from build_support.common import CannotBuild, find_compiler
from tests.mutations import cuda
from tests.mutations.cuda_reasons import REASONS, reason_of
from tests.mutations.cuda_sites import Site, digests, programs_of, sites, sites_of
from tests.support import ROOT

RECORD = ROOT / "tests" / "records" / "cuda_mutations.json"
AGAIN = f"python -m tests.mutations.cuda --out {RECORD.relative_to(ROOT)}"

KERNEL = """
PA_DEVICE TwoB load(const Tile &tile) {
    hw::ldmatrix(a, tile.at);  // hw::sync_block();
    return {{m[0], m[1]}, {m[2], m[3]}};
}
inline int host() {
    for (int i = 0; i < 4; ++i) go(i);
}
template <int kPending>
PA_DEVICE static void arrive(const Params &p) {
    hw::copy_wait<kPending>();
}
template <class E>
PA_DEVICE void run(const Params &p) {
    if (p.two) hw::sync_block();
    arrive<0>(p);
    arrive<1>(p);
    for (int i = f(1, 2); i < (n + 1) * 2; i += kStep, j ^= 1)
        hw::mma<E>(c[i], a[i, 0], b.first);
    for (; left > 0; --left) x[1] = y, x[2] = z;
    while (there(p)) {
        as_a<E>(a[0], s[i][n], s[i][n + 1]);
    }
}
"""


def recorded() -> dict[str, Any]:
    made: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8"))
    return made


def test_the_record_is_of_these_kernels() -> None:
    assert recorded()["sources"] == digests(ROOT), f"the kernels or what runs them changed: {AGAIN}"
    made = [cuda.name_of(row) for row in recorded()["rows"]]
    assert made == cuda.all_names(), AGAIN


def test_each_mistake_is_seen_or_a_reason_is_known() -> None:
    missed = [row for row in recorded()["rows"] if row["outcome"] not in cuda.CAUGHT]
    assert [cuda.name_of(row) for row in missed if not reason_of(row)] == []
    known = {(row["file"], row["function"], row["text"], row["nth"]) for row in missed}
    assert REASONS.keys() <= known, "a reason for what is seen"


def test_what_the_machine_checks_it_sees() -> None:
    """No barrier, wait or fence is found out by its results alone."""
    rows = recorded()["rows"]
    for kind in ("barrier", "wait", "fence"):
        words = {row["outcome"] for row in rows if row["kind"] == kind and row["outcome"] in cuda.CAUGHT}
        assert words and words <= {"race", "late copy", "never written", "outside", "meeting", "deadlock"}, kind


def test_sites_are_found_by_their_text(tmp_path: Path) -> None:
    (tmp_path / "kernel.h").write_text(KERNEL)
    found = sites_of(tmp_path / "kernel.h")
    assert [(site.function, site.kind, site.change) for site in found] == [
        ("load", "fragments", "registers 1 and 2 exchanged"),
        ("load", "fragments", "registers 1 and 2 exchanged"),
        ("arrive", "wait", "removed where kPending = 0"),
        ("arrive", "wait", "removed where kPending = 1"),
        ("run", "barrier", "removed"),
        ("run", "loop", "one turn less"),
        ("run", "fragments", "registers 0 and 1 of b.first exchanged"),
        ("run", "fragments", "registers 1 and 2 of a[i, 0] exchanged"),
        ("run", "loop", "one turn less"),
        ("run", "loop", "no second turn"),
        ("run", "fragments", "left and right exchanged"),
    ]
    assert put(found[2]) == ['::mutant::is({n}, __PRETTY_FUNCTION__, "kPending = 0") ? (void)0 : ']
    assert put(found[4]) == ["::mutant::is({n}) ? (void)0 : "]
    assert put(found[5]) == [" i < ((n + 1) * 2) - (::mutant::is({n}) ? (kStep) : 0)"]
    assert put(found[8]) == [" left > (0) + (::mutant::is({n}) ? (1) : 0)"]
    assert put(found[9])[1] == " (there(p)) && ::mutant::first({n}, turns_{n})"
    assert put(found[10]) == ["::mutant::is({n}) ? s[i][n + 1] : s[i][n]", "::mutant::is({n}) ? s[i][n] : s[i][n + 1]"]


def put(site: Site) -> list[str]:
    return [edit[2] for edit in site.edits]


def test_every_file_of_the_kernels_has_a_program() -> None:
    assert {site.kind for site in sites(ROOT)} == {"barrier", "wait", "commit", "fence", "fragments", "loop"}
    for file in {site.file for site in sites(ROOT)}:
        assert programs_of(file, ROOT), file


def test_a_barrier_less_is_a_race(tmp_path: Path) -> None:
    try:
        find_compiler()
    except CannotBuild as error:
        pytest.skip(str(error))
    copy = cuda.Copy(tmp_path / "copy")
    number = [cuda.name_of(site.identity()) for site in copy.sites].index(
        "fwd_short.h:arrive:barrier:hw::sync_block();:0:removed where kPending = 1"
    )
    outcome, said = copy.outcome("fwd", number + 1)
    assert outcome in ("race", "late copy", "never written"), said
    assert "fwd_short" in said and "thread" in said
