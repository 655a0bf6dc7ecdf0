"""The JSON form: the schema, the round trip, and files that are refused with their place."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jsonschema
import pytest

from patchclamp.core import document as core_document
from patchclamp.core import findings as core_findings
from patchclamp.core.document import Bars, Document, Facts, Passage, Picture, Table
from patchclamp.core.errors import DataError, EvidenceError, OutputError
from patchclamp.report import read_document, write_findings
from patchclamp.report.json_form import SCHEMA_PATH, document_from_plain, plain_document
from tests.report_sample import sample_document

SCHEMA = json.loads(SCHEMA_PATH.read_text(encoding="utf-8"))
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
HOSTILE = "\x00\x1b[31m</script>\u202eתוצאה\U0001f9ea\u2028\ufeff"


def plain() -> dict:
    return json.loads(json.dumps(sample_document().to_json()))


def with_block(block) -> Document:
    document = sample_document()
    section = dataclasses.replace(document.sections[0], blocks=(block,))
    return dataclasses.replace(document, sections=(section,))


def test_the_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("name", [*SCHEMA["$defs"], "document"])
def test_the_schema_names_the_fields_of_the_classes(name: str) -> None:
    schema = SCHEMA if name == "document" else SCHEMA["$defs"][name]
    class_name = "".join(part.capitalize() for part in name.split("_"))
    cls = getattr(core_document, class_name, None) or getattr(core_findings, class_name)
    fields = {field.name for field in dataclasses.fields(cls)}
    assert set(schema["properties"]) == fields
    assert set(schema["required"]) == fields
    assert schema["additionalProperties"] is False


def test_what_is_written_is_valid_and_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "findings.json"
    write_findings(sample_document(), path)
    VALIDATOR.validate(json.loads(path.read_text(encoding="ascii")))
    assert read_document(path) == sample_document()


def test_plain_data_is_the_documents_own() -> None:
    assert json.loads(json.dumps(plain_document(sample_document()))) == plain()


def test_equal_documents_have_equal_bytes(tmp_path: Path) -> None:
    document = sample_document()
    turned = dict(reversed(document.versions.items()))
    for name, versions in (("a", document.versions), ("b", turned)):
        write_findings(dataclasses.replace(document, versions=versions), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.update(extra=1),
        lambda d: d.pop("title"),
        lambda d: d["sections"][0]["blocks"][0].update(kind="chart"),
        lambda d: d["sections"][0]["blocks"][0]["columns"][0].update(role="pie"),
        lambda d: d["sections"][0]["blocks"][0]["rows"].append([[1]] * 6),
        lambda d: d["sections"][0]["blocks"][1].update(counts="many"),
        lambda d: d["sections"][0]["findings"][0].update(effect="2"),
        lambda d: d["sections"][0]["findings"][0].update(evidence="certain"),
        lambda d: d["sections"][0]["findings"][0]["record"].update(seed=1.5),
        lambda d: d["sections"][0]["findings"][0]["record"].update(versions={"torch": 2}),
        lambda d: d["sections"][1]["blocks"][0].update(items=[["one"]]),
        lambda d: d["sections"][2]["blocks"][1]["units"][0]["pictures"][0].update(
            png_base64="R0lG"
        ),
        lambda d: d["sections"][2]["blocks"][1]["units"][3]["passages"][0].update(focus=True),
        lambda d: d.update(schema_version=2),
        lambda d: d.update(left_out={}),
    ],
)
def test_schema_and_reader_refuse_the_same(damage) -> None:
    data = plain()
    VALIDATOR.validate(data)
    document_from_plain(data)
    damage(data)
    assert list(VALIDATOR.iter_errors(data))
    with pytest.raises(DataError):
        document_from_plain(data)


def test_errors_name_the_place_and_the_nearest_key() -> None:
    data = plain()
    data["sections"][1]["blocks"][1]["wieght"] = data["sections"][1]["blocks"][1].pop("weight")
    with pytest.raises(DataError, match=r"sections\[1\]\.blocks\[1\].*'wieght'.*nearest 'weight'"):
        document_from_plain(data)


def test_a_file_cannot_claim_more_than_its_proof() -> None:
    data = plain()
    data["sections"][0]["findings"][0]["evidence"] = "certified"
    assert list(VALIDATOR.iter_errors(data))
    with pytest.raises(EvidenceError, match="without a certificate"):
        document_from_plain(data)


def test_hostile_text_survives(tmp_path: Path) -> None:
    document = dataclasses.replace(sample_document(), title=HOSTILE, versions={HOSTILE: HOSTILE})
    write_findings(document, tmp_path / "f.json")
    raw = (tmp_path / "f.json").read_bytes()
    assert raw.isascii()
    assert b"\x00" not in raw
    assert b"\x1b" not in raw
    assert read_document(tmp_path / "f.json") == document


def test_a_lone_surrogate_is_spelled_out(tmp_path: Path) -> None:
    write_findings(dataclasses.replace(sample_document(), title="a\udc80b"), tmp_path / "f.json")
    assert read_document(tmp_path / "f.json").title == r"a\udc80b"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), {1: 2}])
def test_what_json_cannot_hold_is_refused_by_place(tmp_path: Path, value: object) -> None:
    block = Facts(title="x", items=(("name", value),))
    with pytest.raises(OutputError, match=r"sections\[0\]\.blocks\[0\]\.items\[0\]\[1\]"):
        write_findings(with_block(block), tmp_path / "f.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not strict JSON"),
        ("{", "not strict JSON"),
        ("[1]", "schema_version"),
        ('{"schema_version": NaN}', "NaN is not a number"),
        ('{"schema_version": true}', "schema_version"),
        ('{"schema_version": 7}', "another schema version; got 7; expected 1"),
        ('{"schema_version": 1, "schema_version": 1}', "occurs twice"),
        ('{"schema_version": 1}', "lacks the key 'title'"),
        ("[" * 200_000, "nested too deeply"),
    ],
)
def test_wrong_files_get_one_clear_error(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "f.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=says):
        read_document(path)


def test_missing_and_undecodable_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        read_document(tmp_path / "none.json")
    (tmp_path / "f.json").write_bytes(b'{"title": "\xff"}')
    with pytest.raises(DataError, match="not UTF-8"):
        read_document(tmp_path / "f.json")


def test_an_infinite_number_in_a_file_is_refused(tmp_path: Path) -> None:
    data = json.dumps(plain()).replace('"cpu_seconds": 1.84', '"cpu_seconds": 1e999')
    (tmp_path / "f.json").write_text(data)
    with pytest.raises(DataError, match="1e999 is too large"):
        read_document(tmp_path / "f.json")


COLUMNS = sample_document().sections[2].blocks[0].columns
PNG = sample_document().sections[2].blocks[1].units[0].pictures[0].png_base64


@pytest.mark.parametrize(
    ("block", "says"),
    [
        (Table(title="t", columns=COLUMNS, rows=((1, 2),)), "wrong number of cells"),
        (Table(title="t", columns=COLUMNS[1:2], rows=(("much",),)), "a number or null"),
        (Table(title="t", columns=COLUMNS[3:4], rows=((1.2,),)), "a share between 0 and 1"),
        (Table(title="t", columns=COLUMNS[4:5], rows=((1,),)), "true, false or null"),
        (Bars(title="b", labels=("a",), values=(1.0, 2.0), unit=""), "values has the wrong length"),
        (Bars(title="b", labels=("a",), values=(1.0,), unit="", low=(1.0,)), "high has the wrong"),
        (
            Bars(title="b", labels=("a",), values=(1.0,), unit="", low=(2.0,), high=(1.0,)),
            "is above",
        ),
        (
            core_document.Histogram(title="h", edges=(0.0, 0.0), counts=(1,), unit=""),
            "do not increase",
        ),
        (Bars(title="b", labels=(), values=(), unit="", kind="curve"), "not what its kind says"),
    ],
)
def test_a_document_that_contradicts_itself_is_refused(block, says: str) -> None:
    with pytest.raises(DataError, match=says):
        plain_document(with_block(block))


@pytest.mark.parametrize("text", ["", "PHN2Zz4=", PNG[:12], PNG.replace("A", "*"), " " + PNG])
def test_a_picture_must_be_a_png(text: str) -> None:
    unit = core_document.UnitExamples(
        unit="u", summary="", pictures=(Picture(png_base64=text, label="", value=0.0),)
    )
    with pytest.raises(DataError, match="not a PNG"):
        plain_document(with_block(core_document.Examples(title="e", units=(unit,))))


def test_a_focus_outside_its_passage_is_refused() -> None:
    passage = Passage(tokens=("a",), strengths=(1.0,), focus=1, value=1.0)
    unit = core_document.UnitExamples(unit="u", summary="", passages=(passage,))
    with pytest.raises(DataError, match="not one of its tokens"):
        plain_document(with_block(core_document.Examples(title="e", units=(unit,))))


def test_ids_are_unique() -> None:
    document = sample_document()
    twice = dataclasses.replace(document, sections=(*document.sections, document.sections[0]))
    with pytest.raises(DataError, match="section id 'anatomy' occurs twice"):
        plain_document(twice)
