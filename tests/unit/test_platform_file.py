# SPDX-License-Identifier: GPL-2.0-or-later
"""platform.toml: what it can say, and that each mistake in it is told precisely."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mktme.engine.firmware import Exclusion, PlatformConfig, PlatformConfigError
from mktme.engine.tme import Revision
from mktme.engine.xts import Algorithm
from mktme.service.platform_file import MAX_FILE_BYTES, parse_size, read_platform

EXAMPLE = Path(__file__).parents[2] / "docs" / "platform.toml"
KEYS = [field.encode_name for field in msgspec.structs.fields(PlatformConfig)]
MIB = 1 << 20

EVERY_KEY = """\
dram = "2G"
physical-address-bits = 40
tme = true
policy = "aes-xts-256"
bypass = true
save-key-for-standby = true
exclusion = { base = "16M", size = "1M" }
keyid-bits = 4
algorithms = ["aes-xts-256"]
revision = "spec-1.4"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "platform.toml"


def read(file: Path, text: str | bytes) -> PlatformConfig:
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_platform(file)


def refused(file: Path, text: str | bytes) -> PlatformConfigError:
    with pytest.raises(PlatformConfigError) as caught:
        read(file, text)
    return caught.value


def outcome(file: Path, text: str | bytes) -> PlatformConfig | PlatformConfigError:
    try:
        return read(file, text)
    except PlatformConfigError as error:
        return error


# --- what it says -----------------------------------------------------------------------------


def test_every_key_arrives(file: Path) -> None:
    assert list(tomllib.loads(EVERY_KEY)) == KEYS
    assert read(file, EVERY_KEY) == PlatformConfig(
        dram=2 << 30,
        physical_address_bits=40,
        tme=True,
        policy=Algorithm.AES_XTS_256,
        bypass=True,
        save_key_for_standby=True,
        exclusion=Exclusion(base=16 * MIB, size_bytes=MIB),
        keyid_bits=4,
        algorithms=(Algorithm.AES_XTS_256,),
        revision=Revision.SPEC_1_4,
    )


def test_what_is_left_out_has_its_default(file: Path) -> None:
    assert read(file, "") == PlatformConfig()
    assert read(file, "keyid-bits = 3") == PlatformConfig(keyid_bits=3)


@pytest.mark.parametrize(
    "exclusion",
    [
        'exclusion = { base = "16M", size = 1048576 }',
        "[exclusion]\nbase = 0x1000000\nsize = '1024K'",
        'exclusion.size = "1MiB"\nexclusion.base = "16m"',
    ],
)
def test_a_table_and_a_size_in_any_spelling(file: Path, exclusion: str) -> None:
    assert read(file, exclusion).exclusion == Exclusion(base=16 * MIB, size_bytes=MIB)


def test_lines_may_end_as_on_windows(file: Path) -> None:
    assert read(file, 'tme = true\r\npolicy = "aes-xts-256"\r\n').policy is Algorithm.AES_XTS_256
    assert str(refused(file, "tme = true\r\nbypass = 1\r\n")).startswith(f"{file}:2: bypass: ")


def test_a_file_of_the_most_bytes(file: Path) -> None:
    assert read(file, "#" * MAX_FILE_BYTES) == PlatformConfig()


# --- the example ------------------------------------------------------------------------------


def test_example_is_the_defaults() -> None:
    assert read_platform(EXAMPLE) == PlatformConfig()


def test_example_has_every_key_and_its_commented_values_are_good(file: Path) -> None:
    text, count = re.subn(r"^# (?=[a-z-]+ = )", "", EXAMPLE.read_text(), flags=re.MULTILINE)
    assert sorted(tomllib.loads(text)) == sorted(KEYS)
    assert count == 2
    config = read(file, text)
    assert config.dram == 2 << 30
    assert config.exclusion == Exclusion(base=16 * MIB, size_bytes=MIB)


