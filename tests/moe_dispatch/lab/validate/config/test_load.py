"""A config is read into frozen values, or refused with each problem: key, fact, rule, a value that works."""

import pickle
from dataclasses import FrozenInstanceError, asdict
from pathlib import Path

import pytest

from moe_dispatch.lab.desk.config_file import ConfigError
from moe_dispatch.lab.validate.config.load import load_config
from moe_dispatch.lab.validate.config.spreading import CU_SEQLENS, MASK, Spreading
from sp_attention import Scheme
from sp_attention.work.scheme import Keys
from tests.support.lab.config_problems import problems_of
from tests.support.lab.configs import CONFIGS, TINY_TEXT

VALIDATE_CONFIGS = sorted((CONFIGS / "validate").glob("*.toml"))


@pytest.mark.parametrize("path", VALIDATE_CONFIGS, ids=lambda path: path.stem)
def test_every_config_of_the_project_loads(path: Path) -> None:
    config = load_config(path)
    assert set(config.tolerance) >= set(config.dtypes)
    assert config.model.nope_head_dim + config.model.rope_head_dim != config.model.value_head_dim


def test_default_config_holds_the_matrix_of_the_main_job() -> None:
    config = load_config(CONFIGS / "validate" / "deepseek_v3_debug.toml")
    assert [(row.dp, row.tp, row.ep, row.batch, row.seq) for row in config.rows if row.sp == 1] == [
        (4, 1, 1, 3, 129),
        (4, 1, 4, 3, 129),
        (2, 2, 1, 3, 129),
        (2, 2, 2, 3, 129),
        (2, 2, 4, 3, 129),
        (1, 4, 4, 1, 129),
        (2, 2, 4, 1, 129),
        (1, 4, 4, 3, 3),
    ]
    meshes = [(1, 4, 1, 1), (1, 4, 1, 4), (2, 2, 1, 2), (2, 2, 1, 4), (1, 2, 2, 4)]
    for dp, sp, tp, ep in meshes:
        rows = [row for row in config.rows if (row.dp, row.sp, row.tp, row.ep) == (dp, sp, tp, ep)]
        assert any(row.batch > 1 and row.seq % (sp * tp) for row in rows)
        assert any(row.seq < sp * tp for row in rows)
        assert any(tokens < places for row in rows for tokens, places in row.documents)
        assert any(row.heads < sp * tp for row in rows)
    assert any(row.seq // row.sp < row.window < row.seq for row in config.rows)


def test_default_config_meets_each_scheme_with_all_that_can_be_hard_for_it() -> None:
    rows = load_config(CONFIGS / "validate" / "deepseek_v3_debug.toml").rows
    for scheme, head_ranks in (("ulysses", 1), ("gather", 1), ("ring", 1), ("two_dimensional", 2)):
        of_scheme = [row for row in rows if row.scheme == scheme and row.sp == 4]
        assert {row.head_ranks for row in of_scheme} == {head_ranks}
        assert {row.ep for row in of_scheme} >= {4}
        assert any(row.seq > row.sp and row.seq % row.sp for row in of_scheme)
        assert any(row.seq < row.sp for row in of_scheme)
        padded = [row for row in of_scheme if any(tokens < places for tokens, places in row.documents)]
        assert any(row.nan_padding for row in padded)
        assert any(row.heads < row.sp for row in of_scheme)
        assert any(row.seq // row.sp < row.window < row.seq for row in of_scheme)
        assert any(row.order == "zigzag" for row in of_scheme)
    assert any(row.batch > 1 and row.seq > row.sp and row.scheme != "ulysses" for row in rows)
    spread = [row.spreading for row in rows]
    assert any(each.scheme.head_ranks == 2 and each.scheme.keys is Keys.RING and each.scheme.keep for each in spread)
    assert any(each.documents_as == MASK for each in spread)
    assert any(row.latent_keys and row.tp > 1 for row in rows)
    assert any(row.latent_keys and row.documents for row in rows)
    assert any(each.scheme.chunk < 33 for each in spread)


@pytest.mark.parametrize(
    ("keys", "scheme"),
    [
        ("", Scheme.ulysses()),
        ("keep = false", Scheme.ulysses(keep=False)),
        ('scheme = "ring"', Scheme.ring()),
        ('scheme = "gather"\nkeep = true\nchunk = 5', Scheme.gather(keep=True, chunk=5)),
        ('scheme = "two_dimensional"\nhead_ranks = 2', Scheme.two_dimensional(head_ranks=2)),
        ('scheme = "two_dimensional"\nkeys = "ring"', Scheme.two_dimensional(head_ranks=1, keys="ring")),
    ],
)
def test_a_row_has_the_scheme_that_its_keys_say(tmp_path: Path, keys: str, scheme: Scheme) -> None:
    path = tmp_path / "my.toml"
    path.write_text(TINY_TEXT.replace("tp = 2\nep = 2", f"sp = 2\nep = 2\n{keys}"))
    wanted = Spreading(scheme=scheme, documents_as=CU_SEQLENS, nan_padding=False, latent_keys=False)
    assert load_config(path).rows[2].spreading == wanted


def test_config_is_frozen_and_survives_pickling(tmp_path: Path) -> None:
    config = load_config(CONFIGS / "validate" / "tiny.toml")
    assert asdict(pickle.loads(pickle.dumps(config))) == asdict(config)
    with pytest.raises(FrozenInstanceError):
        config.model.dim = 1  # pyright: ignore[reportAttributeAccessIssue]


WRONG_VALUES = [
    (
        "dim = 32",
        "dim = 99999999999",
        "model.dim is 99999999999; it has to be an int of at least 1 and at most 1048576, e.g. dim = 64",
    ),
    (
        "seed = 0",
        "seed = 18446744073709551616",
        "train.seed is 18446744073709551616; it has to be an int of at least 0 and at most 9223372036854775807, e.g. "
        "seed = 0",
    ),
    (
        "learning_rate = 3e-3",
        "learning_rate = 1e30",
        "train.learning_rate is 1e+30; it has to be a number above 0 and at most 1000.0, e.g. learning_rate = 0.003",
    ),
    (
        "ranks = 2",
        "ranks = 1025",
        "ranks is 1025; it has to be an int of at least 1 and at most 1024, e.g. ranks = 4",
    ),
    ("dim = 32", "", "model.dim is missing; it has to be an int of at least 1, e.g. dim = 64"),
    ("dim = 32", "dim = '32'", "model.dim is '32'; it has to be an int of at least 1, e.g. dim = 64"),
    ("dim = 32", "dim = 0", "model.dim is 0; it has to be an int of at least 1, e.g. dim = 64"),
    ("dim = 32", "dmi = 32\ndim = 32", "model.dmi is not a known key; did you mean dim?"),
    (
        "normalize = true",
        "normalize = 1",
        "model.normalize is 1; it has to be true or false, e.g. normalize = true",
    ),
    (
        'score = "sigmoid"',
        'score = "relu"',
        'model.score is \'relu\'; it has to be "sigmoid" or "softmax", e.g. score = "sigmoid"',
    ),
    (
        'name = "TP2 + EP2"',
        'name = "TP2 + EP2"\nscheme = "rign"',
        'rows[2].scheme (row "TP2 + EP2") is \'rign\'; it has to be "ulysses", "gather", "ring" or '
        '"two_dimensional", e.g. scheme = "ring"',
    ),
    (
        'name = "TP2 + EP2"',
        'name = "TP2 + EP2"\nkeep = 1',
        'rows[2].keep (row "TP2 + EP2") is 1; it has to be true or false, e.g. keep = true',
    ),
    (
        'name = "TP2 + EP2"',
        'name = "TP2 + EP2"\nchunk = 0',
        'rows[2].chunk (row "TP2 + EP2") is 0; it has to be an int of at least 1, e.g. chunk = 64',
    ),
    ("steps = 2", "steps = 0", "train.steps is 0; it has to be an int of at least 1, e.g. steps = 4"),
    ("steps = 2", "steps = true", "train.steps is True; it has to be an int of at least 1, e.g. steps = 4"),
    (
        "learning_rate = 3e-3",
        "learning_rate = nan",
        "train.learning_rate is nan; it has to be a number above 0, e.g. learning_rate = 0.003",
    ),
    (
        "weight_decay = 0.1",
        "weight_decay = inf",
        "train.weight_decay is inf; it has to be a number of at least 0, e.g. weight_decay = 0.1",
    ),
    ("batch = 3", "batch = 0", "train.batch is 0; it has to be an int of at least 1, e.g. batch = 3"),
    ("batch = 3", "", "train.batch is missing; it has to be an int of at least 1, e.g. batch = 3"),
    (
        'name = "TP2 + EP2"',
        'name = "TP2 + EP2"\nbatch = -1',
        'rows[2].batch (row "TP2 + EP2") is -1; it has to be an int of at least 1, e.g. batch = 3',
    ),
    (
        'name = "TP2 + EP2"',
        'name = ""',
        'rows[2].name (row "") is \'\'; it has to be a non-empty string, e.g. name = "FSDP2 + TP2"',
    ),
    (
        'name = "TP2 + EP2"',
        'name = "TP2 + EP2"\ndocuments = [[1, 2, 3]]',
        'rows[2].documents[0] (row "TP2 + EP2") is [1, 2, 3]; it has to be a list of 2 numbers',
    ),
    (
        'name = "TP2 + EP2"',
        'name = "TP2 + EP2"\ndocuments = [[3, "4"]]',
        "rows[2].documents[0][1] (row \"TP2 + EP2\") is '4'; it has to be an int",
    ),
    ("ranks = 2", "ranks = 2\nrank = 3", "rank is not a known key; did you mean ranks?"),
    (
        "ranks = 2",
        "ranks = 2\nzzz = 3",
        "zzz is not a known key; the keys here are ranks, dtypes, train, tolerance, rows, model",
    ),
    (
        '["float32", "float64"]',
        '["float16", "float64"]',
        "dtypes[0] is 'float16'; it has to be one of float32, float64",
    ),
    (
        '["float32", "float64"]',
        "[]",
        'dtypes is []; it has to be a list, e.g. dtypes = ["float32", "float64"]',
    ),
]


@pytest.mark.parametrize(("right", "wrong", "problem"), WRONG_VALUES)
def test_wrong_value_is_named_with_rule_and_example(tmp_path: Path, right: str, wrong: str, problem: str) -> None:
    assert right in TINY_TEXT
    assert problems_of(tmp_path, TINY_TEXT.replace(right, wrong, 1)) == [problem]


def test_a_number_in_the_place_of_a_table_is_told(tmp_path: Path) -> None:
    start, end = TINY_TEXT.index("[tolerance.float64]"), TINY_TEXT.index("[tolerance.float32]")
    text = f"{TINY_TEXT[:start]}[tolerance]\nfloat64 = 1\n{TINY_TEXT[end:]}"
    assert problems_of(tmp_path, text) == ["tolerance.float64 is 1; it has to be a table"]


def test_all_problems_of_a_file_are_listed_at_once(tmp_path: Path) -> None:
    text = (
        TINY_TEXT.replace("dim = 32", "dim = 0", 1).replace("steps = 2", "stesp = 2").replace("dp = 2", "dp = 2.5", 1)
    )
    assert [problem.split(" ")[0] for problem in problems_of(tmp_path, text)] == [
        "train.steps",
        "train.stesp",
        "rows[0].dp",
        "model.dim",
    ]


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("", "ranks is missing; it has to be an int of at least 1, e.g. ranks = 4"),
        (TINY_TEXT[: TINY_TEXT.index("[[rows]]")], "rows is missing; it has to be a list of tables, e.g. [[rows]]"),
        ("rows = 3", "ranks is missing; it has to be an int of at least 1, e.g. ranks = 4"),
        ("rows = [3]\n" + TINY_TEXT[: TINY_TEXT.index("[[rows]]")], "rows[0] is 3; it has to be a table"),
        (
            "rows = []\n" + TINY_TEXT[: TINY_TEXT.index("[[rows]]")],
            "rows is []; it has to be a list of tables, e.g. [[rows]]",
        ),
        ("model = 3", "ranks is missing; it has to be an int of at least 1, e.g. ranks = 4"),
    ],
)
def test_a_file_of_another_shape_is_refused_without_noise(tmp_path: Path, text: str, first: str) -> None:
    assert problems_of(tmp_path, text)[0] == first


def test_a_row_takes_batch_and_seq_of_train_unless_it_has_its_own(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_text(TINY_TEXT.replace('name = "FSDP2 x2"  ', 'name = "FSDP2 x2"\nseq = 5 #'))
    rows = load_config(path).rows
    assert [(row.batch, row.seq) for row in rows] == [(3, 5), (3, 17), (3, 17)]


def test_a_file_that_cannot_be_read_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("dim = = 3")
    (tmp_path / "latin.toml").write_bytes(b"# \xff")
    with pytest.raises(ConfigError, match=r"none\.toml does not exist; name a TOML file, or a packaged config"):
        load_config(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match=r"bad\.toml is not valid TOML: .*line 1.*; correct that place"):
        load_config(tmp_path / "bad.toml")
    for name in ("", "latin.toml"):
        with pytest.raises(ConfigError, match=r"cannot be read \(.*\); name a readable TOML file"):
            load_config(tmp_path / name)


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_text("\ufeff" + TINY_TEXT)
    assert load_config(path) == load_config(CONFIGS / "validate" / "tiny.toml")
