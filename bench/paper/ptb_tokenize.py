"""Penn Treebank tokens as the captioning metrics want them, without Java.

The official E2E scripts feed METEOR, ROUGE-L and CIDEr with the output of a Java tokenizer (Stanford CoreNLP 3.4.1,
lower-cased, punctuation removed). These rules were worked out from that program's output: at each place the longest
token that any rule allows is taken. Lines whose tokens differ: 1 of E2E's 51,426 references (none of the test set),
0.3 % of WebNLG's, 1 % of mixed English, where addresses, telephone numbers and smileys have no rule here. And one thing
a line alone cannot tell: the Java program reads all lines as one text and decides by the first word of the next one
whether "in Serie A." ends in an abbreviation; here it does not.
"""

from __future__ import annotations

import re
from functools import lru_cache

# The official scripts also list "-LRB-" and its kin, but compare after lower-casing, so that "-lrb-" stays a word.
PUNCTUATION = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])

_WRITTEN = {  # tokens that are not written as they were read
    **{"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"},
    **{"£": "#", "€": "$", "¢": "cents", "…": "...", "\u2013": "--", "\u2014": "--"},
    **dict.fromkeys('"“”«»', "''"),
    **dict.fromkeys("\u2018\u2019", "'"),
}

_ABBREVIATIONS = (  # keep their period wherever they stand
    "jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thurs fri "
    "inc co corp ltd cos bros plc pty cie mfg assn dept univ intl natl bldg assoc adv "
    "mr mrs ms dr drs prof sen sens rep reps gov gen lt col capt cmdr maj sgt pvt cpl adm brig rev hon pres supt "
    "msgr mme mlle messrs sr jr esq det insp atty st ste ave rd blvd ct sq mt ft etc al seq vs est tel ext "
    "calif fla ariz colo conn ga ind kan ky md mich minn mo mont neb nev okla penn tenn va vt wis wyo wisc ala dak ph"
).replace(" ", "|")
_CAPITALISED = "Ark|Del|Ill|La|Mass|Miss|Ore|Pa|Tex|Wash"  # these only so: "hit or miss." is no state

_OPENERS = (  # words that begin a sentence even after a single letter and a period: "Serie A. The club"
    "A About According Additionally After An As At But Earlier He Her Here However If In It Last Many More Now "
    "Once One Other Our She Since Some Such That The Their Then There These They This We What When While Yet You"
).replace(" ", "|")

_Q = "['\u2019]"  # an apostrophe
_A = "[^\\W\\d_]"  # a letter
_AN = "[^\\W_]"  # a letter or digit
_STOP = f"(?!{_A})"
_PART = f"(?:[dlo]{_Q}{_A})?{_AN}+"  # d'oeuvre, o'clock and l'eau are one word

_RULES = [  # a rule with groups makes one token of each group
    re.compile(rule, re.IGNORECASE)
    for rule in (
        f"(can)(not){_STOP}|(gon|wan)(na){_STOP}|(got)(ta){_STOP}|(gim|lem)(me){_STOP}|({_Q}t)(is|was){_STOP}",
        f"({_A}*?)(n['\u2019`]t){_STOP}",
        f"{_Q}(?:[sdm]|ll|re|ve){_STOP}",
        f"{_Q}(?:n{_Q}?|em|til|[2-9]0s){_STOP}|[ldj]{_Q}|(?:ol|y){_Q}",
        f"{_A}\\w*(?:[.!?]{_A}\\w*)*",  # a stop with no space behind it glues two sentences together
        f"{_PART}(?:-{_PART})*",  # family-friendly
        f"{_A}*(?:[aeiou]{_Q}(?:[aeou]|(?-i:[A-Z]))|(?-i:\\b[A-HJ-XZan]{_Q}){_A}){_A}+",  # Ka'ak, N'Djamena
        "[a-z0-9][a-z0-9.,]*(?:-[a-z0-9]+)+",  # food,low-priced: the hyphen holds it together
        "(?-i:[A-Z]+(?:[+&][A-Z]+)+)",  # R&B
        "[a-z0-9]+(?:-[a-z]+)*(?:/[a-z0-9]+(?:-[a-z]+)*){1,2}",  # and/or
        r"[-+]?(?:\d*(?:[.:,]\d+)+|\d+)",  # 20.00, :5, -25
        r"\d{1,4}/\d{1,4}|\d{1,2}[-/]\d{1,2}[-/]\d{2,4}",
        r"(?-i:[A-Z])*\$",
        f"(?:{_A}\\.){{2,}}",
        f"{_A}\\.(?!\\s*$|\\s+(?-i:{_OPENERS})\\b)",
        f"(?:{_ABBREVIATIONS}|(?-i:{_CAPITALISED}))\\.",
        r"(?:ca|figs?|props?|nos?|arts?|pps?|ops?|approx)\.(?=\s?\d)",
        f"{_A}\\w*\\.(?=[,;:])",
        r"</?[a-z][^<>]*>",
        r"[?!]+|\*+|\.{3,}|-{2,}|''|``",
        ".",
    )
]


def _written(token: str) -> str:
    """The token as the Java program prints it, lower-cased."""
    if token[0] in "'\u2019" or token[-2:-1] == "\u2019":  # the two halves of a contraction get a plain apostrophe
        token = token.replace("\u2019", "'")
    if len(token) > 1 and set(token) <= set("-."):
        token = "--" if token[0] == "-" else "..."
    return _WRITTEN.get(token, token).lower()


@lru_cache(maxsize=100_000)  # references come back for every system that is scored
def tokenize(text: str) -> tuple[str, ...]:
    """Lower-cased tokens of one line of text, punctuation removed."""
    text = re.sub("[\u00ad\u200b]", "", text.replace("&amp;", "&"))
    tokens, at = [], 0
    while at < len(text):
        if text[at].isspace():
            at += 1
            continue
        best = max((m for m in (rule.match(text, at) for rule in _RULES) if m), key=lambda m: m.end())
        tokens += [_written(part) for part in best.groups() if part] or [_written(best.group())]
        at = best.end()
    return tuple(token for token in tokens if token not in PUNCTUATION)
