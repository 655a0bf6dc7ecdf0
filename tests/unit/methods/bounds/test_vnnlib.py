"""Property files: what they state, exactly or rounded outward, and what is refused."""

from __future__ import annotations

import gzip
import itertools
import random
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from patchclamp.core.errors import PropertyError
from patchclamp.methods.bounds.property import Case, Property
from patchclamp.methods.bounds.vnnlib import cases, grammar, parse_property, read_property

HERE = Path(__file__).parent / "properties"
ACAS = Path(__file__).parents[5] / "shared" / "data" / "acasxu" / "vnnlib"

HEAD = """(declare-const X_0 Real)
(declare-const X_1 Real)
(declare-const Y_0 Real)
(declare-const Y_1 Real)
"""
BOX = """(assert (>= X_0 -1)) (assert (<= X_0 1))
(assert (>= X_1 0)) (assert (<= X_1 2))
"""


def parsed(assertions: str) -> Property:
    return parse_property(HEAD + BOX + assertions, "p.vnnlib")


def only(found: Property) -> Case:
    (case,) = found.cases
    return case


class TestFiles:
    def test_one_box(self) -> None:
        found = read_property(HERE / "one_box.vnnlib")
        case = only(found)
        assert (found.num_inputs, found.num_outputs) == (2, 2)
        np.testing.assert_array_equal(case.lower, [-0.5, -0.25])
        np.testing.assert_array_equal(case.upper, [0.5, 0.25])
        np.testing.assert_array_equal(case.rows, [[-1, 1], [-1, 0]])
        assert case.offsets[0] == 0
        assert Fraction(case.offsets[1]) <= Fraction("0.1") < Fraction(case.offsets[1] + 2e-17)
        assert case.input_rows.shape == (0, 2)
        assert case.input_offsets.shape == (0,)

    def test_boxes_and_outputs_multiply(self) -> None:
        found = read_property(str(HERE / "boxes_and_outputs.vnnlib"))
        assert [case.lower[1] > 0 for case in found.cases] == [True] * 3 + [False] * 3
        assert [len(case.rows) for case in found.cases] == [1, 1, 2] * 2
        inside, outside = np.array([0.0, 0.5]), np.array([0.0, 0.0])
        unsafe, safe = np.array([1.0, 0.0, 9.0]), np.array([-1.0, 0.0, 0.0])
        assert found.margin(inside, unsafe) <= 0
        assert found.margin(inside, safe) > 0
        assert found.margin(outside, unsafe) > 0

    def test_version_2(self) -> None:
        found = read_property(HERE / "version_2.vnnlib")
        assert (found.num_inputs, found.num_outputs, len(found.cases)) == (3, 1, 2)
        for case in found.cases:
            np.testing.assert_array_equal(case.lower, [0, -50, 7.5])
            np.testing.assert_array_equal(case.upper, [50, 50, 7.5])
            np.testing.assert_array_equal(case.input_rows, [[0, -1.5, 1]])
            np.testing.assert_array_equal(case.input_offsets, [15])
        np.testing.assert_array_equal([case.rows[0, 0] for case in found.cases], [1, -1])
        np.testing.assert_array_equal([case.offsets[0] for case in found.cases], [3, 0])

    def test_packed_files_are_known_by_their_content(self, tmp_path: Path) -> None:
        raw = (HERE / "one_box.vnnlib").read_bytes()
        (tmp_path / "p.vnnlib.gz").write_bytes(gzip.compress(raw))
        (tmp_path / "q.vnnlib").write_bytes(gzip.compress(b"\xef\xbb\xbf" + raw))
        for name in ("p.vnnlib.gz", "q.vnnlib"):
            assert only(read_property(tmp_path / name)).upper[0] == 0.5

    def test_damaged_files(self, tmp_path: Path) -> None:
        whole = gzip.compress((HERE / "one_box.vnnlib").read_bytes())
        (tmp_path / "cut.gz").write_bytes(whole[:-20])
        with pytest.raises(PropertyError, match="cut short"):
            read_property(tmp_path / "cut.gz")
        with pytest.raises(PropertyError, match="cannot be read"):
            read_property(tmp_path / "none.vnnlib")
        (tmp_path / "raw").write_bytes(bytes(range(128, 256)))
        with pytest.raises(PropertyError, match="line 1, column 1"):
            read_property(tmp_path / "raw")

    @pytest.mark.skipif(not ACAS.is_dir(), reason="the ACAS Xu files are not beside the project")
    def test_all_properties_of_acas_xu(self) -> None:
        shapes = {}
        for path in sorted(ACAS.glob("*.gz")):
            found = read_property(path)
            assert (found.num_inputs, found.num_outputs) == (5, 5)
            assert all((case.lower <= case.upper).all() for case in found.cases)
            shapes[path.name.split(".")[0]] = [len(case.rows) for case in found.cases]
        assert shapes == {
            "prop_1": [1],
            "prop_2": [4],
            "prop_3": [4],
            "prop_4": [4],
            "prop_5": [1] * 4,
            "prop_6": [1] * 8,
            "prop_7": [3] * 2,
            "prop_8": [2] * 3,
            "prop_9": [1] * 4,
            "prop_10": [1] * 4,
        }


