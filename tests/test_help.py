"""--help of the four scripts reads as one: groups, order, words, and sources of the defaults."""

import re

import pytest

import common
import cpctrans
import f2c_oops
import replai
import ssdet_coarsefine

SCRIPTS = [replai, cpctrans, f2c_oops, ssdet_coarsefine]
FIRST = ["data", "clips", "method"]
LAST = ["optimization", "evaluation", "faults of the release", "run"]
HOMONYMS = {"--crops"}               # where clips begin in f2c_oops.py; cuts of one in cpctrans.py


def listed(script, flags=""):
    """{flag: (group, text in one line)} of --help, in its order."""
    with pytest.MonkeyPatch.context() as m, pytest.raises(SystemExit) as e:
        lines = []
        m.setattr(common.Parser, "print_help", lambda p: lines.extend(p.format_help().split("\n")))
        script.parse_args([*flags.split(), "--help"])
    assert not e.value.code and max(map(len, lines)) <= 100
    found, group = {}, None
    for line in lines[lines.index("data:"):]:
        head = re.match(r"(\S.*):$|  (--\w+) ?(?:, --\w+ )?(?:.*?  +|.*$)", line)
        if head and head[1]:
            group = head[1]
        elif head:
            flag = head[2]
            found[flag] = [group, line[head.end():]]
        elif line.startswith(" " * 8):
            found[flag][1] += f" {line.strip()}"
    return {k: (group, text.strip()) for k, (group, text) in found.items()}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.__name__)
@pytest.mark.parametrize("flags", ["", "--tiny"])
def test_every_text_is_of_one_form(script, flags):
    flags = listed(script, flags)
    groups = list(dict.fromkeys(group for group, _ in flags.values()))
    assert groups[:3] == FIRST and groups[-4:] == LAST
    for flag, (_, text) in flags.items():
        assert len(text.split()) > 1 and not re.match(r"[A-Z][a-z]|.*\.$", text), flag


def test_flags_of_several_scripts_stand_in_the_same_groups_and_order():
    helps = [listed(s) for s in SCRIPTS]
    for i, a in enumerate(helps):
        for b in helps[:i]:
            both = [flag for flag in a if flag in b and flag not in HOMONYMS]
            assert len(both) > 15 and both == [flag for flag in b if flag in both]
            assert [a[flag][0] for flag in both] == [b[flag][0] for flag in both]
    for flag in [f for f, (group, _) in helps[0].items() if group == "run" and f != "--out"]:
        assert len({h[flag][1] for h in helps}) == 1, flag


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.__name__)
def test_every_number_says_where_it_comes_from(script):
    published, tiny = listed(script), listed(script, "--tiny")
    for flag, (_, text) in published.items():
        found = re.search(r"\(default: ([^,]*)(, .*)?\)$", text)
        if found and re.match(r"[\d.]", found[1]):
            assert found[2], flag
        changed = text != tiny[flag][1] and flag != "--dataset"
        assert changed == tiny[flag][1].endswith(", ours for --tiny)"), flag
    assert sum(text.endswith(", ours for --tiny)") for _, text in tiny.values()) > 5


def test_the_defaults_are_those_of_the_stage():
    flags = listed(replai, "--stage linear --dataset epic")
    assert "(default: 128, commands/*.sh" in flags["--batch_size"][1]
    assert "(default: 0, " in flags["--weight_decay"][1]      # a zero, too
    assert flags["--out"][1].endswith("_epic_linear)")
    assert "default" not in listed(f2c_oops, "--stage evaluate")["--epochs"][1]     # has none
