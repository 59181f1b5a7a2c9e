from __future__ import annotations

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from expt.errors import ConfigError
from expt.search.exhaustion import _values
from expt.search.space import Space, choices, line, same, typed


def test_the_grammar_is_hydras():
    space = Space.parse(
        {
            "optimizer.lr": "tag(log,interval(1e-4,1e-2))",
            "model.dropout": "interval(0.0,0.3)",
            "model.num_stages": "range(1,4)",
            "model.patch_sizes": "choice([1],[1,2],[1,2,4])",
            "memory.precision": "choice(fp32,bf16)",
            "memory.activation_checkpointing": "choice(false,true)",
        }
    )
    known = space.distributions
    assert known["optimizer.lr"] == FloatDistribution(1e-4, 1e-2, log=True)
    assert known["model.dropout"] == FloatDistribution(0.0, 0.3)
    assert known["model.num_stages"] == IntDistribution(1, 3)
    assert known["model.patch_sizes"] == CategoricalDistribution(["[1]", "[1,2]", "[1,2,4]"])
    assert known["memory.precision"] == CategoricalDistribution(["fp32", "bf16"])
    assert known["memory.activation_checkpointing"] == CategoricalDistribution([False, True])
    assert space.size is None


def test_a_point_is_written_as_settings_that_hydra_reads_back():
    space = Space.parse({"a.b": "choice(false,true)", "c": "choice([1],[1,2])", "d": "range(1,4)"})
    assert space.lines({"a.b": True, "c": "[1,2]", "d": 3}) == ["a.b=true", "c=[1,2]", "d=3"]
    assert line("x", None) == "x=null"
    assert space.size == 2 * 2 * 3


def test_the_values_of_a_discrete_distribution_are_counted():
    assert choices(IntDistribution(2, 8, step=3)) == [2, 5, 8]
    assert choices(FloatDistribution(0.0, 1.0, step=0.5)) == [0.0, 0.5, 1.0]
    assert choices(IntDistribution(1, 4, log=True)) == [1, 2, 3, 4]
    assert choices(FloatDistribution(0.0, 1.0)) is None


def test_a_large_range_is_counted_without_making_its_values(monkeypatch):
    monkeypatch.setattr("expt.search.space.choices", None)
    space = Space.parse({"trainer.seed": "range(0,20000000)", "x": "range(0.0,1.0,1e-9)"})
    assert space.size == 20000000 * 1000000000
    second = {name: _values(one)[1] for name, one in space.distributions.items()}
    assert second == pytest.approx({"trainer.seed": 5_000_000, "x": 0.25})


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("tag(log,range(8,256))", IntDistribution(8, 255, log=True)),
        ("tag(log,interval(8,256))", FloatDistribution(8.0, 256.0, log=True)),
        ("int(interval(1,8))", IntDistribution(1, 8)),
        ("tag(log,int(interval(1,8)))", IntDistribution(1, 8, log=True)),
        ("sort(choice(2,1))", CategoricalDistribution([1, 2])),
    ],
)
def test_a_form_has_its_effect(text, found):
    assert Space.parse({"x": text}).distributions == {"x": found}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"x": "shuffle(choice(a,b,c,d))"}, "another order each time that it is read"),
        ({"x": "shuffle(range(1,9))"}, "leave shuffle out"),
        ({"x": "tag(int,interval(1,8))"}, "the tag int says nothing of this; write tag(log,"),
        ({"x": "tag(log,int,interval(1,8))"}, "int(interval(1,8)) for whole numbers"),
        ({"x": "tag(log,choice(1,2))"}, "the tag log says nothing"),
        ({"x": "tag(mine,range(1,8))"}, "the tag mine says nothing"),
        ({"x": "tag(log,range(8,256,8))"}, "only a range in steps of 1"),
        ({"x": "tag(log,range(0.1,0.9,0.2))"}, "only a range in steps of 1"),
        ({"x": "tag(log,range(0,8))"}, "is no distribution"),
        ({}, "search.space is empty"),
        ({"x": "0.3"}, "x=0.3 is a single value"),
        ({"x": "interval(2,1)"}, "x=interval(2,1) is no distribution"),
        ({"x": "intervall(0,1)"}, "write choice(a,b)"),
        ({"x": "interval(0"}, "is no distribution"),
        ({"memory.budget": "choice(1GiB,2GiB)"}, "memory.budget cannot be varied"),
        ({"search.n_trials": "range(1,5)"}, "search.n_trials cannot be varied"),
        ({"trainer.test": "choice(true,false)"}, "trainer.test cannot be varied"),
    ],
)
def test_what_is_no_space_is_refused(entries, message):
    with pytest.raises(ConfigError) as caught:
        Space.parse(entries)
    assert message in str(caught.value)


def test_every_value_that_may_come_is_checked_once():
    seen = []

    def check(text: str) -> str | None:
        seen.append(text)
        return f"{text} is wrong" if "c" in text else None

    with pytest.raises(ConfigError, match=r"search.space: a=c is wrong"):
        Space.parse({"a": "choice(b,c)", "n": "range(1,4)", "f": "interval(1.0,2.0)"}, check)
    assert seen[:4] == ["a=b", "a=c", "n=1", "n=3"]
    assert not float(seen[4].removeprefix("f=")).is_integer(), "a round one may pass for an integer"