class TestArithmetic:
    @pytest.mark.parametrize(
        ("assertion", "rows", "offset"),
        [
            ("(<= Y_0 Y_1)", [1, -1], 0),
            ("(>= Y_0 Y_1)", [-1, 1], 0),
            ("(< Y_0 3)", [1, 0], -3),
            ("(> 3 Y_0)", [1, 0], -3),
            ("(<= (+ Y_0 (* 2 Y_1) 1) (- 4))", [1, 2], 5),
            ("(<= (- Y_0 Y_1 1) (* (+ 1 1) (- 3 1)))", [1, -1], -5),
            ("(<= (- (+ Y_0 Y_1)) 0)", [-1, -1], 0),
            ("(<= (/ Y_0 4) Y_1)", [0.25, -1], 0),
            ("(<= (+ Y_0 Y_1) (+ Y_1 2.5E+0))", [1, 0], -2.5),
            ("(<= (* Y_1 .5 2.) +1e0)", [0, 1], -1),
        ],
    )
    def test_one_row(self, assertion: str, rows: list[float], offset: float) -> None:
        case = only(parsed(f"(assert {assertion})"))
        np.testing.assert_array_equal(case.rows, [rows])
        np.testing.assert_array_equal(case.offsets, [offset])

    def test_equality_is_two_rows(self) -> None:
        case = only(parsed("(assert (= Y_0 2))"))
        np.testing.assert_array_equal(case.rows, [[1, 0], [-1, 0]])
        np.testing.assert_array_equal(case.offsets, [-2, 2])

    def test_weights_are_scaled_until_float64_holds_them(self) -> None:
        case = only(parsed("(assert (<= (+ (* 0.1 Y_0) (* -0.3 Y_1)) 0.7))"))
        (row,), (offset,) = case.rows.tolist(), case.offsets.tolist()
        assert Fraction(row[1]) == -3 * Fraction(row[0])
        assert Fraction(offset) == -7 * Fraction(row[0])
        assert 0.05 < row[0] < 0.2

    def test_weights_that_float64_cannot_hold_are_refused_on_outputs(self) -> None:
        with pytest.raises(PropertyError, match=r"line 7, column 10: .*weights"):
            parsed("(assert (<= (+ (* 0.1234567890123456789 Y_0) (* 0.3 Y_1)) 0.7))")

    def test_and_are_widened_by_their_rounding_on_inputs(self) -> None:
        text = "(<= (+ (* 0.1234567890123456789 X_0) (* 0.3 X_1)) 0.7)"
        case = only(parsed(f"(assert {text})(assert (<= Y_0 0))"))
        exact = Fraction("0.1234567890123456789"), Fraction("0.3")
        (row,), offset = case.input_rows.tolist(), Fraction(case.input_offsets[0])
        for x in itertools.product((-1, 1), (0, 2)):
            held = sum(Fraction(w) * v for w, v in zip(row, x, strict=True)) + offset
            scale = Fraction(row[0]) / exact[0]
            real = sum(w * v for w, v in zip(exact, x, strict=True)) - Fraction("0.7")
            assert held <= scale * real + Fraction(1, 10**18)
        assert -0.71 < case.input_offsets[0] / (row[0] / 0.1234567890123456789) < -0.69

    def test_bounds_are_rounded_outward(self) -> None:
        text = "(assert (>= X_0 0.1)) (assert (<= X_0 0.7)) (assert (<= Y_0 0))"
        case = only(parsed(text))
        assert Fraction(case.lower[0]) <= Fraction("0.1") < Fraction(np.nextafter(case.lower[0], 1))
        assert Fraction(case.upper[0]) >= Fraction("0.7") > Fraction(np.nextafter(case.upper[0], 0))
        # 0.1 lies below its nearest float64, 0.7 above; so that one of each pair was moved.
        assert case.lower[0] == np.nextafter(0.1, 0)
        assert case.upper[0] == np.nextafter(0.7, 1)
        assert only(parsed("(assert (<= X_1 0.5))")).upper[1] == 0.5

    @pytest.mark.parametrize("text", ["1e-320", "-1e-390", "1.7976931348623157e308", "3", "1/3"])
    def test_rounding_down(self, text: str) -> None:
        value = Fraction(text)
        found = cases.rounded_down(value)
        assert Fraction(found) <= value < Fraction(np.nextafter(found, np.inf, dtype=np.float64))


