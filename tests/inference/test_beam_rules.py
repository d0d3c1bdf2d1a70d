import pytest

from megatron_ads.errors import DataError
from megatron_ads.inference.beam_rules import Node, build_trie

END = 9


def _paths(node: Node) -> list[tuple[int, ...]]:
    if not node.children:
        return [()]
    return [
        (int(token), *rest) for token, child in zip(node.tokens_C, node.children, strict=True) for rest in _paths(child)
    ]


def test_every_path_is_a_name_and_every_name_a_path() -> None:
    names = {"to": [1, 2], "tom": [1, 2, 3], "ann": [4], "tim": [1, 5, 3]}
    trie = build_trie(names, END)
    paths = _paths(trie.root)
    assert [list(path) for path in paths] == [[*names[name], END] for name in trie.names]
    assert sorted(trie.names) == sorted(names)
    assert trie.depth == 4


def test_the_names_below_a_node_are_a_range() -> None:
    trie = build_trie({"to": [1, 2], "tom": [1, 2, 3], "ann": [4], "tim": [1, 5, 3]}, END)
    below = dict(zip(trie.root.tokens_C.tolist(), trie.root.children, strict=True))
    assert set(trie.names[below[1].first : below[1].last]) == {"to", "tom", "tim"}
    assert trie.names[below[4].first : below[4].last] == ("ann",)
    assert (trie.root.first, trie.root.last) == (0, 4)


def test_names_that_the_tokenizer_cannot_tell_apart_are_refused() -> None:
    with pytest.raises(DataError, match="'Café' and 'Cafe' are the same tokens"):
        build_trie({"Café": [1], "Cafe": [1]}, END)


def test_no_names_are_refused() -> None:
    with pytest.raises(DataError, match="no valid names to answer with; give --names"):
        build_trie({}, END)


def test_a_name_may_have_more_tokens_than_python_has_levels_of_recursion() -> None:
    long = [1] * 3000
    trie = build_trie({"long": long, "to": [1, 2]}, END)
    assert trie.depth == 3001
    assert (trie.name_of([*long, END]), trie.name_of([1, 2, END])) == ("long", "to")
