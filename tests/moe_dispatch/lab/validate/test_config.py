"""A config is read into frozen values, or refused with each problem: key, fact, rule, a value that works."""

import pickle
from dataclasses import FrozenInstanceError, asdict
from pathlib import Path

import pytest

from moe_dispatch.lab.validate.config import ConfigError, load_config

CONFIGS = Path(__file__).parents[4] / "configs"
VALIDATE_CONFIGS = [path for path in sorted(CONFIGS.glob("*.toml")) if not path.stem.startswith("bench")]
TINY = (CONFIGS / "tiny.toml").read_text()


def problems_of(tmp_path: Path, text: str) -> list[str]:
    """The lines below the first of the error that ``text`` gets."""
    path = tmp_path / "my.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(path)
    first, *problems = str(error.value).splitlines()
    assert first == f"config {path} cannot be used:"
    return [problem.strip() for problem in problems]


@pytest.mark.parametrize("path", VALIDATE_CONFIGS, ids=lambda path: path.stem)
def test_every_config_of_the_project_loads(path: Path) -> None:
    config = load_config(path)
    assert set(config.tolerance) >= set(config.dtypes)
    assert config.model.nope_head_dim + config.model.rope_head_dim != config.model.value_head_dim


def test_default_config_holds_the_matrix_of_the_main_job() -> None:
    config = load_config(CONFIGS / "deepseek_v3_debug.toml")
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


def test_config_is_frozen_and_survives_pickling(tmp_path: Path) -> None:
    config = load_config(CONFIGS / "tiny.toml")
    assert asdict(pickle.loads(pickle.dumps(config))) == asdict(config)
    with pytest.raises(FrozenInstanceError):
        config.model.dim = 1  # pyright: ignore[reportAttributeAccessIssue]