class TestFormulas:
    def test_formulas_mean_what_they_say(self) -> None:
        """Random formulas of dyadic numbers at random points: the same verdict, exactly."""
        draw = random.Random(0)
        seen = set()
        for _ in range(300):
            formula = _formula(draw, 3)
            text = "".join(f"(assert {part})" for part in _written(formula))
            found = parsed(text) if _possible(formula) else None
            for _ in range(5):
                x = [draw.randrange(-5, 6) / 4, draw.randrange(-1, 10) / 4]
                y = [draw.randrange(-8, 9) / 4 for _ in range(2)]
                inside = -1 <= x[0] <= 1 and 0 <= x[1] <= 2
                expected = inside and _true(formula, x + y)
                got = found is not None and found.margin(np.array(x), np.array(y)) <= 0
                assert got == expected, text
                seen.add(got)
        assert seen == {True, False}

    def test_what_the_file_allows_the_property_allows(self) -> None:
        """Decimals that float64 cannot hold, at points on the very boundary."""
        draw = random.Random(1)
        for _ in range(200):
            a, b = (f"{draw.uniform(-1, 1):.{draw.randrange(1, 20)}f}" for _ in range(2))
            both = f"(<= (+ X_0 (* {b} X_1)) 0)"
            case = only(parsed(f"(assert (and (>= X_0 {a}) {both} (<= Y_0 {b})))"))
            assert Fraction(case.lower[0]) <= Fraction(a)
            assert Fraction(case.rows[0, 0]) * Fraction(b) + Fraction(case.offsets[0]) <= 0
            if not len(case.input_rows):
                continue  # the weight was 0
            x = (-2 * Fraction(b), Fraction(2))
            held = sum(Fraction(w) * v for w, v in zip(case.input_rows[0].tolist(), x, strict=True))
            if abs(x[0]) <= 1:
                assert held + Fraction(case.input_offsets[0]) <= 0

    def test_an_empty_alternative_is_dropped(self) -> None:
        text = "(assert (or (and (>= X_0 2) (<= Y_0 0)) (and (<= X_0 0) (<= Y_0 1))))"
        case = only(parsed(text))
        assert (case.upper[0], case.offsets[0]) == (0, -1)
        inside = "(assert (or (and (>= X_0 0.5) (<= X_0 0.25)) (<= Y_0 0)))"
        assert only(parsed(inside)).offsets[0] == 0
        above = "(assert (or (<= X_0 -2) (<= Y_0 0)))"
        assert only(parsed(above)).upper[0] == 1

    def test_constants_decide(self) -> None:
        assert only(parsed("(assert (or (<= 1 0) (<= Y_0 0)))")).rows.shape == (1, 2)
        assert only(parsed("(assert (<= 0 1))")).rows.shape == (0, 2)

    def test_cases_of_one_box_share_it(self) -> None:
        found = parsed("(assert (or (<= Y_0 0) (<= Y_1 0)))")
        assert found.cases[0].lower is found.cases[1].lower

    def test_other_commands_and_comments(self) -> None:
        text = f"; (assert (\n(set-logic QF_LRA){HEAD}{BOX};)\r(assert (<= Y_0 0))\r\n(check-sat)"
        assert only(parse_property(text)).rows.shape == (1, 2)
        old = HEAD.replace("declare-const X_0", "declare-fun X_0 ()")
        assert only(parse_property(f"{old}{BOX}(assert (<= Y_0 0))")).upper[0] == 1


