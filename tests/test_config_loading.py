"""Configuration files and words: merging, types, and errors that name place and remedy."""

from typing import Annotated, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from jaxlm.config_loading import diff, format_diff, json_schema, load, parse_value, settings_help, to_yaml
from jaxlm.schema import Schema, UserError


class Cat(Schema):
    kind: Literal["cat"] = "cat"
    lives: int = Field(9, gt=0, description="How many.")


class Dog(Schema):
    kind: Literal["dog"] = "dog"
    names: tuple[str, ...] = ()
    speed: float = 1.0


Pet = Annotated[Cat | Dog, Field(discriminator="kind")]


class Bird(Schema):
    kind: Literal["bird", "cat"]
    tag: int = 0
    lives: int = 1


class Fish(Schema):
    kind: Literal["fish"]
    tag: int


class House(Schema):
    width: int = 3
    note: str | None = None
    warm: bool = False


class Root(Schema):
    name: str
    rate: float = 1e-3
    house: House = House()
    pet: Pet = Cat()
    pets: tuple[Pet, ...] = ()
    zoo: dict[str, Pet] = Field(default_factory=dict)
    guest: Annotated[Bird | Fish, Field(discriminator="kind")] | None = None
    limit: int | str = 1


def write(tmp_path, text, name="a.yaml"):
    path = tmp_path / name
    path.write_text(text)
    return path


def fails(tmp_path, text, *overrides):
    with pytest.raises(UserError) as error:
        load(Root, write(tmp_path, text), overrides)
    return str(error.value).replace(str(tmp_path) + "/", "")


def test_values_sources_and_overrides(tmp_path):
    path = write(tmp_path, "name: x\nhouse:\n  width: 5\npets:\n  - {kind: dog, names: [a, b]}\n")
    loaded = load(Root, path, ["house.width=7", "pets.0.speed=2", "rate=1e-4", "zoo.big={kind: cat, lives: 3}"])
    assert loaded.config == Root(
        name="x", house=House(width=7), rate=1e-4, pets=(Dog(names=("a", "b"), speed=2.0),), zoo={"big": Cat(lives=3)}
    )
    assert loaded.sources["name"] == f"{path}:1"
    assert loaded.sources["house.width"] == "command line"
    assert loaded.overridden[0] == ("house.width", 5, 7)
    assert loaded.overridden[2] == ("rate", "(default)", 1e-4)


def test_base_merges_mappings_replaces_lists_and_whole_kinds(tmp_path):
    base = "name: base\nhouse: {width: 5, note: old}\npet: {kind: cat, lives: 2}\npets: [{kind: cat}]\n"
    write(tmp_path, base, "base.yaml")
    (tmp_path / "sub").mkdir()
    text = "base: ../base.yaml\nhouse: {note: new}\npet: {kind: dog, speed: 3}\npets: []\n"
    path = write(tmp_path, text, "sub/a.yaml")
    config = load(Root, path).config
    assert config == Root(name="base", house=House(width=5, note="new"), pet=Dog(speed=3.0), pets=())
    same_kind = write(tmp_path, "base: base.yaml\npet: {lives: 4}\n", "b.yaml")
    assert load(Root, same_kind).config.pet == Cat(lives=4)