@pytest.mark.parametrize("key", [key for key in KEYS if key not in ("dram", "exclusion")])
def test_example_tells_what_is_allowed(file: Path, key: str) -> None:
    comment = re.search(rf"((?:^#.*\n)+){key} = ", EXAMPLE.read_text(), re.MULTILINE)
    assert comment is not None
    hint = refused(file, f"{key} = {{}}").hint
    assert hint is not None
    allowed = hint.removeprefix("allowed: ").removeprefix("an array of ")
    for value in allowed.split(", "):
        assert value in comment[1]


# --- what is wrong ----------------------------------------------------------------------------

ALGORITHMS = "aes-xts-128, aes-xts-256, aes-xts-128-integrity"
ALL_KEYS = f"allowed: {', '.join(KEYS)}"
SIZE = 'allowed: bytes, 0 to 4503599627370496, or "512M", "2G" and the like'
EXCLUSION = 'allowed: { base = "16M", size = "1M" } and the like'

# The file, what is told after its name, and the hint.
WRONG: dict[str, tuple[str, str, str | None]] = {
    "misspelt key": (
        'tme = true\npolcy = "x"',
        ":2: polcy: unknown key",
        f"did you mean policy? {ALL_KEYS}",
    ),
    "key with underscores": (
        "keyid_bits = 3",
        ":1: keyid_bits: unknown key",
        f"did you mean keyid-bits? {ALL_KEYS}",
    ),
    "key in capitals": ("TME = true", ":1: TME: unknown key", f"did you mean tme? {ALL_KEYS}"),
    "key like none": ("colour = 3", ":1: colour: unknown key", ALL_KEYS),
    "unknown table": ("\n[memory]\ndram = 3", ":2: memory: unknown key", ALL_KEYS),
    "key with a line break": ('"a\\nb" = 1', r": 'a\nb': unknown key", ALL_KEYS),
    "unknown subkey": (
        'exclusion = { base = 0, size = "1M", bse = 1 }',
        ":1: exclusion.bse: unknown key",
        "did you mean base? allowed: base, size",
    ),
    "missing size": ("exclusion = { base = 0 }", ":1: exclusion: has no size", EXCLUSION),
    "missing base": ("[exclusion]\nsize = 4096", ":1: exclusion: has no base", EXCLUSION),
    "exclusion that is no table": (
        'exclusion = "16M"',
        ":1: exclusion: '16M' is not a table",
        EXCLUSION,
    ),
    "unknown policy": (
        '# none\npolicy = "rot13"',
        ":2: policy: 'rot13' is not allowed",
        f"allowed: {ALGORITHMS}",
    ),
    "policy in capitals": (
        'policy = "AES-XTS-128"',
        ":1: policy: 'AES-XTS-128' is not allowed",
        f"allowed: {ALGORITHMS}",
    ),
    "policy as it is encoded": ("policy = 0", ":1: policy: 0 is not allowed", None),
    "policies": (
        'policy = ["aes-xts-128"]',
        ":1: policy: an array is not allowed",
        f"allowed: {ALGORITHMS}",
    ),
    "policy that the revision does not have": (
        'revision = "spec-1.4"\npolicy = "aes-xts-128-integrity"',
        ":2: policy: aes-xts-128-integrity is not for the TME key with revision spec-1.4",
        'allowed: aes-xts-128, aes-xts-256; or revision = "sdm"',
    ),
    "unknown revision": (
        "revision = 1.4",
        ":1: revision: 1.4 is not allowed",
        "allowed: sdm, spec-1.4",
    ),
    "date for a revision": (
        "revision = 2021-04-30",
        ":1: revision: 2021-04-30 is not allowed",
        "allowed: sdm, spec-1.4",
    ),
    "flag in words": ('tme = "on"', ":1: tme: 'on' is not allowed", "allowed: true, false"),
    "flag as a number": ("bypass = 1", ":1: bypass: 1 is not allowed", "allowed: true, false"),
    "flag that is no number": (
        "save-key-for-standby = nan",
        ":1: save-key-for-standby: nan is not allowed",
        "allowed: true, false",
    ),
    "KeyID bits past the register's": (
        "keyid-bits = 16",
        ":1: keyid-bits: 16 is out of range",
        "allowed: 0 to 15",
    ),
    "negative KeyID bits": (
        "keyid-bits = -1",
        ":1: keyid-bits: -1 is out of range",
        "allowed: 0 to 15",
    ),
    "fractional KeyID bits": (
        "keyid-bits = 6.0",
        ":1: keyid-bits: 6.0 is not a whole number",
        "allowed: 0 to 15",
    ),
    "KeyID bits in a string": (
        'keyid-bits = "6"',
        ":1: keyid-bits: '6' is not a whole number",
        "allowed: 0 to 15",
    ),
    "true for a number": (
        "keyid-bits = true",
        ":1: keyid-bits: true is not a whole number",
        "allowed: 0 to 15",
    ),
    "narrow addresses": (
        "physical-address-bits = 31",
        ":1: physical-address-bits: 31 is out of range",
        "allowed: 32 to 52",
    ),
    "wide addresses": (
        "physical-address-bits = 53",
        ":1: physical-address-bits: 53 is out of range",
        "allowed: 32 to 52",
    ),
    "number of any length": (
        f"keyid-bits = 0x{'f' * 20000}",
        ":1: keyid-bits: a number of more than 64 bits is out of range",
        "allowed: 0 to 15",
    ),
    "no size": ('dram = "2T"', ":1: dram: '2T' is not a size", SIZE),
    "true for a size": ("dram = true", ":1: dram: true is not a size", SIZE),
    "fractional size": ("dram = 1e9", ":1: dram: 1000000000.0 is not a size", SIZE),
    "size past any address": (
        'dram = "4194305G"',
        ":1: dram: '4194305G' is out of range",
        SIZE,
    ),
    "size of any length": (
        f'dram = "{"9" * 5000}"',
        ":1: dram: '999999999999...9999999999999' is not a size",
        SIZE,
    ),
    "negative size": ("dram = -4096", ":1: dram: -4096 is out of range", SIZE),
    "negative base": (
        "exclusion.base = -1\nexclusion.size = 4096",
        ":1: exclusion.base: -1 is out of range",
        SIZE,
    ),
    "algorithm alone": (
        'algorithms = "aes-xts-128"',
        ":1: algorithms: 'aes-xts-128' is not an array",
        f"allowed: an array of {ALGORITHMS}",
    ),
    "unknown algorithm": (
        'algorithms = ["aes-xts-128", "rot13"]',
        ":1: algorithms: 'rot13' is not allowed",
        f"allowed: {ALGORITHMS}",
    ),
    "algorithm that is an array": (
        'algorithms = [["aes-xts-128"]]',
        ":1: algorithms: an array is not allowed",
        f"allowed: {ALGORITHMS}",
    ),
    "algorithm twice": (
        'tme = true\nalgorithms = [\n  "aes-xts-128",\n  "aes-xts-128",\n]',
        ":2: algorithms: aes-xts-128 is there twice",
        f"allowed, once each: {ALGORITHMS}",
    ),
    # What only `PlatformConfig` knows comes with the file, too.
    "half a page of DRAM": (
        "tme = true\ndram = 2048",
        ":2: dram: 2048 bytes are not whole 4 KiB pages",
        None,
    ),
    "DRAM past the address bits": (
        'dram = "4G"\nphysical-address-bits = 36',
        ":1: dram: 4294967296 bytes do not fit",
        None,
    ),
    "KeyIDs without TME": ("tme = false", ": keyid-bits: 6 KeyID bits without TME", None),
    "KeyIDs without algorithms": ("algorithms = []", ":1: algorithms: none", None),
    "exclusion of no power of two": (
        'exclusion = { base = 0, size = "3M" }',
        ":1: exclusion.size: 3145728 bytes are no power of two",
        None,
    ),
    "exclusion across its size": (
        '[exclusion]\nsize = "1M"\nbase = "512K"',
        ":3: exclusion.base: 0x80000 is no multiple",
        None,
    ),
    # TOML's own rules, with the place that the parser gives.
    "no TOML": ("tme = true\npolicy =\n", ": not TOML: Invalid value (at line 2, column 9)", None),
    "key twice": ("tme = true\ntme = true\n", ": not TOML: Cannot overwrite a value", None),
    "unending nesting": ("dram = " + "[" * 50000, ": not TOML: ", None),
    "more digits than Python takes": (f"dram = {'9' * 5000}", ": not TOML: ", None),
}


