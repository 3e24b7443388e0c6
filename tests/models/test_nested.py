"""Arguments of forward(), taken apart by place and put together again."""

from __future__ import annotations

from diffc.models.nested import nested, places, tuple_places, without_repeats

ARGUMENTS = {
    "hidden_states": 1,
    "added_cond_kwargs": {"text_embeds": 2, "time_ids": 3},
    "image_rotary_emb": (4, 5),
    "scale": [0.5, (32, 33)],
}


def test_nested_is_the_inverse_of_places() -> None:
    found = places(ARGUMENTS)
    assert found[("added_cond_kwargs", "time_ids")] == 3
    assert found[("scale", 1, 0)] == 32
    assert nested(found.items(), tuple_places(ARGUMENTS)) == ARGUMENTS


def test_what_is_none_has_no_place_and_keeps_its_position() -> None:
    assert places({"a": None, "b": [None, 1]}) == {("b", 1): 1}
    assert nested({("b", 1): 1}.items()) == {"b": [None, 1]}


def test_a_dictionary_among_the_values_stays_one_value() -> None:
    assert nested([(("a",), {"b": 1})]) == {"a": {"b": 1}}


def test_what_is_said_of_every_image_is_said_once() -> None:
    same, other = [[(1, 4, 6)], [(1, 4, 6)]], [[(1, 4, 6)], [(1, 4, 8)]]
    found = without_repeats({"img_shapes": same, "sizes": other, "scale": [1, 1], "one": [[(1, 2)]]})
    assert found == {"img_shapes": [[(1, 4, 6)]], "sizes": other, "scale": [1, 1], "one": [[(1, 2)]]}