def test_a_base_that_leads_back_is_an_error(tmp_path):
    write(tmp_path, "base: b.yaml\n", "a.yaml")
    write(tmp_path, "base: a.yaml\n", "b.yaml")
    with pytest.raises(UserError, match=r"leads back to itself: a\.yaml -> b\.yaml -> a\.yaml"):
        load(Root, tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\nhouse:\n  widht: 5\n", "a.yaml:3: house.widht: unknown key; did you mean 'width'?"),
        ("name: x\nzzz: 5\n", "a.yaml:2: zzz: unknown key (known: name, rate, house, pet, pets, zoo, guest, limit)"),
        ("house: {}\n", "a.yaml:1: name: required but not given"),
        ("name: x\nhouse: {width: '5'}\n", "a.yaml:2: house.width: input should be a valid integer, got '5'"),
        ("name: x\nhouse: {width: true}\n", "a.yaml:2: house.width: input should be a valid integer, got true"),
        ("name: x\nhouse: {width: 1.5}\n", "a.yaml:2: house.width: input should be a valid integer"),
        ("name: x\nhouse: {warm: yes}\n", "a.yaml:2: house.warm: input should be a valid boolean, got 'yes'"),
        ("name: 5\n", "a.yaml:1: name: input should be a valid string, got 5"),
        ("name: x\nrate: fast\n", "a.yaml:2: rate: input should be a valid number, got fast"),
        ("name: x\npet:\n  lives: 1\n  kind: cta\n", "a.yaml:4: pet.kind: unknown kind 'cta'; did you mean 'cat'?"),
        ("name: x\npet: {kind: cta}\n", " (known: cat, dog)"),
        ("name: x\npet: 5\n", "a.yaml:2: pet: input should be a mapping, got 5"),
        ("name: x\nguest: {kind: cat, lifes: 3}\n", "a.yaml:2: guest.lifes: unknown key; did you mean 'lives'?"),
        ("name: x\nlimit: [1]\n", "a.yaml:2: limit: input should be a valid integer, got [1]"),
        ("name: x\nrate: '3'\n", "a.yaml:2: rate: input should be a valid number, got '3'"),
        ("name: x\nrate: true\n", "a.yaml:2: rate: input should be a valid number, got true"),
        ("name: x\nhouse: {width: 010}\n", "a.yaml:2: house.width: input should be a valid integer, got '010'"),
        ("bsae: x\n", "a.yaml:1: bsae: unknown key; did you mean 'base'?"),
        ("name: x\npet: {lives: 3}\n", "a.yaml:2: pet: needs a `kind`: one of cat, dog"),
        ("name: x\npet: {kind: cat, lives: 0}\n", "a.yaml:2: pet.lives: input should be greater than 0, got 0"),
        ("name: x\npets:\n  - {kind: cat}\n  - {kind: dog, spede: 1}\n", "a.yaml:4: pets.1.spede: unknown key; did"),
        ("name: x\nzoo:\n  a: {kind: dog, names: 3}\n", "a.yaml:3: zoo.a.names: input should be a list, got 3"),
        ("name: x\nzoo:\n  cat: {kind: dog, spede: 3}\n", "a.yaml:3: zoo.cat.spede: unknown key; did you mean"),
        ("name: x\nname: y\n", "a.yaml:2: name: given twice; keep one"),
        ("name: [x\n", "a.yaml:2: not valid YAML"),
        ("rate: 1\nname: \x07\n", "a.yaml:2: not valid YAML: unacceptable character #x0007"),
        ("name: x\nnote: !!binary aGk=\n", "a.yaml:2: note: the tag !!binary is not read here"),
        ("name: x\nrate: !!int one\n", "a.yaml:2: rate: 'one' is no !!int"),
        ("name: x\npet: &p {kind: cat}\nzoo:\n  <<: *p\n", "a.yaml:4: zoo.<<: YAML merge keys are not read here"),
        ("name: x\npet: &p {kind: *p}\n", "a.yaml:2: pet.kind: an alias to what it stands in"),
        ("- a\n- b\n", "a.yaml:1: a config is a mapping of settings, got a list"),
    ],
)
def test_errors_name_file_line_key_and_remedy(tmp_path, text, message):
    assert message in fails(tmp_path, text)


def test_all_problems_are_told_at_once(tmp_path):
    lines = fails(tmp_path, "name: 5\nhouse: {widht: 1}\n", "rate=fast").splitlines()
    assert len(lines) == 3
    assert any(line.startswith("command line: rate:") for line in lines)


def test_repeated_keys_and_bad_words_hide_no_other_problem_and_lines_are_in_order(tmp_path):
    lines = fails(tmp_path, "name: x\nzz: 1\nname: y" + "\n" * 8 + "aa: 2\n", "--rate=3").splitlines()
    assert [line.split(": ")[:2] for line in lines] == [
        ["--rate=3", "settings are given as key=value, e.g. rate=3"],
        ["a.yaml:2", "zz"],
        ["a.yaml:3", "name"],
        ["a.yaml:11", "aa"],
    ]


