from curation.data.card import MAX_CODE, CardFacts, card

FACTS = CardFacts(
    recipe_name="small",
    shards="/pool/{00000..00041}.tar",
    read=12_345,
    embedded=12_340,
    dropped={"image:empty": 3, "caption:missing": 2},
    warnings={},
    waterfall=[("duplicate_uid", 12_340, 12_300), ("clip_score", 12_300, 3_690)],
    selected=3_690,
    licences={"CC0": 690, "CC BY 4.0": 3_000},
    embedded_by={"embed.model": "ViT-B-32", "embed.weights": "ab12", "compute.torch_threads": None},
    versions={"torch": "2.11.0"},
)


def lines_with(text, *words):
    return [line for line in text.splitlines() if all(word in line for word in words)]


def test_every_count_stands_in_the_card():
    text = card(FACTS)
    for row in (
        "| read | 12,345 |",
        "| dropped: `image:empty` | 3 |",
        "| dropped: `caption:missing` | 2 |",
        "| embedded | 12,340 |",
        "| selected | 3,690 |",
        "| `duplicate_uid` | 12,340 | 40 | 12,300 |",
        "| `clip_score` | 12,300 | 8,610 | 3,690 |",
        "| `embed.weights` | `ab12` |",
        "| torch | 2.11.0 |",
    ):
        assert row in text.splitlines()


def test_licences_are_ordered_by_their_samples_then_by_name():
    text = card(FACTS._replace(licences={"b": 1, "c": 5, "a": 1}))
    assert "| `c` | 5 |\n| `a` | 1 |\n| `b` | 1 |\n" in text


def test_warnings_have_a_section_only_if_there_are_any():
    assert "## Warnings" not in card(FACTS)
    warned = card(FACTS._replace(warnings={"tar:no_end_marker": 2}))
    assert "| `tar:no_end_marker` | 2 |" in warned.splitlines()
    assert warned.index("## Counts") < warned.index("## Warnings") < warned.index("## Licences")


def test_a_hostile_licence_stays_one_cell_of_code():
    hostile = "`</code><script>alert(1)</script>\n\n# Heading | x | `\x1b[2J\u202e"
    (row,) = lines_with(card(FACTS._replace(licences={hostile: 1})), "script")
    assert row == "| `'</code><script>alert(1)</script> # Heading \\| x \\| ' [2J` | 1 |"


def test_a_licence_as_long_as_a_book_is_cut():
    (row,) = lines_with(card(FACTS._replace(licences={"x" * 10_000: 7})), "xxx")
    assert row == f"| `{'x' * MAX_CODE}...` | 7 |"


def test_an_empty_run_has_a_card_too():
    empty = CardFacts("debug", "", 0, 0, {}, {}, [], 0, {"": 0}, {}, {})
    text = card(empty)
    assert "| read | 0 |" in text.splitlines()
    assert "| (none) | 0 |" in text.splitlines()


def test_equal_facts_give_equal_cards():
    reordered = FACTS._replace(licences=dict(sorted(FACTS.licences.items())))
    assert card(reordered) == card(FACTS)