REFUSED = [
    ("(assert (<= Y_0 0)", "line 7, column 1: this parenthesis is not closed"),
    ("(assert (<= Y_0 0)))", "line 7, column 20: '\\)' is not read after the last command"),
    ("(assert (<= Y_0 0)) x", "line 7, column 21: 'x' is not read after the last command"),
    ("(assert (<= Y_0 0 1))", "line 7, column 19: '<=' takes two"),
    ("(assert (<= Y_0))", "line 7, column 16: no number and no variable"),
    ("(assert (<= Y_2 0))", "line 7, column 13: 'Y_2' is not declared; nearest 'Y_1'"),
    ("(assert (<= Z 0))", "line 7, column 13: 'Z' is not declared"),
    ("(assert (<= Y_0 X_0))", "line 7, column 10: an inequality between inputs and outputs"),
    ("(assert (<= (* Y_0 Y_1) 0))", "line 7, column 20: a product of variables"),
    ("(assert (<= (/ 1 Y_1) 0))", "line 7, column 18: division"),
    ("(assert (<= (/ Y_1 0) 0))", "line 7, column 20: division"),
    ("(assert (<= (max Y_1 0) 0))", "line 7, column 14: 'max' is no operation"),
    ("(assert (<= (+) 0))", "line 7, column 14: '\\+' of nothing"),
    ("(assert (not (<= Y_0 0)))", "line 7, column 10: 'not' is no formula"),
    ("(assert (!= Y_0 0))", "line 7, column 10: '!=' is no formula"),
    ("(assert (or))", "line 7, column 10: 'or' of nothing"),
    ("(assert (and))", "line 7, column 10: 'and' of nothing"),
    ("(assert (or (and)))", "line 7, column 14: 'and' of nothing"),
    ("(assert Y_0)", "line 7, column 9: 'Y_0' is not read"),
    ("(asert (<= Y_0 0))", "line 7, column 2: 'asert' is no command.*nearest 'assert'"),
    ("(assert (<= Y_0 nan))", "line 7, column 17: no number and no variable"),
    ("(assert (<= Y_0 inf))", "line 7, column 17: no number and no variable"),
    ("(assert (<= Y_0 1e999999999))", "line 7, column 17: a number that float64 cannot hold"),
    ("(assert (<= X_0 -1e350))", "no input is left"),
    ("(assert (<= Y_0 1_0))", "line 7, column 17: '1_0' is no number"),
    ("(assert (<= Y_0 0x1))", "line 7, column 17: '0x1' is no number"),
    ("(assert (<= Y_0 -Y_1))", "line 7, column 17: '-Y_1' is no number"),
    ("(assert (<= X_0 -2))", "line 7, column 10: no input is left: X_0 >= -1.0 and <= -2.0"),
    ("(assert (<= 1 0))", "every alternative contradicts itself"),
    ("(assert (or (<= X_0 -3) (<= X_0 -2)))", "every alternative contradicts itself"),
    ("(declare-const Y_2 Real)", "line 7, column 2: a declaration after the first assertion"),
    ("(assert (<= Y_0[0] 0))", "line 7, column 13: 'Y_0\\[0\\]' is not declared"),
    ("(assert (<= Y_0 ] 0))", "line 7, column 17: '\\]' is not declared"),
    ("(assert " + "(and " * 200, "more than 100 deep"),
    ("(assert " + "(<= (" + "+ (" * 200, "more than 100 deep"),
    ("(assert (<= (* " + "1e400 " * 500 + ") 0))", "a product that float64 cannot hold"),
    ("(assert (<= Y_0 1e390))", "a bound that float64 cannot hold"),
    ("(assert (<= (+ (* 1e390 Y_0) Y_1) 1))", "a weight that float64 cannot hold"),
]