def test_replaced_values_of_a_base_have_no_place(tmp_path):
    write(tmp_path, "name: x\npet:\n  kind: cat\n  lives: 3\npets: [{kind: cat}, {kind: cat}]\nrate: 1\n", "base.yaml")
    path = write(tmp_path, "base: base.yaml\npet:\n  kind: dog\npets: [{kind: dog}]\n")
    sources = load(Root, path).sources
    assert set(sources) == {"name", "rate", "pet", "pet.kind", "pets", "pets.0", "pets.0.kind"}
    # Nor has what a word replaced.
    assert set(load(Root, path, ["pet={kind: cat}"]).sources) == set(sources)
    assert load(Root, path, ["pets=[]"]).sources.keys() == set(sources) - {"pets.0", "pets.0.kind"}
    assert set(load(Root, tmp_path / "base.yaml").sources) == {
        "name", "rate", "pet", "pet.kind", "pet.lives", "pets", "pets.0", "pets.0.kind", "pets.1", "pets.1.kind",
    }  # fmt: skip
    null = write(tmp_path, "name: x\nbase: null\n", "null.yaml")
    assert load(Root, null).sources == {"name": f"{null}:1"}
    assert sources["rate"] == f"{tmp_path / 'base.yaml'}:6"
    assert sources["pet.kind"] == f"{path}:3"
    # `tag` is required of a fish: what lacks it is the file that made it one, not the base whose cat had one.
    write(tmp_path, "name: x\nguest:\n  kind: bird\n  tag: 1\n", "base.yaml")
    message = fails(tmp_path, "base: base.yaml\n\nguest:\n  kind: fish\n")
    assert message == "a.yaml:3: guest.tag: required but not given"


def test_words_see_what_earlier_words_set(tmp_path):
    words = ["zoo.a={kind: cat, lives: 2}", "zoo.a.lives=5", "zoo.1={kind: dog}"]
    loaded = load(Root, write(tmp_path, "name: x\n"), words)
    assert loaded.config.zoo == {"a": Cat(lives=5), "1": Dog()}
    assert loaded.overridden[:2] == [("zoo.a", "(default)", {"kind": "cat", "lives": 2}), ("zoo.a.lives", 2, 5)]
    assert loaded.sources["zoo.a.kind"] == loaded.sources["zoo.1"] == "command line"
    # What a value was stays what it was, whatever words follow.
    path = write(tmp_path, "name: x\nhouse: {width: 5}\n")
    loaded = load(Root, path, ["house.width=6", "house={width: 7}", "house.width=8"])
    olds = [("house.width", 5, 6), ("house", {"width": 6}, {"width": 7}), ("house.width", 7, 8)]
    assert loaded.overridden == olds


def test_a_config_needs_no_file():
    assert load(Root, None, ["name=x", "house.width=4"]).config == Root(name="x", house=House(width=4))
    with pytest.raises(UserError, match="^name: required but not given$"):
        load(Root, None)


def test_names_and_texts_are_not_taken_for_values(tmp_path):
    text = "name: 2024-1-1\nhouse: {note: 1:30}\nzoo: {1e-3: {kind: cat}, true: {kind: cat}, null: {kind: cat}}\n"
    config = load(Root, write(tmp_path, text)).config
    assert (config.name, config.house.note, set(config.zoo)) == ("2024-1-1", "1:30", {"1e-3", "true", "null"})


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("house.width", "settings are given as key=value, e.g. house.width=..."),
        ("--house.width=5", "settings are given as key=value, e.g. house.width=5"),
        ("house..width=5", "settings are given as key=value"),
        ("house.widht=5", "command line: house.widht: unknown key; did you mean 'width'?"),
        ("pets.3.speed=1", "pets is a list of 0 and has no item 3; give the list whole: pets=[...]"),
        ("pets.²=1", "pets is a list of 0 and has no item ²"),
        ("rate=[1", "command line: rate: not valid YAML"),
        ("pet={kind: cat, kind: dog}", "command line: pet: kind: given twice"),
        # What a word makes of a value that is no mapping is the word's fault, not that of the file.
        ("name.x=1", "command line: name: input should be a valid string, got {x: 1}"),
        ("pet.lives=1", "command line: pet: needs a `kind`"),
    ],
)
def test_wrong_words_are_named(tmp_path, word, message):
    assert message in fails(tmp_path, "name: x\npets: []\n", word)