@pytest.mark.parametrize(("text", "told", "hint"), WRONG.values(), ids=WRONG.keys())
def test_mistake_is_told_with_file_line_key_and_what_is_allowed(
    file: Path, text: str, told: str, hint: str | None
) -> None:
    error = refused(file, text)
    if hint is None:  # another module's, or Python's, words
        assert str(error).startswith(f"{file}{told}")
        assert error.hint is not None
    else:
        assert (str(error), error.hint) == (f"{file}{told}", hint)


def test_error_names_its_key(file: Path) -> None:
    assert refused(file, "keyid-bits = 16").key == "keyid-bits"
    assert refused(file, "exclusion = { base = 0, size = 3 }").key == "exclusion.size"
    assert refused(file, "not TOML").key == str(file)


def test_first_mistake_of_the_file_is_told(file: Path) -> None:
    text = ["bypass = 3", "colour = 1", "keyid-bits = 99"]
    for _rotation in text:
        text.append(text.pop(0))
        assert refused(file, "\n".join(text)).key == text[0].split()[0]


FILE_HINT = "give a TOML file of at most 64 KiB, in UTF-8"


def test_file_that_is_not_there(file: Path) -> None:
    with pytest.raises(PlatformConfigError) as caught:
        read_platform(file)
    assert str(caught.value) == f"{file}: cannot be read: No such file or directory"
    assert caught.value.hint == FILE_HINT