class TestRefused:
    @pytest.mark.parametrize(("text", "message"), REFUSED, ids=[text[:40] for text, _ in REFUSED])
    def test_with_line_and_column(self, text: str, message: str) -> None:
        with pytest.raises(PropertyError, match=message) as caught:
            parsed(text)
        assert "p.vnnlib" in str(caught.value)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "there is no"),
            ("; nothing", "there is no"),
            (HEAD, "there is no"),
            ("hello", "line 1, column 1: 'hello' is not read"),
            ("(declare-const X_0 Int)", "line 1, column 20: variables of type 'Int'"),
            ("(declare-const X_0 Real)(declare-const X_0 Real)", "'X_0' is declared twice"),
            ("(declare-const X_00 Real)", "'X_00' is no input or output"),
            ("(declare-const Z_0 Real)", "'Z_0' is no input or output"),
            ("(declare-const X_1 Real)(declare-const Y_0 Real)(assert (<= Y_0 0))", "'X_0' is not"),
            ("(declare-const X_0 Real)(assert (<= X_0 0))", "'Y_0' is not declared.*no Y_"),
            (HEAD + "(assert (<= X_0 0))", "X_0 has no lower bound"),
            (HEAD + BOX.replace("(<= X_1 2)", "(<= Y_0 2)"), "X_1 has no upper bound"),
            (HEAD + "(assert (or (>= X_0 0) (<= X_0 0)))", "has no .* bound in some case"),
        ],
    )
    def test_declarations_and_bounds(self, text: str, message: str) -> None:
        with pytest.raises(PropertyError, match=message):
            parse_property(text)

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ("<2.0>", "<3.0>", "another version"),
            ("state Real", "state int64", "type 'int64'"),
            ("[1,3]", "[1,x]", "no type and shape"),
            ("[1,3]", "[1,0]", "no type and shape"),
            ("Real [1,3]", "Real", "no type and shape"),
            ("state[0,2] 7.5", "state[0,3] 7.5", "no element of 'state'"),
            ("state[0,2] 7.5", "state[2] 7.5", "no element of 'state'"),
            ("(declare-output", "(declare-input z Real [1]) (declare-output", "one input and one"),
            ("(declare-output", '(declare-hidden h Real [1] "h") (declare-output', "one input and"),
            ("(assert (or", "(declare-network g (declare-input", "several networks|after"),
        ],
    )
    def test_version_2(self, old: str, new: str, message: str) -> None:
        text = (HERE / "version_2.vnnlib").read_text()
        assert old in text
        with pytest.raises(PropertyError, match=message):
            parse_property(text.replace(old, new))

    def test_several_networks(self) -> None:
        text = (HERE / "version_2.vnnlib").read_text()
        second = "(declare-network g (declare-input a Real [1]) (declare-output b Real [1]))\n"
        with pytest.raises(PropertyError, match="line 8, column 2: properties of several networks"):
            parse_property(text.replace("(assert", f"{second}(assert", 1))

    @pytest.mark.parametrize("wrap", ["{}", "(assert (or (<= Y_0 9) (and {})))"])
    def test_too_many_cases_are_refused_before_they_are_made(self, wrap: str) -> None:
        alternative = "(or (<= Y_0 0) (<= Y_1 0))"
        if wrap == "{}":
            text = f"(assert {alternative})" * 60
        else:
            text = wrap.format(alternative * 60)
        with pytest.raises(PropertyError, match="divide the property"):
            parsed(text)

    def test_what_is_false_is_not_multiplied_out(self) -> None:
        alternatives = "(or (<= Y_0 0) (<= Y_1 0))" * 60
        case = only(parsed(f"(assert (or (<= Y_0 9) (and {alternatives} (<= 1 0))))"))
        assert case.offsets[0] == -9

    def test_too_many_numbers_are_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cases, "MAX_NUMBERS", 20)
        text = "(assert (or (<= Y_0 0) (<= Y_0 1) (<= Y_0 2)))"
        assert len(parsed(text).cases) == 3
        with pytest.raises(PropertyError, match="more than 20 numbers"):
            parsed(text.replace("(<= Y_0 0)", " ".join(f"(<= X_0 0.{n})" for n in range(1, 9))))

    def test_every_prefix_of_a_file_is_refused(self) -> None:
        text = (HERE / "version_2.vnnlib").read_text()
        end = text.index("(assert (and (>= state[0,1]")
        for cut in range(0, end, 7):
            with pytest.raises(PropertyError):
                parse_property(text[:cut])


