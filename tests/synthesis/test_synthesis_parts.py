"""Private, public and test parts: one numbering of classes, no picture on two sides, and nothing of a single class."""

import numpy as np
import pytest
from PIL import Image

from edgepriv import datasets
from edgepriv.cli.same_classes import contained, renumbered
from edgepriv.cli.synthesis_parts import take_parts
from edgepriv.errors import DataError


def write_folder(path, names, each, seed):
    """A folder with one sub-folder a class; the pictures of a class are as bright as its letter is late."""
    rng = np.random.default_rng(seed)
    for name in names:
        (path / name).mkdir(parents=True)
        for i in range(each):
            level = 20 * (ord(name[0]) - ord("a")) if name.isalpha() else 20 * int(name)
            picture = rng.integers(level, level + 10, (8, 8), dtype=np.uint8)
            Image.fromarray(picture).save(path / name / f"{i}.png")
    return datasets.load(path, split="all")


def pictures(count, classes, seed, name="set"):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, 8, 8, 1), dtype=np.uint8)
    return datasets.Dataset(name, images, np.arange(count) % classes, tuple(map(str, range(classes))))


def bytes_of(part):
    return {image.tobytes() for image in part[0]}


def test_classes_are_brought_together_by_their_names(tmp_path):
    private = write_folder(tmp_path / "private", "abcdefghij", 9, 1)
    public = write_folder(tmp_path / "public", "fghij", 9, 2)
    assert set(public.labels) == set(range(5))
    parts = take_parts(private, public, 0)
    assert parts.names == tuple("abcdefghij")
    assert set(parts.public[1]) == set(range(5, 10))
    for images, labels in (parts.private, parts.public, parts.test):
        assert (images.reshape(len(images), -1).mean(axis=1) // 20 == labels).all()
    assert parts.held_out == 0


def test_folders_with_numbers_count_as_the_numbers_say(tmp_path):
    public = write_folder(tmp_path / "public", ["3", "4"], 9, 2)
    assert set(renumbered(public, ("0", "1", "2", "3", "4")).labels) == {3, 4}


def test_a_public_class_that_the_private_data_lack_comes_after_theirs(tmp_path):
    private = write_folder(tmp_path / "private", "cd", 9, 1)
    public = write_folder(tmp_path / "public", "abcd", 9, 2)
    parts = take_parts(private, public, 0)
    assert parts.names == tuple("cdab")
    assert parts.classes == 4
    assert set(parts.private[1]) == {0, 1}
    assert set(parts.public[1]) == {0, 1, 2, 3}


def test_names_and_numbers_or_other_names_are_refused_with_the_classes(tmp_path):
    named, numbered = write_folder(tmp_path / "named", "abc", 9, 1), pictures(90, 3, 2)
    for private, public in ((named, numbered), (numbered, named)):
        with pytest.raises(DataError, match=r"a, b, c.* which is which") as told:
            take_parts(private, public, 0)
        assert "0, 1, 2" in str(told.value)
    others = write_folder(tmp_path / "others", "cl", 9, 3)
    with pytest.raises(DataError, match=r"not among a, b, c: l"):
        take_parts(named, None, 0, test=others)
    with pytest.raises(DataError, match=r"not among a, b, c: l"):
        contained(named, others)


def test_members_and_non_members_count_as_the_larger_set_does(tmp_path):
    whole, few = write_folder(tmp_path / "whole", "abc", 3, 1), write_folder(tmp_path / "few", "bc", 3, 2)
    for pair in ((whole, few), (few, whole)):
        assert [set(part.labels) for part in contained(*pair)] == [
            {0, 1, 2} if part is whole else {1, 2} for part in pair
        ]


def test_public_and_test_pictures_that_were_given_must_not_be_the_same():
    data, public, test = pictures(90, 3, 1), pictures(40, 3, 2), pictures(40, 3, 3)
    test.images[:7] = public.images[:7]
    with pytest.raises(DataError, match="7 of the 40 test pictures are public ones too"):
        take_parts(data, public, 0, test)


def test_the_part_that_was_held_out_is_cleaned_of_the_one_that_was_given():
    data = pictures(90, 3, 1)
    whole = take_parts(data, None, 0)
    assert whole.held_out == 30
    public, test = pictures(40, 3, 2), pictures(40, 3, 3)
    public.images[:5] = take_parts(data, public, 0).test[0][:5]
    test.images[:5] = whole.public[0][:5]
    for parts in (take_parts(data, public, 0), take_parts(data, None, 0, test)):
        assert not bytes_of(parts.public) & bytes_of(parts.test)
    assert take_parts(data, None, 0, test).held_out == 25
    doubled = datasets.Dataset("d", np.repeat(data.images, 2, axis=0), np.repeat(data.labels, 2), data.class_names)
    parts = take_parts(doubled, None, 0)
    private, outside, measured = map(bytes_of, (parts.private, parts.public, parts.test))
    assert not private & (outside | measured)
    assert not outside & measured


def test_nothing_left_to_measure_with_is_an_error():
    data = pictures(90, 3, 1)
    test = take_parts(data, pictures(40, 3, 2), 0).test
    public = datasets.Dataset("p", test[0], test[1], data.class_names)
    with pytest.raises(DataError, match="no test picture is left"):
        take_parts(data, public, 0)


def test_a_single_class_is_refused():
    one = pictures(90, 1, 1)
    with pytest.raises(DataError, match="needs at least two classes"):
        take_parts(one, None, 0)
    same = datasets.Dataset("same", one.images, one.labels + 4, tuple("01234"))
    with pytest.raises(DataError, match="needs at least two classes"):
        take_parts(same, None, 0)