def test_directory_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(PlatformConfigError, match="cannot be read: Is a directory"):
        read_platform(tmp_path)


def test_file_that_is_too_large(file: Path) -> None:
    error = refused(file, "#" * (MAX_FILE_BYTES + 1))
    assert (str(error), error.hint) == (f"{file}: larger than 64 KiB", FILE_HINT)


def test_file_without_end_is_not_read_to_it() -> None:
    with pytest.raises(PlatformConfigError, match="/dev/zero: larger than 64 KiB"):
        read_platform(Path("/dev/zero"))


def test_file_that_is_not_utf_8(file: Path) -> None:
    error = refused(file, b"tme = true\n# gr\xfcn\n")
    assert (str(error), error.hint) == (f"{file}: not UTF-8: byte 0xfc on line 2", FILE_HINT)


# --- lines ------------------------------------------------------------------------------------

# Where a plain search would be wrong, there is no line.
UNCERTAIN: dict[str, str] = {
    "in a string": 'revision = """\npolicy = 3\n"""\n',
    "quoted": '"tme" = 3\n',
    "the word in a comment only": '# tme = 3\n"tme" = 3\n',
    "in another table": '"exclusion" = { size = "x", base = 0 }\n[x]\nsize = 3\n',
    "in a string after it": '"policy" = 3\nrevision = """\npolicy = 3\n"""\n',
}


@pytest.mark.parametrize("text", UNCERTAIN.values(), ids=UNCERTAIN.keys())
def test_line_that_is_uncertain_is_left_out(file: Path, text: str) -> None:
    error = refused(file, text)
    told = re.match(r":(\d+): ", str(error).removeprefix(str(file)))
    # The string's own key is on line 1.
    assert told is None or (error.key, told[1]) == ("revision", "1")