def test_missing_files_show_what_is_there(tmp_path):
    write(tmp_path, "name: x\n", "quick.yaml")
    with pytest.raises(UserError, match=r"quik.yaml: no such file; did you mean 'quick.yaml'\? \(there: quick.yaml\)"):
        load(Root, tmp_path / "quik.yaml")
    path = write(tmp_path, "base: gone.yaml\nname: x\n", "b.yaml")
    with pytest.raises(UserError, match=r"b\.yaml:1: base: .*gone\.yaml: no such file"):
        load(Root, path)
    with pytest.raises(UserError, match="is a directory, not a file"):
        load(Root, tmp_path)


WORDS = ["1e-3", "yes", "null", "a: b", "~", "0x1F", "1_000", "- a", "#", "", "on", "2024-01-01", "é", "<<"]
WORDS += ["=", "\x85", "\u2028"]
texts = st.one_of(st.sampled_from(WORDS), st.text())


@pytest.mark.parametrize("word", WORDS)
def test_words_that_look_like_values_stay_words(tmp_path, word):
    config = Root(name=word, house=House(note=word), pets=(Dog(names=(word, word)),), zoo={word: Cat()})
    path = tmp_path / "a.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load(Root, path).config == config
    # Readers of YAML 1.1 see the same words.
    assert yaml.safe_load(to_yaml(config))["name"] == word


@settings(max_examples=80, deadline=None)
@given(name=texts, note=st.none() | texts, rate=st.floats(allow_nan=False), width=st.integers(-(2**60), 2**60))
def test_what_is_printed_loads_again(tmp_path_factory, name, note, rate, width):
    house = House(note=note, width=width)
    config = Root(name=name, rate=rate, house=house, pets=(Dog(names=(name,)), Cat()), zoo={name: Cat()})
    path = tmp_path_factory.mktemp("yaml") / "a.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load(Root, path).config == config


def test_floats_are_floats_however_they_are_written(tmp_path):
    for text in ("1e-3", "1.0e-3", ".001", "0.001", "1E-3"):
        assert load(Root, write(tmp_path, f"name: x\nrate: {text}\n")).config.rate == 1e-3
    assert load(Root, write(tmp_path, "name: x\nrate: 2\n")).config.rate == 2.0


def test_diff_names_leaves():
    a, b = Root(name="x", pets=(Cat(),)), Root(name="x", pet=Dog(), house=House(width=4), pets=(Cat(), Cat(lives=1)))
    found = diff(a, b)
    assert ("house.width", 3, 4) in found
    assert ("pet.kind", "cat", "dog") in found
    assert ("pet.lives", 9, "(absent)") in found
    assert ("pets.1.lives", "(absent)", 1) in found
    assert not any(name == "name" for name, *_ in found)
    assert diff(a, a) == []
    # An empty mapping is not absent: only what was added to it differs, whichever comes first.
    more = a.model_copy(update={"zoo": {"k": Cat()}})
    assert diff(a, more) == [("zoo.k.kind", "(absent)", "cat"), ("zoo.k.lives", "(absent)", 9)]
    assert diff(more, a) == [("zoo.k.kind", "cat", "(absent)"), ("zoo.k.lives", 9, "(absent)")]
    assert "house.width" in format_diff(found)


def test_schema_and_help_cover_every_setting():
    schema = json_schema(Root)
    assert {"base", "name", "pets"} <= set(schema["properties"])
    assert not any("required" in section for section in (schema, *schema["$defs"].values()))
    text = settings_help(Root)
    for line in ("house.width: int = 3", "pet[cat].lives: int = 9", "zoo.NAME[dog].speed: float = 1.0", "How many."):
        assert line in text
    for line in ("pet: section by kind: cat | dog = cat", "guest[bird].tag: int = 0", "guest[fish].tag: int = (req"):
        assert line in text
    assert "    How many." in text.splitlines()


def test_one_value_from_a_word():
    assert parse_value(Pet, "{kind: dog, speed: 2}", "--pet") == Dog(speed=2.0)
    with pytest.raises(UserError, match="^--pet: kind: unknown kind 'dgo'; did you mean 'dog'"):
        parse_value(Pet, "{kind: dgo}", "--pet")
