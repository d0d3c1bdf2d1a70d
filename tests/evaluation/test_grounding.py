from megatron_ads.evaluation.name_answers import NearestNames

NAMES = ("Acme Tools", "Acme Paper", "Bolt & Sons", "Dune", "Dunes End")


def test_every_name_is_nearest_to_itself() -> None:
    ranked = NearestNames(NAMES).rank(NAMES, 5)
    assert [names[0] for names in ranked] == list(NAMES)
    assert all(sorted(names) == sorted(NAMES) for names in ranked)


def test_a_name_spelt_otherwise_or_told_in_a_sentence_is_found() -> None:
    nearest = NearestNames(NAMES)
    ranked = nearest.rank(["ACME  tool", "Bolt and Sons", "They buy from Dunes End next."], 1)
    assert ranked == [["Acme Tools"], ["Bolt & Sons"], ["Dunes End"]]


def test_what_has_nothing_in_common_with_any_name_is_not_grounded() -> None:
    assert NearestNames(NAMES).rank(["xyz", ""], 3) == [[], []]