def test_all_problems_come_at_once():
    with pytest.raises(ConfigError) as caught:
        Space.parse({"x": "1", "y": "2"})
    assert len(caught.value.problems) == 2


def test_composed_values_become_a_point_of_the_space():
    space = Space.parse(
        {
            "model.patch_sizes": "choice([1],[1,2])",
            "model.embed_dim": "choice(32,64)",
            "flag": "choice(false,true)",
            "lr": "interval(1e-3,1e-2)",
            "n": "range(1,4)",
        }
    )
    values = {
        "model.patch_sizes": [1, 2], "model.embed_dim": 64, "flag": False, "lr": 2e-3, "n": 2,
        "elsewhere": 1,
    }  # fmt: skip
    assert space.point(values) == {
        "model.patch_sizes": "[1,2]", "model.embed_dim": 64, "flag": False, "lr": 2e-3, "n": 2,
    }  # fmt: skip
    assert space.point({"model.embed_dim": 96, "lr": 1.0, "flag": "x"}) == {}


def test_equal_spaces_have_equal_plain_values():
    one = Space.parse({"a": "choice(1,2)", "b": "range(0,3)"})
    other = Space.parse({"b": "range(0,3)", "a": "choice(1,2)"})
    assert one.as_json() == other.as_json()
    assert one.as_json() != Space.parse({"a": "choice(1,3)", "b": "range(0,3)"}).as_json()


CHOICES = [
    ("null", None),
    ("'null'", "null"),
    ("true", True),
    ("'true'", "true"),
    ("8", 8),
    ("'8'", "8"),
    ("1e-5", 1e-5),
    ("[1,2]", [1, 2]),
    ("[]", []),
    ("[null,'a, b']", [None, "a, b"]),
    ("{a:1,b:'x y'}", {"a": 1, "b": "x y"}),
    ("'a,b'", "a,b"),
    (r"a\,b", "a,b"),
    ('"it\'s"', "it's"),
    (r"""'say "hi", it\'s'""", 'say "hi", it\'s'),
    ("'[1,2]'", "[1,2]"),
    ("two words", "two words"),
    ("'  space around '", "  space around "),
    ("'a=b:{c}'", "a=b:{c}"),
    ("''", ""),
    (r"'back\slash'", r"back\slash"),
    ("'choice(1,2)'", "choice(1,2)"),
    ("fp32", "fp32"),
]


@pytest.mark.parametrize(("text", "value"), CHOICES)
@pytest.mark.parametrize("form", ["choice({})", "{}"])
def test_a_choice_reaches_the_trial_and_comes_back_as_it_was_meant(form, text, value):
    if text == "8":
        text, value = "9", 9  # 8 is the other choice
    space = Space.parse({"model.x": form.format(f"{text},8")})
    kept, other = space.distributions["model.x"].choices
    assert other == 8
    (written,) = space.lines({"model.x": kept})
    override = OverridesParser.create().parse_override(written)
    assert not override.is_sweep_override()
    read = typed(written.partition("=")[2])
    assert read == value and type(read) is type(value)
    assert typed(kept) == value and type(typed(kept)) is type(value)
    assert space.point({"model.x": value}) == {"model.x": kept}
    assert space.lines(space.point({"model.x": typed(kept)})) == [written]


def test_choices_that_look_alike_are_told_apart():
    space = Space.parse({"x": "choice(null,'null',true,'true',2,'2',[1],'[1]')"})
    values = [None, "null", True, "true", 2, "2", [1], "[1]"]
    kept = [space.point({"x": value})["x"] for value in values]
    assert kept == list(space.distributions["x"].choices)
    assert len(set(map(repr, kept))) == 8


def test_a_number_is_the_same_as_a_float_that_equals_it():
    assert Space.parse({"x": "choice(1,2.5)"}).point({"x": 1.0}) == {"x": 1}
    assert Space.parse({"x": "choice(1,2)"}).point({"x": True}) == {}


def test_nothing_and_a_flag_are_no_text():
    """A preset's null is not the word, even if the word alone is a choice."""
    space = Space.parse({"x": "choice('null','true',3)"})
    assert space.point({"x": None}) == space.point({"x": True}) == {}
    assert space.point({"x": "null"}) == {"x": "'null'"}


@pytest.mark.parametrize(("text", "both"), [("true,1", "true and 1"), ("1,2,1", "1 and 1"),
                                            ("0.0,false", "0.0 and false"),
                                            ("nan,nan", "nan and nan")])  # fmt: skip
def test_choices_that_the_study_would_take_for_one_another_are_refused(text, both):
    with pytest.raises(
        ConfigError, match=f"^search.space: x=choice.{text}. has {both}, which a study cannot tell"
    ):
        Space.parse({"x": f"choice({text})"})


NAN = float("nan")


@pytest.mark.parametrize(
    ("one", "other", "found"),
    [
        (1, 1.0, True),
        (NAN, float("nan"), True),
        (NAN, 0.0, False),
        ([1, NAN], [1, float("nan")], True),
        ({"a": [NAN]}, {"a": (float("nan"),)}, True),
        ({"a": NAN}, {"b": NAN}, False),
        ([1], [1, 2], False),
        (None, 0, False),
    ],
)
def test_what_is_not_a_number_is_itself(one, other, found):
    assert same(one, other) is found