class TestCost:
    def test_big_files_are_read_in_linear_time(self) -> None:
        seconds = []
        for num in (1500, 6000):
            text = _big(num, 1000)
            began = time.process_time()
            found = parse_property(text)
            seconds.append(time.process_time() - began)
            assert (found.num_inputs, len(found.cases)) == (num, 1000)
            assert len({id(case.lower) for case in found.cases}) == 1
        assert seconds[1] < 10 * seconds[0] + 0.5
        assert seconds[1] < 5

    def test_a_limit_is_not_met_by_what_is_read_in_practice(self) -> None:
        assert grammar.MAX_CASES >= 100_000
        assert grammar.MAX_INEQUALITIES >= 5_000_000


def _big(num: int, num_cases: int) -> str:
    """A box of `num` inputs and one alternative for each of many classes."""
    lines = [f"(declare-const X_{i} Real)" for i in range(num)]
    lines += [f"(declare-const Y_{i} Real)" for i in range(10)]
    for i in range(num):
        lines += [f"(assert (>= X_{i} {i / 7:.17g}))", f"(assert (<= X_{i} {i / 7 + 1:.17g}))"]
    rows = "".join(f"(and (>= Y_{k % 9} Y_9))\n" for k in range(num_cases))
    return "\n".join([*lines, f"(assert (or\n{rows}))"])


# Random formulas, as nested tuples.

Formula = tuple  # type: ignore[type-arg]  # recursive: ("and", parts) or (op, weights, constant)


def _formula(draw: random.Random, depth: int) -> Formula:
    kind = draw.choice(("and", "or", "row", "row")) if depth else "row"
    if kind != "row":
        return kind, [_formula(draw, depth - 1) for _ in range(draw.randrange(1, 4))]
    weights = [0.0] * 4
    first = draw.choice((0, 2))
    for place in (first, first + 1):
        weights[place] = draw.choice((-1.0, 0.0, 0.5, 1.0, 2.0))
    return draw.choice(("<=", ">=")), weights, draw.randrange(-8, 9) / 4


def _text(formula: Formula) -> str:
    if formula[0] in ("and", "or"):
        return f"({formula[0]} {' '.join(map(_text, formula[1]))})"
    names = ("X_0", "X_1", "Y_0", "Y_1")
    terms = " ".join(f"(* {w} {n})" for w, n in zip(formula[1], names, strict=True))
    return f"({formula[0]} (+ {terms}) {formula[2]})"


def _written(formula: Formula) -> list[str]:
    return [_text(part) for part in formula[1]] if formula[0] == "and" else [_text(formula)]


def _true(formula: Formula, values: list[float]) -> bool:
    if formula[0] == "and":
        return all(_true(part, values) for part in formula[1])
    if formula[0] == "or":
        return any(_true(part, values) for part in formula[1])
    value = sum(w * v for w, v in zip(formula[1], values, strict=True))
    return value <= formula[2] if formula[0] == "<=" else value >= formula[2]


def _possible(formula: Formula) -> bool:
    """Whether the reader finds an input that is not excluded; refused otherwise, as it must be."""
    try:
        parsed("".join(f"(assert {part})" for part in _written(formula)))
    except PropertyError as e:
        if "no input is left" not in str(e):
            raise
        return False
    return True