WRONG_VALUES = [
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
    ("ranks = 2", "ranks = 2\nrank = 3", "rank is not a known key; did you mean ranks?"),
    (
        "ranks = 2",
        "ranks = 2\nzzz = 3",
        "zzz is not a known key; the keys here are ranks, dtypes, model, train, tolerance, rows",
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
    assert right in TINY
    assert problems_of(tmp_path, TINY.replace(right, wrong, 1)) == [problem]


def test_a_number_in_the_place_of_a_table_is_told(tmp_path: Path) -> None:
    start, end = TINY.index("[tolerance.float64]"), TINY.index("[tolerance.float32]")
    text = f"{TINY[:start]}[tolerance]\nfloat64 = 1\n{TINY[end:]}"
    assert problems_of(tmp_path, text) == ["tolerance.float64 is 1; it has to be a table"]


BROKEN_RULES = [
    (
        "dense_layers = 1",
        "dense_layers = 2",
        "model.dense_layers is 2 of 2 layers, leaving no MoE layer; it has to be below model.layers, "
        "e.g. dense_layers = 1",
    ),
    (
        "rope_head_dim = 4",
        "rope_head_dim = 5",
        "model.rope_head_dim is 5; RoPE turns pairs, so it has to be even, e.g. rope_head_dim = 6",
    ),
    (
        "\ngroups = 1",
        "\ngroups = 3",
        "model.groups is 3; groups of equal size have to hold the 4 experts, e.g. groups = 2",
    ),
    (
        "limited_groups = 1",
        "limited_groups = 2",
        "model.limited_groups is 2, of 1 groups; it has to be at most model.groups, e.g. limited_groups = 1",
    ),
    (
        "\ngroups = 1",
        "\ngroups = 4",
        "model.top_k is 2; a token reaches the 1 experts of its 1 of 4 groups, so it has to be at most that, "
        "e.g. top_k = 1",
    ),
    ('["float32", "float64"]', '["float32", "float32"]', 'dtypes lists "float32" 2 times; list it once'),
    (
        "[tolerance.float64]",
        "[tolerance.float46]",
        "tolerance.float64 is missing; each of dtypes needs tolerances, e.g. [tolerance.float64]",
    ),
    (
        'name = "TP2 + EP2"',
        'name = "FSDP2 x2"',
        'rows[0].name (row "FSDP2 x2") is used 2 times; give each row its own name',
    ),
    (
        "tp = 2\nep = 2",
        "tp = 1\nep = 2\nsp = 2\ndp = 2",
        'rows[2].dp (row "TP2 + EP2") is 2, and dp * sp * tp = 2 * 2 * 1 = 4; it has to be ranks = 2, '
        "e.g. dp = 1, sp = 2, tp = 1",
    ),
    (
        "tp = 2\nep = 2",
        "tp = 2\nep = 2\ndocuments = [[3, 4], [5, 5]]",
        'rows[2].documents (row "TP2 + EP2") take 9 places of batch = 3 rows of seq = 17; they are '
        "packed into one row: set batch = 1 and seq = 9",
    ),
    (
        "tp = 2\nep = 2",
        "tp = 2\nep = 2\nbatch = 1\nseq = 9\ndocuments = [[3, 4], [6, 5]]",
        'rows[2].documents (row "TP2 + EP2") is [[3, 4], [6, 5]]; each is [tokens, places], with '
        "0 <= tokens <= places",
    ),
    (
        "tp = 2\nep = 2",
        "tp = 2\nep = 2\ndp = 2",
        'rows[2].dp (row "TP2 + EP2") is 2, and dp * sp * tp = 2 * 1 * 2 = 4; it has to be ranks = 2, '
        "e.g. dp = 1, tp = 2",
    ),
    (
        "dp = 2\nep = 2",
        "dp = 2\nep = 3",
        'rows[1].ep (row "FSDP2 x2 + EP2") is 3; it has to divide dp * sp * tp = 2: set ep to 1 or 2',
    ),
    (
        "heads = 2",
        "heads = 3",
        'rows[2].tp (row "TP2 + EP2") is 2; it cuts model.heads = 3 into equal parts, so it has to divide '
        "it: set model.heads = 4, or another tp",
    ),
]


@pytest.mark.parametrize(("right", "wrong", "problem"), BROKEN_RULES)
def test_broken_rule_between_keys_is_told_with_a_value_that_works(
    tmp_path: Path, right: str, wrong: str, problem: str
) -> None:
    assert right in TINY
    assert problem in problems_of(tmp_path, TINY.replace(right, wrong, 1))


@pytest.mark.parametrize(
    ("ranks", "dp", "tp", "works"),
    [(6, 2, 2, "dp = 3, tp = 2"), (6, 2, 4, "dp = 2, tp = 3"), (5, 2, 2, "dp = 5, tp = 1")],
)
def test_a_mesh_of_the_wrong_size_is_told_one_that_works(
    tmp_path: Path, ranks: int, dp: int, tp: int, works: str
) -> None:
    rows = TINY.index("[[rows]]")
    text = TINY[:rows].replace("ranks = 2", f"ranks = {ranks}").replace("heads = 2", "heads = 4")
    problem = problems_of(tmp_path, f'{text}[[rows]]\nname = "X"\ndp = {dp}\ntp = {tp}')[0]
    assert problem.endswith(works)


def test_more_ranks_than_experts_in_a_group_is_refused(tmp_path: Path) -> None:
    text = TINY.replace("experts = 4", "experts = 1", 1).replace("top_k = 2", "top_k = 1")
    assert problems_of(tmp_path, text.replace("dp = 2\nep = 2", "dp = 2\nep = 3"))[0].endswith("= 2: set ep to 1")
    assert problems_of(tmp_path, text)[-1] == (
        'rows[2].ep (row "TP2 + EP2") is 2 for 1 experts; every rank of a group holds at least one: '
        "lower ep, or raise model.experts"
    )


def test_all_problems_of_a_file_are_listed_at_once(tmp_path: Path) -> None:
    text = TINY.replace("dim = 32", "dim = 0", 1).replace("steps = 2", "stesp = 2").replace("dp = 2", "dp = 2.5", 1)
    assert [problem.split(" ")[0] for problem in problems_of(tmp_path, text)] == [
        "model.dim",
        "train.steps",
        "train.stesp",
        "rows[0].dp",
    ]


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("", "ranks is missing; it has to be an int of at least 1, e.g. ranks = 4"),
        (TINY[: TINY.index("[[rows]]")], "rows is missing; it has to be a list of tables, e.g. [[rows]]"),
        ("rows = 3", "ranks is missing; it has to be an int of at least 1, e.g. ranks = 4"),
        ("rows = [3]\n" + TINY[: TINY.index("[[rows]]")], "rows[0] is 3; it has to be a table"),
        (
            "rows = []\n" + TINY[: TINY.index("[[rows]]")],
            "rows is []; it has to be a list of tables, e.g. [[rows]]",
        ),
        ("model = 3", "ranks is missing; it has to be an int of at least 1, e.g. ranks = 4"),
    ],
)
def test_a_file_of_another_shape_is_refused_without_noise(tmp_path: Path, text: str, first: str) -> None:
    assert problems_of(tmp_path, text)[0] == first


def test_a_row_takes_batch_and_seq_of_train_unless_it_has_its_own(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_text(TINY.replace('name = "FSDP2 x2"  ', 'name = "FSDP2 x2"\nseq = 5 #'))
    rows = load_config(path).rows
    assert [(row.batch, row.seq) for row in rows] == [(3, 5), (3, 17), (3, 17)]


def test_a_file_that_cannot_be_read_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("dim = = 3")
    (tmp_path / "latin.toml").write_bytes(b"# \xff")
    with pytest.raises(ConfigError, match=r"none\.toml does not exist; name a TOML file, e\.g\. configs/tiny\.toml"):
        load_config(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match=r"bad\.toml is not valid TOML: .*line 1.*; correct that place"):
        load_config(tmp_path / "bad.toml")
    for name in ("", "latin.toml"):
        with pytest.raises(ConfigError, match=r"cannot be read \(.*\); name a readable TOML file"):
            load_config(tmp_path / name)