BEFORE = [
    "",
    "# keyid-bits = 99",
    "# no line ends: \u2028 \x85",
    "tme = true",
    'algorithms = [\n  "aes-xts-128", # policy\n  "aes-xts-256",\n]',
    'policy = """\\\n    aes-xts-128"""',
    "exclusion = { base = 0, size = 4096 } # keyid-bits = 3",
    "   bypass=false",
]


@given(st.lists(st.sampled_from(BEFORE), unique=True), st.sampled_from(["", " ", "\t"]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_line_is_the_keys(file: Path, before: list[str], indent: str) -> None:
    text = "\n".join([*before, f"{indent}keyid-bits = 16", 'revision = "sdm"'])
    line = text[: text.index("= 16")].count("\n") + 1
    assert str(refused(file, text)).startswith(f"{file}:{line}: keyid-bits: ")


def test_nesting_as_deep_as_can_be_read_does_not_end_the_search_for_a_line(file: Path) -> None:
    before = 'exclusion.size = "1M"\nx = '
    after = "\nexclusion.base = true"
    # How deep that is depends on the stack up to here, so find it.
    depth = next(
        depth
        for depth in range(1, 1000)
        if refused(file, before + "[" * depth + "]" * depth + after).key == str(file)
    )
    for less in range(1, 5):
        nested = "[" * (depth - less) + "]" * (depth - less)
        assert refused(file, before + nested + after).key == "exclusion.base"


# --- anything ---------------------------------------------------------------------------------

VALUES = st.one_of(
    st.sampled_from(["true", "false", '"aes-xts-128"', '"sdm"', '"2G"', '"512M"', "[]", "{}"]),
    st.integers().map(str),
    st.integers(0, 60).map(str),
    st.floats().map(lambda value: repr(value) if "e" not in repr(value) else "1.5"),
    st.text(
        st.characters(codec="utf-8", min_codepoint=32, exclude_characters='"\\\x7f'), max_size=60
    ).map(lambda text: f'"{text}"'),
    st.lists(
        st.sampled_from(['"aes-xts-128"', '"aes-xts-256"', '"aes-xts-128-integrity"', "1"])
    ).map(lambda items: f"[{', '.join(items)}]"),
    st.tuples(st.integers(), st.integers()).map(
        lambda pair: f"{{ base = {pair[0]}, size = {pair[1]} }}"
    ),
)


@given(st.dictionaries(st.sampled_from([*KEYS, "colour"]), VALUES))
@example({})
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
def test_whatever_it_says_is_a_platform_or_one_line_with_a_hint(
    file: Path, settings: dict[str, str]
) -> None:
    text = "".join(f"{key} = {value}\n" for key, value in settings.items())
    tomllib.loads(text)  # control: it is TOML, so what is refused is a setting
    came = outcome(file, text)
    if isinstance(came, PlatformConfigError):
        assert re.fullmatch(rf"{re.escape(str(file))}(:\d+)?: [^\n]{{1,300}}", str(came))
        assert "not TOML" not in str(came)
        assert came.hint is not None
        assert "allowed" in came.hint


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_a_platform_or_refused(file: Path, data: bytes) -> None:
    came = outcome(file, data)
    if isinstance(came, PlatformConfigError):
        assert str(came).startswith(f"{file}:")
        assert len(str(came).splitlines()) == 1


# --- sizes ------------------------------------------------------------------------------------


@given(st.integers(0, 10**18 - 1), st.sampled_from(["", "K", "M", "G"]))
def test_size_is_its_number_times_its_unit(number: int, unit: str) -> None:
    assert parse_size(f"{number}{unit}") == number * 1024 ** " KMG".index(unit or " ")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "M",
        "-1",
        "1.5G",
        "1T",
        "\N{ARABIC-INDIC DIGIT TWO}G",
        "1\N{KELVIN SIGN}",  # its lower case is k
        "9" * 19,
    ],
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)
